"""The formula, written to be read: the oracle that everything else is checked against. Nothing is ever dispatched here.

Works in any floating dtype; in float64 it is the truth of the test suite, in a kernel's own dtype it is the "eager" that
the kernel's error is compared with. Memory is quadratic in the number of pixels.
"""

import torch
from torch import Tensor

from .normalization import GroupNorm


def self_attention_2d(
    x: Tensor,
    w_q: Tensor,
    w_k: Tensor,
    w_v: Tensor,
    b_q: Tensor | None = None,
    b_k: Tensor | None = None,
    b_v: Tensor | None = None,
    *,
    w_o: Tensor | None = None,
    b_o: Tensor | None = None,
    gamma: Tensor | None = None,
    scale: float | None = None,
    num_heads: int = 1,
    norm: GroupNorm | None = None,
    pool: int = 1,
    residual: bool = True,
    res_scale: float = 1.0,
    normalize: str = "keys",
) -> Tensor:
    """`res_scale · (x + γ (W_o (softmax(scale · q kᵀ) v) + b_o))` with q, k, v as 1×1 convolutions of norm(x), pixels as tokens.

    x (N, C, H, W); w_q, w_k (E, C) or (E, C, 1, 1); w_v (V, C) or (V, C, 1, 1); b_q, b_k (E); b_v (V); w_o (C, V) or (C, V, 1, 1),
    b_o (C); gamma one element. Every head has its own E / num_heads and V / num_heads channels; scale defaults to the root of the
    former's inverse. Keys and values are the maxima over windows of pool × pool pixels. Source:
    `X + softmax(X W_Q (X W_K)ᵀ / √C) X W_V`, the formula of the CIFAR-10 assignment; the rest as in the papers on SAGAN, BigGAN,
    non-local networks and diffusion models.
    normalize "keys" takes the softmax over the keys of each query, "queries" over the queries of each key.
    """
    h = x if norm is None else _group_norm(x, norm)
    q = _convolution(h, w_q, b_q)
    k = torch.nn.functional.max_pool2d(_convolution(h, w_k, b_k), pool)
    v = torch.nn.functional.max_pool2d(_convolution(h, w_v, b_v), pool)
    if scale is None:
        scale = (q.shape[1] // num_heads) ** -0.5
    outputs = []
    for q_head, k_head, v_head in zip(*(t.flatten(2).transpose(1, 2).chunk(num_heads, dim=2) for t in (q, k, v)), strict=True):
        logits = scale * (q_head @ k_head.transpose(1, 2))  # (N, queries, keys)
        weights = torch.softmax(logits, dim=2 if normalize == "keys" else 1)
        outputs.append(weights @ v_head)
    branch = torch.cat(outputs, dim=2).transpose(1, 2).unflatten(2, x.shape[2:])
    if w_o is not None:
        branch = _convolution(branch, w_o, b_o)
    if gamma is not None:
        branch = gamma.reshape(()) * branch
    return res_scale * (x + branch) if residual else res_scale * branch


def _convolution(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The 1×1 convolution (N, O, H, W) of x (N, I, H, W) with weight (O, I) or (O, I, 1, 1): one linear map of every pixel."""
    return torch.nn.functional.linear(x.movedim(1, -1), weight.flatten(1), bias).movedim(-1, 1)


def _group_norm(x: Tensor, norm: GroupNorm) -> Tensor:
    """x less its mean over its standard deviation, within each image and group of channels; then weight and bias of each channel."""
    groups = x.unflatten(1, (norm.num_groups, -1))
    variance, mean = torch.var_mean(groups, dim=(2, 3, 4), correction=0, keepdim=True)
    out = ((groups - mean) / torch.sqrt(variance + norm.eps)).flatten(1, 2)
    if norm.weight is not None:
        out = out * norm.weight[:, None, None]
    return out if norm.bias is None else out + norm.bias[:, None, None]


def channel_attention(
    x: Tensor,
    w_q: Tensor,
    w_k: Tensor,
    w_v: Tensor,
    b_q: Tensor | None = None,
    b_k: Tensor | None = None,
    b_v: Tensor | None = None,
    *,
    scale: float | None = None,
    residual: bool = True,
) -> Tensor:
    """`x + softmax(scale · q kᵀ) v` with q, k, v (N, C, H·W) as 1×1 convolutions of x, and the softmax over the last axis of (C, C).

    x (N, C, H, W); w_q, w_k, w_v (C, C) or (C, C, 1, 1); b_q, b_k, b_v (C). scale defaults to 1/√C.
    """
    tokens = x.flatten(2).transpose(1, 2)  # (N, L, C)
    q = torch.nn.functional.linear(tokens, w_q.flatten(1), b_q).transpose(1, 2)
    k = torch.nn.functional.linear(tokens, w_k.flatten(1), b_k).transpose(1, 2)
    v = torch.nn.functional.linear(tokens, w_v.flatten(1), b_v).transpose(1, 2)
    if scale is None:
        scale = x.shape[1] ** -0.5
    branch = (torch.softmax(scale * (q @ k.transpose(1, 2)), dim=2) @ v).reshape(x.shape)
    return x + branch if residual else branch


def attention_rows(
    x: Tensor,
    w_q: Tensor,
    w_k: Tensor,
    pixels: Tensor,
    b_q: Tensor | None = None,
    b_k: Tensor | None = None,
    *,
    num_heads: int = 1,
    norm: GroupNorm | None = None,
    pool: int = 1,
    normalize: str = "keys",
) -> Tensor:
    """The rows of the softmax matrix that belong to `pixels` (P, 2), pairs (row, column): (N, P, H // pool, W // pool).

    With several heads, the mean of theirs.
    """
    h = x if norm is None else _group_norm(x, norm)
    q = _convolution(h, w_q, b_q).flatten(2).transpose(1, 2)
    keys = torch.nn.functional.max_pool2d(_convolution(h, w_k, b_k), pool)
    k = keys.flatten(2).transpose(1, 2)
    width = q.shape[2] // num_heads
    heads = zip(q.chunk(num_heads, dim=2), k.chunk(num_heads, dim=2), strict=True)
    weights = [torch.softmax(a @ b.transpose(1, 2) * width**-0.5, dim=2 if normalize == "keys" else 1) for a, b in heads]
    rows = torch.stack(weights).mean(0)[:, pixels[:, 0] * x.shape[3] + pixels[:, 1]]
    return rows.unflatten(2, keys.shape[2:])
