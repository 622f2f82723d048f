"""Who is at the other end: the client's address, through the proxies that an operator trusts.

Invariants
  1. A header is believed only as far as trusted proxies wrote it: the address is the last one, seen from here, that
     none of them has. Whoever connects to us by himself is who he is, whatever he writes.
"""

from collections.abc import Iterable
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address

from aiohttp import web

FORWARDED_FOR = "X-Forwarded-For"


class TrustedProxies:
    """The proxies before one server."""

    def __init__(self, networks: Iterable[IPv4Network | IPv6Network]) -> None:
        self._networks = tuple(networks)

    def client_address(self, request: web.Request) -> str | None:
        """The IP address of who asks; None if it cannot be known."""
        peer = peer_of(request)
        address = None if peer is None else _parsed(peer)
        texts = ",".join(request.headers.getall(FORWARDED_FOR, [])).split(",")
        while address is not None and texts and self._trusts(address):
            text = texts.pop().strip()
            if not text:
                continue
            address = _parsed(text)
        return None if address is None else str(address)

    def _trusts(self, address: IPv4Address | IPv6Address) -> bool:
        return any(address in network for network in self._networks)


def peer_of(request: web.Request) -> str | None:
    """The address at the other end of the socket, never one from a header."""
    peer = None if request.transport is None else request.transport.get_extra_info("peername")
    return str(peer[0]) if isinstance(peer, tuple) else None


def _parsed(text: str) -> IPv4Address | IPv6Address | None:
    """An address, perhaps with a port; None for what is none."""
    if text.startswith("["):
        text = text[1:].partition("]")[0]
    elif text.count(":") == 1:
        text = text.partition(":")[0]
    try:
        address = ip_address(text.partition("%")[0])
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address
