"""What one client address may do, once `[per_ip]` is set in `engine.toml`.

Invariants
  1. Without that table nobody is bounded; nobody on this machine ever is, nor who cannot be told apart. These have no
     name here (None), and nothing is counted of them.
  2. What is kept of addresses is bounded: past `_KEPT_COUNT_MAX` the one that came first goes, unless it is connected.

An address of IPv6 counts as its /64, which is what one customer has.
"""

from ipaddress import ip_address, ip_network

from aiohttp import web

from engine.clock import Clock
from engine.errors import Overloaded, RateLimited
from engine.limits import PerIp
from engine.server.proxies import TrustedProxies

_SECOND_MS, _MINUTE_MS = 1_000, 60_000
_KEPT_COUNT_MAX = 20_000


class _Window:
    """How often something happened since the first time; begins anew after its length."""

    __slots__ = ("count", "since")

    def __init__(self) -> None:
        self.count, self.since = 0, 0.0

    def add(self, now: float, length_ms: int) -> int:
        """How often it happened with this time."""
        if not self.count or now - self.since >= length_ms / 1000:
            self.count, self.since = 0, now
        self.count += 1
        return self.count


class _Address:
    __slots__ = ("arrivals", "connection_count", "failures", "refused_until")

    def __init__(self) -> None:
        self.connection_count = 0
        self.arrivals, self.failures = _Window(), _Window()
        self.refused_until = 0.0  # of its credentials


class Addresses:
    """Counts of one server."""

    def __init__(self, per_ip: PerIp | None, proxies: TrustedProxies, clock: Clock) -> None:
        self._per_ip, self._proxies, self._clock = per_ip, proxies, clock
        self._by_name: dict[str, _Address] = {}

    @property
    def are_bounded(self) -> bool:
        """Whether any address is."""
        return self._per_ip is not None

    def name_of(self, request: web.Request) -> str | None:
        """Whose counts this request goes to; None: nobody's (1)."""
        if self._per_ip is None:
            return None
        text = self._proxies.client_address(request)
        if text is None:
            return None
        address = ip_address(text)
        if address.is_loopback:
            return None
        return text if address.version == 4 else str(ip_network((address, 64), strict=False))

    def connect(self, name: str | None) -> None:
        """One more connection, until `disconnect`. Raises RateLimited, Overloaded."""
        per_ip = self._per_ip
        if name is None or per_ip is None:
            return
        address, now = self._address(name), self._clock.monotonic()
        if address.arrivals.add(now, _SECOND_MS) > per_ip.connection_rate_per_second:
            raise RateLimited(
                f"new connections of {name}",
                count=per_ip.connection_rate_per_second,
                per_ms=_SECOND_MS,
                retry_after_ms=_SECOND_MS,
            )
        if address.connection_count >= per_ip.connection_count_max:
            raise Overloaded(
                f"connections of {name}: {address.connection_count:,}, {per_ip.connection_count_max:,} allowed. "
                "Close some, or raise per_ip.connection_count_max."
            )
        address.connection_count += 1

    def disconnect(self, name: str | None) -> None:
        if name is not None:
            self._by_name[name].connection_count -= 1

    def check_credential(self, name: str | None) -> None:
        """Raises RateLimited while no credential of this address is looked at."""
        address = None if name is None else self._by_name.get(name)
        if address is None or self._per_ip is None:
            return
        rest_ms = int((address.refused_until - self._clock.monotonic()) * 1000)
        if rest_ms > 0:
            raise RateLimited(
                f"refused credentials of {name}",
                count=self._per_ip.authentication_failure_count_max,
                per_ms=_MINUTE_MS,
                retry_after_ms=rest_ms,
            )

    def credential_failed(self, name: str | None) -> None:
        if name is None or self._per_ip is None:
            return
        address, now = self._address(name), self._clock.monotonic()
        if address.failures.add(now, _MINUTE_MS) >= self._per_ip.authentication_failure_count_max:
            address.refused_until = now + self._per_ip.refusal_seconds

    def _address(self, name: str) -> _Address:
        address = self._by_name.get(name)
        if address is None:
            if len(self._by_name) >= _KEPT_COUNT_MAX:  # 2
                oldest = next((each for each, kept in self._by_name.items() if not kept.connection_count), None)
                if oldest is not None:
                    del self._by_name[oldest]
            address = self._by_name[name] = _Address()
        return address
