"""The Triton path: allocates what the kernels fill and starts them with the launch configuration of the tensor's device.

Queries and keys as wide as the map never exist: the keys' weight is folded into the query. Much narrower ones are
projected, in the forward pass and again in the backward pass; `kernels.projects_keys` decides. Maps of more channels than
`kernels.FUSED_CHANNELS` are passed on to wide_triton_backend.py.
"""

import math

import torch
from torch import Tensor

from . import kernels, wide_triton_backend
from .device import kernel_target, on_device_of
from .folding import Moments, Weights
from .layout import contiguous, deliver, empty_map_like, in_memory
from .normalization import GroupNorm


def normalizes(x: Tensor, weights: Weights) -> bool:
    """Whether `forward` takes a norm for the map x (N, C, H, W)."""
    channels = x.shape[1]
    return kernels.attends_normalized(channels, x.dtype, kernel_target(x.device)) and not _projects_keys(weights, channels)


def statistics_of(tokens: Tensor, norm: GroupNorm) -> Tensor:
    """What the kernels normalise tokens (N, C, L) by, (N, 4, C); its last row is the mean of the normalised tokens."""
    weight, bias = (None if t is None else contiguous(t) for t in (norm.weight, norm.bias))
    return kernels.group_statistics(tokens, weight, bias, norm.num_groups, norm.eps)


def forward(
    x: Tensor, weights: Weights, scale: float, residual: bool, save: bool, norm: GroupNorm | None = None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """`(out, y, lse)`: out (N, C, H, W), and with `save` y (N, C, L) and lse (N, L) in fp32, base 2, of the logits without b_k.

    With a norm the normalised map attends, y and lse are its own, and x is what is added.
    """
    x = in_memory(x)
    maps, channels, height, width = x.shape
    if channels > kernels.FUSED_CHANNELS:
        return wide_triton_backend.forward(x, weights, scale, residual, save)
    target = kernel_target(x.device)
    projected = kernels.projected_configs(channels, x.dtype, target) if _projects_keys(weights, channels) else None
    config = projected.forward if projected else kernels.forward_config(channels, x.dtype, target, norm is not None)
    out = empty_map_like(x)
    written = kernels.writable(out.flatten(2))
    parks = config.steps_over_channels(channels) if projected else config.parks_queries(channels)
    y = kernels.empty_with_strides_of(written) if save or parks else None
    lse = x.new_empty((maps, height * width), dtype=torch.float32) if save else None
    if maps:
        weights = weights.map(contiguous)
        with on_device_of(x):
            tokens = kernels.readable(x.flatten(2))
            if projected:
                q, k = _queries_and_keys(tokens, weights, scale, projected)
                kernels.projected_attention_forward(
                    q, k, tokens, tokens, weights.w_v, weights.b_v, weights.gamma, written, y, lse,
                    residual=residual, config=config,
                )  # fmt: skip
            else:
                statistics = None if norm is None else statistics_of(tokens, norm)
                kernels.attention_forward(tokens, *weights, written, y, lse, statistics, scale=scale, residual=residual, config=config)
            deliver(written, out)
    return out, y if save else None, lse


def backward(
    x: Tensor,
    d_out: Tensor,
    weights: Weights,
    y: Tensor,
    lse: Tensor | None,
    scale: float,
    residual: bool,
    need_x: bool,
    need_weights: bool,
) -> tuple[Tensor | None, Moments | None]:
    """The gradient of x (N, C, H, W) and the sums that the gradients of the weights are made of, each where needed."""
    assert lse is not None
    x, d_out = in_memory(x), in_memory(d_out)
    channels, target = x.shape[1], kernel_target(x.device)
    d_x = empty_map_like(x) if need_x else None
    if not x.numel():
        zeros = x.new_zeros((channels, channels), dtype=torch.float32)
        return d_x, Moments(zeros, zeros[0], zeros, zeros[0]) if need_weights else None
    if channels > kernels.FUSED_CHANNELS:
        return wide_triton_backend.backward(x, d_out, weights, y, lse, scale, residual, need_x, need_weights)

    configs = kernels.backward_configs(channels, x.dtype, target)
    weights = weights.map(contiguous)
    w_q, b_q, w_k, w_v, _, gamma = weights
    with on_device_of(x):
        tokens, g, y = (kernels.readable(t) for t in (x.flatten(2), d_out.flatten(2), y))
        d_tokens = None if d_x is None else kernels.writable(d_x.flatten(2))
        d_k = None
        if _projects_keys(weights, channels):
            projected = kernels.projected_configs(channels, x.dtype, target)
            q, k = _queries_and_keys(tokens, weights, scale, projected)
            d_q, d_k = kernels.projected_attention_backward(
                q, k, tokens, g, w_q, w_k, w_v, gamma, y, lse, d_tokens, scale=scale, residual=residual, configs=projected
            )
        else:
            d_q = kernels.attention_backward(
                tokens, g, w_q, b_q, w_k, w_v, gamma, y, lse, d_tokens, scale=scale, residual=residual, configs=configs
            )
        if d_x is not None and d_tokens is not None:
            deliver(d_tokens, d_x)
        if not need_weights:
            return d_x, None
        if d_k is None:
            # The value's first: it can become a gradient as it is, which begins where its memory does.
            (value, query), (value_total, query_total) = kernels.token_moments(g, y, (d_q, tokens), config=configs.token_moments)
            return d_x, Moments(query, query_total, value, value_total)
        (query, key), (query_total, key_total) = kernels.token_moments(d_q, tokens, (d_k, tokens), config=configs.token_moments)
        (value,), (value_total,) = kernels.token_moments(g, y, config=configs.token_moments)
        # Σ dk_i is zero but for rounding, which is kept from multiplying the mean of the map.
        key = torch.addr(key, key_total, tokens.mean((0, 2), dtype=torch.float32), alpha=-1)
    return d_x, Moments(query, query_total, value, value_total, key)


def _projects_keys(weights: Weights, channels: int) -> bool:
    return kernels.projects_keys(channels, weights.w_q.shape[0])


def _queries_and_keys(tokens: Tensor, weights: Weights, scale: float, configs: kernels.ProjectedConfigs) -> tuple[Tensor, Tensor]:
    """`scale · log2(e) · (W_q x + b_q)` and `W_k x`, each (N, D, L)."""
    queries = kernels.Projection(weights.w_q, weights.b_q, scale * math.log2(math.e))
    q, k, _ = kernels.qkv_projection(tokens, queries, kernels.Projection(weights.w_k), config=configs.qkv_projection)
    return q, k
