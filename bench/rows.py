"""What was measured, a row each: how rows are kept, found again and filed."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from visattn import files

HOST_FILE = "host.json"
"""What the host's figures are called beside rows.jsonl."""

RESULTS = Path(__file__).resolve().parent / "results"

TIMED, WRONG, CANNOT_RUN = "timed", "wrong", "cannot run"


@dataclass(frozen=True)
class Row:
    """One provider on one case, run in one way.

    case: what was computed, as a sentence. execution: "pairs" (CPU, in turn with naive), "eager" (GPU, L2 flushed), "back to back"
    (GPU, no flush, the host's time included) or "graph" (replay of a CUDA graph). state: "timed"; "wrong", then it was not timed,
    and reason says how wrong; or "cannot run", and reason says why. Times in microseconds, ratios are naive's time over ours pair
    by pair, memory in bytes beyond what was held before. share: of the floor, 1 at the floor. clock and power of a GPU are asked once
    for all executions, after the first.
    """

    suite: str
    case: str
    provider: str
    execution: str
    form: str
    shape: list[int]
    dtype: str
    tf32: bool
    mode: str
    state: str
    reason: str | None = None
    backend: str | None = None
    p20: float | None = None
    p50: float | None = None
    p80: float | None = None
    ratio_p20: float | None = None
    ratio_p50: float | None = None
    ratio_p80: float | None = None
    peak_bytes: int | None = None
    errors: dict[str, float] = field(default_factory=dict)
    floor: float | None = None
    share: float | None = None
    size: str = "full"
    clock: float | None = None
    power: float | None = None
    environment: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> tuple[str, str, str, str]:
        return self.suite, self.case, self.provider, self.execution

    @property
    def precision(self) -> str:
        return self.dtype if self.dtype != "float32" else "tf32" if self.tf32 else "float32"


class Rows:
    """A file of rows, one JSON object a line, written anew with each row so that it is whole at any moment."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows = read(path) if path.exists() else []
        self._lines = {row.key: _line(row) for row in self.rows}  # each made once: a file has a thousand

    def has(self, suite: str, case: str, provider: str, executions: Iterable[str]) -> bool:
        """Whether the provider has been measured on the case: timed in each of these executions, or found wrong or unable."""
        found = {r.execution: r.state for r in self.rows if (r.suite, r.case, r.provider) == (suite, case, provider)}
        return set(executions) <= set(found) or any(state != TIMED for state in found.values())

    def add(self, *rows: Row) -> None:
        """Rows with the same key replace older ones."""
        keys = {row.key for row in rows}
        self.rows = [row for row in self.rows if row.key not in keys] + list(rows)
        self._lines = {key: line for key, line in self._lines.items() if key not in keys} | {row.key: _line(row) for row in rows}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        files.write(self.path, "".join(self._lines.values()))


def _line(row: Row) -> str:
    return json.dumps(asdict(row)) + "\n"


def read(path: Path) -> list[Row]:
    """
    Raises:
        ValueError: the file is not one of rows.
    """
    try:
        return [Row(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
    except (TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} does not hold rows of this suite: {error}") from None
