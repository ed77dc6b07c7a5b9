"""A gateway's copy of one agent's prefix log. Each report adds what has changed since the version it has."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

from ..prefix_sketch import MAX_ENTRIES, Prefix, PrefixReport


class PrefixMirror:
    """A gateway's copy of one agent's log."""

    def __init__(self) -> None:
        self.incarnation = ""
        self.version = 0
        self._used: OrderedDict[int, int] = OrderedDict()  # hash -> version

    def __contains__(self, entry: object) -> bool:
        return entry in self._used

    def __len__(self) -> int:
        return len(self._used)

    def __iter__(self) -> Iterator[int]:
        return iter(self._used)

    def update(self, report: PrefixReport) -> None:
        """Take over a report that was asked for with this mirror's version and incarnation.

        ValueError if it has a hash that is none.
        """
        if report.incarnation != self.incarnation:
            self._used.clear()  # versions of another incarnation cannot be compared
            self.incarnation = report.incarnation
        for use in report.uses:
            for text in use.hashes:
                self._use(int(text, 16), use.version)
        self.version = report.version
        self._forget_before(report.oldest)

    def expect(self, prefix: Prefix) -> None:
        """A request has just been sent there: its prefix will be cached before the agent reports it."""
        for entry in prefix.hashes:
            self._use(entry, self.version + 1)
        while len(self._used) > 2 * MAX_ENTRIES:
            self._forget_before(next(iter(self._used.values())) + 1)

    def _forget_before(self, version: int) -> None:
        while self._used and next(iter(self._used.values())) < version:
            self._used.popitem(last=False)

    def _use(self, entry: int, version: int) -> None:
        self._used[entry] = version
        self._used.move_to_end(entry)
