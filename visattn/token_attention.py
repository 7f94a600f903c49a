"""`y_i = Σ_j softmax_j(scale · q_i · k_j) v_j` as a differentiable function of queries, keys and values, in PyTorch.

For the forms of the block in which these exist: several heads, pooled keys, thin values. Queries (B, E, L), keys (B, E, K) and
values (B, V, K) have their channels before their tokens; heads are folded into B. Memory is linear in the number of tokens, for
derivatives of both orders. `TokenAttention` is for eager calls, ops.py wires the same three functions into torch.library.

Keys and values are computed with less their means: softmax drops the one, the weights of a row sum to one for the other, and
rounding cannot meet either.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import torch_attention
from .autograd import without_autocast
from .torch_backend import widen

SCORES_AT_ONCE = 1 << 20
"""Elements of one chunk of the attention matrix in the second derivative; the graph of a chunk holds about a dozen of its size."""


def form_of(q: Tensor, v: Tensor) -> str:
    """Who computes: "sdpa" or "flash" of PyTorch's kernels, or "chunks"."""
    if torch_attention.sdpa_takes(q) and torch_attention.sdpa_takes(v):
        return "sdpa"
    return "flash" if torch_attention.flash_is_quicker(widen(q)) and q.shape[1] == v.shape[1] else "chunks"


def keeps_lse(q: Tensor, v: Tensor) -> bool:
    """Whether `forward` gives lse."""
    return q.dtype != torch.float16 and form_of(q, v) == "flash"


def forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor | None]:
    """`(y, lse)`: y (B, V, L) in q's dtype, and if `keeps_lse` lse (B, L) of the logits with centred keys."""
    operands, mean = _operands(q, k, v, scale)
    form, lse = form_of(q, v), None
    if form == "flash":
        y, lse = torch_attention.flash(*operands)
    else:
        y = torch_attention.sdpa(*operands) if form == "sdpa" else torch_attention.chunked(*operands)
    return (y + mean).to(q.dtype), lse if keeps_lse(q, v) else None


def backward(
    d_y: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor | None, lse: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """`(d_q, d_k, d_v)`, each in the dtype of q; y and lse as `forward` gave them, or both None."""
    (queries, keys, values), mean = _operands(q, k, v, scale)
    g = widen(d_y)
    if y is not None and lse is not None:
        d_q, d_k, d_v = torch_attention.flash_backward(g, queries, keys, values, y - mean, lse)
    elif form_of(q, v) == "sdpa":
        d_q, d_k, d_v = torch_attention.sdpa_backward(g, queries, keys, values)
    else:
        d_k, d_v = torch.zeros_like(keys), torch.zeros_like(values)
        d_q = torch_attention.chunked_backward(g, queries, keys, values, keys, d_k, d_v)
    return (scale * d_q).to(q.dtype), d_k.to(q.dtype), d_v.to(q.dtype)


def backward_of_backward(
    d_y: Tensor, q: Tensor, k: Tensor, v: Tensor, v_q: Tensor | None, v_k: Tensor | None, v_v: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients by d_y, q, k and v of `φ = ⟨(v_q, v_k, v_v), backward(d_y, q, k, v)⟩`, in fp32 or wider arithmetic.

    φ is a sum over query rows: a chunk of them is taken forward and backward with a graph, which is then differentiated.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    wide_q, wide_k, wide_v, g = (t.to(dtype) for t in (q, k, v, d_y))
    (queries, keys, values), _ = _operands(wide_q, wide_k, wide_v, 1.0)
    cotangents = [torch.zeros_like(t) if c is None else c.to(dtype) for c, t in zip((v_q, v_k, v_v), (q, k, v), strict=True)]
    totals = [torch.zeros_like(t) for t in (g, queries, keys, values)]
    for maps, rows in torch_attention.slices(q, *torch_attention.chunk_size(q, k, SCORES_AT_ONCE)):
        chunk = g[maps, :, rows], queries[maps, :, rows], keys[maps], values[maps]
        v_first = cotangents[0][maps, :, rows], cotangents[1][maps], cotangents[2][maps]
        with torch.enable_grad():
            leaves = [t.detach().requires_grad_() for t in chunk]
            y = _attention(leaves[1], leaves[2], leaves[3], scale)
            first = torch.autograd.grad(y, leaves[1:], leaves[0], create_graph=True)
            phi = sum((c * d).sum() for c, d in zip(v_first, first, strict=True))
            second = torch.autograd.grad(phi, leaves)  # type: ignore[arg-type]  # sum starts from 0
        for total, part, where in zip(totals, second, (rows, rows, slice(None), slice(None)), strict=True):
            total[maps, :, where] += part
    phi_d_y, phi_q, phi_k, phi_v = totals
    return phi_d_y.to(d_y.dtype), phi_q.to(q.dtype), phi_k.to(q.dtype), phi_v.to(q.dtype)


def _operands(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """`(scale · q, k less its mean, v less its mean)`, and the mean of v (B, V, 1)."""
    q, k, v = widen(q), widen(k), widen(v)
    mean = v.mean(2, keepdim=True)
    return (scale * q, k - k.mean(2, keepdim=True), v - mean), mean


def _attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return v @ torch.softmax(scale * (q.mT @ k), -1).mT


class TokenAttention(torch.autograd.Function):
    """(q, k, v, b_k, scale) → (y, lse). b_k is no part of k: it is taken along for its gradient, which is exactly zero."""

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, b_k: Tensor | None, scale: float) -> tuple[Tensor, Tensor | None]:
        return forward(q, k, v, scale)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        q, k, v, b_k, scale = inputs
        y, lse = output
        ctx.set_materialize_grads(False)
        if lse is None:
            ctx.save_for_backward(q, k, v, b_k, None, None)
        else:
            ctx.mark_non_differentiable(lse)
            ctx.save_for_backward(q, k, v, b_k, y, lse)
        ctx.scale = scale

    @staticmethod
    def backward(ctx: Any, d_y: Tensor | None, _: Any) -> tuple:
        if d_y is None:
            return (None,) * 5
        q, k, v, b_k, y, lse = ctx.saved_tensors
        gradients = TokenAttentionBackward.apply(d_y, q, k, v, y, lse, ctx.scale)
        return *gradients, torch.zeros_like(b_k) if ctx.needs_input_grad[3] else None, None


class TokenAttentionBackward(torch.autograd.Function):
    """(d_y, q, k, v, y, lse, scale) → (d_q, d_k, d_v), itself differentiable once."""

    @staticmethod
    def forward(d_y: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor | None, lse: Tensor | None, scale: float) -> tuple:
        with without_autocast(q):
            return backward(d_y, q, k, v, y, lse, scale)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        d_y, q, k, v, _y, _lse, scale = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(d_y, q, k, v)
        ctx.scale = scale

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, v_q: Tensor | None, v_k: Tensor | None, v_v: Tensor | None) -> tuple:
        d_y, q, k, v = ctx.saved_tensors
        with without_autocast(q):
            gradients = backward_of_backward(d_y, q, k, v, v_q, v_k, v_v, ctx.scale)
        # y and lse are functions of q, k and v, and φ's derivative by those already holds their part.
        return *gradients, None, None, None
