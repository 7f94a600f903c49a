"""Attention on the queries, keys and values of a map, as one differentiable function of the map and the projections.

`y = Attention(W_q h + b_q, pool(W_k h), pool(W_v h))`, for the forms of the block in which these exist. On the kernels, in eager
calls, one function projects and attends, forward and backward; everywhere else these are steps that autograd and compilers see.
"""

import functools
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import block, token_attention
from .autograd import transforms_are_active, without_autocast


def attend(h: Tensor, weights: block.Weights, num_heads: int, pool: int, scale: float, backend: str) -> Tensor:
    """y (N·heads, V/heads, L) without b_v, for a map h (N, C, H, W) that has the dtype of the weights."""
    looked_at = torch.compiler.is_compiling() or torch.jit.is_tracing() or transforms_are_active()
    if backend == "triton" and not looked_at and projects(h):
        w_q, w_k, w_v, b_q, b_k = weights[:5]
        return ProjectedTokenAttention.apply(h, w_q, w_k, w_v, b_q, b_k, num_heads, pool, scale)
    return in_steps(h, weights, num_heads, pool, scale, backend)


def projects(h: Tensor) -> bool:
    """Whether the kernels project a map of so many channels."""
    from . import kernels

    return h.shape[1] <= kernels.FUSED_CHANNELS


@functools.cache
def implementation() -> ModuleType:
    """The module that computes on the kernels; Triton is imported when it is first needed."""
    from . import triton_projected_tokens

    return triton_projected_tokens


def in_steps(h: Tensor, weights: block.Weights, num_heads: int, pool: int, scale: float, backend: str) -> Tensor:
    """The same by convolutions, pooling and attention on tokens, which is an op where a compiler or `torch.jit.trace` is looking."""
    q, k, v = block.queries_keys_values(h, weights, num_heads, pool)
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        from . import ops

        return ops.token_attention(q, k, v, weights.b_k, scale, backend)[0]
    return token_attention.TokenAttention.apply(q, k, v, weights.b_k, scale, backend)[0]


class ProjectedTokenAttention(torch.autograd.Function):
    """(h, w_q, w_k, w_v, b_q, b_k, num_heads, pool, scale) → y on the kernels. b_k is taken along for its gradient: zero."""

    @staticmethod
    def forward(
        ctx: Any,
        h: Tensor,
        w_q: Tensor,
        w_k: Tensor,
        w_v: Tensor,
        b_q: Tensor | None,
        b_k: Tensor | None,
        num_heads: int,
        pool: int,
        scale: float,
    ) -> Tensor:
        y, lse = implementation().forward(h, w_q, w_k, w_v, b_q, num_heads, pool, scale)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(h, w_q, w_k, w_v, b_q, b_k, y, lse)
        ctx.settings = num_heads, pool, scale
        return y

    @staticmethod
    def backward(ctx: Any, d_y: Tensor | None) -> tuple:
        if d_y is None:
            return (None,) * 9
        *inputs, y, lse = ctx.saved_tensors
        with without_autocast(d_y):
            if torch.is_grad_enabled() or transforms_are_active():
                gradients = _differentiable_gradients(d_y, inputs, ctx.needs_input_grad, *ctx.settings)
            else:
                h, w_q, w_k, w_v, b_q, b_k = inputs
                need_h, *need_weights, need_b_k = ctx.needs_input_grad[:6]
                gradients = implementation().backward(d_y, h, w_q, w_k, w_v, b_q, y, lse, *ctx.settings, need_h, any(need_weights))
                gradients.append(torch.zeros_like(b_k) if need_b_k else None)
        return *gradients, None, None, None


def _differentiable_gradients(
    d_y: Tensor, inputs: list[Tensor | None], needed: tuple[bool, ...], num_heads: int, pool: int, scale: float
) -> list[Tensor | None]:
    """The gradients with a graph behind them, from the steps.

    The steps start from views of the inputs, or hooks of the inputs would run here and again where the gradients arrive.
    """
    views = [t if t is None or not need else t.view_as(t) for t, need in zip(inputs, needed, strict=False)]
    h, w_q, w_k, w_v, b_q, b_k = views
    weights = block.Weights(w_q, w_k, w_v, b_q, b_k, None, None, None, None)  # type: ignore[arg-type]
    y = in_steps(h, weights, num_heads, pool, scale, "triton")  # type: ignore[arg-type]
    wanted = [t for t, need in zip(views, needed, strict=False) if need]
    found = iter(torch.autograd.grad(y, wanted, d_y, create_graph=True))  # type: ignore[arg-type]
    return [next(found) if need else None for _, need in zip(views, needed, strict=False)]
