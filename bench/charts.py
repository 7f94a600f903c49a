"""Pictures of rows."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from visattn.report import save

from .rows import Row
from .summary import OURS, Line

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLORS = {
    "naive": "tab:gray", "naive_compiled": "silver", "sdpa": "tab:orange", "sdpa_compiled": "navajowhite", "flex": "tab:green",
    "visattn": "tab:blue", "visattn_compiled": "lightskyblue", "queries": "tab:purple", "channel": "tab:brown", "no attention": "black",
}  # fmt: skip


def ratios(path: Path, lines: list[Line], title: str) -> None:
    """For each case a group of bars, one a provider: how many times quicker than naive, on a log axis."""
    from matplotlib.figure import Figure

    providers = [name for name in COLORS if any(line.timed(name) for line in lines) and name != "naive"]
    width = 0.8 / max(1, len(providers))
    figure = Figure(figsize=(max(7.0, 0.55 * len(lines) * max(1, len(providers)) ** 0.5 + 2), 4.8), layout="constrained")
    axes = figure.add_subplot()
    for i, name in enumerate(providers):
        places = [(place, ratio) for place, line in enumerate(lines) if (ratio := line.ratio_to_naive(name))]
        shifted = [place + (i - (len(providers) - 1) / 2) * width for place, _ in places]
        bars = axes.bar(shifted, [ratio - 1 for _, ratio in places], width, bottom=1, color=COLORS[name], label=name)
        axes.bar_label(bars, [f"{ratio:.2f}" for _, ratio in places], fontsize=6.5, padding=2, fontweight="bold" if name in OURS else None)
    axes.axhline(1, color=COLORS["naive"], linewidth=1.5, label="naive")
    axes.set(yscale="log", ylabel="times as quick as naive", xticks=range(len(lines)), title=title)
    axes.set_xticklabels([_short(line.first) for line in lines], rotation=35, ha="right", fontsize=8)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}×")
    axes.yaxis.set_minor_formatter(lambda value, _: f"{value:g}×" if value in (0.5, 2, 3, 5) else "")
    axes.grid(axis="y", which="both", alpha=0.25)
    axes.margins(y=0.1)
    figure.legend(*axes.get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=4)
    save(figure, path)


def over_length(path: Path, lines: list[Line], title: str) -> None:
    """Time and memory of one map against its number of pixels, both axes logarithmic, the floor drawn in."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    _against_length(left, lines, lambda row: row.p50 and row.p50 / 1000 / row.shape[0])
    _against_length(right, lines, lambda row: row.peak_bytes and row.peak_bytes / 2**20 / row.shape[0])
    floors = sorted(
        {(line.first.shape[2] * line.first.shape[3], line.first.floor / 1000 / line.first.shape[0]) for line in lines if line.first.floor}
    )
    left.plot(*zip(*floors, strict=True), "--", color="black", linewidth=1, label="floor")
    left.set(ylabel="milliseconds a map")
    right.set(ylabel="MiB a map, beyond what was held")
    for axes in (left, right):
        axes.set(xscale="log", yscale="log", xlabel="pixels (H·W)")
        axes.grid(which="both", alpha=0.2)
        axes.legend(fontsize=8)
    figure.suptitle(title)
    save(figure, path)


def steps(path: Path, lines: list[Line], title: str) -> None:
    """Each model with each kind of attention: where pairs were timed in percent of naive's time, else in milliseconds."""
    from matplotlib.figure import Figure

    providers = [name for name in COLORS if any(line.timed(name) for line in lines)]
    figure = Figure(figsize=(8, 1.2 + 0.28 * sum(len(line.rows) for line in lines)), layout="constrained")
    axes = figure.add_subplot()
    paired = any(row.ratio_p50 for line in lines for row in line.rows.values())
    lines = [line for line in lines if not paired or line.timed("naive")]
    place, ticks = 0.0, []
    for line in lines:
        start = place
        for name in providers:
            row = line.timed(name)
            if row and row.p50:
                ratio = line.ratio_to_naive(name)
                bar = axes.barh(place, 100 / (ratio or 1) if paired else row.p50 / 1000, 0.85, color=COLORS[name])
                axes.bar_label(bar, [name + (f", {ratio:.2f}× as quick" if ratio and name != "naive" else "")], fontsize=7, padding=3)
                place += 1
        ticks.append(((start + place - 1) / 2, _short(line.first)))
        place += 0.8
    axes.set(
        xlabel="% of naive's time" if paired else "milliseconds",
        yticks=[t for t, _ in ticks],
        yticklabels=[name for _, name in ticks],
        title=title,
    )
    axes.margins(x=0.25)
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    save(figure, path)


def _against_length(axes: "Axes", lines: list[Line], value: Callable[[Row], float | None]) -> None:
    for name in COLORS:
        points = []
        for line in lines:
            row = line.timed(name)
            if row and (height := value(row)):
                points.append((row.shape[2] * row.shape[3], height))
        if points:
            axes.plot(*zip(*sorted(points), strict=True), "o-", color=COLORS[name], label=name, markersize=4)


def _short(row: Row) -> str:
    """A case on an axis."""
    if row.suite == "models":
        return f"{row.form}\n{row.precision}"
    form = "" if row.form == "attention" else f" {row.form}"
    return f"{row.shape[1]}×{row.shape[2]}×{row.shape[3]}{form}\n{row.precision}"
