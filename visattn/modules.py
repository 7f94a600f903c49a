"""The layers: parameters and one functional call."""

import torch
from torch import Tensor, nn

from . import dispatch, functional, validation


class Attention(nn.Module):
    """Self-attention over the pixels of a feature map: `x + softmax(q kᵀ / √C) v`, q, k, v being 1×1 convolutions of x.

    The layer of the CIFAR-10 assignment: its state_dict has `conv_query`, `conv_key`, `conv_value`, each with weight
    (C, C, 1, 1) and bias (C), and loads from and into any module with those three convolutions.

    Args:
        in_channels: C of the maps (N, C, H, W) it takes and returns.
        device, dtype: where and as what the parameters are made.
    """

    def __init__(self, in_channels: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        validation.check_in_channels(in_channels)
        self.in_channels = in_channels
        self.conv_query = nn.Conv2d(in_channels, in_channels, 1, device=device, dtype=dtype)
        self.conv_key = nn.Conv2d(in_channels, in_channels, 1, device=device, dtype=dtype)
        self.conv_value = nn.Conv2d(in_channels, in_channels, 1, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, C, H, W)."""
        query, key, value = self.conv_query, self.conv_key, self.conv_value
        return functional.self_attention_2d(x, query.weight, key.weight, value.weight, query.bias, key.bias, value.bias)

    def extra_repr(self) -> str:
        return f"{self.in_channels}"


def explain(layer: Attention, x: Tensor) -> str:
    """Which backend `layer(x)` would run on, in which form, and why not on the other, in one sentence.

    Raises:
        TypeError: layer is not one of this package's layers.
        TypeError, ValueError: x does not fit the layer.
    """
    _check_layer(layer)
    validation.check_map(x)
    return dispatch.explain_selection(x, layer.conv_query.out_channels)


def attention_rows(layer: Attention, x: Tensor, pixels: Tensor) -> Tensor:
    """The attention maps of chosen pixels, (N, P, H, W), without the full matrix: see `functional.attention_rows`.

    Args:
        layer: the layer whose queries and keys are meant.
        x: its input (N, C, H, W).
        pixels: integer (P, 2), pairs (row, column).
    """
    _check_layer(layer)
    return functional.attention_rows(x, layer.conv_query.weight, layer.conv_key.weight, pixels, layer.conv_query.bias)


def _check_layer(layer: Attention) -> None:
    if not isinstance(layer, Attention):
        raise TypeError(f"layer must be a visattn layer, got {type(layer).__name__}; visattn.Attention is one")
