"""What the rows say: ratios, the best peer, the share of a floor. No numbers but those of the rows."""

from collections.abc import Iterable
from dataclasses import dataclass

from .providers import PROVIDERS
from .rows import TIMED, Row

OURS = ("visattn", "visattn_compiled")
PEERS = tuple(name for name in PROVIDERS if name not in ("naive", *OURS))
MAIN_EXECUTION = ("pairs", "eager")
"""What a table shows where a case was timed in several ways."""
REPLAY = "graph"


@dataclass(frozen=True)
class Line:
    """All providers' rows of one case in one execution; and, where it was timed, ours replayed as a graph."""

    case: str
    rows: dict[str, Row]
    replayed: Row | None = None

    @property
    def first(self) -> Row:
        return next(iter(self.rows.values()))

    def timed(self, provider: str) -> Row | None:
        row = self.rows.get(provider)
        return row if row and row.state == TIMED else None

    def ratio_to_naive(self, provider: str) -> float | None:
        """Naive's time over the provider's: pair by pair where they were timed so, else of the medians."""
        row, naive = self.timed(provider), self.timed("naive")
        if row is None or row.p50 is None:
            return None
        if row.ratio_p50 is not None:
            return row.ratio_p50
        return naive.p50 / row.p50 if naive and naive.p50 else None

    @property
    def closest_to_floor(self) -> Row | None:
        """The row that says what share of the floor visattn reaches: replayed where it was, since a short kernel waits for the host."""
        return self.replayed or self.timed("visattn")

    def best(self, providers: Iterable[str]) -> str | None:
        """The quickest of those that were timed."""
        timed = [(self._slowness(name), name) for name in providers if self.timed(name)]
        return min(timed)[1] if timed else None

    def ratio(self, provider: str, other: str) -> float:
        """The other's time over the provider's; both were timed."""
        return self._slowness(other) / self._slowness(provider)

    def _slowness(self, provider: str) -> float:
        """Time, in units of naive's where pairs give it."""
        row = self.rows[provider]
        assert row.p50 is not None
        return 1 / row.ratio_p50 if row.ratio_p50 else row.p50


def lines(rows: Iterable[Row], suite: str, executions: tuple[str, ...] = MAIN_EXECUTION) -> list[Line]:
    """The cases of a suite, in the order in which they were measured."""
    found: dict[str, dict[str, Row]] = {}
    replayed: dict[str, Row] = {}
    for row in rows:
        if row.suite == suite and row.execution in executions:
            found.setdefault(row.case, {})[row.provider] = row
        if (row.suite, row.execution, row.provider, row.state) == (suite, REPLAY, "visattn", TIMED):
            replayed[row.case] = row
    return [Line(case, by_provider, replayed.get(case)) for case, by_provider in found.items()]
