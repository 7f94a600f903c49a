"""The layers: parameters and one functional call."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import block, dispatch, functional, projections, validation
from .normalization import GroupNorm


class QueriesAndKeys(NamedTuple):
    """What decides where a layer looks: the arguments of those names of `functional.attention_rows`, or `normalize="channels"`.

    `value_channels` is the number of rows of W_v where an output projection follows, which has a say in the form it runs in.
    """

    w_q: Tensor
    w_k: Tensor
    b_q: Tensor | None
    b_k: Tensor | None
    scale: float | None
    normalize: str
    num_heads: int = 1
    norm: GroupNorm | None = None
    pool: int = 1
    value_channels: int | None = None


class AttentionLayer(nn.Module):
    """A layer that `explain` and `attention_rows` can be asked about.

    Its convolutions hold weights and are not called. Spectral norm, weight norm, pruning and other forward pre-hooks that make or change
    weights work as ever; one that asks for the convolution's input raises, since there is none, and forward hooks never run.
    """

    conv_query: Any
    conv_key: Any
    conv_value: Any

    def queries_and_keys(self) -> QueriesAndKeys:
        raise NotImplementedError

    def _projections(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """Weights of queries, keys and values, and their biases, as the next forward pass uses them.

        Raises:
            projections.Unsuitable: nothing, or something that is no 1×1 convolution, stands in the place of one.
        """
        find = self._modules.get  # where nn.Module's own look-up arrives as well, microseconds later
        w_q, b_q = _weight_and_bias(find("conv_query"), "conv_query")
        w_k, b_k = _weight_and_bias(find("conv_key"), "conv_key")
        w_v, b_v = _weight_and_bias(find("conv_value"), "conv_value")
        return w_q, w_k, w_v, b_q, b_k, b_v


def _weight_and_bias(convolution: Any, name: str) -> tuple[Any, Any]:
    """Looked up where parameters are, unless something else makes them or computes with them: a hook, a method or a class of its own."""
    if type(convolution) is nn.Conv2d:
        held = convolution.__dict__  # where nn.Module's own look-up arrives as well, and this is done several times in every call
        pointwise = held["stride"] == (1, 1) and held["padding"] == (0, 0)
        if pointwise and not held["_forward_pre_hooks"] and "forward" not in held and "_conv_forward" not in held:
            own = held["_parameters"]
            try:
                return own["weight"], own["bias"]
            except KeyError:  # in a replica they are plain attributes
                pass
    projections.check_pointwise(convolution, name)
    return projections.read(convolution, name)


class _ThreeConvolutions(AttentionLayer):
    """What the layers share: the 1×1 convolutions of queries, keys and values, all from C channels to C, with bias."""

    normalize: str

    def __init__(self, in_channels: int, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        super().__init__()
        validation.check_in_channels(in_channels)
        validation.check_dtype(dtype)
        self.in_channels = in_channels
        self.conv_query = nn.Conv2d(in_channels, in_channels, 1, device=device, dtype=dtype)
        self.conv_key = nn.Conv2d(in_channels, in_channels, 1, device=device, dtype=dtype)
        self.conv_value = nn.Conv2d(in_channels, in_channels, 1, device=device, dtype=dtype)

    def queries_and_keys(self) -> QueriesAndKeys:
        with projections.without_steps(self):
            w_q, w_k, _, b_q, b_k, _ = self._projections()
        return QueriesAndKeys(w_q, w_k, b_q, b_k, None, self.normalize)

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
        return functional.self_attention_2d(x, *self._projections(), normalize=self.normalize)

    def extra_repr(self) -> str:
        return f"{self.in_channels}" if self.normalize == "keys" else f"{self.in_channels}, normalize={self.normalize!r}"


class SelfAttention2d(AttentionLayer):
    """The attention block of image models: `res_scale · (x + γ (W_o Attention(norm(x)) + b_o))`, see `functional.self_attention_2d`.

    Submodules, and with them keys of its state_dict: `norm` (a `torch.nn.GroupNorm`), `conv_query`, `conv_key`, `conv_value`,
    `conv_out` (1×1 convolutions), and the parameter `gamma`; `norm`, `conv_out` and `gamma` where there is one.

    Args:
        in_channels: C of the maps (N, C, H, W) it takes and returns.
        qk_channels: width of queries and keys, all heads together; None means C.
        value_channels: width of the values, all heads together; None means C. Another one needs `out_proj`.
        num_heads: how many attentions there are side by side; divides both widths.
        scale: factor of the logits; None means 1/√(qk_channels / num_heads).
        norm_groups: groups of the normalisation before the projections, None for no normalisation; norm_eps: its ε.
        out_proj: whether a 1×1 convolution follows the attention.
        gamma: where a learned factor of the branch starts; None for no such factor.
        pool: side of the windows whose maxima serve as keys and values; 1 pools nothing.
        bias: whether the convolutions have biases.
        residual: whether x is added.
        res_scale: factor of the whole result.
        device, dtype: where and as what the parameters are made.

    Raises:
        TypeError, ValueError: the arguments do not fit together.
    """

    def __init__(
        self,
        in_channels: int,
        *,
        qk_channels: int | None = None,
        value_channels: int | None = None,
        num_heads: int = 1,
        scale: float | None = None,
        norm_groups: int | None = None,
        norm_eps: float = 1e-6,
        out_proj: bool = False,
        gamma: float | None = None,
        pool: int = 1,
        bias: bool = True,
        residual: bool = True,
        res_scale: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        qk_channels = in_channels if qk_channels is None else qk_channels
        value_channels = in_channels if value_channels is None else value_channels
        validation.check_layer(
            in_channels, qk_channels, value_channels, num_heads, scale, norm_groups, norm_eps, out_proj, gamma, pool,
            bias, residual, res_scale,
        )  # fmt: skip
        validation.check_dtype(dtype)
        self.num_heads, self.scale, self.pool = num_heads, scale, pool
        self.residual, self.res_scale = residual, res_scale

        def convolution(inputs: int, outputs: int) -> nn.Conv2d:
            return nn.Conv2d(inputs, outputs, 1, bias=bias, device=device, dtype=dtype)

        self.norm = None if norm_groups is None else nn.GroupNorm(norm_groups, in_channels, norm_eps, device=device, dtype=dtype)
        self.conv_query, self.conv_key = convolution(in_channels, qk_channels), convolution(in_channels, qk_channels)
        self.conv_value = convolution(in_channels, value_channels)
        self.conv_out = convolution(value_channels, in_channels) if out_proj else None
        self.gamma = None if gamma is None else nn.Parameter(torch.full((1,), float(gamma), device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, C, H, W)."""
        w_o, b_o = (None, None) if self.conv_out is None else _weight_and_bias(self.conv_out, "conv_out")
        return functional.self_attention_2d(
            x, *self._projections(), w_o=w_o, b_o=b_o, gamma=self.gamma, scale=self.scale, num_heads=self.num_heads,
            norm=self._group_norm(), pool=self.pool, residual=self.residual, res_scale=self.res_scale,
        )  # fmt: skip

    def queries_and_keys(self) -> QueriesAndKeys:
        with projections.without_steps(self):
            w_q, w_k, w_v, b_q, b_k, _ = self._projections()
        value_channels = None if self.conv_out is None else w_v.shape[0]
        return QueriesAndKeys(
            w_q, w_k, b_q, b_k, self.scale, "keys", self.num_heads, self._group_norm(), self.pool, value_channels,
        )  # fmt: skip

    def extra_repr(self) -> str:
        """What the submodules do not show, as far as it is not the default."""
        shown = {"num_heads": 1, "scale": None, "pool": 1, "residual": True, "res_scale": 1.0}
        different = {name: getattr(self, name) for name, default in shown.items() if getattr(self, name) != default}
        return ", ".join(f"{name}={value}" for name, value in different.items())

    def _group_norm(self) -> GroupNorm | None:
        norm = self.norm
        if norm is None:
            return None
        if norm._forward_pre_hooks:
            projections.run_pre_hooks(norm, "norm")
        return GroupNorm(norm.num_groups, norm.weight, norm.bias, norm.eps)


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
        return functional.channel_attention(x, *self._projections())


def explain(layer: AttentionLayer, x: Tensor) -> str:
    """Which backend `layer(x)` would run on, in which form, and why not on the other, in one sentence; under autocast in its dtype.

    Raises:
        TypeError: layer is not one of this package's layers.
        TypeError, ValueError: x does not fit the layer.
    """
    asked = _asked_of(layer)
    validation.check_queries_and_keys(x, asked.w_q, asked.w_k, asked.b_q, asked.b_k, asked.scale, "keys")
    x = x.to(functional.compute_dtype(x))
    qk_channels = asked.w_q.shape[0]
    if not isinstance(layer, SelfAttention2d):
        return dispatch.explain_selection(x, qk_channels, kind=asked.normalize)
    validation.check_pool(x, asked.pool)
    shape = (x, qk_channels, asked.value_channels, asked.num_heads, asked.pool)
    on_kernels, in_pytorch = block.form_of(*shape, "triton"), block.form_of(*shape)
    sentence = f" In PyTorch the form is {in_pytorch.name}: {in_pytorch.reason}."
    if on_kernels.name == "folded":
        return dispatch.explain_selection(x, qk_channels, normalized=asked.norm is not None, in_pytorch=sentence)
    values = layer.conv_value.out_channels // asked.num_heads
    return dispatch.explain_selection(
        x, qk_channels // asked.num_heads, None, "tokens", values,
        on_kernels=f"on queries, keys and values: {on_kernels.reason}", in_pytorch=sentence,
    )  # fmt: skip


def attention_rows(layer: AttentionLayer, x: Tensor, pixels: Tensor) -> Tensor:
    """The attention maps of chosen pixels, (N, P, H, W), without the full matrix: see `functional.attention_rows`.

    They are those of the normalised map; of several heads, their mean; over pooled keys, (N, P, H // pool, W // pool).

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
        x, asked.w_q, asked.w_k, pixels, asked.b_q, asked.b_k,
        scale=asked.scale, num_heads=asked.num_heads, norm=asked.norm, pool=asked.pool, normalize=asked.normalize,
    )  # fmt: skip


def _asked_of(layer: AttentionLayer) -> QueriesAndKeys:
    if not isinstance(layer, AttentionLayer):
        raise TypeError(f"layer must be a visattn layer, got {type(layer).__name__}; visattn.SelfAttention2d and visattn.Attention are")
    return layer.queries_and_keys()
