"""Attention normalised over the queries, in PyTorch: any device, any floating dtype, memory linear in the number of pixels.

The weights that the queries i give to one key j sum to one: `P_j = softmax over i of (scale · q_i · k_j)`, and `out_i` adds up
`P_ji v_j`. What is constant in i drops out of that softmax, so b_q has no effect and, with the folded key
`t_j = scale · W_qᵀ(W_k x_j + b_k)`, the map itself serves as queries. This is the folding of torch_backend.py with query and key
exchanged, and both functions take their weights so exchanged: `weights.w_q` and `weights.b_q` are those of the key.

A chunk of keys holds complete rows of P, and only one chunk of them exists at a time. Rows of the transposed matrix do not sum
to one, so the values' bias cannot be added afterwards as it is there; here values exist.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .folding import NO_GRADIENTS, Gradients, Weights, weight_gradients
from .layout import empty_map_like
from .torch_attention import chunks
from .torch_backend import folded_queries, gradient_through_queries, moments, output_projection, project, widen


def forward(x: Tensor, weights: Weights, scale: float, residual: bool, save: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """`(out, None, None)`: out (N, C, H, W). Backward needs no more than the inputs."""
    del save
    tokens, weights = widen(x.flatten(2)), weights.matrices()
    t, values = folded_queries(weights, scale, tokens), _values(weights, tokens)
    branch = _zeros(tokens)
    for maps, keys, logits, p in chunks(tokens, tokens, buffers=2):
        torch.softmax(torch.bmm(t[maps, :, keys].mT, tokens[maps], out=logits), -1, out=p)
        _add_product(branch[maps], values[maps, :, keys], p)
    out = empty_map_like(x)
    if residual:
        torch.add(branch, tokens, out=out.flatten(2))
    else:
        out.flatten(2).copy_(branch)
    return out, None, None


def backward(
    x: Tensor,
    d_out: Tensor,
    weights: Weights,
    y: Tensor | None,
    lse: Tensor | None,
    scale: float,
    residual: bool,
    need_x: bool,
    need_weights: bool,
) -> tuple[Tensor | None, Gradients]:
    """The gradients of x (N, C, H, W) and of the weights, each where needed."""
    del y, lse
    tokens, g = widen(x.flatten(2)), widen(d_out.flatten(2))
    parameters, weights = weights, weights.matrices()
    t, values = folded_queries(weights, scale, tokens), _values(weights, tokens)

    d_tokens = _zeros(tokens)
    d_t, g_of_keys = torch.empty_like(tokens), torch.empty_like(tokens)
    for maps, keys, p, d_s in chunks(tokens, tokens, buffers=2):
        queries, t_chunk = tokens[maps], t[maps, :, keys]
        torch.softmax(torch.bmm(t_chunk.mT, queries, out=d_s), -1, out=p)
        g_of_keys[maps, :, keys] = torch.bmm(g[maps], p.mT)
        d_p = torch.bmm(values[maps, :, keys].mT, g[maps], out=d_s)
        torch.ops.aten._softmax_backward_data(d_p, p, -1, p.dtype, grad_input=d_s)
        d_t[maps, :, keys] = torch.bmm(queries, d_s.mT)
        if need_x:
            _add_product(d_tokens[maps], t_chunk, d_s)

    d_x = None
    if need_x:
        d_tokens += gradient_through_queries(weights, scale, d_t)
        d_tokens += project(output_projection(weights, tokens.dtype)[0].mT, None, g_of_keys)
        d_x = empty_map_like(x)
        if residual:
            torch.add(d_tokens, g, out=d_x.flatten(2))
        else:
            d_x.flatten(2).copy_(d_tokens)
    # Σ_i g_i y_iᵀ and Σ_i g_i r_i, with y_i = Σ_j P_ji x_j and r_i = Σ_j P_ji, summed over the keys instead.
    return d_x, weight_gradients(parameters, moments(d_t, None, tokens, g_of_keys, tokens), scale) if need_weights else NO_GRADIENTS


def rows(tokens: Tensor, w_q: Tensor, w_k: Tensor, b_k: Tensor | None, index: Tensor, scale: float) -> Tensor:
    """The weights (N, P, L) of the queries `index` (P) of tokens (N, C, L), all in fp32 or wider; first derivatives only."""
    t = scale * project(w_q.mT, None, project(w_k, b_k, tokens))
    return torch.exp(tokens[:, :, index].mT @ t - LogSums.apply(t, tokens)[:, None])


class LogSums(torch.autograd.Function):
    """`log Σ_i exp(t_j · x_i)` of every key j: (N, C, L) twice to (N, L), a chunk of keys at a time in both directions."""

    @staticmethod
    def forward(t: Tensor, x: Tensor) -> Tensor:
        log_sums = x.new_empty(len(x), x.shape[2])
        for maps, keys, logits in chunks(x, x, buffers=1):
            log_sums[maps, keys] = torch.logsumexp(torch.bmm(t[maps, :, keys].mT, x[maps], out=logits), -1)
        return log_sums

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor, Tensor]:
        t, x = ctx.saved_tensors
        d_t, d_x = torch.empty_like(t), torch.zeros_like(x)
        for maps, keys, logits, p in chunks(x, x, buffers=2):
            torch.softmax(torch.bmm(t[maps, :, keys].mT, x[maps], out=logits), -1, out=p)
            p *= d[maps, keys, None]
            d_t[maps, :, keys] = torch.bmm(x[maps], p.mT)
            d_x[maps].baddbmm_(t[maps, :, keys], p)
        return d_t, d_x


def _values(weights: Weights, tokens: Tensor) -> Tensor:
    """`γ(W_v x + b_v)` (N, C, L)."""
    return project(*output_projection(weights, tokens.dtype), tokens)


def _zeros(tokens: Tensor) -> Tensor:
    """For sums over chunks, which bfloat16 would round once a chunk."""
    return torch.zeros_like(tokens, dtype=torch.promote_types(tokens.dtype, torch.float32))


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    if total.dtype == a.dtype:
        total.baddbmm_(a, b)
    else:
        total += torch.bmm(a, b)
