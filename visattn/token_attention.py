"""`y_i = Σ_j softmax_j(scale · q_i · k_j) v_j` as a differentiable function of queries, keys and values.

For the forms of the block in which these exist: several heads, pooled keys, thin values. Queries (B, E, L), keys (B, E, K) and
values (B, V, K) have their channels before their tokens; heads are folded into B. Memory is linear in the number of tokens, for
derivatives of both orders.

Two modules have the functions `forward` and `backward`, one for each backend; the second derivative is computed here for both.
`TokenAttention` is for eager calls, ops.py wires the same steps into torch.library.
"""

import functools
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import torch_attention, torch_token_attention
from .device import without_autocast
from .second_order import LastDerivative
from .validation import refuse_vmap

SCORES_AT_ONCE = 1 << 20
"""Elements of one chunk of the attention matrix in the second derivative; the graph of a chunk holds about a dozen of its size."""


def implementation(backend: str) -> ModuleType:
    """The module that computes on "torch" or on "triton"."""
    return torch_token_attention if backend == "torch" else _triton_token_attention()


@functools.cache
def _triton_token_attention() -> ModuleType:
    """Triton is imported when it is first needed."""
    from . import triton_token_attention

    return triton_token_attention


def keeps_lse(q: Tensor, v: Tensor, backend: str) -> bool:
    """Whether the backend's `forward` gives lse."""
    return backend == "triton" or torch_token_attention.keeps_lse(q, v)


def backward_of_backward(
    scale: float, d_y: Tensor, q: Tensor, k: Tensor, v: Tensor, v_q: Tensor | None, v_k: Tensor | None, v_v: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients by d_y, q, k and v of `φ = ⟨(v_q, v_k, v_v), backward(d_y, q, k, v)⟩`, in fp32 or wider arithmetic.

    φ is a sum over query rows: a chunk of them is taken forward and backward with a graph, which is then differentiated.
    """
    with without_autocast(q):
        dtype = torch.promote_types(q.dtype, torch.float32)
        wide_q, wide_k, wide_v, g = (t.to(dtype) for t in (q, k, v, d_y))
        keys, values = (t - t.mean(2, keepdim=True) for t in (wide_k, wide_v))
        cotangents = [torch.zeros_like(t) if c is None else c.to(dtype) for c, t in zip((v_q, v_k, v_v), (q, k, v), strict=True)]
        totals = [torch.zeros_like(t) for t in (g, wide_q, keys, values)]
        for maps, rows in torch_attention.slices(q, *torch_attention.chunk_size(q, k, SCORES_AT_ONCE)):
            chunk = g[maps, :, rows], wide_q[maps, :, rows], keys[maps], values[maps]
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


def _attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return v @ torch.softmax(scale * (q.mT @ k), -1).mT


class TokenAttention(torch.autograd.Function):
    """(q, k, v, b_k, scale, backend) → (y, lse). b_k is no part of k: it is taken along for its gradient, which is exactly zero."""

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, b_k: Tensor | None, scale: float, backend: str) -> tuple[Tensor, Tensor | None]:
        return implementation(backend).forward(q, k, v, scale)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        q, k, v, b_k, scale, backend = inputs
        y, lse = output
        ctx.set_materialize_grads(False)
        if lse is None:
            ctx.save_for_backward(q, k, v, b_k, None, None)
        else:
            ctx.mark_non_differentiable(lse)
            ctx.save_for_backward(q, k, v, b_k, y, lse)
        ctx.scale, ctx.backend = scale, backend

    @staticmethod
    def backward(ctx: Any, d_y: Tensor | None, _: Any) -> tuple:
        if d_y is None:
            return (None,) * 6
        q, k, v, b_k, y, lse = ctx.saved_tensors
        gradients = TokenAttentionBackward.apply(d_y, q, k, v, y, lse, ctx.scale, ctx.backend)
        return *gradients, torch.zeros_like(b_k) if ctx.needs_input_grad[3] else None, None, None


class TokenAttentionBackward(torch.autograd.Function):
    """(d_y, q, k, v, y, lse, scale, backend) → (d_q, d_k, d_v), itself differentiable once."""

    @staticmethod
    def forward(d_y: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor | None, lse: Tensor | None, scale: float, backend: str) -> tuple:
        with without_autocast(q):
            return implementation(backend).backward(d_y, q, k, v, y, lse, scale)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        d_y, q, k, v, _y, _lse, scale, _backend = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(d_y, q, k, v)
        ctx.scale = scale

    @staticmethod
    def backward(ctx: Any, v_q: Tensor | None, v_k: Tensor | None, v_v: Tensor | None) -> tuple:
        gradients = LastDerivative.apply(functools.partial(backward_of_backward, ctx.scale), *ctx.saved_tensors, v_q, v_k, v_v)
        # y and lse are functions of q, k and v, and φ's derivative by those already holds their part.
        return *gradients, None, None, None, None

    vmap = staticmethod(refuse_vmap)
