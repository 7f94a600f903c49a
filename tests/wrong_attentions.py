"""Attentions that are wrong on purpose, each in the way that somebody once got it wrong. The gates must reject every one.

They have the interface of the reference. Faults of the forward pass are written as another formula, whose gradients
autograd derives; faults of the backward pass as a backward pass by hand, with one step left out or bent.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Weights = tuple[Tensor | None, ...]


def attention(
    x: Tensor,
    w_q: Tensor,
    w_k: Tensor,
    w_v: Tensor,
    b_q: Tensor | None = None,
    b_k: Tensor | None = None,
    b_v: Tensor | None = None,
    *,
    gamma: Tensor | None = None,
    residual: bool = True,
    normalize: str = "keys",
    fault: str = "",
) -> Tensor:
    """The formula with at most one fault."""
    tokens = x.flatten(2).mT
    if fault == "query and key swapped":
        w_q, w_k, b_q, b_k = w_k, w_q, b_k, b_q
    if fault == "weights of the query transposed":
        w_q = w_q.mT
    if fault == "weights of the value transposed":
        w_v = w_v.mT
    if fault == "values from the key projection":
        w_v = w_k
    if fault == "bias of the query ignored":
        b_q = None
    if fault == "bias of the key ignored":
        b_k = None
    if fault == "bias of the value ignored":
        b_v = None
    q, k, v = (torch.nn.functional.linear(tokens, w, b) for w, b in ((w_q, b_q), (w_k, b_k), (w_v, b_v)))
    if fault == "missing W_k":
        q, k = torch.nn.functional.linear(tokens, w_q, b_q), tokens
    if fault == "keys of the first map for every map":
        k = k[:1].expand_as(k)
    if fault == "one key dropped":
        k, v = k[:, :-1], v[:, :-1]
    if fault == "last tile unmasked":
        k, v = (torch.nn.functional.pad(t, (0, 0, 0, -t.shape[1] % 16)) for t in (k, v))
    scales = {"scale dropped": 1.0, "scale 1/√L": q.shape[1] ** -0.5, "scale 1/C": 1 / q.shape[-1], "scale 0.5": 0.5}
    logits = scales.get(fault, q.shape[-1] ** -0.5) * (q @ k.mT)
    if fault == "natural logits under a base-2 exponential":
        logits = logits * 0.6931471805599453
    if fault == "logits multiplied by log2(e) under a natural exponential":
        logits = logits * 1.4426950408889634
    over_queries = (normalize == "queries") != (fault == "softmax over the other axis")
    weights = torch.softmax(logits, 1 if over_queries else 2)
    if fault == "uniform average":
        weights = torch.softmax(logits * 0, 2)
    if fault == "row sum without the last tile":
        weights = weights / weights[..., : -(weights.shape[-1] % 16 or 16)].sum(-1, keepdim=True)
    if fault == "attention matrix transposed":
        weights = weights.mT
    if fault == "values not projected":
        v = tokens
    if fault == "bias of the value without the sum of the weights" and b_v is not None:
        v = v - b_v
    branch = (weights @ v).mT
    if fault == "bias of the value without the sum of the weights" and b_v is not None:
        branch = branch + b_v[:, None]
    branch = branch.unflatten(2, (x.shape[3], x.shape[2])).mT if fault == "height and width swapped" else branch.unflatten(2, x.shape[2:])
    if gamma is not None and fault != "gamma ignored":
        branch = gamma * branch
    if fault == "gamma applied twice" and gamma is not None:
        branch = gamma * branch
    added = residual != (fault == "residual missing")
    return branch + (2 if fault == "residual twice" else 1) * x if added else branch


class HandWrittenBackward(torch.autograd.Function):
    """The formula with its backward pass by hand, in float64 so that only the fault can be at fault."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, fault: str, residual: bool, *weights: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, *weights)
        ctx.fault, ctx.residual = fault, residual
        w_q, w_k, w_v, b_q, b_k, b_v, gamma = weights
        return attention(x, w_q, w_k, w_v, b_q, b_k, b_v, gamma=gamma, residual=residual)  # type: ignore[arg-type]

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple:
        dtype = d_out.dtype
        d_out, x, w_q, w_k, w_v, b_q, b_k, b_v, gamma = (t.double() for t in (d_out, *ctx.saved_tensors))
        fault = ctx.fault
        scale = w_q.shape[0] ** -0.5
        t, g = x.flatten(2), d_out.flatten(2)
        q = w_q @ t + b_q[:, None]
        u = scale * (w_k.mT @ q)
        logits = u.mT @ t
        lse = torch.logsumexp(logits, -1, keepdim=True)
        if fault == "stale lse":
            lse = lse.roll(1, 1)
        p = torch.exp(logits - lse)
        y = t @ p.mT
        d_y = w_v.mT @ g if fault == "gamma missing in the gradient of y" else gamma * (w_v.mT @ g)
        d_p = d_y.mT @ t
        delta = (d_y * y).sum(1)[..., None]
        if fault == "delta omitted":
            delta = delta * 0
        if fault == "delta without gamma":
            delta = delta / gamma
        d_s = p * (d_p - delta)
        d_u = t @ d_s.mT
        d_q = w_k @ d_u if fault == "scale missing in the query's gradient" else scale * (w_k @ d_u)
        terms = {
            "query gradient missing": w_q.mT @ d_q,
            "key gradient missing": u @ d_s,
            "value gradient missing": d_y @ p,
        }
        d_x = sum(term for name, term in terms.items() if name != fault)
        if ctx.residual and fault != "residual gradient missing":
            d_x = d_x + g
        d_w_k = scale * torch.einsum("ndl,ncl->dc", q - b_q[:, None] if fault == "query bias missing in the key's gradient" else q, d_u)
        if fault == "scale missing in the key's gradient":
            d_w_k = d_w_k / scale
        d_w_v = torch.einsum("nol,ncl->oc", g, t if fault == "values' weight gradient from x" else y)
        branch = w_v @ y + (0 if fault == "value bias missing in gamma's gradient" else b_v[:, None])
        d_gamma = (g * branch).sum().reshape(1)
        d_b_k = d_q.sum((0, 2)) if fault == "gradient for the key's bias" else torch.zeros_like(b_k)
        d_b_v = g.sum((0, 2)) * (1 if fault == "gamma missing in the value bias's gradient" else gamma)
        if fault == "last map left out of the weights' gradient":
            d_w_v = torch.einsum("nol,ncl->oc", g[:-1], y[:-1])
        d_w_q = torch.einsum("ndl,ncl->dc", d_q, t)
        gradients = (d_w_q, d_w_k, gamma * d_w_v, d_q.sum((0, 2)), d_b_k, d_b_v, d_gamma)
        return d_x.view(x.shape).to(dtype), None, None, *(gradient.to(dtype) for gradient in gradients)


def by_hand(fault: str) -> Callable[..., Tensor]:
    def run(x, w_q, w_k, w_v, b_q, b_k, b_v, gamma, residual, normalize):  # type: ignore[no-untyped-def]
        assert normalize == "keys"
        return HandWrittenBackward.apply(x, fault, residual, w_q, w_k, w_v, b_q, b_k, b_v, gamma)

    return run


def with_fault(fault: str) -> Callable[..., Tensor]:
    def run(**tensors: Any) -> Tensor:
        return attention(**tensors, fault=fault)

    return run


FORWARD_FAULTS = [
    "query and key swapped", "weights of the query transposed", "weights of the value transposed", "values from the key projection",
    "bias of the query ignored", "bias of the value ignored", "missing W_k", "keys of the first map for every map", "one key dropped",
    "last tile unmasked", "scale dropped", "scale 1/C", "scale 0.5", "natural logits under a base-2 exponential",
    "logits multiplied by log2(e) under a natural exponential", "softmax over the other axis", "uniform average",
    "row sum without the last tile", "height and width swapped", "gamma ignored", "gamma applied twice", "residual missing",
    "residual twice", "attention matrix transposed", "values not projected", "scale 1/√L",
]  # fmt: skip
BACKWARD_FAULTS = [
    "stale lse", "gamma missing in the gradient of y", "delta omitted", "delta without gamma", "scale missing in the query's gradient",
    "query gradient missing", "key gradient missing", "value gradient missing", "residual gradient missing",
    "query bias missing in the key's gradient", "scale missing in the key's gradient", "values' weight gradient from x",
    "value bias missing in gamma's gradient", "gradient for the key's bias", "gamma missing in the value bias's gradient",
    "last map left out of the weights' gradient",
]  # fmt: skip


def general_attention(
    x: Tensor,
    w_q: Tensor,
    w_k: Tensor,
    w_v: Tensor,
    b_q: Tensor,
    b_k: Tensor,
    b_v: Tensor,
    *,
    w_o: Tensor,
    b_o: Tensor,
    gamma: Tensor,
    scale: float,
    num_heads: int,
    norm: Any,
    pool: int,
    res_scale: float,
    fault: str = "",
) -> Tensor:
    """The block with everything that it can have, and at most one fault."""

    def project(t: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        return torch.einsum("oc,nchw->nohw", w, t) + (0 if b is None else b[:, None, None])

    groups = {"statistics of each channel": x.shape[1], "statistics of the whole map": 1}.get(fault, norm.num_groups)
    weight, bias, eps = norm.weight, norm.bias, 0.1 if fault == "another eps" else norm.eps
    if fault == "weight of the normalisation ignored":
        weight = torch.ones_like(weight)  # PyTorch 2.11 has no gradient of a bias without a weight
    if fault == "bias of the normalisation ignored":
        bias = None
    h = torch.nn.functional.group_norm(x, groups, weight, bias, eps)
    if fault == "statistics of the batch":
        h = torch.nn.functional.batch_norm(x, None, None, weight, bias, training=True, eps=eps)
    pooled = torch.nn.functional.avg_pool2d if fault == "means of windows" else torch.nn.functional.max_pool2d
    ceil = {"ceil_mode": True} if fault == "windows over the edge" else {}
    before = pooled(h, pool) if fault == "pooled before the projection" else h
    q, k, v = project(h, w_q, b_q), project(before, w_k, b_k), project(before, w_v, b_v)
    if fault == "keys not normalised":
        k = project(x, w_k, b_k)
    if fault == "values not normalised":
        v = project(x, w_v, b_v)
    if fault != "pooled before the projection":
        k, v = pooled(k, pool, **ceil), pooled(v, pool, **ceil)
    if fault == "keys pooled, values strided":
        v = project(h, w_v, b_v)[:, :, : k.shape[2] * pool : pool, : k.shape[3] * pool : pool]
    if fault == "queries of the first head for every head":
        q = q[:, : q.shape[1] // num_heads].repeat(1, num_heads, 1, 1)

    def split(t: Tensor) -> Tensor:
        """(N, heads, tokens, D)"""
        if fault == "heads interleaved":
            return t.flatten(2).unflatten(1, (-1, num_heads)).permute(0, 2, 3, 1)
        return t.flatten(2).unflatten(1, (num_heads, -1)).mT

    factor = {"scale of all heads together": scale * num_heads**-0.5, "scale ignored": (q.shape[1] // num_heads) ** -0.5}.get(fault, scale)
    logits = factor * (split(q) @ split(k).mT)
    if fault == "logits summed over the heads":
        logits = logits.sum(1, keepdim=True)
    y = torch.softmax(logits, -1) @ split(v)  # (N, heads, tokens, D)
    y = y.permute(0, 2, 3, 1) if fault == "output interleaved" else y.permute(0, 2, 1, 3)
    y = y.flatten(2).mT.unflatten(2, x.shape[2:])
    branch = project(y, w_o, None if fault in ("bias of the output ignored", "bias of the output without gamma") else b_o)
    branch = gamma * branch
    if fault == "bias of the output without gamma":
        branch = branch + b_o[:, None, None]
    if fault == "result scaled in the branch only":
        return x + res_scale * branch
    if fault == "result scaled in the input only":
        return res_scale * x + branch
    added = h if fault == "normalised map added" else x
    return (1 if fault == "result not scaled" else res_scale) * (added + branch)


GENERAL_FAULTS = [
    "statistics of each channel", "statistics of the whole map", "statistics of the batch", "another eps",
    "weight of the normalisation ignored", "bias of the normalisation ignored", "keys not normalised", "values not normalised",
    "normalised map added", "means of windows", "windows over the edge", "pooled before the projection", "keys pooled, values strided",
    "queries of the first head for every head", "heads interleaved", "output interleaved", "logits summed over the heads",
    "scale of all heads together", "scale ignored", "bias of the output ignored", "bias of the output without gamma",
    "result scaled in the branch only", "result scaled in the input only", "result not scaled",
]  # fmt: skip
"""Of the general block."""
