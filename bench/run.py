"""`python -m bench run`: measures suites and keeps every row at once, so that a run that was stopped goes on where it was."""

import argparse
from collections.abc import Iterable, Iterator
from pathlib import Path

from rich.console import Console

from visattn.device import chosen_device

from . import cases, environment, host, layers, model_steps, rows
from .floors import measure_ceilings
from .providers import PROVIDERS
from .rows import HOST_FILE, Row

SECONDS = {"cpu": {"full": 3.0, "quick": 0.8, "toy": 0.0}, "cuda": {"full": 0.12, "quick": 0.05, "toy": 0.0}}
"""Of each timing."""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--suite", nargs="+", choices=(*cases.SUITES, "all"), default=["all"], help="what to measure (default: all)")
    parser.add_argument("--provider", nargs="+", choices=tuple(PROVIDERS), help="who is measured in layer suites (default: every one)")
    cases.add_size_arguments(parser)
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="folder of rows.jsonl (default: runs/bench)")
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: a GPU where there is one)")
    parser.add_argument("--seconds", type=float, help="of each timing (default: by device)")


def run(options: argparse.Namespace) -> int:
    """Returns 1 if visattn was wrong or could not run, 0 otherwise."""
    device = chosen_device(options.device)
    suites = cases.SUITES if "all" in options.suite else options.suite
    kept, console = rows.Rows(options.out / "rows.jsonl"), Console(highlight=False, soft_wrap=True)
    seconds = SECONDS[device.type][options.size] if options.seconds is None else options.seconds
    how = layers.How(device, seconds, options.size, measure_ceilings(device, options.size != "full"), environment.environment(device))
    console.print(f"{how.environment['device']}, commit {how.environment['commit']}; rows go to {kept.path}")
    names = options.provider or list(PROVIDERS)
    ours_failed = False
    for row in _measured(suites, names, kept, how):
        kept.add(row)
        console.print(in_words(row), markup=False)
        ours_failed |= row.provider == "visattn" and row.state != rows.TIMED
    if "host" in suites:
        measured = host.measure(host.CASES[:1], rounds=3) if options.size == "toy" else host.measure()
        host.write(options.out / HOST_FILE, measured)
        console.print(host.markdown(measured), markup=False)
    return int(ours_failed)


def _measured(suites: Iterable[str], names: list[str], kept: rows.Rows, how: layers.How) -> Iterator[Row]:
    """Every row that is not there yet."""
    for suite in suites:
        if suite in cases.LAYER_SUITES:
            for case in cases.layer_cases(suite, how.device.type, how.size):
                missing = [name for name in names if not kept.has(suite, str(case), name)]
                if missing:
                    yield from layers.measure_layer(case, missing, how)
        elif suite == "models":
            for model_case in cases.model_cases(how.device.type, how.size):
                if not kept.has(suite, str(model_case)):
                    yield from model_steps.measure_model(model_case, how)


def in_words(row: Row) -> str:
    """A row as a line on the screen."""
    start = f"{row.case} | {row.provider}"
    if row.p50 is None:
        return f"{start}: {row.state}, {row.reason}"
    ratio = f", {row.ratio_p50:.2f}× naive ({row.ratio_p20:.2f} to {row.ratio_p80:.2f})" if row.ratio_p50 else ""
    share = f", {100 * row.share:.0f} % of the floor" if row.share else ""
    memory = f", {row.peak_bytes / 2**20:.0f} MiB" if row.peak_bytes is not None else ""
    return f"{start} on {row.backend}, {row.execution}: {row.p50 / 1000:.3f} ms{ratio}{share}{memory}"
