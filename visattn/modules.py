"""The layers: parameters and one functional call."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import dispatch, functional, validation


class QueriesAndKeys(NamedTuple):
    """What decides where a layer looks: the arguments of those names of `functional.attention_rows`, or `normalize="channels"`."""

    w_q: Tensor
    w_k: Tensor
    b_q: Tensor | None
    b_k: Tensor | None
    scale: float | None
    normalize: str


class AttentionLayer(nn.Module):
    """A layer that `explain` and `attention_rows` can be asked about."""

    def queries_and_keys(self) -> QueriesAndKeys:
        raise NotImplementedError


class _ThreeConvolutions(AttentionLayer):
    """What the layers share: the 1×1 convolutions of queries, keys and values, all from C channels to C, with bias."""

    normalize: str

    def __init__(self, in_channels: int, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        super().__init__()
        validation.check_in_channels(in_channels)
        self.in_channels = in_channels
        self.conv_query = nn.Conv2d(in_channels, in_channels, 1, device=device, dtype=dtype)
        self.conv_key = nn.Conv2d(in_channels, in_channels, 1, device=device, dtype=dtype)
        self.conv_value = nn.Conv2d(in_channels, in_channels, 1, device=device, dtype=dtype)

    def queries_and_keys(self) -> QueriesAndKeys:
        query, key = self.conv_query, self.conv_key
        return QueriesAndKeys(query.weight, key.weight, query.bias, key.bias, None, self.normalize)

    def _parameters_in_order(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
        modules: dict[str, Any] = self._modules  # where nn.Module's own look-up arrives as well, microseconds later
        query, key, value = modules["conv_query"], modules["conv_key"], modules["conv_value"]
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

    normalize = "channels"

    def __init__(self, in_channels: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__(in_channels, device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, C, H, W)."""
        return functional.channel_attention(x, *self._parameters_in_order())


def explain(layer: AttentionLayer, x: Tensor) -> str:
    """Which backend `layer(x)` would run on, in which form, and why not on the other, in one sentence.

    Raises:
        TypeError: layer is not one of this package's layers.
        TypeError, ValueError: x does not fit the layer.
    """
    asked = _asked_of(layer)
    validation.check_map(x)
    return dispatch.explain_selection(x, asked.w_q.shape[0], normalize=asked.normalize)


def attention_rows(layer: AttentionLayer, x: Tensor, pixels: Tensor) -> Tensor:
    """The attention maps of chosen pixels, (N, P, H, W), without the full matrix: see `functional.attention_rows`.

    Args:
        layer: the layer whose queries and keys are meant.
        x: its input (N, C, H, W).
        pixels: integer (P, 2), pairs (row, column).

    Raises:
        TypeError: layer is not one of this package's layers, or weighs channels, and so has no map over the pixels.
        TypeError, ValueError: x or pixels are not as above.
    """
    asked = _asked_of(layer)
    if asked.normalize == "channels":
        raise TypeError(f"attention_rows needs a layer that attends to pixels; {type(layer).__name__} weighs channels, its matrix is C×C")
    return functional.attention_rows(
        x, asked.w_q, asked.w_k, pixels, asked.b_q, asked.b_k, scale=asked.scale, normalize=asked.normalize
    )  # fmt: skip


def _asked_of(layer: AttentionLayer) -> QueriesAndKeys:
    if not isinstance(layer, AttentionLayer):
        raise TypeError(f"layer must be a visattn layer, got {type(layer).__name__}; visattn.Attention and visattn.ChannelAttention are")
    return layer.queries_and_keys()
