"""The Triton path of maps wider than a kernel that projects as well can hold: attention on the kernels, projections in PyTorch's products.

The same two functions as in triton_backend.py. Queries and keys of any width are folded; the folded queries exist, linear in the pixels.
"""

import math

import torch
from torch import Tensor

from . import kernels
from .device import kernel_target, on_device_of
from .folding import NO_GRADIENTS, Gradients, Moments, Weights, weight_gradients
from .layout import deliver, empty_map_like
from .torch_backend import folded_queries, gradient_through_queries, output, output_projection

LOG2E = math.log2(math.e)


def forward(x: Tensor, weights: Weights, scale: float, residual: bool, save: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """`(out, y, lse)`: out (N, C, H, W), and with `save` y (N, C, L) and lse (N, L) in fp32, base 2, of the logits without b_k."""
    tokens, weights = kernels.readable(x.flatten(2)), weights.matrices()
    y = kernels.writable(empty_map_like(x).flatten(2))
    lse = x.new_empty((x.shape[0], tokens.shape[2]), dtype=torch.float32)
    if x.numel():
        config = kernels.wide_configs(x.dtype, kernel_target(x.device)).forward
        with on_device_of(x):
            u = kernels.readable(folded_queries(weights, scale * LOG2E, tokens))
            kernels.wide_attention_forward(tokens, u, y, lse, config=config)
    return output(x, tokens, y, weights, residual), y if save else None, lse if save else None


def backward(
    x: Tensor,
    d_out: Tensor,
    weights: Weights,
    y: Tensor,
    lse: Tensor,
    scale: float,
    residual: bool,
    need_x: bool,
    need_weights: bool,
) -> tuple[Tensor | None, Gradients]:
    """The gradients of x (N, C, H, W) and of the weights, each where needed."""
    configs = kernels.wide_configs(x.dtype, kernel_target(x.device))
    tokens, g, y = (kernels.readable(t) for t in (x.flatten(2), d_out.flatten(2), y))
    parameters, weights = weights, weights.matrices()
    u = kernels.readable(folded_queries(weights, scale * LOG2E, tokens))
    w_v, _ = output_projection(weights, x.dtype)
    d_y = torch.bmm(w_v.mT.expand(len(x), -1, -1), g, out=kernels.empty_with_strides_of(u))
    with on_device_of(x):
        d_u, delta = kernels.wide_query_gradient(tokens, u, d_y, y, lse, config=configs.query_gradient)
        d_x = None
        if need_x:
            d_x = empty_map_like(x)
            d_tokens, through_queries = kernels.writable(d_x.flatten(2)), gradient_through_queries(weights, scale, d_u)
            if residual:
                torch.add(through_queries, g, out=d_tokens)
            else:
                d_tokens.copy_(through_queries)
            kernels.wide_key_value_gradient(tokens, u, d_y, lse, delta, d_tokens, config=configs.key_value_gradient)
            deliver(d_tokens, d_x)
        if not need_weights:
            return d_x, NO_GRADIENTS
        (value, query), (value_total, query_total) = kernels.token_moments(g, y, (d_u, tokens), config=configs.token_moments)
    return d_x, weight_gradients(parameters, Moments(query, query_total, value, value_total), scale)
