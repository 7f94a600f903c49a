"""The production PyTorch path: any device, any floating dtype, memory linear in the number of pixels.

Like the kernels it makes no values. Three forms, of which `form_of` takes the quickest as measured: "chunks", where the folded
query meets the map itself (folding.py) a block of the matrix at a time; "flash", the same in PyTorch's CPU kernel; "projected",
where thin queries meet thin keys, in chunks.
"""

import torch
from torch import Tensor

from . import torch_attention
from .folding import NO_GRADIENTS, Gradients, Moments, Weights, weight_gradients
from .layout import empty_map_like

FoldedProjection = tuple[Tensor, Tensor | None]
"""The matrix (C, C) that takes the map to its folded queries, and what is added, (C) or None."""

PROJECTED_MIN_TOKENS = 256
"""On smaller maps attention costs little, and folded it rounds less."""

PROJECTED_MIN_CHANNELS = 128
"""Where there is the CPU kernel, which wants queries as wide as the map, thin ones pay from here on only."""


def form_of(tokens: Tensor, weights: Weights) -> str:
    """ "chunks", "flash" or "projected", for tokens (N, C, L) as `widen` gives them."""
    channels, length = tokens.shape[1:]
    flash = torch_attention.flash_is_quicker(tokens)
    thin = 4 * weights.w_q.shape[0] <= channels and length >= PROJECTED_MIN_TOKENS
    if thin and not (flash and channels < PROJECTED_MIN_CHANNELS):
        return "projected"
    return "flash" if flash else "chunks"


def keeps_lse(x: Tensor, weights: Weights) -> bool:
    """Whether `forward` saves lse for a map x (N, C, H, W)."""
    return x.dtype != torch.float16 and form_of(x.flatten(2), weights) == "flash"


def forward(x: Tensor, weights: Weights, scale: float, residual: bool, save: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """`(out, y, lse)`: out (N, C, H, W), and with `save` y (N, C, L) and, if `keeps_lse`, lse (N, L)."""
    tokens, weights = widen(x.flatten(2)), weights.matrices()
    y, lse = _attend(tokens, weights, scale)
    out = output(x, tokens, y, weights, residual)
    return out, y.to(x.dtype) if save else None, lse if save and keeps_lse(x, weights) else None


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
) -> tuple[Tensor | None, Gradients]:
    """The gradients of x (N, C, H, W) and of the weights, each where needed."""
    tokens, g, y = widen(x.flatten(2)), widen(d_out.flatten(2)), widen(y)
    parameters, weights = weights, weights.matrices()
    if lse is not None:
        tokens, g = _token_major(tokens), _token_major(g)
    d_y = project(output_projection(weights, tokens.dtype)[0].mT, None, g)

    d_k = None
    if form_of(tokens, weights) == "projected":
        d_tokens, d_q, d_k = _projected_backward(d_y, tokens, weights, scale, need_x)
    else:
        d_tokens, d_q = _folded_backward(d_y, tokens, weights, scale, y, lse, need_x)
    d_x = None
    if d_tokens is not None:
        d_x = empty_map_like(x)
        if residual:
            torch.add(d_tokens, g, out=d_x.flatten(2))
        else:
            d_x.flatten(2).copy_(d_tokens)
    return d_x, weight_gradients(parameters, moments(d_q, d_k, tokens, g, y), scale) if need_weights else NO_GRADIENTS


def output(x: Tensor, tokens: Tensor, y: Tensor, weights: Weights, residual: bool) -> Tensor:
    """`x + γ (W_v y + b_v)`, or the branch alone, as a map like x; tokens are those of x in the dtype of y."""
    w_v, b_v = output_projection(weights, tokens.dtype)
    out = empty_map_like(x)
    if residual and _copies_of_weights_cost(tokens):
        torch.add(project(w_v, b_v, y), tokens, out=out.flatten(2))
        return out
    branch = torch.baddbmm(tokens, w_v.expand(len(x), -1, -1), y) if residual else torch.bmm(w_v.expand(len(x), -1, -1), y)
    if b_v is None:
        out.flatten(2).copy_(branch)
    else:
        torch.add(branch, b_v[:, None], out=out.flatten(2))
    return out


def _attend(tokens: Tensor, weights: Weights, scale: float) -> tuple[Tensor, Tensor | None]:
    """`(y, lse)`: what each token takes from the map (N, C, L), and, in the form "flash", lse (N, L) of its keys less their mean."""
    form = form_of(tokens, weights)
    if form == "projected":
        return torch_attention.chunked(*_thin_queries_and_keys(tokens, weights, scale), tokens), None
    if form == "flash":
        tokens = _token_major(tokens)
        mean = tokens.mean(2, keepdim=True)
        keys = tokens - mean
        y, lse = torch_attention.flash(folded_queries(weights, scale, tokens), keys, keys)
        return y + mean, lse
    u = folded_queries(weights, scale, tokens)
    if torch_attention.sdpa_takes(tokens):
        return torch_attention.sdpa(u, tokens, tokens), None
    return torch_attention.chunked(u, tokens, tokens), None


def _folded_backward(
    d_y: Tensor, tokens: Tensor, weights: Weights, scale: float, y: Tensor, lse: Tensor | None, need_x: bool
) -> tuple[Tensor | None, Tensor]:
    """`(d_tokens, d_u)`: what the map (N, C, L) receives as keys, values and queries, and the folded query's gradient."""
    product = None if queries_are_thin(weights) else folded_projection(weights, scale, tokens.dtype)
    u, mean = folded_queries(weights, scale, tokens, product), tokens.mean(2, keepdim=True)
    keys = tokens - mean
    if lse is not None:
        # Softmax drops the mean of the keys, and its derivative that of the values: rounding cannot meet either.
        d_u, d_k, d_v = torch_attention.flash_backward(d_y, u, keys, keys, y - mean, lse)
        d_tokens = d_k.add_(d_v)
    else:
        d_tokens = torch.zeros_like(tokens)
        received = d_tokens if need_x else None
        d_u = torch_attention.chunked_backward(d_y, u, tokens, tokens, keys, received, received)
    if not need_x:
        return None, d_u
    return d_tokens.add_(gradient_through_queries(weights, scale, d_u, product)), d_u


def _projected_backward(d_y: Tensor, tokens: Tensor, weights: Weights, scale: float, need_x: bool) -> tuple[Tensor | None, Tensor, Tensor]:
    """`(d_tokens, d_q, d_k)`: what the map (N, C, L) receives, and the gradients of thin queries and keys (N, D, L)."""
    q, k = _thin_queries_and_keys(tokens, weights, scale)
    d_tokens, d_k = torch.zeros_like(tokens) if need_x else None, torch.zeros_like(k)
    d_q = torch_attention.chunked_backward(d_y, q, k, tokens, k, d_k, d_tokens)
    if d_tokens is not None:
        d_tokens += project(scale * weights.w_q.to(q.dtype).mT, None, d_q)
        d_tokens += project(weights.w_k.to(q.dtype).mT, None, d_k)
    return d_tokens, d_q, d_k


def _thin_queries_and_keys(tokens: Tensor, weights: Weights, scale: float) -> tuple[Tensor, Tensor]:
    """`scale · (W_q x + b_q)` and `W_k x` less its mean over the map, which softmax drops; each (N, D, L)."""
    dtype = tokens.dtype
    w_k, bias = weights.w_k.to(dtype), None if weights.b_q is None else scale * weights.b_q.to(dtype)
    mean = w_k @ tokens.mean(2, keepdim=True)
    return project(scale * weights.w_q.to(dtype), bias, tokens), torch.baddbmm(-mean, w_k.expand(len(tokens), -1, -1), tokens)


def widen(tokens: Tensor) -> Tensor:
    """fp16 is computed in fp32: logits leave the range of fp16 long before their softmax does."""
    return tokens.float() if tokens.dtype == torch.float16 else tokens


def folded_queries(weights: Weights, scale: float, tokens: Tensor, product: FoldedProjection | None = None) -> Tensor:
    """`u = scale · W_kᵀ (W_q x + b_q)` (N, C, L). product: `folded_projection` of the same scale, if at hand."""
    dtype = tokens.dtype
    if queries_are_thin(weights):
        bias = None if weights.b_q is None else weights.b_q.to(dtype)
        return project(scale * weights.w_k.to(dtype).mT, None, project(weights.w_q.to(dtype), bias, tokens))
    return project(*(product or folded_projection(weights, scale, dtype)), tokens)


def gradient_through_queries(weights: Weights, scale: float, d_u: Tensor, product: FoldedProjection | None = None) -> Tensor:
    """What x receives from its folded queries' gradient: `scale · W_qᵀ W_k du` (N, C, L). product: as for `folded_queries`."""
    dtype = d_u.dtype
    if queries_are_thin(weights):
        return project(scale * weights.w_q.to(dtype).mT, None, project(weights.w_k.to(dtype), None, d_u))
    matrix, _ = product or folded_projection(weights, scale, dtype)
    return project(matrix.mT, None, d_u)


def queries_are_thin(weights: Weights) -> bool:
    """Whether to project twice, C → D → C, and not once with the product of both projections.

    Thin queries cost less that way. Over few channels the cost is nothing, and the rounding of the product would not average out.
    """
    qk_channels, channels = weights.w_q.shape
    return 2 * qk_channels < channels or channels < 16


def folded_projection(weights: Weights, scale: float, dtype: torch.dtype) -> FoldedProjection:
    """`scale · W_kᵀ W_q` (C, C) and `scale · W_kᵀ b_q` (C), multiplied in at least fp32 and rounded once."""
    wide = torch.promote_types(dtype, torch.float32)
    w_q, b_q, w_k = (None if w is None else w.to(wide) for w in weights[:3])
    assert w_q is not None
    assert w_k is not None
    return (scale * (w_k.mT @ w_q)).to(dtype), None if b_q is None else (scale * (w_k.mT @ b_q)).to(dtype)


def output_projection(weights: Weights, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """`γ W_v` (C, C) and `γ b_v` (C)."""
    w_v, b_v = weights.w_v, weights.b_v
    if weights.gamma is not None:
        gamma = weights.gamma.reshape(1)
        w_v = gamma * w_v
        b_v = None if b_v is None else gamma * b_v
    return w_v.to(dtype), None if b_v is None else b_v.to(dtype)


def project(weight: Tensor, bias: Tensor | None, tokens: Tensor) -> Tensor:
    """`W t + b` for every token: (O, C) and (N, C, L) to (N, O, L), token by token in memory if tokens are."""
    if tokens.mT.is_contiguous():
        return torch.nn.functional.linear(tokens.mT, weight, bias).mT
    if _copies_of_weights_cost(tokens):
        return torch.nn.functional.conv1d(tokens, weight[:, :, None], bias)
    weight = weight.expand(len(tokens), -1, -1)
    return torch.bmm(weight, tokens) if bias is None else torch.baddbmm(bias[:, None], weight, tokens)


def _copies_of_weights_cost(tokens: Tensor) -> bool:
    """Whether to use no batched product with one weight for all maps: in bf16 on the CPU each map gets a copy of the weight.

    Measured on two cores: where the maps are no larger than that, copies took 28 % of a training step.
    """
    return tokens.dtype == torch.bfloat16 and tokens.device.type == "cpu" and tokens.shape[2] <= tokens.shape[1]


def moments(d_q: Tensor, d_k: Tensor | None, tokens: Tensor, g: Tensor, y: Tensor) -> Moments:
    """The sums over all tokens of all maps that the weights' gradients are made of; d_k only where there are keys."""
    wide = torch.promote_types(tokens.dtype, torch.float32)

    def products(a: Tensor, b: Tensor) -> Tensor:
        no_more_than_scores = len(a) * a.shape[1] * b.shape[1] <= torch_attention.SCORES_AT_ONCE
        if no_more_than_scores and not _copies_of_weights_cost(tokens):
            return torch.bmm(a, b.mT).sum(0, dtype=wide)
        return torch.tensordot(a, b, ([0, 2], [0, 2])).to(wide)

    # Gradients of keys sum to zero but for rounding, which is kept from meeting the mean of the map.
    key = None if d_k is None else products(d_k, tokens - tokens.mean(2, keepdim=True))
    return Moments(products(d_q, tokens), _total(d_q, wide), products(g, y), _total(g, wide), key)


def _total(tokens: Tensor, wide: torch.dtype) -> Tensor:
    """The sum over all tokens of all maps (C). Summed with `wide` from the start, PyTorch would copy 16 bits to it, six times as slow."""
    return tokens.sum(2).sum(0, dtype=wide)


def _token_major(tokens: Tensor) -> Tensor:
    """(N, C, L) with the channels of a token side by side in memory."""
    return tokens.mT.contiguous().mT
