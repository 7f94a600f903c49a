"""`python -m bench run`: measures suites and keeps every row at once, so that a run that was stopped goes on where it was."""

import argparse
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from rich.console import Console

from visattn.device import chosen_device

from . import cases, environment, host, layers, model_steps, rows, timing
from .floors import measure_ceilings
from .providers import PROVIDERS
from .rows import HOST_FILE, Row

DEAD = os.EX_TEMPFAIL
"""75, the exit status after which the same command goes on where it was: the device is dead for this process, and why is in a row."""

SECONDS = {"cpu": {"full": 3.0, "quick": 0.8, "toy": 0.0}, "cuda": {"full": 0.12, "quick": 0.05, "toy": 0.0}}
"""Of each timing."""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--suite", nargs="+", choices=(*cases.SUITES, "all"), default=["all"], help="what to measure (default: all)")
    cases.add_case_argument(parser)
    parser.add_argument("--provider", nargs="+", choices=tuple(PROVIDERS), help="who is measured in layer suites (default: every one)")
    cases.add_size_arguments(parser)
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="folder of rows.jsonl (default: runs/bench)")
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: a GPU where there is one)")
    parser.add_argument("--seconds", type=float, help="of each timing (default: by device)")


def run(options: argparse.Namespace) -> int:
    """Returns 1 if visattn was wrong or could not run in any row of these suites, `DEAD` if the device has died, 0 otherwise."""
    device = chosen_device(options.device)
    suites = cases.SUITES if "all" in options.suite else options.suite
    chosen = cases.named(cases.suite_cases(suites, device.type, options.size), options.case)
    kept, console = rows.Rows(options.out / "rows.jsonl"), Console(highlight=False, soft_wrap=True)
    seconds = SECONDS[device.type][options.size] if options.seconds is None else options.seconds
    how = layers.How(device, seconds, options.size, measure_ceilings(device, options.size != "full"), environment.environment(device))
    console.print(f"{how.environment['device']}, commit {how.environment['commit']}; rows go to {kept.path}")
    names = options.provider or list(PROVIDERS)
    try:
        for row in _measured(chosen, names, kept, how):
            kept.add(row)
            console.print(in_words(row), markup=False)
    except timing.DeadDevice as error:
        console.print(f"the device is dead, run again: {error}", markup=False)
        return DEAD
    if "host" in suites:
        measured = host.measure(host.CASES[:1], rounds=3) if options.size == "toy" else host.measure()
        host.write(options.out / HOST_FILE, measured)
        console.print(host.markdown(measured), markup=False)
    return int(any(row.suite in suites and row.provider == "visattn" and row.state != rows.TIMED for row in kept.rows))


def _measured(chosen: Iterable[cases.Case | cases.ModelCase], names: list[str], kept: rows.Rows, how: layers.How) -> Iterator[Row]:
    """Every row that is not there yet."""

    def missing(case: cases.Case | cases.ModelCase, names: Iterable[str]) -> list[str]:
        return [name for name in names if not kept.has(case.suite, str(case), name, how.executions)]

    for case in chosen:
        if isinstance(case, cases.Case):
            if left := missing(case, names):
                yield from layers.measure_layer(case, left, how)
        elif left := missing(case, map(model_steps.provider, model_steps.kinds_of(case.model))):
            yield from model_steps.measure_model(case, left, how)


def in_words(row: Row) -> str:
    """A row as a line on the screen."""
    start = f"{row.case} | {row.provider}"
    if row.p50 is None:
        return f"{start}: {row.state}, {row.reason}"
    ratio = f", {row.ratio_p50:.2f}× naive ({row.ratio_p20:.2f} to {row.ratio_p80:.2f})" if row.ratio_p50 else ""
    share = f", {100 * row.share:.0f} % of the floor" if row.share else ""
    memory = f", {row.peak_bytes / 2**20:.0f} MiB" if row.peak_bytes is not None else ""
    return f"{start} on {row.backend}, {row.execution}: {row.p50 / 1000:.3f} ms{ratio}{share}{memory}"
