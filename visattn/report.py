"""Tables and pictures."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import files

if TYPE_CHECKING:
    from matplotlib.figure import Figure


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
    save(figure, path)


def training_curves(path: Path, metrics: list[dict[str, Any]], steps_an_epoch: int, title: str) -> None:
    """The loss of every step and the mean of each epoch, and beside it the accuracy on the validation images if there are any."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    losses = [loss for line in metrics for loss in line["losses"]]
    epochs = [line for line in metrics if "epoch_loss" in line]
    validated = [line for line in metrics if "validation_accuracy" in line]

    figure = Figure(figsize=(10 if validated else 6, 4), layout="constrained")
    left, *right = figure.subplots(1, 2 if validated else 1, squeeze=False)[0]
    left.plot([(step + 1) / steps_an_epoch for step in range(len(losses))], losses, linewidth=0.7, alpha=0.5, label="each step")
    left.plot([line["epoch"] for line in epochs], [line["epoch_loss"] for line in epochs], "o-", label="mean of the epoch")
    left.set(xlabel="epoch", ylabel="training loss (cross-entropy)")
    left.legend()
    if validated:
        places = [line["epoch"] - 1 + line["step"] / steps_an_epoch for line in validated]
        accuracies = [100 * line["validation_accuracy"] for line in validated]
        right[0].plot(places, accuracies, ".-", color="tab:green")
        right[0].set(xlabel="epoch", ylabel="accuracy on validation images (%)")
    for axes in figure.axes:
        axes.set_xlim(0, epochs[-1]["epoch"] * 1.02)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
    figure.suptitle(title)
    save(figure, path)


def confusion(path: Path, matrix: Tensor, classes: Sequence[str], title: str) -> None:
    """Rows are the classes of the images, columns what the model took them for; each row in percent of its images."""
    from matplotlib.figure import Figure

    columns = list(classes)
    if matrix[:, len(classes) :].any():
        columns.append("none of them")
    shown = matrix[:, : len(classes)]
    if len(columns) > len(classes):
        shown = torch.cat((shown, matrix[:, len(classes) :].sum(1, keepdim=True)), 1)
    share = 100 * shown / matrix.sum(1, keepdim=True).clamp(min=1)
    size = max(4.5, 0.6 * len(columns) + 2)
    figure = Figure(figsize=(size + 0.8, size), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(share, cmap="Blues", vmin=0, vmax=100)
    for row, values in enumerate(share.tolist()):
        for column, value in enumerate(values):
            axes.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=8, color="white" if value > 55 else "black")
    axes.set(xlabel="taken for", ylabel="class of the image", xticks=range(len(columns)), yticks=range(len(classes)))
    axes.set_xticklabels(columns, rotation=45, ha="right", parse_math=False)  # a folder may have $ in its name
    axes.set_yticklabels(classes, parse_math=False)
    axes.set_title(title, fontsize=10)
    figure.colorbar(image, ax=axes, label="% of the class", shrink=0.8)
    save(figure, path)


def training_report(result: dict[str, Any], title: str) -> str:
    """One run in Markdown: what came out, what it was trained with, where."""

    def percent(value: float | None) -> str:
        return "none held back" if value is None else f"{100 * value:.2f} %"

    losses = result["epoch_losses"]
    outcome = [
        ["test accuracy", percent(result["test_accuracy"]) + f", {result['tested']} weights"],
        [
            "test accuracy, last weights / best weights",
            f"{percent(result['test_accuracy_last'])} / {percent(result['test_accuracy_best'])}",
        ],
        ["best validation accuracy", percent(result["validation_accuracy_best"])],
        ["mean loss, first → last epoch", f"{losses[0]:.4f} → {losses[-1]:.4f}"],
        ["parameters", f"{result['parameters']:,}"],
        ["time an epoch", f"{result['seconds_an_epoch']:.1f} s, {100 * result['share_of_time_for_data']:.1f} % of it for data"],
        ["attention layers", "<br>".join(result["paths"]) or "matrix products of PyTorch, or none"],
        ["processor", result["processor"]],
        ["versions", ", ".join(f"{name} {version}" for name, version in result["versions"].items())],
    ]
    asked = ("model", "attention", "data", "train_images", "validation_images", "test_images", "epochs", "batch_size",
             "learning_rate", "betas", "seed", "precision", "backend", "compile", "device", "processes")  # fmt: skip
    settings = [[name.replace("_", " "), str(result[name])] for name in asked]
    return (
        f"# {title}\n\n{markdown_table(['result', ''], outcome)}\n{markdown_table(['setting', ''], settings)}\n"
        "![loss and accuracy](curves.png)\n\n![confusion matrix](confusion.png)\n"
    )


def attention_maps(path: Path | str, image: Tensor, weights: Tensor, pixels: Sequence[tuple[int, int]], title: str) -> None:
    """Draws an image, and over it the attention of each chosen pixel of a map that lies over the whole image, into a PNG file.

    Args:
        path: the file, in a folder that exists.
        image: (1, H, W) or (3, H, W), uint8, or floating between 0 and 1.
        weights: (P, h, w), one image's part of `visattn.attention_rows`, any floating dtype and device.
        pixels: P pairs (row, column) of the h × w map.
        title: a line above.

    Raises:
        ValueError: the shapes do not fit together; nothing is written.
    """
    from matplotlib.figure import Figure

    if image.dim() != 3 or image.shape[0] not in (1, 3):
        raise ValueError(f"image must be (1, H, W) or (3, H, W), got {tuple(image.shape)}; take one image of a batch")
    if weights.dim() != 3 or len(weights) != len(pixels) or not len(pixels):
        raise ValueError(
            f"weights must be (P, h, w) for the P chosen pixels, got {tuple(weights.shape)} for {len(pixels)}; "
            "of what attention_rows returns, take one image's part"
        )
    weights = weights.detach().to("cpu", torch.float32)
    height, width = image.shape[1:]
    figure = Figure(figsize=(3.2 * (len(pixels) + 1) + 1, 3.9), layout="constrained")
    first, *others = figure.subplots(1, len(pixels) + 1)
    scale = height / weights.shape[1], width / weights.shape[2]
    most = weights.max().item() * weights[0].numel()
    for axes, map_, (row, column) in zip(others, weights, pixels, strict=True):
        axes.imshow(_picture(image), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        axes.imshow(
            map_ * map_.numel(),
            cmap="viridis",
            alpha=0.75,
            vmin=0,
            vmax=most,
            interpolation="nearest",
            extent=(-0.5, width - 0.5, height - 0.5, -0.5),
        )
        place = (column + 0.5) * scale[1] - 0.5, (row + 0.5) * scale[0] - 0.5
        for where in (axes, first):
            where.plot(*place, "x", color="red", markersize=10, markeredgewidth=2.5)
        first.annotate(f"{row}, {column}", place, textcoords="offset points", xytext=(6, 6), color="red", fontsize=8)
        axes.set_title(f"from row {row}, column {column}", fontsize=9)
    first.imshow(_picture(image), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    first.set_title("image", fontsize=9)
    for axes in (first, *others):
        axes.set(xticks=[], yticks=[], xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5))
    figure.colorbar(others[-1].images[-1], ax=others, label="weight × number of pixels\n(1 = uniform)")
    figure.suptitle(title, fontsize=10)
    save(figure, path)


def ranking(path: Path, rows: Sequence[tuple[str, Sequence[float], Sequence[float]]], label: str) -> None:
    """One line a name, the first at the top: a dot for each run of ours, a bar at their mean, hollow dots for what was published."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 1.4 + 0.42 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    for place, (_, ours, published) in enumerate(rows):
        axes.plot(published, [place + 0.18] * len(published), "o", mfc="none", color="tab:orange", label="published" if published else None)
        axes.plot(ours, [place - 0.12] * len(ours), "o", color="tab:blue", label="measured")
        axes.plot([sum(ours) / len(ours)] * 2, [place - 0.34, place + 0.1], color="tab:blue", linewidth=2, label="mean")
    axes.set(xlabel=label, yticks=range(len(rows)), yticklabels=[name for name, _, _ in rows], ylim=(len(rows) - 0.4, -0.6))
    axes.grid(axis="x", alpha=0.3)
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(*zip(*dict(zip(labels, zip(handles, labels, strict=True), strict=True)).values(), strict=True), fontsize=8)
    save(figure, path)


def _picture(image: Tensor) -> Tensor:
    """(C, H, W), bytes or 0 to 1, as matplotlib takes it."""
    image = image.detach().cpu()
    if image.is_floating_point():
        image = (image.float().clamp(0, 1) * 255).round().to(torch.uint8)
    return image[0] if image.shape[0] == 1 else image.permute(1, 2, 0)


def save(figure: "Figure", path: Path | str) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    files.write(Path(path), buffer.getvalue())
