"""The Triton path of maps wider than a kernel that projects as well can hold: attention on the kernels, projections in PyTorch's products.

The same two functions as in triton_backend.py. Queries and keys of any width are folded; the folded queries exist, linear in the pixels.
"""

import math

import torch
from torch import Tensor

from . import kernels
from .device import kernel_target, on_device_of
from .folding import NO_GRADIENTS, Gradients, Weights
from .layout import contiguous_weights, deliver, empty_map_like
from .normalization import GroupNorm, normalized
from .torch_backend import FoldedProjection, folded_queries, gradient_through_queries, output_projection, queries_are_thin

LOG2E = math.log2(math.e)


def forward(
    x: Tensor, weights: Weights, scale: float, residual: bool, save: bool, norm: GroupNorm | None = None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """`(out, y, lse)`: out (N, C, H, W), and with `save` y (N, C, L) and lse (N, L) in fp32, base 2, of the logits without b_k."""
    tokens, weights = kernels.readable(normalized(x, norm).flatten(2)), contiguous_weights(weights).matrices()
    y = kernels.writable(empty_map_like(x).flatten(2))
    lse = x.new_empty((x.shape[0], tokens.shape[2]), dtype=torch.float32)
    if x.numel():
        target = kernel_target(x.device)
        with on_device_of(x):
            product = _folded_projection(weights, scale * LOG2E, target)
            u = kernels.readable(folded_queries(weights, scale * LOG2E, tokens, product))
            kernels.wide_attention_forward(tokens, u, y, lse, config=kernels.wide_configs(x.dtype, target).forward)
    return _output(x, y, weights, residual), y if save else None, lse if save else None


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
    target = kernel_target(x.device)
    configs = kernels.wide_configs(x.dtype, target)
    tokens, g, y = (kernels.readable(t) for t in (x.flatten(2), d_out.flatten(2), y))
    parameters = contiguous_weights(weights)
    weights = parameters.matrices()
    w_v, _ = output_projection(weights, x.dtype)
    with on_device_of(x):
        product = _folded_projection(weights, scale * LOG2E, target)
        u = kernels.readable(folded_queries(weights, scale * LOG2E, tokens, product))
        d_y = torch.bmm(w_v.mT.expand(len(x), -1, -1), g, out=kernels.empty_with_strides_of(u))
        keys, queries = kernels.gradient_splits(*tokens.shape, configs)
        if keys.number == 1:
            d_u, delta = kernels.wide_query_gradient(tokens, u, d_y, y, lse, config=configs.query_gradient)
        else:
            d_u, delta = kernels.split_query_gradient(tokens, u, d_y, y, lse, keys, config=configs.query_gradient, target=target)
        d_x = None
        if need_x:
            d_x = empty_map_like(x)
            d_tokens = kernels.writable(d_x.flatten(2))
            through_queries = gradient_through_queries(weights, scale * LOG2E, d_u, product)
            if residual:
                torch.add(g, through_queries, alpha=1 / LOG2E, out=d_tokens)
            else:
                torch.mul(through_queries, 1 / LOG2E, out=d_tokens)
            config = configs.key_value_gradient
            kernels.key_value_gradient_in_splits(tokens, u, d_y, lse, delta, d_tokens, queries, config=config, target=target)
            deliver(d_tokens, d_x)
        if not need_weights:
            return d_x, NO_GRADIENTS
        sums = kernels.partial_moments(g, y, (d_u, tokens), need_arrived=weights.gamma is not None, config=configs.token_moments)
        return d_x, kernels.weight_gradients(sums, *parameters, scale=scale, config=kernels.weight_gradients_config(target))


def _output(x: Tensor, y: Tensor, weights: Weights, residual: bool) -> Tensor:
    """`x + γ (W_v y + b_v)`, or the branch alone, as a map like x: a product that is added to what is there already."""
    w_v, b_v = output_projection(weights, x.dtype)
    out = empty_map_like(x)
    tokens, w_v = out.flatten(2), w_v.expand(len(x), -1, -1)
    added = None if b_v is None else b_v[:, None]
    if residual:
        added = x.flatten(2) if added is None else torch.add(x.flatten(2), added, out=tokens)
    if added is None:
        torch.bmm(w_v, y, out=tokens)
    else:
        torch.baddbmm(added, w_v, y, out=tokens)
    return out


def _folded_projection(weights: Weights, scale: float, target: kernels.Target) -> FoldedProjection | None:
    """As torch_backend.py's, in one launch, or None where queries are too thin for it."""
    if queries_are_thin(weights):
        return None
    config = kernels.weight_product_config(target)
    return kernels.weight_product(weights.w_k.mT, weights.w_q, weights.b_q, factor=scale, config=config)
