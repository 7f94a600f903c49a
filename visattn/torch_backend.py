"""The production PyTorch path: any device, any floating dtype, memory linear in the number of pixels.

Like the kernels it never makes keys or values: the folded query meets the map itself (folding.py).
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from .folding import Moments, Weights
from .layout import empty_map_like

SCORES_AT_ONCE = 1 << 22
"""Elements of the attention matrix that exist at a time. Measured on two CPU cores: larger is no quicker, smaller is slower."""

SDPA_MIN_TOKENS = 256
"""From here on SDPA beats batched matmul and softmax in fp32 on the CPU; at 64 tokens it is slower than naive attention."""


def forward(x: Tensor, weights: Weights, scale: float, residual: bool, save: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """`(out, y, lse)`: out (N, C, H, W), and with `save` y (N, C, L). lse is always None: backward computes its softmax anew."""
    tokens, weights = widen(x.flatten(2)), weights.matrices()
    u = folded_queries(weights, scale, tokens)
    y = _attend_sdpa(u, tokens) if _sdpa_is_quicker(tokens) else _attend_in_chunks(u, tokens)

    w_v, b_v = output_projection(weights, tokens.dtype)
    branch = torch.baddbmm(tokens, w_v.expand(len(x), -1, -1), y) if residual else project(w_v, None, y)
    out = empty_map_like(x)
    if b_v is None:
        out.flatten(2).copy_(branch)
    else:
        torch.add(branch, b_v[:, None], out=out.flatten(2))
    return out, y.to(x.dtype) if save else None, None


def backward(
    x: Tensor,
    d_out: Tensor,
    weights: Weights,
    y: Tensor,
    lse: Tensor | None,
    scale: float,
    residual: bool,
    need_x: bool,
    need_weights: bool,
) -> tuple[Tensor | None, Moments | None]:
    """The gradient of x (N, C, H, W) and the sums that the gradients of the weights are made of, each where needed."""
    del lse
    tokens, g, y = widen(x.flatten(2)), widen(d_out.flatten(2)), widen(y)
    weights = weights.matrices()
    u = folded_queries(weights, scale, tokens)
    d_y = project(output_projection(weights, tokens.dtype)[0].mT, None, g)

    d_tokens = torch.zeros_like(tokens)
    d_u = torch.empty_like(tokens)
    centered = tokens - tokens.mean(2, keepdim=True)  # rows of dS sum to zero; what rounding leaves of that must not meet the mean
    for maps, rows, p, d_s in chunks(tokens, buffers=2):
        keys, u_chunk, d_y_chunk = tokens[maps], u[maps, :, rows], d_y[maps, :, rows]
        torch.softmax(torch.bmm(u_chunk.mT, keys, out=d_s), -1, out=p)
        d_p = torch.bmm(d_y_chunk.mT, keys, out=d_s)
        # Autograd's own softmax derivative: its Δ is summed from the p and d_p at hand, so that a saturated row cancels to zero.
        torch.ops.aten._softmax_backward_data(d_p, p, -1, p.dtype, grad_input=d_s)
        d_u[maps, :, rows] = torch.bmm(centered[maps], d_s.mT)
        if need_x:
            d_tokens[maps].baddbmm_(d_y_chunk, p).baddbmm_(u_chunk, d_s)

    d_x = None
    if need_x:
        d_tokens += gradient_through_queries(weights, scale, d_u)
        d_x = empty_map_like(x)
        if residual:
            torch.add(d_tokens, g, out=d_x.flatten(2))
        else:
            d_x.flatten(2).copy_(d_tokens)
    return d_x, moments(d_u, tokens, g, y) if need_weights else None


def widen(tokens: Tensor) -> Tensor:
    """fp16 is computed in fp32: logits leave the range of fp16 long before their softmax does."""
    return tokens.float() if tokens.dtype == torch.float16 else tokens


def folded_queries(weights: Weights, scale: float, tokens: Tensor) -> Tensor:
    """`u = scale · W_kᵀ (W_q x + b_q)` (N, C, L)."""
    dtype = tokens.dtype
    if _queries_are_thin(weights):
        bias = None if weights.b_q is None else weights.b_q.to(dtype)
        return project(scale * weights.w_k.to(dtype).mT, None, project(weights.w_q.to(dtype), bias, tokens))
    product = _product_of_projections(weights, scale, dtype)
    if weights.b_q is None:
        return project(product, None, tokens)
    wide = torch.promote_types(dtype, torch.float32)
    bias = scale * (weights.w_k.to(wide).mT @ weights.b_q.to(wide))
    return project(product, bias.to(dtype), tokens)


def gradient_through_queries(weights: Weights, scale: float, d_u: Tensor) -> Tensor:
    """What x receives from its folded queries' gradient: `scale · W_qᵀ W_k du` (N, C, L)."""
    dtype = d_u.dtype
    if _queries_are_thin(weights):
        return project(scale * weights.w_q.to(dtype).mT, None, project(weights.w_k.to(dtype), None, d_u))
    return project(_product_of_projections(weights, scale, dtype).mT, None, d_u)


def _queries_are_thin(weights: Weights) -> bool:
    """Whether to project twice, C → D → C, and not once with the product of both projections.

    Thin queries cost less that way. Over few channels the cost is nothing, and the rounding of the product would not average out.
    """
    qk_channels, channels = weights.w_q.shape
    return 2 * qk_channels < channels or channels < 16


def _product_of_projections(weights: Weights, scale: float, dtype: torch.dtype) -> Tensor:
    """`scale · W_kᵀ W_q` (C, C), multiplied in at least fp32 and rounded once."""
    wide = torch.promote_types(dtype, torch.float32)
    return (scale * (weights.w_k.to(wide).mT @ weights.w_q.to(wide))).to(dtype)


def output_projection(weights: Weights, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """`γ W_v` (C, C) and `γ b_v` (C)."""
    w_v, b_v = weights.w_v, weights.b_v
    if weights.gamma is not None:
        w_v = weights.gamma * w_v
        b_v = None if b_v is None else (weights.gamma * b_v)
    return w_v.to(dtype), None if b_v is None else b_v.to(dtype)


def project(weight: Tensor, bias: Tensor | None, tokens: Tensor) -> Tensor:
    """`W t + b` for every token: (O, C) and (N, C, L) to (N, O, L)."""
    weight = weight.expand(len(tokens), -1, -1)
    return torch.bmm(weight, tokens) if bias is None else torch.baddbmm(bias[:, None], weight, tokens)


def _sdpa_is_quicker(tokens: Tensor) -> bool:
    """Measured on the CPU; on other devices SDPA is taken where its kernels, and not its full-matrix path, accept the input."""
    channels, length = tokens.shape[1:]
    if tokens.device.type == "cpu":
        return tokens.dtype in (torch.float32, torch.float64) and length >= SDPA_MIN_TOKENS
    return tokens.dtype != torch.float64 and channels % 8 == 0 and channels <= 256


def _attend_sdpa(u: Tensor, tokens: Tensor) -> Tensor:
    """softmax(u xᵀ) x by PyTorch's kernel, which needs the last stride to be 1, or it takes its full-matrix path."""
    queries, keys = (t.transpose(1, 2).contiguous()[:, None] for t in (u, tokens))
    return scaled_dot_product_attention(queries, keys, keys, scale=1.0)[:, 0].transpose(1, 2)


def _attend_in_chunks(u: Tensor, tokens: Tensor) -> Tensor:
    """softmax(u xᵀ) x with at most SCORES_AT_ONCE scores in memory."""
    y = torch.empty_like(tokens)
    for maps, rows, logits, p in chunks(tokens, buffers=2):
        keys = tokens[maps]
        torch.softmax(torch.bmm(u[maps, :, rows].mT, keys, out=logits), -1, out=p)
        y[maps, :, rows] = torch.bmm(keys, p.mT)
    return y


def chunks(tokens: Tensor, buffers: int) -> Iterator[tuple]:
    """Walks all query rows of all maps: `(slice of maps, slice of rows, *buffers)`, the buffers (maps, rows, L) reused throughout."""
    num_maps, _, length = tokens.shape
    maps_at_once = max(1, min(num_maps, SCORES_AT_ONCE // length**2))
    rows_at_once = max(1, min(length, SCORES_AT_ONCE // (maps_at_once * length)))
    whole = [tokens.new_empty(maps_at_once, rows_at_once, length) for _ in range(buffers)]
    for map_ in range(0, num_maps, maps_at_once):
        maps = slice(map_, min(map_ + maps_at_once, num_maps))
        for row in range(0, length, rows_at_once):
            rows = slice(row, min(row + rows_at_once, length))
            yield maps, rows, *(b[: maps.stop - maps.start, : rows.stop - rows.start] for b in whole)


def moments(d_u: Tensor, tokens: Tensor, g: Tensor, y: Tensor) -> Moments:
    wide = torch.promote_types(tokens.dtype, torch.float32)
    over_tokens = ([0, 2], [0, 2])
    return Moments(
        query=torch.tensordot(d_u, tokens, over_tokens).to(wide),
        query_total=d_u.sum((0, 2), dtype=wide),
        value=torch.tensordot(g, y, over_tokens).to(wide),
        value_total=g.sum((0, 2), dtype=wide),
    )
