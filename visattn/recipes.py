"""How each model is trained unless told otherwise: the recipe of the document it comes from, and the accuracy that one published."""

from dataclasses import dataclass
from typing import NamedTuple

from .data import Normalization

CIFAR = Normalization((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
HALF = Normalization((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
UNCHANGED = Normalization((0.0,), (1.0,))


@dataclass(frozen=True)
class Recipe:
    """Adam on cross-entropy, images in random order.

    validation: share of the training images that is held back. check_every: iterations between two looks at validation
    accuracy and mean loss, of which a small data set has more. keep: what the best checkpoint is the best of, "accuracy" on
    validation or mean training "loss".
    tested: whether the "last" weights or the "best" are judged on the test images. head: width of the classifier where it is not
    the number of classes. drop_last: whether an epoch's last, smaller batch is left out.
    """

    data: str
    normalization: Normalization
    validation: float
    check_every: int
    keep: str = "accuracy"
    tested: str = "last"
    batch_size: int = 64
    epochs: int = 10
    learning_rate: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    drop_last: bool = False
    head: int | None = None


class Published(NamedTuple):
    """Test accuracies in percent, as a document gives them for a model with one kind of attention."""

    source: str
    accuracies: tuple[float, ...]


_ASSIGNMENT = Recipe("cifar10", CIFAR, validation=0.02, check_every=100)
_RESNET = Recipe("cifar10", CIFAR, validation=0.02, check_every=100, head=100)  # ten classes behind a head of a hundred, as published
_SAGAN_AND_VIT = Recipe("cifar10", HALF, validation=0.0, check_every=100, keep="loss")
_FLAT = Recipe(
    "folder:data/five_classes", HALF, validation=0.0, check_every=100, keep="loss", tested="best",
    batch_size=16, epochs=20, learning_rate=1e-4, drop_last=True,
)  # fmt: skip
_MNIST = Recipe("mnist", UNCHANGED, validation=0.2, check_every=750)

RECIPES = {
    "cnn_vanilla": _ASSIGNMENT,
    "cnn_early_attention": _ASSIGNMENT,
    "cnn_late_attention": _ASSIGNMENT,
    "cnn_double_attention": _ASSIGNMENT,
    "resnet10": _RESNET,
    "resnet10_attention": _RESNET,
    "sagan_cnn": _SAGAN_AND_VIT,
    "vit": _SAGAN_AND_VIT,
    "vit_flat": _FLAT,
    "mlp_mnist": _MNIST,
    "cnn_mnist": _MNIST,
    "vit_mnist": _MNIST,
}

PUBLISHED: dict[tuple[str, str | None], Published] = {
    ("cnn_vanilla", None): Published("two answers to one assignment", (59.51, 56.98, 59.52, 59.77, 60.81, 57.70, 59.77)),
    ("cnn_early_attention", "queries"): Published("first answer", (60.60, 62.32, 61.12)),
    ("cnn_early_attention", "channel"): Published("second answer", (59.39, 61.11, 60.81, 60.79)),
    ("cnn_late_attention", "queries"): Published("first answer", (56.37, 57.68, 58.30)),
    ("cnn_late_attention", "channel"): Published("second answer", (58.11, 61.62, 60.21, 61.46)),
    ("cnn_double_attention", "queries"): Published("first answer", (58.31, 60.24, 58.62)),
    ("cnn_double_attention", "channel"): Published("second answer", (67.7, 62.88, 61.76, 62.41)),
    ("resnet10", None): Published("first answer", (74.88, 74.43, 73.52)),
    ("resnet10_attention", "queries"): Published("first answer", (75.98, 76.34, 77.01)),
    ("sagan_cnn", "fused"): Published("SAGAN-style CNN", (73.25,)),
    ("vit", "sdpa"): Published("ViT beside it", (55.37,)),
    ("vit_flat", "matmul"): Published("ViT on flattened sequences", (53.0,)),
    ("vit_flat", "einsum"): Published("ViT on flattened sequences", (53.0,)),
    ("mlp_mnist", None): Published("homework on MNIST", (97.6,)),
    ("cnn_mnist", None): Published("homework on MNIST", (98.8,)),
}
"""By model and kind of attention. The formula itself, kind "fused", was never trained by the assignment's answers."""
