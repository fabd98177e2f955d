"""Slows down whoever guesses passwords, without letting them lock anybody out for good.

Failures are counted per (name, address) and per address; there is no count per name alone, so that failures from one
place never keep the owner of the name out at another. Each further failure doubles the wait, up to a minute; the count
halves as time passes. In memory, of one process: with several workers an attacker gets that many times the tries.
"""

from __future__ import annotations

import ipaddress
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

FREE_FAILURES: Final = 5
"""Wrong passwords for one name from one address before the waits begin."""
FREE_ADDRESS_FAILURES: Final = 50
"""Wrong passwords for any names from one address before the waits begin: many people may share an address."""
MAX_WAIT_SECONDS: Final = 60.0
_HALVING_SECONDS: Final = 120.0
_MAX_KEYS: Final = 10_000


@dataclass(slots=True)
class _Count:
    failures: float
    at: float

    def now(self, now: float) -> float:
        return float(self.failures * 0.5 ** ((now - self.at) / _HALVING_SECONDS))


def network_of(address: str) -> str:
    """What counts as one address: an IPv4 address, or the /64 of an IPv6 one."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return address
    if parsed.version == 6:
        if parsed.ipv4_mapped is not None:
            return str(parsed.ipv4_mapped)
        return str(ipaddress.ip_network((parsed, 64), strict=False))
    return address


class Throttle:
    """Counts failed log-ins. Thread-safe as far as dict operations are; a lost count does no harm."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._counts: OrderedDict[tuple[str, str], _Count] = OrderedDict()

    def wait_seconds(self, name: str, address: str) -> float:
        """How long `name` must wait at `address` before the next try; 0 if it may try now."""
        network = network_of(address)
        return max(self._wait((name, network), FREE_FAILURES), self._wait(("", network), FREE_ADDRESS_FAILURES), 0.0)

    def _wait(self, key: tuple[str, str], free: int) -> float:
        count = self._counts.get(key)
        if count is None:
            return 0.0
        now = self._clock()
        # 1e-6: a failure that has aged by microseconds still counts whole
        beyond = count.now(now) + 1e-6 - free
        if beyond < 0:
            return 0.0
        return float(min(MAX_WAIT_SECONDS, 2.0 ** min(beyond, 10.0)) - (now - count.at))

    def failed(self, name: str, address: str) -> None:
        """Count a wrong password."""
        network = network_of(address)
        now = self._clock()
        for key in ((name, network), ("", network)):
            count = self._counts.get(key)
            self._counts[key] = _Count(1.0 if count is None else count.now(now) + 1.0, now)
            self._counts.move_to_end(key)
        while len(self._counts) > _MAX_KEYS:
            self._counts.popitem(last=False)

    def succeeded(self, name: str, address: str) -> None:
        """Forget the failures of `name` at `address`, and one of the address."""
        network = network_of(address)
        self._counts.pop((name, network), None)
        count = self._counts.get(("", network))
        if count is not None:
            now = self._clock()
            self._counts["", network] = _Count(max(0.0, count.now(now) - 1.0), now)
