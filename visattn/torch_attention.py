"""`y_i = Σ_j softmax_j(q_i · k_j) v_j` on tokens in PyTorch, in memory linear in their number: by its CPU kernel, or in chunks.

Queries and keys are (N, E, L), values (N, C, L), channels before tokens, in any strides; where the map's own tokens are not the
keys, there may be another number of keys than of queries. The kernel wants the channels of a token side by side in memory, as in a
view of (N, L, C); other layouts are copied for it.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

SCORES_AT_ONCE = 1 << 22
"""Elements of the attention matrix that exist at a time. Measured on two CPU cores: larger is no quicker, smaller is slower."""

FLASH_MIN_TOKENS = 256
"""From here on PyTorch's kernel beats batched matrix products and softmax in fp32 on the CPU; at 64 tokens it loses to them."""


def flash_is_quicker(tokens: Tensor) -> bool:
    """Whether PyTorch's CPU kernel is the quicker way for queries, keys and values of this shape and dtype (N, C, L).

    Measured on two cores: in fp32 its backward pass is 1.1 (256 channels) to 1.8 times (32) as quick, in bfloat16 it is slower.
    """
    return tokens.device.type == "cpu" and tokens.dtype in (torch.float32, torch.float64) and tokens.shape[2] >= FLASH_MIN_TOKENS


def flash(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """`(y, lse)` by the CPU kernel, for q, k and v of one shape; lse (N, L) is the natural log-sum-exp of each query's logits."""
    y, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*_token_major(q, k, v), scale=1.0)
    return y[:, 0].mT, lse[:, 0]


def flash_backward(d_y: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`(d_q, d_k, d_v)` by the CPU kernel; y and lse as `flash` gave them."""
    g, q, k, v, y = _token_major(d_y, q, k, v, y)
    gradients = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(g, q, k, v, y, lse[:, None], 0.0, False, scale=1.0)
    d_q, d_k, d_v = (gradient[:, 0].mT for gradient in gradients)
    return d_q, d_k, d_v


def sdpa_takes(tokens: Tensor) -> bool:
    """Whether SDPA has kernels for queries, keys or values of this shape and dtype on a GPU, and not only its full-matrix path."""
    maps, channels, _ = tokens.shape
    fits = channels % 8 == 0 and channels <= 256 and maps < 1 << 16  # of maps their grids take no more
    return tokens.device.type != "cpu" and tokens.dtype != torch.float64 and fits


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """y by `scaled_dot_product_attention`."""
    q, k, v = _token_major(q, k, v)
    return scaled_dot_product_attention(q, k, v, scale=1.0)[:, 0].mT


def sdpa_backward(d_y: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`(d_q, d_k, d_v)` by the derivative of `scaled_dot_product_attention`, which computes y once more for it.

    By `torch.func`: within a library op, which compiled calls are, autograd records nothing.
    """
    _, pullback, *_ = torch.func.vjp(sdpa, q, k, v)
    d_q, d_k, d_v = pullback(d_y)
    return d_q, d_k, d_v


def chunked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """y by matrix products, with at most SCORES_AT_ONCE scores in memory."""
    y = torch.empty_like(v) if q.shape[2] == v.shape[2] else v.new_empty(*v.shape[:2], q.shape[2])
    for maps, rows, logits, p in chunks(q, v, buffers=2):
        torch.softmax(torch.bmm(q[maps, :, rows].mT, k[maps], out=logits), -1, out=p)
        torch.bmm(v[maps], p.mT, out=y[maps, :, rows])
    return y


def chunked_backward(d_y: Tensor, q: Tensor, k: Tensor, v: Tensor, centered_keys: Tensor, d_k: Tensor | None, d_v: Tensor | None) -> Tensor:
    """Returns d_q, and adds to d_k and d_v where given, which may be one tensor; computes its softmax anew.

    centered_keys: k less its mean over the tokens, or k if that has none. Rows of dS sum to zero, and what rounding leaves of
    that must not meet the mean.
    """
    d_q = torch.empty_like(q)
    for maps, rows, p, d_s in chunks(q, v, buffers=2):
        q_chunk, d_y_chunk = q[maps, :, rows], d_y[maps, :, rows]
        torch.softmax(torch.bmm(q_chunk.mT, k[maps], out=d_s), -1, out=p)
        d_p = torch.bmm(d_y_chunk.mT, v[maps], out=d_s)
        # Autograd's own softmax derivative: its Δ is summed from the p and d_p at hand, so that a saturated row cancels to zero.
        torch.ops.aten._softmax_backward_data(d_p, p, -1, p.dtype, grad_input=d_s)
        torch.bmm(centered_keys[maps], d_s.mT, out=d_q[maps, :, rows])
        if d_v is not None:
            d_v[maps].baddbmm_(d_y_chunk, p)
        if d_k is not None:
            d_k[maps].baddbmm_(q_chunk, d_s)
    return d_q


def chunks(queries: Tensor, keys: Tensor, buffers: int) -> Iterator[tuple]:
    """Walks all query rows of all maps: `(slice of maps, slice of rows, *buffers)`, the buffers (maps, rows, keys) reused throughout."""
    maps_at_once, rows_at_once = chunk_size(queries, keys, SCORES_AT_ONCE)
    whole = [queries.new_empty(maps_at_once, rows_at_once, keys.shape[2]) for _ in range(buffers)]
    for maps, rows in slices(queries, maps_at_once, rows_at_once):
        yield maps, rows, *(b[: maps.stop - maps.start, : rows.stop - rows.start] for b in whole)


def chunk_size(queries: Tensor, keys: Tensor, scores_at_once: int) -> tuple[int, int]:
    """How many maps, and how many rows of each, make at most so many scores; one row at least."""
    (num_maps, _, length), num_keys = queries.shape, keys.shape[2]
    maps_at_once = max(1, min(num_maps, scores_at_once // (length * num_keys)))
    return maps_at_once, max(1, min(length, scores_at_once // (maps_at_once * num_keys)))


def slices(queries: Tensor, maps_at_once: int, rows_at_once: int) -> Iterator[tuple[slice, slice]]:
    """All rows of all maps (N, E, L): slices of maps and of rows."""
    num_maps, _, length = queries.shape
    for map_ in range(0, num_maps, maps_at_once):
        for row in range(0, length, rows_at_once):
            yield slice(map_, min(map_ + maps_at_once, num_maps)), slice(row, min(row + rows_at_once, length))


def _token_major(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Each (N, E, L) as (N, 1, L, E), the last stride 1: otherwise PyTorch takes its full-matrix path."""
    return tuple(t.mT.contiguous()[:, None] for t in tensors)
