"""Tables and pictures. Every file is written whole or not at all."""

import io
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def write(path: Path, content: str | bytes) -> None:
    """Writes a file beside its place and moves it there once it is complete."""
    data = content.encode() if isinstance(content, str) else content
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        try:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            os.chmod(file.name, 0o644)
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def loss_curves(path: Path, curves: dict[str, list[float]], title: str) -> None:
    """One line a run, thinner and lighter the earlier it is drawn, so that lines that coincide are all seen."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for i, (name, losses) in enumerate(curves.items()):
        last = i == len(curves) - 1
        axes.plot(range(1, len(losses) + 1), losses, label=name, linewidth=1.4 if last else 5, alpha=1.0 if last else 0.35)
    axes.set(xlabel="step", ylabel="training loss (cross-entropy)", title=title, yscale="log")
    axes.grid(alpha=0.3)
    axes.legend()
    _save(figure, path)


def attention_map(path: Path, image: Tensor, weights: Tensor, pixel: tuple[int, int], title: str) -> None:
    """An image (H, W), its chosen pixel, and over it the attention (H, W) of that pixel to every other."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes, heading in ((left, "image"), (right, "attention of the marked pixel")):
        axes.imshow(image, cmap="gray", interpolation="nearest")
        axes.plot(pixel[1], pixel[0], "x", color="red", markersize=11, markeredgewidth=2.5)
        axes.set(xticks=[], yticks=[], title=heading)
    heat = right.imshow(weights * weights.numel(), cmap="viridis", alpha=0.75, interpolation="nearest")
    figure.colorbar(heat, ax=right, label="weight × number of pixels (1 = uniform)")
    figure.suptitle(title)
    _save(figure, path)


def _save(figure: "Figure", path: Path) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    write(path, buffer.getvalue())
