"""The formula, written to be read: the oracle that everything else is checked against. Nothing is ever dispatched here.

Works in any floating dtype; in float64 it is the truth of the test suite, in a kernel's own dtype it is the "eager" that
the kernel's error is compared with. Memory is quadratic in the number of pixels.
"""

import torch
from torch import Tensor


def self_attention_2d(
    x: Tensor,
    w_q: Tensor,
    w_k: Tensor,
    w_v: Tensor,
    b_q: Tensor | None = None,
    b_k: Tensor | None = None,
    b_v: Tensor | None = None,
    *,
    gamma: Tensor | None = None,
    scale: float | None = None,
    residual: bool = True,
    normalize: str = "keys",
) -> Tensor:
    """`x + γ (softmax(scale · q kᵀ) v)` with q, k, v as 1×1 convolutions of x and the H·W pixels as tokens.

    x (N, C, H, W); w_q, w_k (D, C) or (D, C, 1, 1); w_v (C, C) or (C, C, 1, 1); b_q, b_k (D); b_v (C); gamma one element.
    scale defaults to 1/√D. Source: `X + softmax(X W_Q (X W_K)ᵀ / √C) X W_V`, the formula of the CIFAR-10 assignment.
    normalize "keys" takes the softmax over the keys of each query, "queries" over the queries of each key.
    """
    tokens = x.flatten(2).transpose(1, 2)  # (N, L, C)
    q = torch.nn.functional.linear(tokens, w_q.flatten(1), b_q)
    k = torch.nn.functional.linear(tokens, w_k.flatten(1), b_k)
    v = torch.nn.functional.linear(tokens, w_v.flatten(1), b_v)
    if scale is None:
        scale = q.shape[-1] ** -0.5
    logits = scale * (q @ k.transpose(1, 2))  # (N, queries, keys)
    weights = torch.softmax(logits, dim=2 if normalize == "keys" else 1)
    branch = (weights @ v).transpose(1, 2).reshape(x.shape)
    if gamma is not None:
        branch = gamma.reshape(()) * branch
    return x + branch if residual else branch


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
    normalize: str = "keys",
) -> Tensor:
    """The rows of the softmax matrix that belong to `pixels` (P, 2), pairs (row, column): (N, P, H, W)."""
    height, width = x.shape[2:]
    tokens = x.flatten(2).transpose(1, 2)
    q = torch.nn.functional.linear(tokens, w_q.flatten(1), b_q)
    k = torch.nn.functional.linear(tokens, w_k.flatten(1), b_k)
    weights = torch.softmax(q @ k.transpose(1, 2) * q.shape[-1] ** -0.5, dim=2 if normalize == "keys" else 1)
    return weights[:, pixels[:, 0] * width + pixels[:, 1]].reshape(x.shape[0], -1, height, width)
