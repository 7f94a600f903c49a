"""The Triton path: allocates what the kernels fill and starts them with the launch configuration of the tensor's device."""

import torch
from torch import Tensor

from . import kernels
from .device import kernel_target, on_device_of
from .folding import Moments, Weights
from .layout import empty_map_like


def forward(x: Tensor, weights: Weights, scale: float, residual: bool, save: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """`(out, y, lse)`: out (N, C, H, W), and with `save` y (N, C, L) and lse (N, L) in fp32, base 2, of the folded logits."""
    config = kernels.forward_config(x.shape[1], x.dtype, kernel_target(x.device))
    out = empty_map_like(x)
    y = empty_map_like(x).flatten(2) if save or config.steps_over_channels(x.shape[1]) else None
    lse = x.new_empty((x.shape[0], x.shape[2] * x.shape[3]), dtype=torch.float32) if save else None
    if x.numel():
        with on_device_of(x):
            kernels.attention_forward(
                x.flatten(2), *weights.map(Tensor.contiguous), out.flatten(2), y, lse, scale=scale, residual=residual, config=config
            )
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
    channels = x.shape[1]
    d_x = empty_map_like(x) if need_x else None
    if not x.numel():
        zeros = x.new_zeros((channels, channels), dtype=torch.float32)
        return d_x, Moments(zeros, zeros[0], zeros, zeros[0]) if need_weights else None

    configs = kernels.backward_configs(channels, x.dtype, kernel_target(x.device))
    tokens, g = x.flatten(2), d_out.flatten(2)
    w_q, b_q, w_k, w_v, _, gamma = weights.map(Tensor.contiguous)
    with on_device_of(x):
        d_u = kernels.attention_backward(
            tokens, g, w_q, b_q, w_k, w_v, gamma, y, lse, None if d_x is None else d_x.flatten(2),
            scale=scale, residual=residual, configs=configs,
        )  # fmt: skip
        if not need_weights:
            return d_x, None
        query, query_total = kernels.token_moments(d_u, tokens, config=configs.token_moments)
        value, value_total = kernels.token_moments(g, y, config=configs.token_moments)
    return d_x, Moments(query, query_total, value, value_total)
