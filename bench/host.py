"""What a call costs the host before a kernel runs: validation, dispatch, autograd and the start of each kernel.

The launch itself is replaced by nothing, and tensors on the CPU stand for those on a GPU, so that the host's work is all there is.
PyTorch's own operations, allocations, views and the small products behind the gradients of the weights, do run. On a GPU they
would only be queued; here they compute, which at 32 channels takes no time beside calling them. The cases with 32 channels
are therefore the ones to be held against the targets; those with more also contain arithmetic that is not the host's.

Where the time goes is found by recording the calls of one step with their arguments and timing each kind in isolation, in the
same rounds as the whole. A part that is repeated runs from warm caches, as it never does in a step: "colder caches" is the
time of all parts one after another less their sum. "Not explained" is the rest of the whole: the lines between the parts.

Triton's part of a start, as far as to the driver, is measured by itself, with a driver that starts nothing: there kernels are
compiled, and `kernels/launching.py` stands beside Triton's own `kernel[grid](...)`. What the driver takes, and the questions that only
a GPU can answer, such as making its device current, cannot be measured this way.
"""

import argparse
import dataclasses
import functools
import gc
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from visattn import device, files, kernels, report

from .environment import environment
from .host_parts import CASES, COLDER, MODES, Case, Step, asked_launches, parts_of, stubbed_launches, with_graph
from .stub_driver import stubbed_driver

TARGETS = {"forward": 20.0, "forward + backward": 60.0}
"""Microseconds a call."""

WHOLE, UNEXPLAINED = "whole", "not explained"
STARTS = "Start of a kernel, Triton's part included"
TRITON_S_START, OUR_START = "kernel[grid]", "launch"
ROUNDS = 200
BATCH = 200.0
"""Microseconds that a batch of calls takes: a small part of a scheduler's time slice."""


@dataclass(frozen=True)
class Row:
    """One figure: microseconds a call, and how often the part is called in it. What is a difference may fall below zero."""

    case: str
    mode: str
    part: str
    calls: int
    p20: float
    p50: float
    p80: float


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there as well")


@dataclass(frozen=True)
class Figures:
    """What was measured; where, as `environment` tells it; and how busy that machine was (load average over a minute)."""

    environment: dict[str, Any]
    load: float
    rows: list[Row]


def run(options: argparse.Namespace) -> int:
    figures = measure()
    print(markdown(figures))
    if options.json:
        write(options.json, figures)
    return 0


def write(path: Path, figures: Figures) -> None:
    files.write(path, json.dumps(dataclasses.asdict(figures), indent=1) + "\n")


def read(path: Path) -> Figures:
    """
    Raises:
        ValueError: the file is not one that `write` left.
    """
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        return Figures(told["environment"], told["load"], [Row(**row) for row in told["rows"]])
    except (TypeError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} does not hold figures of the host: {error}") from None


def measure(cases: Sequence[Case] = tuple(CASES), rounds: int = ROUNDS) -> Figures:
    """All figures of all cases.

    Raises:
        RuntimeError: TRITON_INTERPRET is set; then nothing is launched, and kernels run in Python.
    """
    if device.triton_is_interpreting():
        raise RuntimeError("host overhead is that of launches, which the interpreter has none of; unset TRITON_INTERPRET")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # memory that no kernel has filled may hold them, and they are slow
    try:
        load = os.getloadavg()[0]
        rows = [row for case in cases for mode in MODES for row in _measure_one(case, mode, rounds)]
        return Figures(environment(torch.device("cpu")), load, [_yardstick(rounds), *rows, *_starts(cases[0], rounds)])
    finally:
        torch.set_flush_denormal(False)
        torch.set_num_threads(threads)


def markdown(figures: Figures) -> str:
    """The wholes of all cases beside the targets, and the parts of the first two forms."""
    wholes, rows, place = [], figures.rows, figures.environment
    for row in rows:
        if row.part == WHOLE:
            target = f"{TARGETS[row.mode]:.0f}" if row.mode in TARGETS else ""
            wholes.append([row.case, row.mode, *(f"{value:.1f}" for value in (row.p20, row.p50, row.p80)), target])
    text = [
        f"Host overhead in µs a call, launches stubbed, CPU tensors in place of a GPU's; {place['device']}, torch {place['torch']}, "
        f"commit {place['commit']}, load {figures.load:.1f} before.\n",
        report.markdown_table(["case", "mode", "p20", "p50", "p80", "target"], wholes),
    ]
    for case in dict.fromkeys(row.case for row in rows if row.part == UNEXPLAINED):
        cells = {(row.part, row.mode): row for row in rows if row.case == case}
        lines = []
        parts = dict.fromkeys(part for part, _ in cells)
        for part in (*(part for part in parts if part not in (COLDER, UNEXPLAINED, WHOLE)), COLDER, UNEXPLAINED, WHOLE):
            found = [cells.get((part, mode)) for mode in MODES]
            lines.append([part, *("" if row is None else f"{row.p20:.1f} ({row.calls})" for row in found)])
        text.append(f"Where it goes, {case}: p20 of each part in µs (calls)\n\n" + report.markdown_table(["part", *MODES], lines))
    starts = {(row.part, row.mode): f"{row.p20:.1f}" for row in rows if row.case == STARTS}
    if starts:
        ways = (TRITON_S_START, OUR_START)
        lines = [[kernel, *(starts[kernel, way] for way in ways)] for kernel in dict.fromkeys(kernel for kernel, _ in starts)]
        text.append(f"{STARTS}: p20 in µs\n\n" + report.markdown_table(["kernel", *ways], lines))
    text.append("Not contained: what the driver takes to start a kernel, and questions that only a GPU can answer.")
    return "\n".join(text)


def _measure_one(case: Case, mode: str, rounds: int) -> list[Row]:
    step = Step(case, mode)
    whole = with_graph(step) if step.training else step
    with torch.no_grad():
        timed, counts = parts_of(step)
        timed[WHOLE] = [(1, whole)]
        batches = [(part, sign, _Batches(call)) for part, calls in timed.items() for sign, call in calls]
        with stubbed_launches(), _quiet():
            for _ in range(rounds):
                for _, _, batch in batches:
                    batch.time()
    figures = {part: torch.zeros(3, dtype=torch.float64) for part in timed}
    for part, sign, batch in batches:
        figures[part] += sign * torch.tensor(batch.percentiles(), dtype=torch.float64)
    total = figures.pop(WHOLE)
    figures[COLDER] -= sum(figures[part] for part in figures if part != COLDER)
    figures |= {UNEXPLAINED: total - sum(figures.values()), WHOLE: total}
    counts |= {UNEXPLAINED: 1, WHOLE: 1}
    return [Row(case.name, mode, part, counts[part], *values.tolist()) for part, values in figures.items()]


def _starts(case: Case, rounds: int) -> list[Row]:
    """Each kernel of a forward and backward pass, started by Triton alone and by `launch`, up to a driver that does nothing."""
    rows = []
    with torch.no_grad(), stubbed_driver(lambda _: None), _quiet():
        for kernel, grid, args, constants in asked_launches(case):
            ways = {
                TRITON_S_START: _Batches(functools.partial(kernel[grid], *args, **constants)),
                OUR_START: _Batches(functools.partial(kernels.launching.launch, kernel, *grid, constants, *args)),
            }
            for _ in range(rounds):
                for batch in ways.values():
                    batch.time()
            rows += [Row(STARTS, way, kernel.__name__, 1, *batch.percentiles()) for way, batch in ways.items()]
    return rows


def _yardstick(rounds: int) -> Row:
    """One allocation, to compare machines and loads by."""
    batches = _Batches(functools.partial(torch.empty_like, torch.empty(2, 32, 8, 8)))
    with _quiet():
        for _ in range(rounds):
            batches.time()
    return Row("yardstick", "torch.empty_like", WHOLE, 1, *batches.percentiles())


class _Batches:
    """Times a call in batches, so short that mostly nothing else gets the core meanwhile."""

    def __init__(self, call: Callable[[], object]) -> None:
        self._call = call
        self._calls = 0
        self._times: list[float] = []

    def time(self) -> None:
        if not self._calls:
            self._calls = 3
            self._calls = max(3, round(BATCH / min(self._batch() for _ in range(10))))
        self._times.append(self._batch())

    def _batch(self) -> float:
        """Microseconds a call; as many calls before the clock starts fill the caches."""
        call = self._call
        for _ in range(self._calls):
            call()
        start = time.perf_counter_ns()
        for _ in range(self._calls):
            call()
        return (time.perf_counter_ns() - start) / self._calls / 1e3

    def percentiles(self) -> tuple[float, float, float]:
        """p20, p50 and p80."""
        ordered = sorted(self._times)
        p20, p50, p80 = (ordered[round(share * (len(ordered) - 1))] for share in (0.2, 0.5, 0.8))
        return p20, p50, p80


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the garbage collector."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
