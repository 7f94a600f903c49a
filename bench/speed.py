"""The README's section on speed, from what is filed and from nothing else."""

from visattn.report import markdown_table

from . import summary
from .readme import Section
from .rows import RESULTS, TIMED, Row, read

SECTION = Section("speed", "python -m bench report")


def filed() -> dict[str, list[Row]]:
    """The rows of each device, by the name of its folder."""
    return {path.parent.name: read(path) for path in sorted(RESULTS.glob("*/rows.jsonl"))}


def section(devices: dict[str, list[Row]]) -> str:
    """For each device the layer's ratio to naive and to the best peer, and at the end what was not measured."""
    text = [_device(folder, rows) for folder, rows in devices.items()]
    return "\n".join([*text, f"Not measured: {'; '.join(_missing(devices)) or 'nothing'}.\n"])


def _device(folder: str, rows: list[Row]) -> str:
    first = rows[0]
    pairs = first.execution == "pairs"
    cells = []
    for suite in ("cifar", "large"):
        by_shape: dict[str, dict[str, summary.Line]] = {}
        for line in summary.lines(rows, suite):
            row = line.first
            form = "" if row.form == "attention" else f"{row.form} "
            by_shape.setdefault(f"{form}({', '.join(map(str, row.shape))}) {row.precision}", {})[row.mode] = line
        cells += [[name, *(_cell(modes.get(mode)) for mode in ("forward", "training"))] for name, modes in by_shape.items()]
    commits = ", ".join(f"`{commit}`" for commit in sorted({row.environment["commit"] for row in rows}))
    how = "in turn, pair by pair" if pairs else "by events, the L2 cache flushed"
    heading = (
        f"{first.environment['device']}, torch {first.environment.get('torch')}, commit {commits}, timed {how}, "
        f"`python -m bench run`; all rows, pictures and reasons in [bench/results/{folder}](bench/results/{folder}/report.md). "
        "Times as quick as naive attention (as the best peer):\n"
    )
    return heading + "\n" + markdown_table(["(N, C, H, W)", "forward", "forward + backward"], cells)


def _cell(line: summary.Line | None) -> str:
    row, naive = (line.rows.get(name) if line else None for name in ("visattn", "naive"))
    if line is None or row is None:
        return "–"
    if row.state != TIMED:
        return f"**{row.state}**"
    ratio, peer = line.ratio_to_naive("visattn"), line.best(summary.PEERS)
    against = f" ({line.ratio('visattn', peer):.2f}×)" if peer else ""
    return (f"{ratio:.2f}×" if ratio else f"naive {naive.state}" if naive else "naive not measured") + against


def _missing(devices: dict[str, list[Row]]) -> list[str]:
    missing = []
    if not any(row.execution == "eager" for rows in devices.values() for row in rows):
        missing.append("**anything on a GPU**, so no time, no memory figure and no bf16 result of the kernels")
    for folder, rows in devices.items():
        missing += [f"suite {suite} on {folder}" for suite in ("cifar", "large", "models") if not any(row.suite == suite for row in rows)]
    return missing
