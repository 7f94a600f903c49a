"""The algebra that lets attention run on the map itself, in the two places where it works on whole weights.

Forward, for one head with softmax over the keys: the logits `(W_q x_i + b_q) · (W_k x_j + b_k)` equal `W_kᵀ(W_q x_i + b_q) · x_j`
up to a constant of the row, which softmax drops. So x itself serves as keys, and b_k has no effect. Backward, every
gradient of a weight follows from four sums over the tokens.
"""

from typing import NamedTuple

import torch


class Weights(NamedTuple):
    """The layer's parameters as matrices: w_q, w_k (D, C); b_q (D); w_v (C, C); b_v (C); gamma one element. b_k never matters."""

    w_q: torch.Tensor
    b_q: torch.Tensor | None
    w_k: torch.Tensor
    w_v: torch.Tensor
    b_v: torch.Tensor | None
    gamma: torch.Tensor | None


class Moments(NamedTuple):
    """Sums over all tokens i of all maps, in fp32 or wider: with `du` the gradient of the folded query and `g` that of the output."""

    query: torch.Tensor  # Σ du_i x_iᵀ (C, C)
    query_total: torch.Tensor  # Σ du_i (C)
    value: torch.Tensor  # Σ g_i y_iᵀ (C, C)
    value_total: torch.Tensor  # Σ g_i (C)


def weight_gradients(weights: Weights, moments: Moments, scale: float) -> Weights:
    """The gradients of all weights, each in its weight's dtype and shape, None where there is no such weight.

    From `u_i = scale · W_kᵀ(W_q x_i + b_q)` and `out_i = x_i + γ(W_v y_i + b_v)`.
    """
    dtype = moments.query.dtype
    w_q, b_q, w_k, w_v, b_v, gamma = (None if w is None else w.to(dtype) for w in weights)
    assert w_q is not None and w_k is not None and w_v is not None
    d_w_q = scale * (w_k @ moments.query)
    d_w_k = scale * (w_q @ moments.query.mT)
    d_b_q = d_b_v = d_gamma = None
    if b_q is not None:
        d_w_k += scale * torch.outer(b_q, moments.query_total)
        d_b_q = scale * (w_k @ moments.query_total)
    d_w_v = moments.value
    if b_v is not None:
        d_b_v = moments.value_total
    if gamma is not None:
        d_gamma = (w_v * moments.value).sum()
        if b_v is not None:
            d_gamma = d_gamma + b_v @ moments.value_total
        d_w_v = gamma * d_w_v
        d_b_v = None if d_b_v is None else gamma * d_b_v
    gradients = (d_w_q, d_b_q, d_w_k, d_w_v, d_b_v, d_gamma)
    return Weights(*(None if d is None else d.to(w.dtype).reshape(w.shape) for d, w in zip(gradients, weights, strict=True)))  # type: ignore[union-attr]
