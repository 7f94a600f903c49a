"""Forward where a few maps make too few programs to fill a chip: keys are split among programs, and what those find is merged.

Each program attends to its own keys. In a fixed order `y = Σ_s w_s y_s / Σ_s w_s` with `w_s = exp2(lse_s)`; the output is projected from
the merged y by a kernel of its own (output_projection.py).
"""

import torch
import triton
import triton.language as tl

from .attention_forward import attend_all_keys, attended, fold_queries
from .block_sizes import MERGE_OPTIONS, MERGE_TILE
from .launch_config import LaunchConfig, num_tiles, remembered
from .launching import Constants, launch
from .primitives import NORM_ROWS, load_tile, locate, store_sum, store_tile, tile_offsets


@triton.jit
def split_attention_forward_kernel(
    x_ptr, stride_xn, stride_xc, stride_xl,
    w_q_ptr, b_q_ptr, w_k_ptr,
    y_ptr, u_ptr, stride_yn, stride_yc, stride_yl,
    lse_ptr, norm_ptr,
    num_tokens, splits, keys_per_split, scale,
    C: tl.constexpr, D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr, INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """One program computes y for BLOCK_M query tokens and one split of the keys of one map; each folds the queries of its tile anew.

    x_ptr (N, C, L); w_q_ptr, w_k_ptr (D, C); b_q_ptr (D) or None; y_ptr (N · splits, C, L) fp32; u_ptr, of that shape and x's dtype, with
    the strides of y, where folded queries are parked, or None: in fp32 y takes their place after them; lse_ptr (N · splits, L) fp32, the
    base-2 log-sum-exp of the folded logits; norm_ptr (N, NORM_ROWS, C) or None, as in attention_forward.py. Split s of a map has the
    keys from s · keys_per_split on.
    """
    row, tile = locate(tl.cdiv(num_tokens, BLOCK_M))
    n, first_key = row // splits, (row % splits).to(tl.int32) * keys_per_split
    num_keys = tl.minimum(keys_per_split, num_tokens - first_key)
    offs_c = tl.arange(0, BLOCK_C)
    offs_m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    x_ptr += n * stride_xn
    y_ptr += row * stride_yn
    u_ptr = y_ptr if u_ptr is None else u_ptr + row * stride_yn
    if norm_ptr is not None:
        norm_ptr += n * NORM_ROWS * C

    u, offset = fold_queries(
        x_ptr, stride_xc, stride_xl, offs_m, num_tokens, w_q_ptr, b_q_ptr, w_k_ptr, scale, norm_ptr,
        u_ptr, stride_yc, stride_yl, offs_c, C, D, BLOCK_C, BLOCK_K, BLOCK_P, BLOCK_D, INPUT_PRECISION,
    )  # fmt: skip
    acc, m_i, l_i = attend_all_keys(
        u, u_ptr, stride_yc, stride_yl, offs_m, num_tokens,
        x_ptr + tl.cast(first_key, tl.int64) * stride_xl, stride_xc, stride_xl, offs_c, num_keys,
        C, BLOCK_N, BLOCK_K, BLOCK_P < BLOCK_K, INPUT_PRECISION, norm_ptr is not None,
    )  # fmt: skip
    y, lse = attended(acc, m_i, l_i, norm_ptr, offset, offs_c, C)
    tl.store(lse_ptr + row * num_tokens + offs_m, lse, mask=offs_m < num_tokens)
    if BLOCK_P < BLOCK_C:
        tl.debug_barrier()  # the folded queries have been read for the last time
    store_sum(y, None, 0, 0, y_ptr, stride_yc, stride_yl, 0, offs_m, C, num_tokens, BLOCK_K < BLOCK_C)


@triton.jit
def merge_splits_kernel(
    split_y_ptr, stride_sn, stride_sc, stride_sl,
    split_lse_ptr,
    y_ptr, stride_yn, stride_yc, stride_yl,
    lse_ptr,
    num_tokens, splits,
    C: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program merges BLOCK_C channels of BLOCK_L tokens of one map.

    split_y_ptr (N · splits, C, L) fp32; split_lse_ptr (N · splits, L) fp32, base 2; y_ptr (N, C, L); lse_ptr (N, L) fp32.
    """
    parts: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    n, tile = locate(tl.cdiv(num_tokens, BLOCK_L) * parts)
    part = tile % parts
    offs_c = part * BLOCK_C + tl.arange(0, BLOCK_C)
    offs_l = tile // parts * BLOCK_L + tl.arange(0, BLOCK_L)
    split_offsets = tile_offsets(offs_c, offs_l, stride_sc, stride_sl)
    inside = offs_l < num_tokens

    acc = tl.zeros((BLOCK_C, BLOCK_L), tl.float32)
    highest = tl.full((BLOCK_L,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_L,), tl.float32)
    for split in range(splits):
        row = n * splits + split
        lse = tl.load(split_lse_ptr + row * num_tokens + offs_l, mask=inside, other=0.0)
        y = load_tile(split_y_ptr, row * stride_sn + split_offsets, offs_c, offs_l, C, num_tokens, True)
        new_highest = tl.maximum(highest, lse)
        weight, alpha = tl.exp2(lse - new_highest), tl.exp2(highest - new_highest)
        acc = acc * alpha[None, :] + y * weight[None, :]
        total = total * alpha + weight
        highest = new_highest
    y_offsets = n * stride_yn + tile_offsets(offs_c, offs_l, stride_yc, stride_yl)
    store_tile(y_ptr, y_offsets, acc / total[None, :], offs_c, offs_l, C, num_tokens)
    if part == 0:
        tl.store(lse_ptr + n * num_tokens + offs_l, highest + tl.log2(total), mask=inside)


@remembered
def _split_constants(num_channels: int, qk_channels: int, config: LaunchConfig) -> Constants:
    return config.folded_constants(num_channels, qk_channels)


def split_attention_forward(
    x: torch.Tensor,
    w_q: torch.Tensor,
    b_q: torch.Tensor | None,
    w_k: torch.Tensor,
    y: torch.Tensor,
    lse: torch.Tensor,
    norm: torch.Tensor | None = None,
    *,
    scale: float,
    splits: int,
    keys_per_split: int,
    config: LaunchConfig,
) -> None:
    """Fills `y` (N, C, L) and `lse` (N, L) from x (N, C, L), as `attention_forward` does, in so many splits as `key_splits` says."""
    num_channels, num_tokens = x.shape[1:]
    split_y, split_lse = empty_splits(y, lse, splits)
    parks_apart = config.parks_queries(num_channels) and x.dtype != split_y.dtype
    launch(
        split_attention_forward_kernel, len(split_y) * num_tiles(num_tokens, config.block_m),
        _split_constants(num_channels, w_q.shape[0], config),
        x, *x.stride(),
        w_q, b_q, w_k,
        split_y, torch.empty_like(split_y, dtype=x.dtype) if parks_apart else None, *split_y.stride(),
        split_lse, norm,
        num_tokens, splits, keys_per_split, scale,
    )  # fmt: skip
    merge_splits(split_y, split_lse, y, lse)


def empty_splits(y: torch.Tensor, lse: torch.Tensor, splits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Uninitialised y (N · splits, C, L) and lse (N · splits, L) in fp32, dense, channels or tokens side by side as in y (N, C, L)."""
    num_maps, channels, length = y.shape
    rows, channels_last = num_maps * splits, y.stride(1) == 1
    empty = torch.empty((rows, length, channels) if channels_last else (rows, channels, length), dtype=torch.float32, device=y.device)
    return empty.mT if channels_last else empty, lse.new_empty((rows, length))


@remembered
def merge_constants(num_channels: int) -> Constants:
    """Those of the kernel that adds up gradients as well."""
    return {"C": num_channels, "BLOCK_L": MERGE_TILE, "BLOCK_C": MERGE_TILE, **MERGE_OPTIONS}


def merge_splits(split_y: torch.Tensor, split_lse: torch.Tensor, y: torch.Tensor, lse: torch.Tensor) -> None:
    """Fills `y` (N, C, L) and `lse` (N, L) from those of splits, (N · splits, C, L) and (N · splits, L)."""
    num_maps, num_channels, num_tokens = y.shape
    launch(
        merge_splits_kernel, num_maps * num_tiles(num_tokens, MERGE_TILE) * num_tiles(num_channels, MERGE_TILE),
        merge_constants(num_channels),
        split_y, *split_y.stride(),
        split_lse,
        y, *y.stride(),
        lse,
        num_tokens, len(split_y) // num_maps,
    )  # fmt: skip
