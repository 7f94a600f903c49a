"""Attention on maps of more channels than one accumulator holds. Projections are products of their own, before and after.

The folded queries u, y and their gradients exist; keys and values are the map x itself. With `P_ij = exp2(u_i · x_j - lse_i)`,
`y_i = Σ_j P_ij x_j`; backward, dy being the gradient of y, `Δ_i = dy_i · y_i` and `dS_ij = P_ij (dy_i · x_j - Δ_i)`, the folded query
receives `du_i = Σ_j dS_ij x_j`. As in attention_backward.py what rounding leaves of `Σ_j dS_ij` is taken off du, times y_i, and mends Δ
for the key and value gradient, for which the kernel of that file serves.

A program owns BLOCK_C channels of what it accumulates. Those that share a tile of tokens each compute its weights, from all channels:
two accumulators of 256 channels would not fit into registers, and handing weights over would mean writing them.

Where a few maps make too few programs to fill a chip, the forward pass splits the keys among programs, as in key_splits.py, and for the
backward pass gradient_splits.py serves.
"""

import torch
import triton
import triton.language as tl

from .alignment import empty_with_strides_of
from .attention_backward import delta_of_queries, query_gradient_of_all_keys, store_query_gradient
from .attention_forward import attend_all_keys
from .key_splits import empty_splits, merge_splits
from .launch_config import LaunchConfig, num_programs, remembered, token_splits
from .launching import Constants, launch
from .primitives import locate, store_tile, tile_offsets


@triton.jit
def wide_attention_forward_kernel(
    x_ptr, stride_xn, stride_xc, stride_xl,
    u_ptr, stride_un, stride_uc, stride_ul,
    y_ptr, stride_yn, stride_yc, stride_yl,
    lse_ptr,
    num_tokens, splits, keys_per_split,
    C: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """One program computes BLOCK_C channels of y for BLOCK_M query tokens and one split of the keys of one map.

    Queries hold scale and log2(e). x_ptr, u_ptr (N, C, L); y_ptr (N · splits, C, L); lse_ptr (N · splits, L) fp32, the base-2
    log-sum-exp of the logits. Split s of a map has the keys from s · keys_per_split on.
    """
    parts: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    row, tile = locate(tl.cdiv(num_tokens, BLOCK_M) * parts)
    n, first_key = row // splits, (row % splits).to(tl.int32) * keys_per_split
    num_keys = tl.minimum(keys_per_split, num_tokens - first_key)
    part = tile % parts
    offs_c = part * BLOCK_C + tl.arange(0, BLOCK_C)
    offs_m = tile // parts * BLOCK_M + tl.arange(0, BLOCK_M)
    x_ptr += n * stride_xn + tl.cast(first_key, tl.int64) * stride_xl
    u_ptr += n * stride_un

    acc, m_i, l_i = attend_all_keys(
        None, u_ptr, stride_uc, stride_ul, offs_m, num_tokens, x_ptr, stride_xc, stride_xl, offs_c, num_keys,
        C, BLOCK_N, BLOCK_K, False, INPUT_PRECISION,
    )  # fmt: skip

    y = (acc / l_i[:, None]).to(y_ptr.dtype.element_ty)
    y_offsets = row * stride_yn + tile_offsets(offs_c, offs_m, stride_yc, stride_yl)
    store_tile(y_ptr, y_offsets, tl.trans(y), offs_c, offs_m, C, num_tokens)
    if part == 0:
        tl.store(lse_ptr + row * num_tokens + offs_m, m_i + tl.log2(l_i), mask=offs_m < num_tokens)


@triton.jit
def wide_query_gradient_kernel(
    x_ptr, stride_xn, stride_xc, stride_xl,
    u_ptr, d_y_ptr, stride_un, stride_uc, stride_ul,
    y_ptr, d_u_ptr, stride_yn, stride_yc, stride_yl,
    lse_ptr, delta_ptr,
    num_tokens,
    C: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """One program computes BLOCK_C channels of du for BLOCK_M tokens of one map, and the first of a tile their mended Δ.

    x_ptr (N, C, L); u_ptr, d_y_ptr (N, C, L), one set of strides; y_ptr, d_u_ptr (N, C, L), one set of strides; lse_ptr (N, L) base 2;
    delta_ptr (N, L) fp32.
    """
    parts: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    n, tile = locate(tl.cdiv(num_tokens, BLOCK_M) * parts)
    part = tile % parts
    offs_c = part * BLOCK_C + tl.arange(0, BLOCK_C)
    offs_m = tile // parts * BLOCK_M + tl.arange(0, BLOCK_M)
    u_ptr += n * stride_un
    d_y_ptr += n * stride_un
    y_ptr += n * stride_yn
    lse = tl.load(lse_ptr + n * num_tokens + offs_m, mask=offs_m < num_tokens, other=0.0)
    delta = delta_of_queries(d_y_ptr, stride_uc, stride_ul, y_ptr, stride_yc, stride_yl, offs_m, num_tokens, C, BLOCK_K)
    acc, row_sum = query_gradient_of_all_keys(
        None, None, u_ptr, d_y_ptr, stride_uc, stride_ul, lse, delta, offs_m, num_tokens,
        x_ptr + n * stride_xn, stride_xc, stride_xl, offs_c, num_tokens, C, BLOCK_N, BLOCK_K, False, INPUT_PRECISION,
    )  # fmt: skip

    if part == 0:
        tl.store(delta_ptr + n * num_tokens + offs_m, delta + row_sum, mask=offs_m < num_tokens)
    d_u_ptr += n * stride_yn
    store_query_gradient(acc, row_sum, y_ptr, d_u_ptr, stride_yc, stride_yl, part * BLOCK_C, offs_m, num_tokens, C, False)


@remembered
def _constants(num_channels: int, config: LaunchConfig) -> Constants:
    return {**config.blocks(num_channels), **config.options}


def wide_attention_forward(x: torch.Tensor, u: torch.Tensor, y: torch.Tensor, lse: torch.Tensor, *, config: LaunchConfig) -> None:
    """Fills `y` (N, C, L), and `lse` (N, L) with the base-2 log-sum-exp of the logits.

    x (N, C, L) and the folded queries u (N, C, L), which hold scale and log2(e). Strides are free, lse is contiguous.
    """
    programs, num_tokens = num_programs(config.block_m, *x.shape), x.shape[2]
    splits, keys_per_split = token_splits(programs, num_tokens, config.block_n)
    split_y, split_lse = empty_splits(y, lse, splits) if splits > 1 else (y, lse)
    launch(
        wide_attention_forward_kernel, programs * splits,
        _constants(x.shape[1], config),
        x, *x.stride(),
        u, *u.stride(),
        split_y, *split_y.stride(),
        split_lse,
        num_tokens, splits, keys_per_split,
    )  # fmt: skip
    if splits > 1:
        merge_splits(split_y, split_lse, y, lse)


def wide_query_gradient(
    x: torch.Tensor, u: torch.Tensor, d_y: torch.Tensor, y: torch.Tensor, lse: torch.Tensor, *, config: LaunchConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """`(du, Δ)`: the gradient of the folded queries without log2(e) (N, C, L), and Δ (N, L), mended.

    x, u, y and lse as the forward pass took and left them; d_y (N, C, L), the gradient of y, has the strides of u.
    """
    d_u, delta = empty_with_strides_of(y), torch.empty_like(lse)
    launch(
        wide_query_gradient_kernel, num_programs(config.block_m, *x.shape),
        _constants(x.shape[1], config),
        x, *x.stride(),
        u, d_y, *u.stride(),
        y, d_u, *y.stride(),
        lse, delta,
        x.shape[2],
    )  # fmt: skip
    return d_u, delta
