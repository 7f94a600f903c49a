"""Attention on the queries, keys and values of a map: `y = Attention(W_q h + b_q, pool(W_k h), pool(W_v h))`, h = norm(x).

For the forms of the block in which these exist. On the kernels, in eager calls, one function normalises, projects and attends, forward
and backward; everywhere else these are steps that autograd and compilers see.
"""

import functools
from types import ModuleType
from typing import NamedTuple

from torch import Tensor

from . import block, map_attention, token_attention
from .autograd import is_looked_at, is_recorded
from .map_attention import Tensors
from .normalization import GroupNorm, normalized


def attend(x: Tensor, norm: GroupNorm | None, weights: block.Weights, num_heads: int, pool: int, scale: float, backend: str) -> Tensor:
    """y (N·heads, V/heads, L) without b_v, for a map x (N, C, H, W), all in one dtype."""
    w_q, w_k, w_v, b_q, b_k = weights[:5]
    kind = AttentionOnTokens(num_heads, pool, scale)
    if backend == "triton" and not is_looked_at(backend, x, *weights) and projects(x):
        return map_attention.attend(x, None if norm is None else norm.to(x.dtype), kind, (w_q, w_k, w_v, b_q, b_k))
    return _in_steps(normalized(x, norm), weights, *kind, backend)


def projects(x: Tensor) -> bool:
    """Whether the kernels project a map of so many channels."""
    from . import kernels

    return x.shape[1] <= kernels.FUSED_CHANNELS


@functools.cache
def implementation() -> ModuleType:
    """The module that computes on the kernels; Triton is imported when it is first needed."""
    from . import triton_projected_tokens

    return triton_projected_tokens


def _in_steps(h: Tensor, weights: block.Weights, num_heads: int, pool: int, scale: float, backend: str) -> Tensor:
    """The same by products, pooling and attention on tokens, which is an op where a call is recorded."""
    q, k, v = block.queries_keys_values(h, weights, num_heads, pool)
    if is_recorded(backend, q, k, v):
        from . import ops

        return ops.token_attention(q, k, v, weights.b_k, scale, backend)[0]
    return token_attention.TokenAttention.apply(q, k, v, weights.b_k, scale, backend)[0]


class AttentionOnTokens(NamedTuple):
    """On the kernels, as `map_attention` asks for it. Tensors are w_q, w_k, w_v, b_q, and b_k for its gradient: zero."""

    num_heads: int
    pool: int
    scale: float

    @property
    def adds_input(self) -> bool:
        return False

    def forward(self, x: Tensor, norm: GroupNorm | None, tensors: Tensors, save: bool) -> tuple[Tensor, Tensors]:
        saved = implementation().forward(x, *tensors[:4], *self, norm)
        return saved[0], saved

    def backward(self, d_out: Tensor, h: Tensor, tensors: Tensors, saved: Tensors, need_h: bool, need_tensors: bool) -> Tensors:
        return implementation().backward(d_out, h, *tensors, *saved, *self, need_h, need_tensors)

    def in_steps(self, h: Tensor, tensors: Tensors) -> Tensor:
        w_q, w_k, w_v, b_q, b_k = tensors
        weights = block.Weights(w_q, w_k, w_v, b_q, b_k, None, None, None, None)  # type: ignore[arg-type]
        return _in_steps(h, weights, *self, "triton")
