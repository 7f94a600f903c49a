"""The derivative of the backward pass, for gradient penalties.

The backward pass computes `(∂x, ∂θ) = ∇ ⟨d_out, F(x, θ)⟩`. Its vector-Jacobian product with cotangents v = (v_x, v_θ) is the
gradient of `φ = ⟨v, ∇⟨d_out, F⟩⟩ = ⟨d_out, Ḟ⟩`, where Ḟ is the derivative of F along v. Ḟ is written out below in
differentiable operations; φ is a sum over query rows, so it is differentiated chunk by chunk and memory stays linear. Where
softmax goes over the queries, φ is a sum over keys, and a chunk of keys contributes to every query.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .folding import Gradients, Weights

SCORES_AT_ONCE = 1 << 20
"""Elements of one chunk of the attention matrix; the graph of a chunk holds about a dozen of its size."""


class LastDerivative(torch.autograd.Function):
    """(compute, *tensors) → compute(*tensors), a tuple of tensors, whose own derivative raises.

    What `once_differentiable` marks refuses in a node beside the graph. `torch.autograd.grad` goes only where its inputs are, passes that
    node by, and returns what it finds elsewhere as if it were the whole derivative.
    """

    @staticmethod
    def forward(compute: Callable[..., tuple], *tensors: Tensor | None) -> tuple:
        return compute(*tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        """Nothing is kept."""

    @staticmethod
    def backward(ctx: Any, *_: Tensor | None) -> tuple:
        raise RuntimeError("attention has first and second derivatives, no third ones; for those write it with matmul and softmax")


def backward_of_backward(
    d_out: Tensor, x: Tensor, weights: Weights, v_x: Tensor | None, v_weights: Gradients, scale: float, residual: bool, normalize: str
) -> tuple[Tensor, Tensor, Gradients]:
    """Gradients of φ by d_out (N, C, H, W), x (N, C, H, W) and each weight, in fp32 or wider arithmetic.

    `v_x` and `v_weights` are the cotangents of the backward pass's results, None where there is none.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    tokens, g = (t.flatten(2).to(dtype) for t in (x, d_out))
    v_tokens = torch.zeros_like(tokens) if v_x is None else v_x.flatten(2).to(dtype)
    wide = weights.matrices().map(lambda w: w.to(dtype))
    tangents = Weights(*(_tangent(v, w) for v, w in zip(v_weights, wide, strict=True)))  # type: ignore[arg-type]

    length = tokens.shape[2]
    maps_at_once = max(1, SCORES_AT_ONCE // length**2)
    rows_at_once = max(1, min(length, SCORES_AT_ONCE // length))
    phi_d_out, phi_tokens = torch.zeros_like(g), torch.zeros_like(tokens)
    phi_weights = [None if w is None else torch.zeros_like(w) for w in wide]
    for map_ in range(0, len(tokens), maps_at_once):
        maps = slice(map_, map_ + maps_at_once)
        for row in range(0, length, rows_at_once):
            rows = slice(row, row + rows_at_once)
            with torch.enable_grad():
                keys = tokens[maps].detach().requires_grad_()
                leaves = wide.map(lambda w: w.detach().requires_grad_())
                if normalize == "keys":
                    reached, tangent = rows, _tangent_of_rows(keys, v_tokens[maps], rows, leaves, tangents, scale)
                else:
                    reached, tangent = slice(None), _tangent_from_keys(keys, v_tokens[maps], rows, leaves, tangents, scale)
                phi = (g[maps, :, reached] * tangent).sum()
                wanted = [keys, *(w for w in leaves if w is not None)]
                gradients = iter(torch.autograd.grad(phi, wanted, allow_unused=True))
            phi_d_out[maps, :, reached] += tangent.detach()
            _add(phi_tokens[maps], next(gradients))
            for total in phi_weights:
                if total is not None:
                    _add(total, next(gradients))
    if residual:
        phi_d_out += v_tokens
    shaped = tuple(None if w is None or t is None else t.to(w.dtype).reshape(w.shape) for t, w in zip(phi_weights, weights, strict=True))
    return phi_d_out.view(x.shape).to(d_out.dtype), phi_tokens.view(x.shape).to(x.dtype), shaped


def _tangent_of_rows(x: Tensor, v_x: Tensor, rows: slice, w: Weights, v: Weights, scale: float) -> Tensor:
    """The derivative of the branch's `rows` (n, C, M) along (v_x, v), by the product rule, line by line of the forward pass."""
    p, v_p = _attention_weights(x, v_x, rows, w, v, scale)
    return _projection(x @ p.mT, x @ v_p.mT + v_x @ p.mT, w, v)[1]


def _tangent_from_keys(x: Tensor, v_x: Tensor, keys: slice, w: Weights, v: Weights, scale: float) -> Tensor:
    """What `keys` contribute to the derivative of the whole branch (n, C, L) where softmax goes over the queries."""
    p, v_p = _attention_weights(x, v_x, keys, w, v, scale)
    values, v_values = _projection(x[:, :, keys], v_x[:, :, keys], w, v)
    return values @ v_p + v_values @ p


def _attention_weights(x: Tensor, v_x: Tensor, rows: slice, w: Weights, v: Weights, scale: float) -> tuple[Tensor, Tensor]:
    """`rows` of the softmax (n, M, L) and their derivative."""
    x_m, v_m = x[:, :, rows], v_x[:, :, rows]
    q, v_q = w.w_q @ x_m, v.w_q @ x_m + w.w_q @ v_m
    if w.b_q is not None and v.b_q is not None:
        q, v_q = q + w.b_q[:, None], v_q + v.b_q[:, None]
    u, v_u = scale * (w.w_k.mT @ q), scale * (v.w_k.mT @ q + w.w_k.mT @ v_q)
    p = torch.softmax(u.mT @ x, -1)
    v_s = v_u.mT @ x + u.mT @ v_x
    return p, p * (v_s - (p * v_s).sum(-1, keepdim=True))


def _projection(y: Tensor, v_y: Tensor, w: Weights, v: Weights) -> tuple[Tensor, Tensor]:
    """`γ(W_v y + b_v)` and its derivative."""
    branch, tangent = w.w_v @ y, v.w_v @ y + w.w_v @ v_y
    if w.b_v is not None and v.b_v is not None:
        branch, tangent = branch + w.b_v[:, None], tangent + v.b_v[:, None]
    if w.gamma is not None and v.gamma is not None:
        gamma = w.gamma.reshape(())
        branch, tangent = gamma * branch, v.gamma.reshape(()) * branch + gamma * tangent
    return branch, tangent


def _tangent(cotangent: Tensor | None, weight: Tensor | None) -> Tensor | None:
    """A missing cotangent of a weight that exists is zero."""
    if weight is None:
        return None
    return torch.zeros_like(weight) if cotangent is None else cotangent.to(weight.dtype).reshape(weight.shape)


def _add(total: Tensor, part: Tensor | None) -> None:
    if part is not None:
        total += part
