"""`python -m bench gallery`: whole models before and after `visattn.patch_model`, each in processes of its own, and the README's section.

Memory is what a step takes beyond what a process holds that has made the same step before; times are those of steps taken in
turn; results are compared with the unpatched model's. All of it on the CPU, with one thread.
"""

import argparse
import copy
import importlib.util
import json
import multiprocessing
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

import visattn
from visattn import files, provenance
from visattn.patching.families import BY_NAME

from . import cases, timing
from .environment import environment
from .gallery_models import EXAMPLES, Example, Result
from .readme import Section
from .rows import RESULTS

FILED = RESULTS / "gallery.json"
SECTION = Section("gallery", "python -m bench gallery --readme")
CPU = torch.device("cpu")
THREADS = 1
SECONDS = {"full": 20.0, "quick": 2.0, "toy": 0.0}
"""Of the timing of each model."""
MIN_PAIRS = 3

T = TypeVar("T")


@dataclass(frozen=True)
class Row:
    """One model before and after.

    bytes_*: of memory a step takes, None where the system does not tell. us_*: microseconds a step, the median. ratio_*: the time
    before over the time after, pair by pair. output_error: 2-norm of the difference over that of the unpatched output.
    gradient_error: the same of the gradient that is worst, None for a step without gradients. no_effect_*: the largest entry of a
    gradient that is zero but for rounding. report: what `patch_model` told. load: how busy the machine was (load average over a minute).
    """

    name: str
    size: str
    shape: list[int]
    bytes_before: int | None
    bytes_after: int | None
    us_before: float
    us_after: float
    ratio_p20: float
    ratio_p50: float
    ratio_p80: float
    output_error: float
    gradient_error: float | None
    no_effect_before: float | None
    no_effect_after: float | None
    report: str
    load: float
    command: str
    environment: dict[str, Any]


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=FILED, metavar="FILE", help="where rows go (default: bench/results/gallery.json)")
    parser.add_argument("--only", nargs="+", choices=tuple(EXAMPLES), default=tuple(EXAMPLES), metavar="NAME", help=", ".join(EXAMPLES))
    parser.add_argument("--readme", action="store_true", help="measure nothing; write the README's section from what is filed")
    cases.add_size_arguments(parser)


def run(options: argparse.Namespace) -> int:
    """
    Raises:
        ValueError: what is to be filed would be a quick look, or come from code that is not in a commit.
    """
    if options.readme:
        SECTION.write(section(read(FILED)))
        return 0
    filing = options.out.resolve() == FILED
    if filing:
        check_filing(options.size, provenance.commit())
    rows = {row.name: row for row in read(options.out)} if options.out.exists() else {}
    for name in options.only:
        example = EXAMPLES[name]
        if example.needs and importlib.util.find_spec(example.needs) is None:
            print(f"{name}: left out, {example.needs} is not installed")
            continue
        row = measure(example, options.size)
        if filing:
            check_filing(row.size, row.environment["commit"])
        print(f"{name}: {in_words(row)}", flush=True)
        rows[name] = row
        write(options.out, [rows[name] for name in EXAMPLES if name in rows])  # at once: a run that is stopped keeps what it has
    return 0


def check_filing(size: str, commit: str | None) -> None:
    """
    Raises:
        ValueError: such a row is for looking only.
    """
    if size != "full":
        raise ValueError("--quick and --toy are for looking only; give another --out")
    if commit is None or commit.endswith("+"):
        raise ValueError("the code is in no commit, or has been changed since; commit, then measure, or give another --out")


def write(path: Path, rows: Iterable[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write(path, json.dumps([asdict(row) for row in rows], indent=1) + "\n")


def read(path: Path) -> list[Row]:
    """
    Raises:
        ValueError: the file is not one that `write` left.
    """
    try:
        return [Row(**row) for row in json.loads(path.read_text(encoding="utf-8"))]
    except (TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} does not hold rows of the gallery: {error}") from None


def measure(example: Example, size: str) -> Row:
    """The row of one model. Three processes: one for each figure of memory, one for what is compared side by side."""
    before, after = (_in_own_process(_peak_bytes, example.name, size, patched) for patched in (False, True))
    return Row(
        example.name, size, list(example.shapes[size]), before, after, **_in_own_process(_side_by_side, example.name, size),
        command="python -m bench gallery",
    )  # fmt: skip


def _in_own_process(function: Callable[..., T], *arguments: object) -> T:
    with ProcessPoolExecutor(
        1, multiprocessing.get_context("spawn"), initializer=torch.set_num_threads, initargs=(THREADS,)
    ) as pool:  # fmt: skip
        return pool.submit(function, *arguments).result()


def _made(example: Example, size: str) -> tuple[nn.Module, Tensor]:
    """The model and its input, the same in every process."""
    torch.manual_seed(0)
    return example.make(), torch.randn(example.shapes[size])


def _peak_bytes(name: str, size: str, patched: bool) -> int | None:
    example = EXAMPLES[name]
    model, x = _made(example, size)
    if patched:
        visattn.patch_model(model, attention_maps=example.attention_maps)
    return timing.peak_bytes(lambda: example.step(model, x), CPU)


def _side_by_side(name: str, size: str) -> dict[str, Any]:
    """What a row says of times and results."""
    example, load = EXAMPLES[name], os.getloadavg()[0]
    before, x = _made(example, size)
    after = copy.deepcopy(before)
    report = visattn.patch_model(after, attention_maps=example.attention_maps)
    results: dict[nn.Module, Result] = {}

    def step(model: nn.Module) -> None:
        results[model] = example.step(model, x)

    in_turn = timing.pairs(lambda: step(after), lambda: step(before), SECONDS[size], MIN_PAIRS)
    assert in_turn.ratio_p50 is not None
    return _compared(example, results[before], results[after]) | {
        "us_before": in_turn.p50 * in_turn.ratio_p50,
        "us_after": in_turn.p50,
        "ratio_p20": in_turn.ratio_p20,
        "ratio_p50": in_turn.ratio_p50,
        "ratio_p80": in_turn.ratio_p80,
        "report": str(report),
        "load": load,
        "environment": environment(CPU),
    }


def _compared(example: Example, before: Result, after: Result) -> dict[str, float | None]:
    """How far apart two results are. A gradient that is not there is zero."""
    given = {name: after.gradients.get(name, torch.zeros_like(gradient)) for name, gradient in before.gradients.items()}
    errors = [_error(given[name], gradient) for name, gradient in before.gradients.items() if name != example.no_effect]
    no_effect = [float(gradients[example.no_effect].abs().max()) if example.no_effect else None for gradients in (before.gradients, given)]
    return {
        "output_error": _error(after.output, before.output),
        "gradient_error": max(errors, default=None),
        "no_effect_before": no_effect[0],
        "no_effect_after": no_effect[1],
    }


def _error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def section(rows: list[Row]) -> str:
    """The README's section: each model's code and figures, a report, the families of blocks, and what was not measured."""
    text = [_shown(EXAMPLES[row.name], row) for row in rows]
    text += [f"The report that `patch_model` returned for the first, printed:\n\n```\n{rows[0].report}\n```\n"] if rows else []
    text += [f"Recognised are the blocks of {'; '.join(BY_NAME)}.\n"]
    sources = sorted({f"{e['device']}, torch {e['torch']}, commit `{e['commit']}`" for e in (row.environment for row in rows)})
    if sources:
        busy = f"load average {min(row.load for row in rows):.1f} to {max(row.load for row in rows):.1f}"
        text += [
            f"Measured: {'; '.join(sources)}, float32, {busy}, `python -m bench gallery`. Memory is the peak of a step beyond what a "
            "process holds that has made it before; steps before and after are timed in turn, and in brackets is how many times as quick "
            "(median, 20 % and 80 % of the pairs). Differences are relative 2-norms against the model before, of the gradient that is "
            "worst.\n"
        ]
    missing = [f"`{name}`" for name in EXAMPLES if name not in {row.name for row in rows}]
    text += [
        "Not measured: GPUs; half precision; whole networks, since in these little stands around attention, and what does takes the same "
        f"before and after{''.join(f'; {name}' for name in missing)}.\n"
    ]
    return "\n".join(text)


def _shown(example: Example, row: Row) -> str:
    return f"**{example.title}** ({example.note}):\n\n```python\n{example.code}\n```\n\n{in_words(row)}\n"


def in_words(row: Row) -> str:
    """The figures of a row as a sentence."""
    memory = f"**{_mebibytes(row.bytes_before)} → {_mebibytes(row.bytes_after)} MiB**, "
    times = f"{row.us_before / 1e6:.2g} → {row.us_after / 1e6:.2g} s ({row.ratio_p50:.2f}×, {row.ratio_p20:.2f} to {row.ratio_p80:.2f})"
    apart = f"; output equal to {row.output_error:.0e}"
    if row.gradient_error is not None:
        apart += f", gradients to {row.gradient_error:.0e}"
    if row.no_effect_before is not None:
        now = f"{row.no_effect_after:.0e}" if row.no_effect_after else "0"
        apart += f". The gradient of the key's bias, zero in exact arithmetic, is {now} (before: {row.no_effect_before:.0e})"
    return f"{memory}{times}{apart}."


def _mebibytes(count: int | None) -> str:
    return "–" if count is None else f"{count / 2**20:.0f}"
