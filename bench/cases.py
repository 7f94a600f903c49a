"""What is measured: layers on maps, and whole models. A case says nothing about who runs it."""

import argparse
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TypeVar

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MODES = ("forward", "training")
"""A forward pass without gradients; a forward and a backward pass with the gradients of the input and of every weight."""

LAYER_SUITES = ("cifar", "large")
SUITES = (*LAYER_SUITES, "models", "host")
SIZES = ("full", "quick", "toy")
"""Only full results are filed. quick takes a minute or two, toy seconds."""


@dataclass(frozen=True)
class Case:
    """A layer on maps (batch, channels, height, width).

    form: "attention", queries and keys as wide as the map and logits over √C, or "sagan", an eighth as wide, not scaled, with γ.
    tf32: PyTorch's switch for fp32 matrix products.
    """

    suite: str
    form: str
    batch: int
    channels: int
    height: int
    width: int
    dtype: str
    tf32: bool
    mode: str

    @property
    def qk_channels(self) -> int:
        return self.channels // 8 if self.form == "sagan" else self.channels

    @property
    def tokens(self) -> int:
        return self.height * self.width

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self.batch, self.channels, self.height, self.width

    @property
    def scale(self) -> float:
        return 1.0 if self.form == "sagan" else self.channels**-0.5

    @property
    def precision(self) -> str:
        """The dtype, and with fp32 the switch."""
        return self.dtype if self.dtype != "float32" else "tf32" if self.tf32 else "float32"

    def __str__(self) -> str:
        return f"{self.form} {'×'.join(map(str, self.shape))} {self.precision} {self.mode}"


@dataclass(frozen=True)
class ModelCase:
    """A CIFAR model with one kind of attention on `batch` images; "training" is a whole step with Adam."""

    model: str
    batch: int
    dtype: str
    tf32: bool
    mode: str
    suite: str = "models"

    @property
    def precision(self) -> str:
        return self.dtype if self.dtype != "float32" else "tf32" if self.tf32 else "float32"

    def __str__(self) -> str:
        return f"{self.model}, {self.batch} images, {self.precision}, {self.mode}"


AnyCase = TypeVar("AnyCase", bound=Case | ModelCase)

# (form, batch, channels, side) of every attention layer in the CIFAR models.
_CIFAR = [
    ("attention", 64, 32, 32), ("attention", 64, 64, 32), ("attention", 64, 128, 32), ("attention", 64, 256, 32),
    ("attention", 64, 128, 8),
    ("sagan", 64, 32, 32), ("sagan", 64, 64, 32), ("sagan", 64, 128, 32), ("sagan", 64, 256, 32),
]  # fmt: skip
# Large maps, and the single wide head of a diffusion VAE.
_LARGE = [("attention", 16, 64, 64), ("attention", 4, 64, 128), ("attention", 1, 64, 256), ("attention", 4, 512, 64)]
# What each of the lists is without a GPU, where a case takes a thousand times as long.
_LARGE_CPU = [("attention", 1, 64, 64), ("attention", 1, 64, 128), ("attention", 1, 512, 64)]

# The one that a target is set for comes first.
_MODELS = ("cnn_early_attention", "cnn_vanilla", "cnn_late_attention", "cnn_double_attention", "resnet10_attention", "sagan_cnn", "vit")


def add_size_arguments(parser: argparse.ArgumentParser) -> None:
    """`size` of the options: one of `SIZES`."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "--quick", dest="size", action="store_const", const="quick", help="few shapes and precisions, small batches on a CPU"
    )
    group.add_argument("--toy", dest="size", action="store_const", const="toy", help="maps of a few pixels, to see that everything runs")
    parser.set_defaults(size="full")


def add_case_argument(parser: argparse.ArgumentParser) -> None:
    """`case` of the options: what `named` takes."""
    parser.add_argument("--case", nargs="+", metavar="TEXT", help="only cases with one of these in their name, as rows have it")


def named(chosen: Iterable[AnyCase], texts: list[str] | None) -> list[AnyCase]:
    """Those cases that have one of these texts in their name; without texts all.

    Raises:
        ValueError: there is none.
    """
    given = list(chosen)
    found = [case for case in given if texts is None or any(text in str(case) for text in texts)]
    if given and not found:
        raise ValueError(f"no case has {' or '.join(map(repr, texts or ()))} in its name; names are like {str(given[0])!r}")
    return found


def suite_cases(suites: Iterable[str], device_type: str, size: str) -> list[Case | ModelCase]:
    """Every case of these suites that is timed on the device, layers and models."""
    found: list[Case | ModelCase] = []
    for suite in suites:
        if suite in LAYER_SUITES:
            found += layer_cases(suite, device_type, size)
        elif suite == "models":
            found += model_cases(device_type, size)
    return found


def layer_cases(suite: str, device_type: str, size: str) -> Iterator[Case]:
    """The cases of "cifar" or "large": on a GPU in fp32, tf32, bf16 and fp16, on a CPU in fp32, and those of "cifar" in bf16 as well."""
    quick = size != "full"
    on_cpu = device_type == "cpu"
    shapes = _CIFAR if suite == "cifar" else _LARGE_CPU if on_cpu else _LARGE
    if size == "toy":
        shapes = [(form, 2, 16, 6) for form in dict.fromkeys(shape[0] for shape in shapes)]
    elif quick and on_cpu:
        chosen = [("attention", 32), ("attention", 64), ("attention", 128), ("sagan", 64)] if suite == "cifar" else [("attention", 64)]
        shapes = [shape for shape in shapes if (shape[0], shape[2]) in chosen and shape[3] <= 64]
    precisions = [("float32", False), ("float32", True), ("bfloat16", False), ("float16", False)]
    if on_cpu:
        # Where bf16 is emulated one step of naive attention takes minutes on large maps.
        precisions = [("float32", False), ("bfloat16", False)] if suite == "cifar" else [("float32", False)]
    if quick:
        precisions = [precisions[0]] if on_cpu else [precisions[0], precisions[2]]
    for form, batch, channels, side in shapes:
        for dtype, tf32 in precisions:
            for mode in MODES:
                case = Case(suite, form, batch, channels, side, side, dtype, tf32, mode)
                yield replace(case, batch=min(batch, 8)) if quick and on_cpu and side > 8 else case


def model_cases(device_type: str, size: str) -> Iterator[ModelCase]:
    """Forward pass and training step of the CIFAR models."""
    on_cpu, quick = device_type == "cpu", size != "full"
    names = ("cnn_early_attention",) if quick else _MODELS
    precisions = [("float32", False)] if on_cpu or quick else [("float32", False), ("float32", True), ("bfloat16", False)]
    for name in names:
        for dtype, tf32 in precisions:
            for mode in MODES:
                batch = 2 if size == "toy" else 8 if on_cpu and quick else 16 if on_cpu and name == "sagan_cnn" else 64
                yield ModelCase(name, batch, dtype, tf32, mode)
