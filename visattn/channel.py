"""Attention between the channels of a map, in PyTorch: any device, any floating dtype, two large matrix products.

With q, k, v (N, C, L) as 1×1 convolutions of x, `softmax(scale · q kᵀ) v` needs the pixels only through their mean μ and their
centred Gram matrix `G = Σ_l (x_l - μ)(x_l - μ)ᵀ`, both of which are small:
`q kᵀ = W_q G W_kᵀ + L (W_q μ + b_q)(W_k μ + b_k)ᵀ` and `A v = (A W_v) x + A b_v`.
Without centring, a common mean would leave nothing but rounding errors of G where W_q or W_k cancels it.
"""

from typing import Any

import torch
from torch import Tensor

from .layout import memory_format_of
from .torch_backend import widen

PIXELS_PER_CHANNEL = 4
"""From here on the Gram matrix pays; at half of it both take as long. Measured on the CPU."""


def forward(
    x: Tensor,
    w_q: Tensor,
    w_k: Tensor,
    w_v: Tensor,
    b_q: Tensor | None,
    b_k: Tensor | None,
    b_v: Tensor | None,
    scale: float,
    residual: bool,
) -> Tensor:
    """The map (N, C, H, W), from weights (C, C) and biases (C); autograd derives it, to any order.

    Everything of size C×C is fp32 or wider: the logits are sums over all pixels.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    w_q, w_k, w_v = w_q.to(dtype), w_k.to(dtype), w_v.to(dtype)
    b_q, b_k, b_v = (None if b is None else b.to(dtype) for b in (b_q, b_k, b_v))
    tokens = x.flatten(2)
    if tokens.shape[2] < PIXELS_PER_CHANNEL * tokens.shape[1]:
        branch = _of_few_pixels(tokens.to(dtype), w_q, w_k, w_v, b_q, b_k, b_v, scale)
    else:
        weights = torch.softmax(scale * _logits(tokens, w_q, w_k, b_q, b_k), -1).to(dtype)
        tokens = widen(tokens)
        bias = None if b_v is None else (weights @ b_v)[..., None].to(tokens.dtype)
        branch = _project((weights @ w_v).to(tokens.dtype), bias, tokens)
    branch = branch.unflatten(2, x.shape[2:])
    out = x + branch if residual else branch
    return out.to(x.dtype).contiguous(memory_format=memory_format_of(x))


def _of_few_pixels(
    x: Tensor, w_q: Tensor, w_k: Tensor, w_v: Tensor, b_q: Tensor | None, b_k: Tensor | None, b_v: Tensor | None, scale: float
) -> Tensor:
    """The branch (N, C, L) as it is written: over few pixels, products of C×C cost more than q, k and v."""
    pairs = ((w_q, b_q), (w_k, b_k), (w_v, b_v))
    q, k, v = (_project(w.expand(len(x), -1, -1), None if b is None else b[:, None], x) for w, b in pairs)
    return torch.bmm(torch.softmax(scale * torch.bmm(q, k.mT), -1), v)


def _project(weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    """`W x + b` with a weight (N, C, C) for each map and a bias that broadcasts to x (N, C, L)."""
    return torch.bmm(weight, x) if bias is None else torch.baddbmm(bias, weight, x)


def _logits(x: Tensor, w_q: Tensor, w_k: Tensor, b_q: Tensor | None, b_k: Tensor | None) -> Tensor:
    """`Σ_l q_l k_lᵀ` (N, C, C) for x (N, C, L), without q and k."""
    dtype = w_q.dtype if x.device.type == "mps" else torch.float64  # Metal has none
    gram, mean = (t.to(dtype) for t in Statistics.apply(x))
    w_q, w_k = w_q.to(dtype), w_k.to(dtype)
    mean_q, mean_k = (w @ mean if b is None else w @ mean + b.to(dtype)[:, None] for w, b in ((w_q, b_q), (w_k, b_k)))
    return torch.baddbmm(w_q @ gram @ w_k.mT, mean_q, mean_k.mT, alpha=x.shape[2])


class Statistics(torch.autograd.Function):
    """`Σ_l (x_l - μ)(x_l - μ)ᵀ` (N, C, C) and `μ` (N, C, 1) in fp32 or wider; the gradient is one product where autograd's takes two."""

    @staticmethod
    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        centered, mean = _centered(x)
        return torch.bmm(centered, centered.mT), mean

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, d_gram: Tensor, d_mean: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return torch.baddbmm(d_mean / x.shape[2], d_gram + d_gram.mT, _centered(x)[0]).to(x.dtype)


def _centered(x: Tensor) -> tuple[Tensor, Tensor]:
    """x - μ and μ, in fp32 or wider."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    mean = wide.mean(2, keepdim=True)
    return wide - mean, mean
