"""Attention on tokens on the kernels: allocates what they fill and starts them with the launch configuration of the tensors' device.

Queries (B, E, L), keys (B, E, K) and values (B, V, K), heads folded into B, in any strides. Keys and values are computed with less
their means, each rounded to the dtype of the tokens, which changes nothing as long as what is taken off is what is added again.
"""

import math

import torch
from torch import Tensor

from . import kernels
from .device import kernel_target, on_device_of


def forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """`(y, lse)`: y (B, V, L) in q's dtype, lse (B, L) in fp32, base 2, of the logits with centred keys."""
    y = q.new_empty((q.shape[0], v.shape[1], q.shape[2]))
    lse = q.new_empty((q.shape[0], q.shape[2]), dtype=torch.float32)
    if q.numel():
        config = kernels.token_configs(q.shape[1], v.shape[1], q.dtype, kernel_target(q.device)).forward
        with on_device_of(q):
            kernels.token_attention_forward(*_operands(q, k, v, scale), y, lse, config=config)
    return y, lse


def backward(
    d_y: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor | None, lse: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """`(d_q, d_k, d_v)`, each in the dtype of q; y and lse as `forward` gave them."""
    assert y is not None
    assert lse is not None
    d_q, d_k, d_v = (t.new_empty(t.shape) for t in (q, k, v))
    if q.numel():
        configs = kernels.token_configs(q.shape[1], v.shape[1], q.dtype, kernel_target(q.device))
        with on_device_of(q):
            kernels.token_attention_backward(
                *_operands(q, k, v, scale), d_y.resolve_neg(), y, lse, d_q, d_k, d_v, scale=scale, configs=configs
            )
    return d_q, d_k, d_v


def _operands(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`(scale · log2(e) · q, k less its mean, v less its mean)`, and the mean of v (B, V)."""
    mean = v.mean(2, keepdim=True)
    return (scale * math.log2(math.e)) * q, k - k.mean(2, keepdim=True), v - mean, mean[:, :, 0].contiguous()
