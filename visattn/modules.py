"""The layers: parameters and one functional call."""

import torch
from torch import Tensor, nn

from . import dispatch, functional, validation


class _ThreeConvolutions(nn.Module):
    """What the layers share: the 1×1 convolutions of queries, keys and values, all from C channels to C, with bias."""

    def __init__(self, in_channels: int, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        super().__init__()
        validation.check_in_channels(in_channels)
        self.in_channels = in_channels
        self.conv_query = nn.Conv2d(in_channels, in_channels, 1, device=device, dtype=dtype)
        self.conv_key = nn.Conv2d(in_channels, in_channels, 1, device=device, dtype=dtype)
        self.conv_value = nn.Conv2d(in_channels, in_channels, 1, device=device, dtype=dtype)

    def _parameters_in_order(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
        query, key, value = self.conv_query, self.conv_key, self.conv_value
        return query.weight, key.weight, value.weight, query.bias, key.bias, value.bias

    def extra_repr(self) -> str:
        return f"{self.in_channels}"


class Attention(_ThreeConvolutions):
    """Self-attention over the pixels of a feature map: `x + softmax(q kᵀ / √C) v`, q, k, v being 1×1 convolutions of x.

    The layer of the CIFAR-10 assignment: its state_dict has `conv_query`, `conv_key`, `conv_value`, each with weight
    (C, C, 1, 1) and bias (C), and loads from and into any module with those three convolutions.

    Args:
        in_channels: C of the maps (N, C, H, W) it takes and returns.
        normalize: "keys", the formula; "queries" takes the softmax over the queries of each key instead, as one published answer
            to the assignment does. It is there to reproduce that answer, and runs in PyTorch on every device.
        device, dtype: where and as what the parameters are made.
    """

    def __init__(
        self,
        in_channels: int,
        *,
        normalize: str = "keys",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_channels, device, dtype)
        validation.check_normalize(normalize)
        self.normalize = normalize

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, C, H, W)."""
        return functional.self_attention_2d(x, *self._parameters_in_order(), normalize=self.normalize)

    def extra_repr(self) -> str:
        return f"{self.in_channels}" if self.normalize == "keys" else f"{self.in_channels}, normalize={self.normalize!r}"


class ChannelAttention(_ThreeConvolutions):
    """Attention between the channels of a feature map: `x + softmax(q kᵀ / √C) v` with q, k, v (N, C, H·W), the softmax over the last axis.

    What another published answer to the CIFAR-10 assignment computes; there to reproduce it. Its state_dict is that of `Attention`.
    It runs in PyTorch on every device.

    Args:
        in_channels: C of the maps (N, C, H, W) it takes and returns.
        device, dtype: where and as what the parameters are made.
    """

    def __init__(self, in_channels: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__(in_channels, device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, C, H, W)."""
        return functional.channel_attention(x, *self._parameters_in_order())


def explain(layer: Attention | ChannelAttention, x: Tensor) -> str:
    """Which backend `layer(x)` would run on, and why not the other, in one sentence.

    Raises:
        TypeError: layer is not one of this package's layers.
        TypeError, ValueError: x does not fit the layer.
    """
    _check_layer(layer)
    validation.check_map(x)
    normalize = layer.normalize if isinstance(layer, Attention) else "channels"
    return dispatch.explain_selection(x, layer.conv_query.out_channels, normalize=normalize)


def attention_rows(layer: Attention, x: Tensor, pixels: Tensor) -> Tensor:
    """The attention maps of chosen pixels, (N, P, H, W), without the full matrix: see `functional.attention_rows`.

    Args:
        layer: the layer whose queries and keys are meant.
        x: its input (N, C, H, W).
        pixels: integer (P, 2), pairs (row, column).

    Raises:
        TypeError: layer is not an `Attention`; a `ChannelAttention` has no map over the pixels.
        TypeError, ValueError: x or pixels are not as above.
    """
    _check_layer(layer)
    if isinstance(layer, ChannelAttention):
        raise TypeError("attention_rows needs a layer that attends to pixels; ChannelAttention weighs channels, its matrix is C×C")
    query, key = layer.conv_query, layer.conv_key
    return functional.attention_rows(x, query.weight, key.weight, pixels, query.bias, key.bias, normalize=layer.normalize)


def _check_layer(layer: nn.Module) -> None:
    if not isinstance(layer, Attention | ChannelAttention):
        raise TypeError(f"layer must be a visattn layer, got {type(layer).__name__}; visattn.Attention and visattn.ChannelAttention are")
