"""What stands around attention in a block: the choice of its form, projections, heads, pooling, output projection, residual.

The block is `res_scale · (x + γ (W_o Attention(q, k, v) + b_o))` with `q = W_q h + b_q`, `k = pool(W_k h + b_k)`,
`v = pool(W_v h + b_v)` and h the normalised map. It takes one of two forms. "folded": one head attends to every pixel, so that
neither keys nor values need exist, and `W_o W_v` and `W_o b_v + b_o` serve the plain layer as the weights of its values.
"projected": queries, keys and values exist, and attention runs on them as tokens (projected_tokens.py). As steps, the projections
are ordinary products, which autograd derives.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import max_pool2d

from .layout import memory_format_of


class Weights(NamedTuple):
    """w_q, w_k (E, C); w_v (V, C); b_q, b_k (E); b_v (V); w_o (C, V); b_o (C); gamma one element. Matrices may be (…, …, 1, 1)."""

    w_q: Tensor
    w_k: Tensor
    w_v: Tensor
    b_q: Tensor | None
    b_k: Tensor | None
    b_v: Tensor | None
    w_o: Tensor | None
    b_o: Tensor | None
    gamma: Tensor | None

    def map(self, function: Callable[[Tensor], Tensor]) -> "Weights":
        """The function of each weight that exists."""
        return Weights._make([None if w is None else function(w) for w in self])


class Form(NamedTuple):
    """name is "folded" or "projected"; the rest is why. A text of it would tie what `torch.compile` traces to one size of the map."""

    name: str
    num_heads: int
    pool: int
    multiplications: tuple[int, int] | None
    """Of a pixel, folded and projected, where there was a choice."""

    @property
    def reason(self) -> str:
        """Why, as a clause."""
        if self.num_heads > 1:
            return f"each of the {self.num_heads} heads has queries, keys and values of its own"
        if self.pool > 1:
            return "there are fewer keys and values than pixels, the maxima of windows"
        if self.name == "folded" or self.multiplications is None:
            return "keys and values are the map itself"
        folded, projected = self.multiplications
        return f"a pixel takes {projected} multiplications, and {folded} if keys and values were the map itself"


def form_of(x: Tensor, qk_channels: int, value_channels: int | None, num_heads: int, pool: int, backend: str = "torch") -> Form:
    """The form on a backend for a map x (N, C, H, W): where both would do, the one that multiplies less.

    value_channels is None without an output projection; both widths are those of all heads together.
    """
    if num_heads > 1 or pool > 1:
        return Form("projected", num_heads, pool, None)
    if value_channels is None:
        return Form("folded", num_heads, pool, None)
    folded, projected = _multiplications(x, qk_channels, value_channels, backend)
    return Form("projected" if projected < folded else "folded", num_heads, pool, (folded, projected))


def _multiplications(x: Tensor, qk_channels: int, value_channels: int, backend: str) -> tuple[int, int]:
    """A pixel, in the folded and in the projected form: with every pixel, then in projections.

    Measured on a CPU over 64 to 512 channels, 8 to 256 of them attending, 64 to 1024 pixels: the form with fewer is the quicker.
    Products of the kernels are as wide as a power of two, at least 16 wide, and those of values at least as wide as those of keys.
    """
    channels, qk, value = (int(width) for width in (x.shape[1], qk_channels, value_channels))  # `torch.jit.trace` has tensors for sizes
    if backend == "triton":
        channels, qk, value = (max(16, 1 << (width - 1).bit_length()) for width in (channels, qk, max(qk, value)))
    pixels = x.shape[2] * x.shape[3]
    # As in the backend: wider queries are widened to the map's channels, and so are those of maps that the kernels hold in parts.
    thin = 2 * qk <= channels <= 256 if backend == "triton" else 4 * qk <= channels
    folded = pixels * ((qk if thin else channels) + channels) + channels * ((2 * qk if thin else channels) + channels)
    return folded, (pixels + 2 * channels) * (qk + value)


def folded_values(w_o: Tensor | None, w_v: Tensor, b_v: Tensor | None, b_o: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """`W_o W_v` (C, C) and `W_o b_v + b_o` (C), computed in fp32 or wider and rounded once to the dtype of the weights."""
    if w_o is None:
        return w_v, b_v
    wide = torch.promote_types(w_o.dtype, torch.float32)
    product = (w_o.to(wide).flatten(1) @ w_v.to(wide).flatten(1)).to(w_o.dtype)
    return product, output_bias(w_o, b_v, b_o, w_o.dtype)


def queries_keys_values(h: Tensor, weights: Weights, num_heads: int, pool: int) -> tuple[Tensor, Tensor, Tensor]:
    """q (N·heads, E/heads, L), k (N·heads, E/heads, K) and v (N·heads, V/heads, K) of the map h (N, C, H, W).

    Keys and values are without b_k and b_v, before and after pooling: the one adds the same to all logits of a row, the other to
    all values that a row weighs, and so to y, to which `branch_of` adds it.
    """
    q = _projected(h, weights.w_q, weights.b_q)
    k, v = (_pooled(_projected(h, w, None), pool) for w in (weights.w_k, weights.w_v))
    return _split(q, num_heads), _split(k, num_heads), _split(v, num_heads)


def branch_of(y: Tensor, weights: Weights, num_heads: int, shape: torch.Size) -> Tensor:
    """`γ (W_o (y + b_v) + b_o)` as a map of `shape` (N, C, H, W), for y (N·heads, V/heads, L)."""
    maps, _, height, width = shape
    y = y.reshape(maps, y.shape[1] * num_heads, height, width)
    return projected_branch(y, weights.w_o, output_bias(weights.w_o, weights.b_v, weights.b_o, y.dtype), weights.gamma)


def projected_branch(y: Tensor, w_o: Tensor | None, bias: Tensor | None, gamma: Tensor | None) -> Tensor:
    """`γ (W_o y + bias)` of a map y (N, V, H, W); without w_o `γ (y + bias)`."""
    gamma = None if gamma is None else gamma.reshape(())
    if w_o is None:
        y = y if bias is None else y + bias[:, None, None]
        return y if gamma is None else gamma * y
    if gamma is not None:
        w_o, bias = gamma * w_o, None if bias is None else gamma * bias
    return _projected(y, w_o, bias)


def output_bias(w_o: Tensor | None, b_v: Tensor | None, b_o: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """`W_o b_v + b_o` (C), computed in fp32 or wider and rounded once to dtype; without W_o b_v."""
    if w_o is None or b_v is None:
        return b_v if w_o is None else b_o
    wide = torch.promote_types(dtype, torch.float32)
    w_o, b_v = w_o.to(wide).flatten(1), b_v.to(wide)
    return (w_o @ b_v if b_o is None else torch.addmv(b_o.to(wide), w_o, b_v)).to(dtype)


def rows(h: Tensor, w_q: Tensor, w_k: Tensor, b_q: Tensor | None, index: Tensor, scale: float, num_heads: int, pool: int) -> Tensor:
    """The weights (N, P, H // pool, W // pool) that the pixels `index` (P) of h (N, C, H, W) give to its keys, the mean over the heads."""
    k = _pooled(_projected(h, w_k, None), pool)
    q = _projected(h.flatten(2)[:, :, index, None], w_q, b_q)
    logits = scale * (_split(q, num_heads).mT @ _split(k, num_heads))
    return torch.softmax(logits, -1).unflatten(0, (-1, num_heads)).mean(1).unflatten(2, k.shape[2:])


def joined(x: Tensor, branch: Tensor, residual: bool, res_scale: float) -> Tensor:
    """`res_scale · (x + branch)`, or without x, in the wider dtype of both and the layout that is due to x."""
    out = x + branch if residual else branch
    if res_scale != 1.0:
        out = res_scale * out
    return out.contiguous(memory_format=memory_format_of(x))


def _projected(h: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`W h + b`, a map. A product: in fp32 on CUDA a convolution follows a switch of its own, which permits TF32 unless told otherwise."""
    weight, tokens = weight.flatten(1).expand(h.shape[0], -1, -1), h.flatten(2)
    out = torch.bmm(weight, tokens) if bias is None else torch.baddbmm(bias[:, None], weight, tokens)
    return out.unflatten(2, h.shape[2:])


def _pooled(h: Tensor, pool: int) -> Tensor:
    return h if pool == 1 else max_pool2d(h, pool)


def _split(h: Tensor, num_heads: int) -> Tensor:
    """(N, heads · D, H, W) as tokens of one head after the other (N·heads, D, H·W)."""
    maps, channels = h.shape[:2]
    return h.reshape(maps * num_heads, channels // num_heads, h.shape[2] * h.shape[3])
