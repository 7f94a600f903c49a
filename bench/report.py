"""`python -m bench report`: tables and pictures from rows, and the README's section from what is filed; from nothing else."""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from visattn import files
from visattn.report import markdown_table

from . import charts, host, speed, summary, targets
from .environment import slug
from .rows import HOST_FILE, RESULTS, TIMED, Row, Rows, read

MODES = {"forward": "forward, no gradients", "training": "forward and backward"}


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folder", nargs="?", type=Path, help="a folder with rows.jsonl; without it all that is filed, and the README's section"
    )


def configure_import(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, help="a folder with rows.jsonl, as `python -m bench run` leaves it")


def run(options: argparse.Namespace) -> int:
    if options.folder:
        write(read(options.folder / "rows.jsonl"), options.folder)
        print(f"written to {options.folder}: report.md and its pictures")
        return 0
    for folder in sorted({path.parent for name in ("rows.jsonl", HOST_FILE) for path in RESULTS.glob(f"*/{name}")}):
        write(read(folder / "rows.jsonl") if (folder / "rows.jsonl").exists() else [], folder)
        print(f"written to bench/results/{folder.name}: report.md and its pictures")
    speed.SECTION.write(speed.section(speed.filed()))
    return 0


def run_import(options: argparse.Namespace) -> int:
    """Files rows, and the host's figures where there are some, under the name of their device.

    Raises:
        FileNotFoundError: there is neither.
        ValueError: some are quick ones, or come from code that is not in a commit; nothing is filed then.
    """
    host_file = options.folder / HOST_FILE
    figures = [host.read(host_file)] if host_file.exists() else []
    rows = [] if figures and not (options.folder / "rows.jsonl").exists() else read(options.folder / "rows.jsonl")
    environments = [row.environment for row in rows] + [measured.environment for measured in figures]
    quick = [row for row in rows if row.size != "full"]
    unnamed = [e for e in environments if not e.get("commit") or e["commit"].endswith("+")]
    if quick:
        raise ValueError(f"{len(quick)} of {len(rows)} rows were measured with --quick or --toy, which are for looking only; run without")
    if unnamed:
        raise ValueError(f"{len(unnamed)} of {len(environments)} rows come from no commit, or from one changed since; commit, then measure")
    for device in sorted({e["device"] for e in environments}):
        folder = RESULTS / slug(device)
        folder.mkdir(parents=True, exist_ok=True)
        of_device = [row for row in rows if row.environment["device"] == device]
        if of_device:
            Rows(folder / "rows.jsonl").add(*of_device)
        for measured in figures:
            if measured.environment["device"] == device:
                host.write(folder / HOST_FILE, measured)
        print(f"filed under bench/results/{folder.name}")
    return 0


def write(rows: list[Row], folder: Path) -> None:
    """report.md and the pictures that it shows, of rows, of the host's figures in the folder, or of both."""
    files.write(folder / "report.md", "\n".join(_report(rows, folder)))


def _report(rows: list[Row], folder: Path) -> Iterator[str]:
    on_host = host.read(folder / HOST_FILE) if (folder / HOST_FILE).exists() else None
    environments = [row.environment for row in rows] + ([on_host.environment] if on_host else [])
    yield f"# {environments[0]['device']}\n"
    if rows:
        yield from _of_layers_and_models(rows, folder)
    if on_host:
        yield f"## What a call costs the host\n\n{host.markdown(on_host)}\n"
    if rows:
        yield from _not_timed(rows)


def _of_layers_and_models(rows: list[Row], folder: Path) -> Iterator[str]:
    if any(row.size != "full" for row in rows):
        yield "A quick look: few shapes, small batches, short timings.\n"
    yield "Measured: " + "; ".join(_environments(rows)) + ".\n"
    yield from _targets(rows)
    for suite, title in (("cifar", "The layer at the sizes of the CIFAR models"), ("large", "Large maps")):
        for mode, mode_title in MODES.items():
            lines = [line for line in summary.lines(rows, suite) if line.first.mode == mode]
            if lines:
                picture = f"{suite}-{mode}.png"
                charts.ratios(folder / picture, lines, f"{title}: {mode_title}")
                yield f"## {title}: {mode_title}\n\n![ratios]({picture})\n\n{layer_table(lines)}"
    yield from _lengths(rows, folder)
    yield from _models(rows, folder)
    yield from _other_executions(rows)


def _targets(rows: list[Row]) -> Iterator[str]:
    device_type = "cpu" if any(row.execution == "pairs" for row in rows) else "cuda"
    cells = [[v.target, "–" if v.figure is None else f"{v.figure:.2f}", v.in_words] for v in targets.verdicts(rows, device_type)]
    yield f"## Targets\n\n{markdown_table(['target', 'measured', ''], cells)}"


def layer_table(lines: list[summary.Line]) -> str:
    """A line a case: each provider's time and ratio to naive, then ours against the best peer, the floor, and memory."""
    providers = [name for name in summary.PROVIDERS if any(name in line.rows for line in lines)]
    cells = []
    for line in lines:
        ours, peer = line.timed("visattn"), line.best(summary.PEERS)
        cells.append([
            _name(line.first),
            *(_time(line, name) for name in providers),
            f"{line.ratio('visattn', peer):.2f}× {peer}" if ours and peer else "–",
            _share(line.closest_to_floor),
            _memory(line),
        ])  # fmt: skip
    return markdown_table(["(N, C, H, W)", *providers, "visattn against the best peer", "of the floor", "memory, naive → visattn"], cells)


def _share(row: Row | None) -> str:
    if row is None or not row.share:
        return "–"
    return f"{100 * row.share:.0f} %" + ", replayed" * (row.execution == summary.REPLAY)


def _time(line: summary.Line, name: str) -> str:
    row = line.rows.get(name)
    if row is None or row.p50 is None:
        return "–" if row is None else row.state
    ratio = line.ratio_to_naive(name)
    time = f"{row.p50:.0f} µs" if row.p50 < 10_000 else f"{row.p50 / 1000:.0f} ms"
    if row.ratio_p50 is not None:
        return f"{ratio:.2f}× ({row.ratio_p20:.2f}–{row.ratio_p80:.2f}), {time}"
    return time + (f", {ratio:.2f}×" if ratio and name != "naive" else "")


def _memory(line: summary.Line) -> str:
    def mebibytes(name: str) -> str:
        row = line.timed(name)
        return "–" if row is None or row.peak_bytes is None else f"{row.peak_bytes / 2**20:.0f}"

    return f"{mebibytes('naive')} → {mebibytes('visattn')} MiB"


def _lengths(rows: list[Row], folder: Path) -> Iterator[str]:
    """Time and memory against the number of pixels, for 64 channels in each precision that was measured at several sizes."""
    lines = [line for suite in ("cifar", "large") for line in summary.lines(rows, suite)]
    for mode, mode_title in MODES.items():
        for precision in ("float32", "bfloat16"):
            chosen = [
                x for x in lines if (x.first.form, x.first.shape[1], x.first.mode, x.first.precision) == ("attention", 64, mode, precision)
            ]
            if len({line.first.shape[2] for line in chosen}) > 1:
                picture = f"length-{mode}-{precision}.png"
                charts.over_length(folder / picture, chosen, f"64 channels, {precision}, {mode_title}")
                yield f"![time and memory against the number of pixels]({picture})\n"


def _models(rows: list[Row], folder: Path) -> Iterator[str]:
    for mode, mode_title in {"forward": "forward pass", "training": "training step"}.items():
        lines = [line for line in summary.lines(rows, "models") if line.first.mode == mode]
        if not lines:
            continue
        charts.steps(folder / f"models-{mode}.png", lines, f"CIFAR models: {mode_title}")
        cells = [[f"{line.first.form}, {line.first.shape[0]} images, {line.first.precision}", name, _time(line, name), _peak(row)]
                 for line in lines for name, row in line.rows.items()]  # fmt: skip
        table = markdown_table(["model", "attention", "time, and how many times as quick as naive", "memory"], cells)
        yield f"## CIFAR models: {mode_title}\n\n![models](models-{mode}.png)\n\n{table}"


def _peak(row: Row) -> str:
    return "–" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:.0f} MiB"


def _other_executions(rows: list[Row]) -> Iterator[str]:
    for execution, title in (
        ("back to back", "One call after another, the host's time included"),
        (summary.REPLAY, "Replayed as a CUDA graph"),
    ):
        for mode, mode_title in MODES.items():
            lines = [line for line in summary.lines(rows, "cifar", (execution,)) if line.first.mode == mode]
            if lines:
                yield f"## {title}: {mode_title}\n\n{layer_table(lines)}"


def _not_timed(rows: list[Row]) -> Iterator[str]:
    """Who could not run, or was wrong, and why; the same reason once."""
    reasons: dict[tuple[str, str, str], list[str]] = {}
    for row in rows:
        if row.state != TIMED:
            reasons.setdefault((row.provider, row.state, row.reason or ""), []).append(f"{_name(row)} {row.mode}")
    if reasons:
        cells = [[provider, state, ", ".join(where), reason.replace("|", "\\|")] for (provider, state, reason), where in reasons.items()]
        yield f"## Not timed\n\n{markdown_table(['provider', '', 'cases', 'reason'], cells)}"


def _name(row: Row) -> str:
    form = "" if row.form == "attention" else f"{row.form} "
    return f"{form}({', '.join(map(str, row.shape))}) {row.precision}"


def _environments(rows: list[Row]) -> list[str]:
    """What the rows were measured with, each combination once."""
    told = ("torch", "triton", "driver", "commit")
    found = {json.dumps({name: row.environment.get(name) for name in told}) for row in rows}
    return [", ".join(f"{name} {value}" for name, value in json.loads(text).items() if value) for text in sorted(found)]
