"""What an attempt to break the package came to: one line of the table that `make reliability` prints."""

from collections.abc import Sequence
from dataclasses import dataclass

from visattn import report


@dataclass(frozen=True)
class Figure:
    """What was tried, what came of it, and what should have: `right` is None where this machine cannot tell.

    details: every single attempt, as a table, where a reader would want to see them.
    """

    what: str
    figure: str
    wanted: str
    right: bool | None
    details: str = ""

    @property
    def verdict(self) -> str:
        return {True: "yes", False: "**no**", None: "not verified here"}[self.right]


def markdown(figures: Sequence[Figure]) -> str:
    """The table."""
    return report.markdown_table(
        ["what was tried", "figure", "wanted", "as wanted"],
        [[figure.what, figure.figure, figure.wanted, figure.verdict] for figure in figures],
    )
