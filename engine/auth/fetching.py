"""Fetching the key set of an issuer over HTTP.

Invariants
  1. A fetch takes at most 5 seconds and 64 KiB, never leaves the configured scheme, host and port, and by default
     never reaches an address inside a private network.
  2. The address comes from the configuration only, never from a token.

Who fetches imports this, nobody else: an HTTP client takes 16 MB and a third of the time that `import engine` takes.
"""

import asyncio
import ipaddress
import socket

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

FETCH_SECONDS_MAX = 5.0
FETCH_SIZE_BYTES_MAX = 64 << 10
_REDIRECT_COUNT_MAX = 3


class FetchRefused(OSError):
    """An address or an answer that `fetch_key_set` does not accept."""


async def fetch_key_set(url: str, *, is_private_network_allowed: bool, seconds_max: float = FETCH_SECONDS_MAX) -> bytes:
    """The body at the address, within the bounds of invariant 1; raises `OSError`."""
    address = URL(url)
    resolver = None if is_private_network_allowed else _PublicResolver()
    connector = aiohttp.TCPConnector(resolver=resolver, limit=1, force_close=True)
    try:
        async with (
            asyncio.timeout(seconds_max),
            aiohttp.ClientSession(connector=connector, auto_decompress=False) as session,
        ):
            for _ in range(_REDIRECT_COUNT_MAX + 1):
                if not is_private_network_allowed:
                    _check_public_literal(address)
                async with session.get(
                    address,
                    allow_redirects=False,
                    headers={"Accept": "application/json", "Accept-Encoding": "identity"},
                ) as response:
                    if response.status not in (301, 302, 303, 307, 308):
                        return await _read_body(response)
                    address = _redirected(address, response.headers.get("Location", ""))
            raise FetchRefused(f"more than {_REDIRECT_COUNT_MAX} redirects")
    except TimeoutError as cause:
        raise FetchRefused(f"no answer within {seconds_max:g} s") from cause
    except aiohttp.ClientConnectorError as cause:
        raise FetchRefused(f"no connection: {cause.os_error}") from cause  # also what `_PublicResolver` refused
    except aiohttp.ClientError as cause:
        raise FetchRefused(f"{type(cause).__name__}: {cause}") from cause


async def _read_body(response: aiohttp.ClientResponse) -> bytes:
    if response.status != 200:
        raise FetchRefused(f"status {response.status}, expected 200")
    body = bytearray()
    async for part in response.content.iter_any():
        body += part
        if len(body) > FETCH_SIZE_BYTES_MAX:
            raise FetchRefused(f"more than {FETCH_SIZE_BYTES_MAX} bytes")
    return bytes(body)


def _redirected(address: URL, location: str) -> URL:
    try:
        target = address.join(URL(location))
        same_host = bool(location) and target.origin() == address.origin()
    except ValueError as cause:
        raise FetchRefused("a redirect without a usable address") from cause
    if not same_host:
        raise FetchRefused(f"a redirect to another host ({target.host})")
    return target


def _is_public(address: str) -> bool:
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address) and ip.ipv4_mapped is not None:
        ip = ip.ipv4_mapped
    return ip.is_global and not ip.is_multicast


def _check_public_literal(address: URL) -> None:
    """aiohttp asks no resolver about a host that is an address already."""
    try:
        is_public = _is_public(address.host or "")
    except ValueError:
        return  # a name: `_PublicResolver` looks at what it stands for
    if not is_public:
        raise FetchRefused(f"{address.host} is not a public address; set `jwks_private_network = true` to allow it")


class _PublicResolver(AbstractResolver):
    """Names, resolved; private addresses are refused after the look-up, so a name cannot be rebound in between."""

    def __init__(self) -> None:
        self._resolver = aiohttp.ThreadedResolver()

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        results = await self._resolver.resolve(host, port, family)
        public = [result for result in results if _is_public(result["host"])]
        if not public:
            raise FetchRefused(f"{host} is inside a private network; set `jwks_private_network = true` to allow it")
        return public

    async def close(self) -> None:
        await self._resolver.close()
