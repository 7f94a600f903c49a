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
from .folding import NO_GRADIENTS, Gradients, Weights
from .layout import contiguous, contiguous_weights, deliver, empty_map_like, in_memory
from .normalization import GroupNorm


def normalizes(x: Tensor, weights: Weights) -> bool:
    """Whether `forward` takes a norm for the map x (N, C, H, W)."""
    if x.shape[1] > kernels.FUSED_CHANNELS:
        return True
    target = kernel_target(x.device)
    return kernels.attends_normalized(x.shape[1], x.dtype, target) and not _projects_keys(x, weights, target)


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
        return wide_triton_backend.forward(x, weights, scale, residual, save, norm)
    target = kernel_target(x.device)
    projected = kernels.projected_configs(channels, x.dtype, target) if _projects_keys(x, weights, target) else None
    config = projected.forward if projected else kernels.forward_config(channels, x.dtype, target, norm is not None)
    out = empty_map_like(x)
    written = kernels.writable(out.flatten(2))
    splits, keys = (1, 0) if projected else kernels.key_splits(maps, channels, height * width, config)
    parks = config.steps_over_channels(channels) if projected else config.parks_queries(channels)
    y = kernels.empty_with_strides_of(written) if save or parks or splits > 1 else None
    lse = x.new_empty((maps, height * width), dtype=torch.float32) if save or splits > 1 else None
    if maps:
        weights = contiguous_weights(weights)
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
                if splits > 1:
                    assert y is not None
                    assert lse is not None
                    _forward_in_splits(tokens, weights, written, y, lse, statistics, scale, residual, splits, keys, config, target)
                else:
                    w_q, b_q, w_k, _, w_v, b_v, gamma = weights
                    kernels.attention_forward(
                        tokens, w_q, b_q, w_k, w_v, b_v, gamma, written, y, lse, statistics,
                        scale=scale, residual=residual, config=config,
                    )  # fmt: skip
            deliver(written, out)
    return out, y if save else None, lse if save else None


def _forward_in_splits(
    tokens: Tensor, weights: Weights, written: Tensor, y: Tensor, lse: Tensor, statistics: Tensor | None,
    scale: float, residual: bool, splits: int, keys_per_split: int, config: kernels.LaunchConfig, target: kernels.Target,
) -> None:  # fmt: skip
    """The same in three launches, for a few maps of many tokens."""
    w_q, b_q, w_k, _, w_v, b_v, gamma = weights
    kernels.split_attention_forward(
        tokens, w_q, b_q, w_k, y, lse, statistics, scale=scale, splits=splits, keys_per_split=keys_per_split, config=config
    )
    output = kernels.projection_configs(tokens.shape[1], tokens.dtype, target).qkv_projection
    kernels.output_projection(y, w_v, None, b_v, gamma, tokens, written, residual=residual, factor=None, config=output)


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
) -> tuple[Tensor | None, Gradients]:
    """The gradients of x (N, C, H, W) and of the weights, each where needed."""
    assert lse is not None
    x, d_out = in_memory(x), in_memory(d_out)
    channels, target = x.shape[1], kernel_target(x.device)
    d_x = empty_map_like(x) if need_x else None
    if not x.numel():
        return d_x, weights.map(torch.zeros_like) if need_weights else NO_GRADIENTS
    if channels > kernels.FUSED_CHANNELS:
        return wide_triton_backend.backward(x, d_out, weights, y, lse, scale, residual, need_x, need_weights)

    weights = contiguous_weights(weights)
    with on_device_of(x):
        tokens, g, y = (kernels.readable(t) for t in (x.flatten(2), d_out.flatten(2), y))
        d_tokens = None if d_x is None else kernels.writable(d_x.flatten(2))
        backward_of_form = _backward_projected if _projects_keys(x, weights, target) else _backward_folded
        gradients = backward_of_form(tokens, g, weights, y, lse, d_tokens, scale, residual, need_weights, target)
        if d_x is not None and d_tokens is not None:
            deliver(d_tokens, d_x)
    return d_x, gradients


def _backward_folded(
    tokens: Tensor, g: Tensor, weights: Weights, y: Tensor, lse: Tensor, d_tokens: Tensor | None,
    scale: float, residual: bool, need_weights: bool, target: kernels.Target,
) -> Gradients:  # fmt: skip
    """Fills d_tokens, unless it is None; the gradients of the weights, where needed."""
    w_q, b_q, w_k, _, w_v, _, gamma = weights
    single_tile = kernels.single_tile_config(*tokens.shape, tokens.dtype, target)
    if single_tile is not None:
        sums = kernels.single_tile_backward(
            tokens, g, w_q, b_q, w_k, w_v, gamma, y, lse, d_tokens,
            scale=scale, residual=residual, need_sums=need_weights, config=single_tile,
        )  # fmt: skip
    else:
        configs = kernels.backward_configs(tokens.shape[1], tokens.dtype, target)
        d_u = _attention_backward(tokens, g, weights, y, lse, d_tokens, scale, residual, configs, target)
        sums = None
        if need_weights:
            sums = kernels.partial_moments(g, y, (d_u, tokens), need_arrived=gamma is not None, config=configs.token_moments)
    if sums is None:
        return NO_GRADIENTS
    return kernels.weight_gradients(sums, *weights, scale=scale, config=kernels.weight_gradients_config(target))


def _attention_backward(
    tokens: Tensor, g: Tensor, weights: Weights, y: Tensor, lse: Tensor, d_tokens: Tensor | None,
    scale: float, residual: bool, configs: kernels.BackwardConfigs, target: kernels.Target,
) -> Tensor:  # fmt: skip
    """Fills d_tokens, unless it is None, and returns the gradient of the folded queries (N, C, L)."""
    w_q, b_q, w_k, _, w_v, _, gamma = weights
    keys, queries = kernels.gradient_splits(*tokens.shape, configs)
    u, d_y, delta = kernels.prepare_backward(tokens, g, w_q, b_q, w_k, w_v, gamma, y, lse, scale=scale, config=configs.prepare)
    config = configs.query_gradient
    if keys.number == 1:
        d_u = kernels.query_gradient(tokens, g, u, d_y, y, lse, delta, w_q, w_k, d_tokens, scale=scale, residual=residual, config=config)
    else:
        d_u, delta = kernels.split_query_gradient(tokens, u, d_y, y, lse, keys, config=config, target=target)
        if d_tokens is not None:
            _project_back(d_u, w_q, w_k, g, d_tokens, scale, residual, target)
    if d_tokens is not None:
        config = configs.key_value_gradient
        kernels.key_value_gradient_in_splits(tokens, u, d_y, lse, delta, d_tokens, queries, config=config, target=target)
    return d_u


def _project_back(
    d_u: Tensor, w_q: Tensor, w_k: Tensor, g: Tensor, d_tokens: Tensor, scale: float, residual: bool, target: kernels.Target
) -> None:
    """Fills d_tokens with what x receives through the folded queries, and with a residual past them: `scale · W_qᵀ W_k du + g`."""
    product, _ = kernels.weight_product(w_q.flatten(1).mT, w_k.flatten(1), factor=scale, config=kernels.weight_product_config(target))
    output = kernels.projection_configs(d_u.shape[1], d_u.dtype, target).qkv_projection
    kernels.output_projection(d_u, product, None, None, None, g, d_tokens, residual=residual, factor=None, config=output)


def _backward_projected(
    tokens: Tensor, g: Tensor, weights: Weights, y: Tensor, lse: Tensor, d_tokens: Tensor | None,
    scale: float, residual: bool, need_weights: bool, target: kernels.Target,
) -> Gradients:  # fmt: skip
    """The same where keys are projected."""
    w_q, _, w_k, _, w_v, _, gamma = weights
    projected = kernels.projected_configs(tokens.shape[1], tokens.dtype, target)
    q, k = _queries_and_keys(tokens, weights, scale, projected)
    d_q, d_k = kernels.projected_attention_backward(
        q, k, tokens, g, w_q, w_k, w_v, gamma, y, lse, d_tokens, scale=scale, residual=residual, configs=projected
    )
    if not need_weights:
        return NO_GRADIENTS
    config = kernels.backward_configs(tokens.shape[1], tokens.dtype, target).token_moments
    sums = kernels.partial_moments(d_q, tokens, (d_k, tokens), need_right=True, config=config)
    value_sums = kernels.partial_moments(g, y, need_arrived=gamma is not None, config=config)
    return kernels.projection_gradients(
        sums, value_sums, *weights,
        num_tokens=tokens.shape[0] * tokens.shape[2], scale=scale, config=kernels.weight_gradients_config(target),
    )  # fmt: skip


def _projects_keys(x: Tensor, weights: Weights, target: kernels.Target) -> bool:
    maps, channels, height, width = x.shape
    return kernels.projects_keys(maps, channels, height * width, weights.w_q.shape[0], x.dtype, target)


def _queries_and_keys(tokens: Tensor, weights: Weights, scale: float, configs: kernels.ProjectedConfigs) -> tuple[Tensor, Tensor]:
    """`scale · log2(e) · (W_q x + b_q)` and `W_k x`, each (N, D, L)."""
    queries = kernels.Projection(weights.w_q, weights.b_q, scale * math.log2(math.e))
    q, k, *_ = kernels.qkv_projection(tokens, queries, kernels.Projection(weights.w_k), config=configs.qkv_projection)
    return q, k
