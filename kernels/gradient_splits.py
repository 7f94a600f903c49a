"""Backward where a few maps make too few programs to fill a chip, as key_splits.py forward: for maps that one program holds and wider ones.

Keys are split among programs for the query gradient, and queries for that of keys and values. What the splits leave is linear in them, so
it is added up, in a fixed order: `du = Σ_s du_s - y Σ_s Σ_j dS_ij`, which also mends Δ, and what x receives as keys and values.
"""

import torch
import triton
import triton.language as tl

from .alignment import empty_with_strides_of
from .attention_backward import (
    delta_of_queries,
    key_value_constants,
    key_value_gradient,
    key_value_gradient_of_all_queries,
    query_gradient_of_all_keys,
)
from .block_sizes import MERGE_TILE
from .key_splits import empty_splits, merge_constants
from .launch_config import LaunchConfig, Splits, Target, num_programs, num_tiles, remembered, split_config
from .launching import Constants, launch
from .primitives import load_tile, locate, store_sum, store_tile, tile_offsets


@triton.jit
def split_query_gradient_kernel(
    x_ptr, stride_xn, stride_xc, stride_xl,
    u_ptr, d_y_ptr, stride_un, stride_uc, stride_ul,
    y_ptr, stride_yn, stride_yc, stride_yl,
    d_u_ptr, stride_dn, stride_dc, stride_dl,
    lse_ptr, delta_ptr, row_sum_ptr,
    num_tokens, splits, keys_per_split,
    C: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """One program computes what one split of the keys adds to BLOCK_C channels of du, for BLOCK_M tokens of one map.

    x_ptr (N, C, L); u_ptr, d_y_ptr (N, C, L), one set of strides; y_ptr (N, C, L); d_u_ptr (N · splits, C, L) fp32, not yet less y times
    the row's Σ dS, which goes to row_sum_ptr (N · splits, L) fp32; lse_ptr (N, L) base 2; delta_ptr (N, L) fp32, written, not yet mended.
    Split s of a map has the keys from s · keys_per_split on. BLOCK_P as in `query_gradient_kernel`, and Δ is computed by
    so many channels at a time.
    """
    parts: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    row, tile = locate(tl.cdiv(num_tokens, BLOCK_M) * parts)
    n, split = row // splits, (row % splits).to(tl.int32)
    first_key = split * keys_per_split
    num_keys = tl.minimum(keys_per_split, num_tokens - first_key)
    part = tile % parts
    offs_c = part * BLOCK_C + tl.arange(0, BLOCK_C)
    offs_m = tile // parts * BLOCK_M + tl.arange(0, BLOCK_M)
    u_ptr += n * stride_un
    d_y_ptr += n * stride_un
    u_offsets = tile_offsets(offs_c, offs_m, stride_uc, stride_ul)
    u = tl.trans(load_tile(u_ptr, u_offsets, offs_c, offs_m, C, num_tokens, True))
    d_y = tl.trans(load_tile(d_y_ptr, u_offsets, offs_c, offs_m, C, num_tokens, True))
    inside = offs_m < num_tokens
    lse = tl.load(lse_ptr + n * num_tokens + offs_m, mask=inside, other=0.0)
    delta = delta_of_queries(d_y_ptr, stride_uc, stride_ul, y_ptr + n * stride_yn, stride_yc, stride_yl, offs_m, num_tokens, C, BLOCK_P)
    acc, row_sum = query_gradient_of_all_keys(
        u, d_y, u_ptr, d_y_ptr, stride_uc, stride_ul, lse, delta, offs_m, num_tokens,
        x_ptr + n * stride_xn + tl.cast(first_key, tl.int64) * stride_xl, stride_xc, stride_xl, offs_c, num_keys,
        C, BLOCK_N, BLOCK_K, BLOCK_P < BLOCK_K, INPUT_PRECISION,
    )  # fmt: skip
    if part == 0:
        tl.store(row_sum_ptr + row * num_tokens + offs_m, row_sum, mask=inside)
        if split == 0:
            tl.store(delta_ptr + n * num_tokens + offs_m, delta, mask=inside)
    d_u_ptr += row * stride_dn
    store_sum(acc, None, 0, 0, d_u_ptr, stride_dc, stride_dl, part * BLOCK_C, offs_m, C, num_tokens, BLOCK_P < BLOCK_K)


@triton.jit
def split_key_value_gradient_kernel(
    x_ptr, stride_xn, stride_xc, stride_xl,
    u_ptr, d_y_ptr, stride_un, stride_uc, stride_ul,
    lse_ptr, delta_ptr,
    d_x_ptr, stride_dn, stride_dc, stride_dl,
    num_tokens, splits, queries_per_split,
    C: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, SPARE_REGISTERS: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """One program computes what BLOCK_C channels of BLOCK_N tokens of one map receive as keys and values from one split of the queries.

    x_ptr (N, C, L); u_ptr, d_y_ptr (N, C, L), one set of strides; lse_ptr (N, L) base 2; delta_ptr (N, L), mended; d_x_ptr
    (N · splits, C, L) fp32. Split s of a map has the queries from s · queries_per_split on. SPARE_REGISTERS as in
    `key_value_gradient_kernel`.
    """
    parts: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    row, tile = locate(tl.cdiv(num_tokens, BLOCK_N) * parts)
    n, first_query = row // splits, (row % splits).to(tl.int32) * queries_per_split
    num_queries = tl.minimum(queries_per_split, num_tokens - first_query)
    first_c = tile % parts * BLOCK_C
    offs_c = first_c + tl.arange(0, BLOCK_C)
    offs_n = tile // parts * BLOCK_N + tl.arange(0, BLOCK_N)
    x_ptr += n * stride_xn
    x_offsets = tile_offsets(offs_c, offs_n, stride_xc, stride_xl)
    x_n = tl.trans(load_tile(x_ptr, x_offsets, offs_c, offs_n, C, num_tokens, True))
    step = n * stride_un + tl.cast(first_query, tl.int64) * stride_ul
    rows = n * num_tokens + first_query
    acc = key_value_gradient_of_all_queries(
        x_n, x_ptr, stride_xc, stride_xl, offs_n, num_tokens,
        u_ptr + step, d_y_ptr + step, stride_uc, stride_ul, lse_ptr + rows, delta_ptr + rows, offs_c, num_queries,
        C, BLOCK_M, BLOCK_K, SPARE_REGISTERS, INPUT_PRECISION,
    )  # fmt: skip
    d_x_ptr += row * stride_dn
    store_sum(acc, None, 0, 0, d_x_ptr, stride_dc, stride_dl, first_c, offs_n, C, num_tokens, SPARE_REGISTERS)


@triton.jit
def add_up_splits_kernel(
    split_ptr, stride_sn, stride_sc, stride_sl,
    out_ptr, stride_on, stride_oc, stride_ol,
    y_ptr, stride_yn, stride_yc, stride_yl,
    row_sum_ptr, delta_ptr,
    num_tokens, splits,
    C: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program adds up BLOCK_C channels of BLOCK_L tokens of one map: those of d_x onto what is there, those of du less a multiple of y.

    split_ptr (N · splits, C, L) fp32; out_ptr (N, C, L): d_x, or du, and then y_ptr (N, C, L), row_sum_ptr (N · splits, L) fp32, and
    delta_ptr (N, L) fp32, to be mended; they are None for d_x.
    """
    parts: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    n, tile = locate(tl.cdiv(num_tokens, BLOCK_L) * parts)
    part = tile % parts
    offs_c = part * BLOCK_C + tl.arange(0, BLOCK_C)
    offs_l = tile // parts * BLOCK_L + tl.arange(0, BLOCK_L)
    split_offsets = tile_offsets(offs_c, offs_l, stride_sc, stride_sl)
    out_offsets = n * stride_on + tile_offsets(offs_c, offs_l, stride_oc, stride_ol)
    inside = offs_l < num_tokens
    total = tl.zeros((BLOCK_C, BLOCK_L), tl.float32)
    row_sum = tl.zeros((BLOCK_L,), tl.float32)
    for split in range(splits):
        row = n * splits + split
        total += load_tile(split_ptr, row * stride_sn + split_offsets, offs_c, offs_l, C, num_tokens, True)
        if y_ptr is not None:
            row_sum += tl.load(row_sum_ptr + row * num_tokens + offs_l, mask=inside, other=0.0)
    if y_ptr is not None:
        y_offsets = n * stride_yn + tile_offsets(offs_c, offs_l, stride_yc, stride_yl)
        total -= load_tile(y_ptr, y_offsets, offs_c, offs_l, C, num_tokens, True).to(tl.float32) * row_sum[None, :]
        if part == 0:
            delta_ptr += n * num_tokens
            tl.store(delta_ptr + offs_l, tl.load(delta_ptr + offs_l, mask=inside, other=0.0) + row_sum, mask=inside)
    else:
        total += load_tile(out_ptr, out_offsets, offs_c, offs_l, C, num_tokens, True).to(tl.float32)
    store_tile(out_ptr, out_offsets, total, offs_c, offs_l, C, num_tokens)


@remembered
def _query_constants(num_channels: int, config: LaunchConfig) -> Constants:
    return {**config.blocks(num_channels), "BLOCK_P": config.query_step(num_channels), **config.options}


def split_query_gradient(
    x: torch.Tensor, u: torch.Tensor, d_y: torch.Tensor, y: torch.Tensor, lse: torch.Tensor, splits: Splits,
    *, config: LaunchConfig, target: Target,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """`(du, Δ)`: the gradient of the folded queries without log2(e) (N, C, L), and Δ (N, L), mended, in so many splits of the keys.

    x, u (with log2(e)), d_y and y (N, C, L), d_y with the strides of u; lse (N, L) base 2. config: that of the loop which is split.
    """
    config = split_config(config, target)
    d_u, delta = empty_with_strides_of(y), torch.empty_like(lse)
    split_d_u, row_sums = empty_splits(y, lse, splits.number)
    launch(
        split_query_gradient_kernel, num_programs(config.block_m, *x.shape) * splits.number,
        _query_constants(x.shape[1], config),
        x, *x.stride(),
        u, d_y, *u.stride(),
        y, *y.stride(),
        split_d_u, *split_d_u.stride(),
        lse, delta, row_sums,
        x.shape[2], *splits,
    )  # fmt: skip
    _add_up(split_d_u, d_u, y, row_sums, delta, splits)
    return d_u, delta


def key_value_gradient_in_splits(
    x: torch.Tensor, u: torch.Tensor, d_y: torch.Tensor, lse: torch.Tensor, delta: torch.Tensor, d_x: torch.Tensor, splits: Splits,
    *, config: LaunchConfig, target: Target,
) -> None:  # fmt: skip
    """`key_value_gradient` in so many splits of the queries, which may be one; delta (N, L) is mended. config: that of the unsplit loop."""
    if splits.number == 1:
        key_value_gradient(x, u, d_y, lse, delta, d_x, config=config)
        return
    config = split_config(config, target)
    split_d_x, _ = empty_splits(d_x, lse, splits.number)
    launch(
        split_key_value_gradient_kernel, num_programs(config.block_n, *x.shape) * splits.number,
        key_value_constants(x.shape[1], config),
        x, *x.stride(),
        u, d_y, *u.stride(),
        lse, delta,
        split_d_x, *split_d_x.stride(),
        x.shape[2], *splits,
    )  # fmt: skip
    _add_up(split_d_x, d_x, None, None, None, splits)


def _add_up(
    parts: torch.Tensor,
    out: torch.Tensor,
    y: torch.Tensor | None,
    row_sums: torch.Tensor | None,
    delta: torch.Tensor | None,
    splits: Splits,
) -> None:
    num_maps, num_channels, num_tokens = out.shape
    launch(
        add_up_splits_kernel, num_maps * num_tiles(num_tokens, MERGE_TILE) * num_tiles(num_channels, MERGE_TILE),
        merge_constants(num_channels),
        parts, *parts.stride(),
        out, *out.stride(),
        y, *((0, 0, 0) if y is None else y.stride()),
        row_sums, delta,
        num_tokens, splits.number,
    )  # fmt: skip
