"""The models of the assignments that the layers come from, by name."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

from torch import nn

from ..modules import Attention, ChannelAttention
from .cnn import cnn_double_attention, cnn_early_attention, cnn_late_attention, cnn_vanilla
from .mnist import DigitTransformer, NaiveSingleHeadAttention, SingleHeadAttention, ViTLayer, cnn_mnist, mlp_mnist
from .naive import NaiveAttention
from .resnet import ResNet10
from .sagan import NaiveSaganAttention, SaganAttention, SaganCNN
from .vit import MultiHeadSelfAttention, NaiveMultiHeadSelfAttention, VisionTransformer
from .vit_flat import AttentionHead, EinsumAttentionHead, FlatVisionTransformer

__all__ = [
    "AttentionHead", "DigitTransformer", "EinsumAttentionHead", "FlatVisionTransformer", "MultiHeadSelfAttention", "NaiveAttention",
    "NaiveMultiHeadSelfAttention", "NaiveSaganAttention", "NaiveSingleHeadAttention", "ResNet10", "SaganAttention", "SaganCNN",
    "SingleHeadAttention", "ViTLayer", "VisionTransformer", "attentions", "create_model", "input_shape", "names",
]  # fmt: skip

Layers = Mapping[str, Callable[..., nn.Module]]


class Model(NamedTuple):
    """A row of the table: what builds it from num_classes and, where `layers` has any, an attention layer; its images (C, H, W)."""

    build: Callable[..., nn.Module]
    input_shape: tuple[int, int, int]
    layers: Layers


CIFAR, DIGITS = (3, 32, 32), (1, 28, 28)
NONE: Layers = {}
ON_MAPS: Layers = {
    "fused": Attention,
    "naive": NaiveAttention,
    "queries": partial(Attention, normalize="queries"),
    "channel": ChannelAttention,
}

_MODELS = {
    "cnn_vanilla": Model(cnn_vanilla, CIFAR, NONE),
    "cnn_early_attention": Model(cnn_early_attention, CIFAR, ON_MAPS),
    "cnn_late_attention": Model(cnn_late_attention, CIFAR, ON_MAPS),
    "cnn_double_attention": Model(cnn_double_attention, CIFAR, ON_MAPS),
    "resnet10": Model(ResNet10, CIFAR, NONE),
    "resnet10_attention": Model(ResNet10, CIFAR, ON_MAPS),
    "sagan_cnn": Model(SaganCNN, CIFAR, {"fused": SaganAttention, "naive": NaiveSaganAttention}),
    "vit": Model(VisionTransformer, CIFAR, {"sdpa": MultiHeadSelfAttention, "naive": NaiveMultiHeadSelfAttention}),
    "vit_flat": Model(FlatVisionTransformer, (3, 64, 64), {"matmul": AttentionHead, "einsum": EinsumAttentionHead}),
    "mlp_mnist": Model(mlp_mnist, DIGITS, NONE),
    "cnn_mnist": Model(cnn_mnist, DIGITS, NONE),
    "vit_mnist": Model(DigitTransformer, DIGITS, {"sdpa": SingleHeadAttention, "naive": NaiveSingleHeadAttention}),
}


def names() -> list[str]:
    """The names that `create_model` knows."""
    return list(_MODELS)


def attentions(name: str) -> tuple[str, ...]:
    """The kinds of attention that a model can be built with, its default first; none for a model without attention."""
    return tuple(_row(name).layers)


def input_shape(name: str) -> tuple[int, int, int]:
    """(channels, height, width) of the images that a model takes."""
    return _row(name).input_shape


def create_model(name: str, num_classes: int = 10, *, attention: str | None = None) -> nn.Module:
    """A new model for images (N, *input_shape(name)), giving scores (N, num_classes).

    Args:
        name: one of `names()`.
        num_classes: number of scores. They are logits, but for sagan_cnn and vit, which end in log_softmax.
        attention: one of `attentions(name)`; None means the first of them.

    Raises:
        TypeError, ValueError: there is no such model, no such kind of it, or no class to score.
    """
    model = _row(name)
    if isinstance(num_classes, bool) or not isinstance(num_classes, int):
        raise TypeError(f"num_classes must be an int, got {num_classes!r}")
    if num_classes < 1:
        raise ValueError(f"num_classes must be at least 1, got {num_classes}")
    if attention is not None and attention not in model.layers:
        expected = f"expected one of {', '.join(model.layers)}" if model.layers else "it has no attention; leave the argument out"
        raise ValueError(f"unknown attention {attention!r} for {name}, {expected}")
    if not model.layers:
        return model.build(num_classes)
    return model.build(num_classes, model.layers[attention or next(iter(model.layers))])


def _row(name: str) -> Model:
    if not isinstance(name, str) or name not in _MODELS:
        raise ValueError(f"unknown model {name!r}, expected one of {', '.join(_MODELS)}")
    return _MODELS[name]
