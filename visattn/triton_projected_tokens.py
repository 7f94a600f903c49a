"""Attention on the queries, keys and values of a map on the kernels: they project the map, attend, and take both back.

Queries, keys and values are projected again in the backward pass, so that nothing but y and a number for each row is kept. Keys and
values are computed less `W h̄`, h̄ being the map's mean, and the maxima of windows less their own mean as well: a vector that softmax
drops, and one that is added to y again. Where the map is normalised, h below, the kernel that projects does it.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from . import kernels
from .device import kernel_target, on_device_of
from .layout import contiguous, deliver, empty_map_like, in_memory
from .normalization import GroupNorm
from .triton_backend import statistics_of


class _Projected(NamedTuple):
    """Of a map (N, C, L): queries, keys and values of all its tokens, the heads side by side.

    q (N, E, L) times scale and log2(e), k (N, E, L) and v (N, V, L) less vectors of each map, that of v being c (N, V) in fp32.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    c: Tensor


def forward(
    x: Tensor,
    w_q: Tensor,
    w_k: Tensor,
    w_v: Tensor,
    b_q: Tensor | None,
    num_heads: int,
    pool: int,
    scale: float,
    norm: GroupNorm | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`(y, lse, centre)`: y (N·heads, V/heads, L) in aligned rows, lse (N·heads, L) in fp32, base 2, of the logits with these keys.

    centre (N, C) in fp32 is the mean of h, which keys and values are projected less; None without maps.
    """
    maps, _, height, width = x.shape
    y = kernels.empty_aligned(x, (maps * num_heads, w_v.shape[0] // num_heads, height * width))
    lse = x.new_empty((maps * num_heads, height * width), dtype=torch.float32)
    if not maps:
        return y, lse, None
    w_q, w_k, w_v = (contiguous(w) for w in (w_q, w_k, w_v))
    with on_device_of(x):
        tokens = kernels.readable(in_memory(x).flatten(2))
        statistics = None if norm is None else statistics_of(tokens, norm)
        centre = tokens.mean(2, dtype=torch.float32) if statistics is None else statistics[:, -1]
        q, k, v, c = _projected(tokens, centre, w_q, w_k, w_v, b_q, scale, statistics)
        if pool > 1:
            k, v, c = kernels.max_pool(k, v, c, height, width, pool)
        q, k, v, c = (_heads(t, num_heads) for t in (q, k, v, c))
        config = kernels.token_configs(q.shape[1], v.shape[1], x.dtype, kernel_target(x.device)).forward
        kernels.token_attention_forward(q, k, v, c, y, lse, config=config)
    return y, lse, centre


def backward(
    d_y: Tensor,
    h: Tensor,
    w_q: Tensor,
    w_k: Tensor,
    w_v: Tensor,
    b_q: Tensor | None,
    b_k: Tensor | None,
    y: Tensor,
    lse: Tensor,
    centre: Tensor | None,
    num_heads: int,
    pool: int,
    scale: float,
    need_h: bool,
    need_weights: bool,
) -> list[Tensor | None]:
    """The gradients of h, w_q, w_k, w_v, b_q and b_k, each as its own where needed; y, lse, centre as `forward` gave them."""
    d_h = empty_map_like(h) if need_h else None
    if not h.numel():
        return [d_h, *(torch.zeros_like(w) if need_weights and w is not None else None for w in (w_q, w_k, w_v, b_q, b_k))]
    assert centre is not None
    height, width = h.shape[2:]
    target = kernel_target(h.device)
    w_q, w_k, w_v = (contiguous(w) for w in (w_q, w_k, w_v))
    with on_device_of(h):
        tokens = kernels.readable(in_memory(h).flatten(2))
        q, all_k, all_v, shift = _projected(tokens, centre, w_q, w_k, w_v, b_q, scale, None)
        k, v, c = (all_k, all_v, shift) if pool == 1 else kernels.max_pool(all_k, all_v, shift, height, width, pool)
        q, k, v, c = (_heads(t, num_heads) for t in (q, k, v, c))
        d_q, d_k, d_v = (kernels.empty_aligned(t, t.shape) for t in (q, k, v))
        configs = kernels.token_configs(q.shape[1], v.shape[1], h.dtype, target)
        kernels.token_attention_backward(q, k, v, c, in_memory(d_y), y, lse, d_q, d_k, d_v, scale=scale, configs=configs)
        d_q, d_k, d_v = (t.reshape(len(h), -1, t.shape[2]) for t in (d_q, d_k, d_v))
        if pool > 1:
            d_k, d_v = kernels.max_pool_backward(all_k, all_v, d_k, d_v, height, width, pool)

        of_projections = kernels.projection_configs(h.shape[1], h.dtype, target)
        if d_h is not None:
            d_tokens = kernels.writable(d_h.flatten(2))
            kernels.qkv_projection_backward(d_q, d_k, d_v, w_q, w_k, w_v, d_tokens, config=of_projections.backward)
            deliver(d_tokens, d_h)
        if not need_weights:
            return [d_h, *(None,) * 5]
        moments = kernels.partial_moments(d_q, tokens, (d_k, tokens), need_right=True, config=of_projections.token_moments)
        value_moments = kernels.partial_moments(d_v, tokens, config=of_projections.token_moments)
        y_total = d_y.unflatten(0, (len(h), num_heads)).sum((0, 3), dtype=torch.float32)
        d_w_q, d_b_q, d_w_k, d_b_k, d_w_v, *_ = kernels.projection_gradients(
            moments, value_moments, w_q, b_q, w_k, b_k, w_v, None, None, y_total,
            num_tokens=tokens.shape[0] * tokens.shape[2], scale=1.0, config=kernels.weight_gradients_config(target),
        )  # fmt: skip
    return [d_h, d_w_q, d_w_k, d_w_v, d_b_q, d_b_k]


def _projected(
    tokens: Tensor,
    centre: Tensor,
    w_q: Tensor,
    w_k: Tensor,
    w_v: Tensor,
    b_q: Tensor | None,
    scale: float,
    statistics: Tensor | None,
) -> _Projected:
    """Of a map (N, C, L), or of it normalised where its statistics are given; centre as `forward` returns it.

    The weights are contiguous, those of 1×1 convolutions as well.
    """
    queries = kernels.Projection(w_q, None if b_q is None else contiguous(b_q), scale * math.log2(math.e))
    config = kernels.projection_configs(tokens.shape[1], tokens.dtype, kernel_target(tokens.device)).qkv_projection
    keys, values = kernels.Projection(w_k), kernels.Projection(w_v)
    q, k, v, c = kernels.qkv_projection(tokens, queries, keys, values, statistics, centre, config=config)
    assert q is not None
    assert k is not None
    assert v is not None
    assert c is not None
    return _Projected(q, k, v, c)


def _heads(t: Tensor, num_heads: int) -> Tensor:
    """(N, heads · D, …), with nothing between its maps, as one head after the other, (N·heads, D, …), a view."""
    return t if num_heads == 1 else t.reshape(t.shape[0] * num_heads, t.shape[1] // num_heads, *t.shape[2:])
