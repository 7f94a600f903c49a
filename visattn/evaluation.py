"""`visattn evaluate` and `visattn map`: what a checkpoint finds in images, and where it looks."""

from pathlib import Path

import torch
from torch import nn

from . import data, experiment, models, report, training
from .modules import AttentionLayer, attention_rows


def evaluate(path: Path, load: experiment.Loader, source: str | None, device: torch.device, out: Path | None) -> str:
    """The accuracy of a checkpoint on the test images of `source`, or of what it was trained on; draws its confusion matrix to `out`.

    Raises:
        RuntimeError: the checkpoint or the data cannot be read.
        ValueError: the data has other classes than the model was trained for.
    """
    model, settings, classes = experiment.model_of(path)
    name = source or settings.data
    dataset = load(name, models.input_shape(settings.model))
    if dataset.classes != classes:
        raise ValueError(f"{path} was trained for the classes {', '.join(classes)}; {name} has {', '.join(dataset.classes)}")
    matrix = training.confusion_matrix(
        model.to(device), dataset.test, settings.normalization, num_classes=len(classes), device=device, precision=settings.precision
    )
    accuracy = f"{100 * training.accuracy(matrix):.2f} % of {len(dataset.test.labels)} test images of {name}"
    shares = matrix.diagonal()[: len(classes)] / matrix.sum(1).clamp(min=1)
    lines = [[c, str(int(n)), f"{100 * share:.1f} %"] for c, n, share in zip(classes, matrix.sum(1), shares, strict=True)]
    if out is not None:
        report.confusion(out, matrix, classes, f"{settings.model}: {accuracy}")
    return f"{path}: {accuracy}\n\n{report.markdown_table(['class', 'images', 'right'], lines)}"


def draw_attention(
    path: Path,
    load: experiment.Loader,
    source: str | None,
    image: Path | None,
    index: int,
    layer: str | None,
    pixels: list[tuple[int, int]],
    out: Path,
) -> str:
    """Draws where chosen pixels of an image look, in one attention layer of a checkpoint's model; says what was drawn.

    Raises:
        RuntimeError: the checkpoint or the image cannot be read.
        ValueError: the model has no such layer, the data set no such image, or the layer's map no such pixel.
    """
    model, settings, _ = experiment.model_of(path)
    shape = models.input_shape(settings.model)
    if image is not None:
        picture = data.read_image(image, shape)
    else:
        test = load(source or settings.data, shape).test
        if not 0 <= index < len(test.labels):
            raise ValueError(f"--index must be between 0 and {len(test.labels) - 1}, got {index}")
        picture = test.pixels[index]
    name, module = _attention_layer(model, layer)
    x = training.input_of(model, module, settings.normalization.apply(picture[None]))
    height, width = x.shape[2:]
    chosen = pixels or [(height * row // 4, width * column // 4) for row in (1, 3) for column in (1, 3)]
    with torch.no_grad():
        weights = attention_rows(module, x, torch.tensor(chosen))[0]
    title = f"{settings.model}, layer {name} ({type(module).__name__})"
    report.attention_maps(out, picture, weights, chosen, title)
    return f"Written to {out}: where {len(chosen)} of {height}×{width} pixels look in layer {name} of {settings.model}"


def _attention_layer(model: nn.Module, name: str | None) -> tuple[str, AttentionLayer]:
    layers = {n: m for n, m in model.named_modules() if isinstance(m, AttentionLayer) and m.queries_and_keys().normalize != "channels"}
    if not layers:
        raise ValueError("the model has no attention over the pixels of a map")
    if name is None:
        return next(iter(layers.items()))
    if name not in layers:
        raise ValueError(f"the model has no attention layer {name!r}, expected one of {', '.join(layers)}")
    return name, layers[name]
