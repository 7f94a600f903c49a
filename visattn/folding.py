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
    """The layer's parameters: w_q, w_k (D, C); b_q, b_k (D); w_v (C, C); b_v (C); gamma one element.

    b_k never matters: it is taken along for its gradient, which is exactly zero. The matrices may be the weights of 1×1 convolutions,
    (D, C, 1, 1), which lie in memory no differently.
    """

    w_q: Tensor
    b_q: Tensor | None
    w_k: Tensor
    b_k: Tensor | None
    w_v: Tensor
    b_v: Tensor | None
    gamma: Tensor | None

    def map(self, function: Callable[[Tensor], Tensor]) -> "Weights":
        """The function of each weight that exists."""
        return Weights._make([None if w is None else function(w) for w in self])

    def matrices(self) -> "Weights":
        """The same with weights of convolutions as the matrices they are."""
        w_q, b_q, w_k, b_k, w_v, b_v, gamma = self
        return Weights(w_q.flatten(1), b_q, w_k.flatten(1), b_k, w_v.flatten(1), b_v, gamma)


NO_GRADIENTS: Gradients = (None,) * len(Weights._fields)


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
    query, query_total, d_w_v, value_total, d_w_k = moments
    w_q, b_q, w_k, _, w_v, b_v, gamma = weights.map(lambda w: w if w.dtype == query.dtype else w.to(query.dtype))
    d_b_v = value_total
    d_b_q = d_gamma = None
    if d_w_k is not None:
        d_w_q = scale * query
        if b_q is not None:
            d_b_q = scale * query_total
    else:
        w_q, w_k = w_q.flatten(1), w_k.flatten(1)
        # With beta = 0 the first operand is not read: these are products times scale, in one operation.
        d_w_q = torch.addmm(w_k, w_k, query, beta=0, alpha=scale)
        if b_q is None:
            d_w_k = torch.addmm(w_q, w_q, query.mT, beta=0, alpha=scale)
        else:
            d_b_q = torch.addmv(b_q, w_k, query_total, beta=0, alpha=scale)
            d_w_k = (w_q @ query.mT).addr_(b_q, query_total, beta=scale, alpha=scale)
    if gamma is not None:
        d_gamma = (w_v.flatten(1) * d_w_v).sum()
        if b_v is not None:
            d_gamma = d_gamma + b_v @ value_total
            d_b_v = gamma * value_total
        d_w_v = gamma * d_w_v
    d_b_k = None if weights.b_k is None else torch.zeros_like(weights.b_k)
    gradients = (d_w_q, d_b_q, d_w_k, d_b_k, d_w_v, d_b_v, d_gamma)
    return tuple([None if w is None or d is None else _fitted(d, w) for d, w in zip(gradients, weights, strict=True)])


def _fitted(gradient: Tensor, weight: Tensor) -> Tensor:
    """The gradient in its weight's dtype and shape; asking first is quicker than a conversion that changes nothing."""
    if gradient.dtype != weight.dtype:
        gradient = gradient.to(weight.dtype)
    return gradient if gradient.shape == weight.shape else gradient.reshape(weight.shape)
