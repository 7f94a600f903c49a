"""Attention on tokens in PyTorch: queries (B, E, L), keys (B, E, K) and values (B, V, K), heads folded into B.

Keys and values are computed with less their means: softmax drops the one, the weights of a row sum to one for the other, and
rounding cannot meet either. Memory is linear in the number of tokens.
"""

import torch
from torch import Tensor

from . import torch_attention
from .torch_backend import widen


def form_of(q: Tensor, v: Tensor) -> str:
    """Who computes: "sdpa" or "flash" of PyTorch's kernels, or "chunks"."""
    if torch_attention.sdpa_takes(q) and torch_attention.sdpa_takes(v):
        return "sdpa"
    return "flash" if torch_attention.flash_is_quicker(widen(q)) and q.shape[1] == v.shape[1] else "chunks"


def keeps_lse(q: Tensor, v: Tensor) -> bool:
    """Whether `forward` gives lse."""
    return q.dtype != torch.float16 and form_of(q, v) == "flash"


def forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor | None]:
    """`(y, lse)`: y (B, V, L) in q's dtype, and if `keeps_lse` lse (B, L) of the logits with centred keys."""
    operands, mean = _operands(q, k, v, scale)
    form, lse = form_of(q, v), None
    if form == "flash":
        y, lse = torch_attention.flash(*operands)
    else:
        y = torch_attention.sdpa(*operands) if form == "sdpa" else torch_attention.chunked(*operands)
    return (y + mean).to(q.dtype), lse if keeps_lse(q, v) else None


def backward(
    d_y: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor | None, lse: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """`(d_q, d_k, d_v)`, each in the dtype of q; y and lse as `forward` gave them, or both None."""
    (queries, keys, values), mean = _operands(q, k, v, scale)
    g = widen(d_y)
    if y is not None and lse is not None:
        d_q, d_k, d_v = torch_attention.flash_backward(g, queries, keys, values, y - mean, lse)
    elif form_of(q, v) == "sdpa":
        d_q, d_k, d_v = torch_attention.sdpa_backward(g, queries, keys, values)
    else:
        d_k, d_v = torch.zeros_like(keys), torch.zeros_like(values)
        d_q = torch_attention.chunked_backward(g, queries, keys, values, keys, d_k, d_v)
    return (scale * d_q).to(q.dtype), d_k.to(q.dtype), d_v.to(q.dtype)


def _operands(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """`(scale · q, k less its mean, v less its mean)`, and the mean of v (B, V, 1)."""
    q, k, v = widen(q), widen(k), widen(v)
    mean = v.mean(2, keepdim=True)
    return (scale * q, k - k.mean(2, keepdim=True), v - mean), mean
