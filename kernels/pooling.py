"""Maxima of windows side by side, of keys and values in one launch, less their means, and the gradients that they hand back.

A window's maximum is found again in the backward pass, where keys and values are projected again anyway: no index is kept.
"""

import torch
import triton
import triton.language as tl

from .alignment import empty_aligned
from .block_sizes import POOLING_BLOCK, POOLING_OPTIONS
from .launch_config import block_channels, num_tiles, remembered
from .launching import Constants, launch
from .primitives import locate


@triton.jit
def row_of(k_ptr, stride_k, v_ptr, stride_v, row, num_key_rows):
    """Where a row begins that is one of num_key_rows of k, or one of v after them; stride_k and stride_v apart."""
    is_key = row < num_key_rows
    return tl.where(is_key, k_ptr, v_ptr) + tl.where(is_key, row * stride_k, (row - num_key_rows) * stride_v)


@triton.jit
def window_maxima(row_ptr, offs, windows_across, inside, width, POOL: tl.constexpr):
    """The maxima of windows of POOL × POOL pixels in fp32, and where in a window each lies, row by row: what `torch.max_pool2d` takes.

    offs: their numbers, windows_across in each line of windows. A number that is none is the maximum, and of several the last.
    """
    offs_y, offs_x = offs // windows_across * POOL, offs % windows_across * POOL
    best = tl.full(offs.shape, float("-inf"), tl.float32)
    chosen = tl.zeros(offs.shape, tl.int32)
    for pixel in range(POOL * POOL):
        offsets = (offs_y + pixel // POOL).to(tl.int64) * width + offs_x + pixel % POOL
        candidate = tl.load(row_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        better = (candidate > best) | (candidate != candidate)
        best, chosen = tl.where(better, candidate, best), tl.where(better, pixel, chosen)
    return best, chosen


@triton.jit
def max_pool_kernel(
    k_ptr, stride_k, pooled_k_ptr, stride_pk,
    v_ptr, stride_v, pooled_v_ptr, stride_pv,
    shift_ptr, c_ptr,
    num_key_rows, width, windows_across, num_windows,
    POOL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program takes the maxima of all windows of one row, BLOCK at once, and takes their mean off them.

    A row is all pixels of one channel of one map: k_ptr and v_ptr, rows of maps `width` wide, stride_k and stride_v apart; pooled_k_ptr and
    pooled_v_ptr, rows of num_windows, windows_across in each line of windows; shift_ptr and c_ptr, a number in fp32 for each row of v: what
    it is less already, and with the mean of its maxima.
    """
    row = tl.program_id(0).to(tl.int64)
    row_ptr = row_of(k_ptr, stride_k, v_ptr, stride_v, row, num_key_rows)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, num_windows, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        inside = offs < num_windows
        best, _ = window_maxima(row_ptr, offs, windows_across, inside, width, POOL)
        total += tl.where(inside, best, 0.0)
    mean = tl.sum(total, 0) / num_windows

    out_ptr = row_of(pooled_k_ptr, stride_pk, pooled_v_ptr, stride_pv, row, num_key_rows)
    for start in range(0, num_windows, BLOCK):  # the row is in the cache
        offs = start + tl.arange(0, BLOCK)
        inside = offs < num_windows
        best, _ = window_maxima(row_ptr, offs, windows_across, inside, width, POOL)
        tl.store(out_ptr + offs, (best - mean).to(out_ptr.dtype.element_ty), mask=inside)
    if row >= num_key_rows:
        value_row = row - num_key_rows
        tl.store(c_ptr + value_row, tl.load(shift_ptr + value_row) + mean)


@triton.jit
def max_pool_backward_kernel(
    k_ptr, stride_k, d_pooled_k_ptr, stride_gk, d_k_ptr, stride_dk,
    v_ptr, stride_v, d_pooled_v_ptr, stride_gv, d_v_ptr, stride_dv,
    num_key_rows, height, width, windows_down, windows_across,
    POOL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program fills the pixels of BLOCK windows of one row with the gradient: at the maximum that of the window, zero elsewhere.

    Rows as above; d_pooled_k_ptr and d_pooled_v_ptr, rows of windows_down × windows_across; d_k_ptr and d_v_ptr, rows of height × width
    pixels. Pixels that fill no window are in windows over the edge, whose gradient is zero.
    """
    all_across = tl.cdiv(width, POOL)
    num_windows = tl.cdiv(height, POOL) * all_across
    row, tile = locate(tl.cdiv(num_windows, BLOCK))
    offs = tile * BLOCK + tl.arange(0, BLOCK)
    down, across = offs // all_across, offs % all_across
    pooled = (offs < num_windows) & (down < windows_down) & (across < windows_across)
    _, chosen = window_maxima(row_of(k_ptr, stride_k, v_ptr, stride_v, row, num_key_rows), offs, all_across, pooled, width, POOL)

    d_pooled_ptr = row_of(d_pooled_k_ptr, stride_gk, d_pooled_v_ptr, stride_gv, row, num_key_rows)
    d_pooled = tl.load(d_pooled_ptr + down * windows_across + across, mask=pooled, other=0.0).to(tl.float32)
    d_ptr = row_of(d_k_ptr, stride_dk, d_v_ptr, stride_dv, row, num_key_rows)
    for pixel in range(POOL * POOL):
        y, x = down * POOL + pixel // POOL, across * POOL + pixel % POOL
        d = tl.where(chosen == pixel, d_pooled, 0.0).to(d_ptr.dtype.element_ty)
        tl.store(d_ptr + y.to(tl.int64) * width + x, d, mask=(offs < num_windows) & (y < height) & (x < width))


@remembered
def _constants(pool: int, num_windows: int) -> Constants:
    return dict(POOL=pool, BLOCK=min(POOLING_BLOCK, block_channels(num_windows)), **POOLING_OPTIONS)


def max_pool(
    k: torch.Tensor, v: torch.Tensor, shift: torch.Tensor, height: int, width: int, pool: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The maxima (N, E, K) and (N, V, K) of windows of pool × pool pixels, less the mean of each row, in aligned rows, and shift (N, V) in
    fp32 with that of the values added. K = (height // pool) · (width // pool).

    k (N, E, L) and v (N, V, L) are rows with nothing between them but what `empty_aligned` leaves, L = height · width; shift is contiguous.
    """
    windows_across = width // pool
    num_windows = height // pool * windows_across
    pooled_k, pooled_v = (empty_aligned(t, (*t.shape[:2], num_windows)) for t in (k, v))
    c = torch.empty_like(shift)
    launch(
        max_pool_kernel, k.shape[0] * (k.shape[1] + v.shape[1]),
        _constants(pool, num_windows),
        k, k.stride(1), pooled_k, pooled_k.stride(1),
        v, v.stride(1), pooled_v, pooled_v.stride(1),
        shift, c,
        k.shape[0] * k.shape[1], width, windows_across, num_windows,
    )  # fmt: skip
    return pooled_k, pooled_v, c


def max_pool_backward(
    k: torch.Tensor, v: torch.Tensor, d_pooled_k: torch.Tensor, d_pooled_v: torch.Tensor, height: int, width: int, pool: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients (N, E, L) and (N, V, L) of k and v, as `max_pool` takes them, from those of their maxima, of rows like these.

    Not of the means that were taken off: attention does not depend on those.
    """
    d_k, d_v = (empty_aligned(t, t.shape) for t in (k, v))
    num_windows = num_tiles(height, pool) * num_tiles(width, pool)
    constants = _constants(pool, num_windows)
    launch(
        max_pool_backward_kernel, k.shape[0] * (k.shape[1] + v.shape[1]) * num_tiles(num_windows, constants["BLOCK"]),
        constants,
        k, k.stride(1), d_pooled_k, d_pooled_k.stride(1), d_k, d_k.stride(1),
        v, v.stride(1), d_pooled_v, d_pooled_v.stride(1), d_v, d_v.stride(1),
        k.shape[0] * k.shape[1], height, width, height // pool, width // pool,
    )  # fmt: skip
    return d_k, d_v
