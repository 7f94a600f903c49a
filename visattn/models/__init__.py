"""The models the layer is used in, by name."""

from collections.abc import Callable

from torch import nn

from ..modules import Attention
from .cnn import cnn_early_attention
from .naive import NaiveAttention

_MODELS = {"cnn_early_attention": cnn_early_attention}

__all__ = ["NaiveAttention", "create_model", "names"]


def names() -> list[str]:
    """The names that `create_model` knows."""
    return sorted(_MODELS)


def create_model(name: str, num_classes: int = 10, *, attention: Callable[[int], nn.Module] = Attention) -> nn.Module:
    """A new model for images (N, 3, 32, 32), giving logits (N, num_classes).

    Args:
        name: one of `names()`.
        num_classes: number of logits.
        attention: makes each attention layer from its number of channels; the default is the fused layer.

    Raises:
        ValueError: there is no model of that name.
    """
    if name not in _MODELS:
        raise ValueError(f"unknown model {name!r}, expected one of {', '.join(names())}")
    return _MODELS[name](num_classes, attention)
