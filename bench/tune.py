"""`python -m bench tune`: block sizes by measurement, as text for `kernels/block_sizes.py`, which it never edits itself.

Each entry of the tables is measured by itself, the most important first, and is a row of a file as soon as it is there. Run again, it
goes on where it was; once the proposals have been pasted, it looks at the neighbours of the new sizes.
"""

import argparse
import hashlib
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from visattn import files, kernels
from visattn.device import chosen_device

from .ahead_of_time import DEVICES
from .candidates import BY_WEIGHT, CHANNELS, DTYPES, Entry, entries, neighbours, sizes_text, table_row, winner
from .providers import first_line
from .trial import Gpu, Machine, Rehearsal, Trial, Verdict

ROUNDS = 10  # of the case that ranks, an even number, so that its halves are as long
OTHER_ROUNDS = 3
COMPILES = 3  # of a rehearsal
TABLES = {"folded": "FOLDED_TABLE", "narrow": "PROJECTED_TABLE"}

Clock = Callable[[], float]


@dataclass(frozen=True)
class Row:
    """One entry measured on one device.

    cases: shapes of the maps, the first of which ranks. present, best: sizes as a table has them. candidates: of each its sizes,
    registers and bytes of shared memory, and either "reason", why it was not timed, or "times", the medians on each case in
    microseconds, and "rounds", all of those that rank. complete: False where time ran out before every candidate had its turn.
    reason: why the present configuration itself could not be measured. source: what the kernels were.
    state: the device's clocks, power and temperature right after.
    """

    form: str
    kernel: str
    dtype: str
    channels: int
    cases: list[str]
    present: str
    best: str
    candidates: list[dict[str, Any]]
    complete: bool
    reason: str | None
    source: str
    environment: dict[str, Any]
    state: dict[str, float | None] = field(default_factory=dict)

    @property
    def key(self) -> tuple[Any, ...]:
        return (self.form, self.kernel, self.dtype, self.channels, self.present, *identity(self.source, self.environment))

    def times(self, sizes: str) -> list[float]:
        return next(candidate["times"] for candidate in self.candidates if candidate["sizes"] == sizes)


def identity(source: str, environment: dict[str, Any]) -> tuple[Any, ...]:
    """What has to be the same for a row to hold still."""
    return (source, *(environment.get(name) for name in ("device", "torch", "triton")))


class Rows:
    """A file of rows, one JSON object a line, written anew with each row so that it is whole at any moment.

    Raises:
        ValueError: the file there is not one of rows.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[tuple[Any, ...], Row] = {}
        if path.exists():
            try:
                found = [Row(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
            except (TypeError, json.JSONDecodeError) as error:
                raise ValueError(f"{path} does not hold rows of this tool: {error}") from None
            self.rows = {row.key: row for row in found}

    def add(self, row: Row) -> None:
        self.rows[row.key] = row
        self.path.parent.mkdir(parents=True, exist_ok=True)
        files.write(self.path, "".join(json.dumps(asdict(row)) + "\n" for row in self.rows.values()))


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--minutes", type=float, default=8, help="no entry is begun, and no candidate compiled, later (default: 8)")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["bf16", "fp32-high", "fp32-highest"])
    parser.add_argument("--channels", nargs="+", type=int, choices=(16, *sorted(CHANNELS)), default=list(CHANNELS))
    parser.add_argument("--kernels", nargs="+", choices=BY_WEIGHT, default=list(BY_WEIGHT))
    parser.add_argument("--out", type=Path, default=Path("runs/tune"), help="folder of tune.jsonl (default: runs/tune)")
    parser.add_argument("--dry-run", action="store_true", help="a rehearsal without a GPU: times are made up, and filed as such")


def run(options: argparse.Namespace) -> int:
    """Returns 1 where a present configuration was wrong or did not run, 0 otherwise.

    Raises:
        RuntimeError: there is no GPU, and it is no rehearsal.
    """
    device = chosen_device(None)
    if not options.dry_run and device.type != "cuda":
        raise RuntimeError("block sizes are measured on a GPU, and there is none; --dry-run rehearses it")
    machine: Machine = Rehearsal(DEVICES["sm_90"], COMPILES) if options.dry_run else Gpu(device)
    chosen = list(entries(options.dtypes, options.channels, options.kernels))
    kept = Rows(options.out / "tune.jsonl")
    print(f"{machine.environment['device']}: {len(chosen)} entries; rows go to {kept.path}", flush=True)
    rows = tune(chosen, machine, kept, 60 * options.minutes)
    text = proposals(rows, machine)
    files.write(options.out / "proposals.txt", text + "\n")
    print(f"\n{text}")
    return int(any(row.reason for row in rows))


def tune(chosen: list[Entry], machine: Machine, kept: Rows, seconds: float, clock: Clock = time.monotonic) -> list[Row]:
    """The rows of all entries that are there, or can be measured in time."""
    end, source, rows = clock() + seconds, source_of_kernels(), []
    for entry in chosen:
        row = blank_row(entry, machine, source)
        found = kept.rows.get(row.key)
        if not (found and found.complete) and clock() < end:
            kept.add(found := measure(entry, machine, source, end, clock))
            print(f"{entry.form} {entry.channels} {in_words(found)}", flush=True)
        if found:
            rows.append(found)
    missing = len(chosen) - sum(row.complete or row.reason is not None for row in rows)
    if missing:
        print(f"No time left: {missing} of {len(chosen)} entries are not finished; run again for them.")
    return rows


def blank_row(entry: Entry, machine: Machine, source: str) -> Row:
    """The entry with nothing measured."""
    present = sizes_text(table_row(entry, machine.target(entry))[entry.kernel])
    cases = ["×".join(map(str, case.shape)) for case in entry.cases()]
    return Row(**asdict(entry), cases=cases, present=present, best=present, candidates=[], complete=False, reason=None,
               source=source, environment=machine.environment)  # fmt: skip


def measure(entry: Entry, machine: Machine, source: str, end: float, clock: Clock) -> Row:
    """Compiles and judges the present configuration and its neighbours until `end`, then times those that are right, in turn."""
    blank = blank_row(entry, machine, source)
    present = table_row(entry, machine.target(entry))[entry.kernel]
    try:
        trial = machine.open(entry)
    except Exception as error:
        return replace(blank, reason=f"{type(error).__name__}: {first_line(error)}")
    trial.compile([present])
    verdicts = {present: trial.judge(present, None)}
    if verdicts[present].reason:
        return replace(blank, reason=verdicts[present].reason)
    waiting = neighbours(entry, present)
    while waiting and clock() < end:
        some, waiting = waiting[: machine.workers], waiting[machine.workers :]
        trial.compile(some)
        verdicts |= {config: trial.judge(config, verdicts[present].errors) for config in some}
    rounds = timed_in_turn(trial, [config for config, verdict in verdicts.items() if verdict.reason is None], case=0, rounds=ROUNDS)
    times = {config: [statistics.median(found)] for config, found in rounds.items()}
    for case in range(1, len(entry.cases())):
        for config, found in timed_in_turn(trial, list(rounds), case, OTHER_ROUNDS).items():
            times[config].append(statistics.median(found))
    candidates = [candidate(config, verdict, times.get(config), rounds.get(config)) for config, verdict in verdicts.items()]
    best = sizes_text(winner(present, rounds))
    return replace(blank, best=best, candidates=candidates, complete=not waiting, state=machine.state())


def timed_in_turn(trial: Trial, configs: list[kernels.LaunchConfig], case: int, rounds: int) -> dict[kernels.LaunchConfig, list[float]]:
    """Microseconds of each in every round, so that whatever the device does meets all alike; every other round backwards."""
    times: dict[kernels.LaunchConfig, list[float]] = {config: [] for config in configs}
    for round_ in range(rounds):
        for config in configs[:: -1 if round_ % 2 else 1]:
            times[config].append(trial.time(config, case))
    return times


def candidate(config: kernels.LaunchConfig, verdict: Verdict, times: list[float] | None, rounds: list[float] | None) -> dict[str, Any]:
    """As a row keeps it."""
    found = {"sizes": sizes_text(config), "registers": verdict.registers, "shared_memory": verdict.shared_memory}
    return found | ({"reason": verdict.reason} if times is None else {"times": times, "rounds": rounds})


def source_of_kernels() -> str:
    """A digest of all device code and its launchers, but not of the table of sizes."""
    digest = hashlib.sha256()
    for path in sorted(Path(kernels.__file__).parent.glob("*.py")):
        if path.name != "block_sizes.py":
            digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def in_words(row: Row) -> str:
    """A row as a line."""
    start = f"{row.kernel}, {row.dtype}: {row.present}"
    if row.reason:
        return f"{start} cannot be measured: {row.reason}"
    before, after = row.times(row.present), row.times(row.best)
    stopped = "" if row.complete else ", stopped early"
    tried = f"{sum('times' in c for c in row.candidates)} of {len(row.candidates)} timed{stopped}"
    if row.best == row.present:
        return f"{start} stays, {before[0]:.1f} µs, {tried}"
    elsewhere = "".join(f", {case}: {b / a:.2f}×" for case, b, a in zip(row.cases[1:], before[1:], after[1:], strict=True))
    return f"{start} → {row.best}, {before[0]:.1f} → {after[0]:.1f} µs, {before[0] / after[0]:.2f}×{elsewhere}, {tried}"


def proposals(rows: list[Row], machine: Machine) -> str:
    """What the rows speak for, as text for the tables. Sizes that two dtypes of a class do not agree on stay as they are."""
    lines = [f"Measured on {machine.environment['device']}, triton {machine.environment['triton']}"]
    classes: dict[tuple[str, str, int], list[Row]] = {}
    for row in rows:
        classes.setdefault((row.form, entry_of(row).operands(machine.target(entry_of(row))), row.channels), []).append(row)
    for (form, operands, channels), measured in classes.items():
        entry = entry_of(measured[0])
        target = machine.target(entry)
        table = {kernel: sizes_text(config) for kernel, config in table_row(entry, target).items()}
        lines += ["", f'{TABLES[form]}["{target.architecture}", "{operands}"], {channels} channels']
        lines += [f"    {in_words(row)}" for row in measured]
        for kernel in table:
            best = {row.best for row in measured if row.kernel == kernel and not row.reason}
            if len(best) == 1:
                table[kernel] = best.pop()
            elif best:
                lines.append(f"    {kernel}: the dtypes do not agree, so that it stays")
        if any(table[row.kernel] != row.present for row in measured):
            *first, fourth, fifth = table.values()
            lines += [f"        {channels}: ({', '.join(first)},", f"              {fourth}, {fifth}),"]
    return "\n".join([*lines, "", "Other widths and layouts, and Blackwell, share these sizes: make test-all compiles them all."])


def entry_of(row: Row) -> Entry:
    return Entry(row.form, row.kernel, row.dtype, row.channels)
