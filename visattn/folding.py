"""The algebra that lets attention run on the map itself, in the two places where it works on whole weights.

Forward, for one head with softmax over the keys: the logits `(W_q x_i + b_q) · (W_k x_j + b_k)` equal `W_kᵀ(W_q x_i + b_q) · x_j`
up to a constant of the row, which softmax drops. So x itself serves as keys, and b_k has no effect. Backward, every
gradient of a weight follows from four sums over the tokens.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

Gradients = tuple[Tensor | None, ...]
"""One for each of `Weights`, in their order; None where there is no such weight or its gradient is not wanted."""


class Weights(NamedTuple):
    """The layer's parameters as matrices: w_q, w_k (D, C); b_q (D); w_v (C, C); b_v (C); gamma one element. b_k never matters."""

    w_q: Tensor
    b_q: Tensor | None
    w_k: Tensor
    w_v: Tensor
    b_v: Tensor | None
    gamma: Tensor | None

    def map(self, function: Callable[[Tensor], Tensor]) -> "Weights":
        """The function of each weight that exists."""
        return Weights(*(None if w is None else function(w) for w in self))  # type: ignore[arg-type]


class Moments(NamedTuple):
    """Sums over all tokens i of all maps, in fp32 or wider, g being the gradient of the output.

    Where the keys' weight was folded into the query, dq is the gradient of the folded query and E = C. Where keys were
    projected it is that of `scale · (W_q x + b_q)`, E = D, and dk is the gradient of the keys.
    """

    query: Tensor  # Σ dq_i x_iᵀ (E, C)
    query_total: Tensor  # Σ dq_i (E)
    value: Tensor  # Σ g_i y_iᵀ (C, C)
    value_total: Tensor  # Σ g_i (C)
    key: Tensor | None = None  # Σ dk_i x_iᵀ (D, C), None where there are no keys but the map


def weight_gradients(weights: Weights, moments: Moments, scale: float) -> Gradients:
    """The gradients of all weights, each in its weight's dtype and shape.

    From `u_i = scale · W_kᵀ(W_q x_i + b_q)`, or `q_i = scale · (W_q x_i + b_q)` and `k_j = W_k x_j`, and
    `out_i = x_i + γ(W_v y_i + b_v)`.
    """
    w_q, b_q, w_k, w_v, b_v, gamma = weights.map(lambda w: w.to(moments.query.dtype))
    d_w_v = moments.value
    d_b_v = d_gamma = None
    if moments.key is None:
        d_w_q = scale * (w_k @ moments.query)
        d_w_k = scale * (w_q @ moments.query.mT)
        d_b_q = scale * (w_k @ moments.query_total)
        if b_q is not None:
            d_w_k += scale * torch.outer(b_q, moments.query_total)
    else:
        d_w_q, d_w_k, d_b_q = scale * moments.query, moments.key, scale * moments.query_total
    if b_v is not None:
        d_b_v = moments.value_total
    if gamma is not None:
        d_gamma = (w_v * moments.value).sum()
        d_w_v = gamma * moments.value
        if b_v is not None:
            d_gamma = d_gamma + b_v @ moments.value_total
            d_b_v = gamma * moments.value_total
    gradients = (d_w_q, d_b_q, d_w_k, d_w_v, d_b_v, d_gamma)
    return tuple(None if w is None or d is None else d.to(w.dtype).reshape(w.shape) for d, w in zip(gradients, weights, strict=True))
