"""Backward: the gradient of the map in three kernels, without atomics, so that repeats are bitwise equal.

With g = dOut, `dy = γ W_vᵀ g`, `Δ_i = dy_i · y_i`, `P_ij = exp(u_i · x_j - lse_i)` and `dS_ij = P_ij (dy_i · x_j - Δ_i)`:
keys and values are one tensor, so their gradients share one accumulator, `Σ_i dS_ij u_i + P_ij dy_i`; the folded query
receives `du_i = Σ_j dS_ij x_j` and hands it on to x as `scale · W_qᵀ W_k du_i`.

In exact arithmetic `Σ_j dS_ij` is zero. What it is after rounding, mostly because y is, would be multiplied by whatever
mean the map has; so the query gradient, which sees whole rows, takes `y_i Σ_j dS_ij` off again and mends Δ for the
key and value gradient, which sees only columns and therefore runs last.
"""

import torch
import triton
import triton.language as tl

from .alignment import empty_with_strides_of
from .launch_config import LaunchConfig, block_channels, num_programs, num_tiles, remembered
from .launching import Constants, launch
from .primitives import (
    LN2,
    LOG2E,
    dot_over_channels,
    gradient_of_y,
    load_tile,
    locate,
    parts_to_store,
    project_there_and_back,
    row_sums,
    store_sum,
    store_tile,
    tile_offsets,
)


@triton.jit
def prepare_backward_kernel(
    x_ptr, stride_xn, stride_xc, stride_xl,
    d_out_ptr, stride_gn, stride_gc, stride_gl,
    w_q_ptr, b_q_ptr, w_k_ptr, w_v_ptr, gamma_ptr,
    y_ptr, u_ptr, d_y_ptr, stride_yn, stride_yc, stride_yl,
    delta_ptr,
    num_tokens, scale,
    C: tl.constexpr, D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """One program computes u (times log2(e), as in the forward pass), dy and Δ of BLOCK_M tokens of one map.

    x_ptr, d_out_ptr (N, C, L); w_q_ptr, w_k_ptr (D, C); b_q_ptr (D) or None; w_v_ptr (C, C); gamma_ptr (1) or None;
    y_ptr, u_ptr, d_y_ptr (N, C, L), one set of strides; delta_ptr (N, L) fp32.
    """
    n, tile = locate(tl.cdiv(num_tokens, BLOCK_M))
    offs_c = tl.arange(0, BLOCK_C)
    offs_m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    y_offsets = n * stride_yn + tile_offsets(offs_c, offs_m, stride_yc, stride_yl)

    u = project_there_and_back(
        x_ptr + n * stride_xn, stride_xc, stride_xl, offs_m, num_tokens, w_q_ptr, b_q_ptr, w_k_ptr, scale * LOG2E,
        C, D, BLOCK_C, BLOCK_K, BLOCK_D, INPUT_PRECISION,
    )  # fmt: skip
    store_tile(u_ptr, y_offsets, tl.trans(u), offs_c, offs_m, C, num_tokens)

    d_y = gradient_of_y(
        d_out_ptr + n * stride_gn, stride_gc, stride_gl, w_v_ptr, gamma_ptr, offs_c, offs_m, num_tokens, C, C, BLOCK_D, INPUT_PRECISION
    )
    store_tile(d_y_ptr, y_offsets, d_y, offs_c, offs_m, C, num_tokens)

    y = load_tile(y_ptr, y_offsets, offs_c, offs_m, C, num_tokens, True)
    delta = tl.sum(d_y.to(tl.float32) * y.to(tl.float32), 0)
    tl.store(delta_ptr + n * num_tokens + offs_m, delta, mask=offs_m < num_tokens)


@triton.jit
def delta_of_queries(
    d_y_ptr, stride_dc, stride_dl, y_ptr, stride_yc, stride_yl, offs_m, num_queries, C: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """`Δ_i = dy_i · y_i` (BLOCK_M) for a tile of queries of d_y_ptr and y_ptr (C, num_queries), BLOCK_K channels at a time."""
    delta = tl.zeros((offs_m.shape[0],), tl.float32)
    for start_k in tl.range(0, C, BLOCK_K, num_stages=1):
        offs_k = start_k + tl.arange(0, BLOCK_K)
        d_y = load_tile(d_y_ptr, tile_offsets(offs_k, offs_m, stride_dc, stride_dl), offs_k, offs_m, C, num_queries, True)
        y = load_tile(y_ptr, tile_offsets(offs_k, offs_m, stride_yc, stride_yl), offs_k, offs_m, C, num_queries, True)
        delta += tl.sum(d_y.to(tl.float32) * y.to(tl.float32), 0)
    return delta


@triton.jit
def accumulate_query_gradient(
    acc, row_sum, u, d_y, u_ptr, d_y_ptr, stride_yc, stride_yl, lse, delta, offs_m, num_queries,
    x_ptr, stride_xc, stride_xl, offs_c, offs_n, num_keys,
    C: tl.constexpr, BLOCK_K: tl.constexpr, MASK_TOKENS: tl.constexpr, INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds what one tile of keys, x_ptr (C, BLOCK_N), gives a tile of queries: to acc (BLOCK_M, BLOCK_C), to row_sum (BLOCK_M) Σ dS.

    The queries and their gradient of y are u and d_y (BLOCK_M, BLOCK_C), or, where those are too wide to keep, lie behind
    u_ptr and d_y_ptr (C, num_queries).
    """
    offsets = tile_offsets(offs_c, offs_n, stride_xc, stride_xl)
    if C > BLOCK_K:
        logits = dot_over_channels(
            u_ptr, stride_yc, stride_yl, offs_m, num_queries, x_ptr, stride_xc, stride_xl, offs_n, num_keys, C, BLOCK_K, INPUT_PRECISION
        )
        d_p = dot_over_channels(
            d_y_ptr, stride_yc, stride_yl, offs_m, num_queries, x_ptr, stride_xc, stride_xl, offs_n, num_keys, C, BLOCK_K, INPUT_PRECISION
        )
        x = load_tile(x_ptr, offsets, offs_c, offs_n, C, num_keys, MASK_TOKENS)
    else:
        x = load_tile(x_ptr, offsets, offs_c, offs_n, C, num_keys, MASK_TOKENS)
        logits = tl.dot(u, x, input_precision=INPUT_PRECISION)
        d_p = tl.dot(d_y, x, input_precision=INPUT_PRECISION)
    d_s = tl.exp2(logits - lse[:, None]) * (d_p - delta[:, None])
    if MASK_TOKENS:
        # The weight of a key that does not exist is exp2(-lse), which may overflow: zero times it would be NaN.
        d_s = tl.where((offs_n < num_keys)[None, :], d_s, 0.0)
    rounded = d_s.to(x.dtype)
    acc = tl.dot(rounded, tl.trans(x), acc, input_precision=INPUT_PRECISION)
    return acc, row_sum + row_sums(rounded, C <= BLOCK_K)


@triton.jit
def query_gradient_of_all_keys(
    u, d_y, u_ptr, d_y_ptr, stride_uc, stride_ul, lse, delta, offs_m, num_queries, x_ptr, stride_xc, stride_xl, offs_c, num_keys,
    C: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, LAST_BY_LOOP: tl.constexpr, INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """What all keys of x_ptr (C, num_keys) give a tile of queries, as in `accumulate_query_gradient`: `(acc, row_sum)`.

    LAST_BY_LOOP as in `attend_all_keys`.
    """
    acc = tl.zeros((offs_m.shape[0], offs_c.shape[0]), tl.float32)
    row_sum = tl.zeros((offs_m.shape[0],), tl.float32)
    offs_n = tl.arange(0, BLOCK_N)
    full_keys = num_keys // BLOCK_N * BLOCK_N
    for start_n in range(0, full_keys, BLOCK_N):
        keys_ptr = x_ptr + tl.cast(start_n, tl.int64) * stride_xl
        acc, row_sum = accumulate_query_gradient(
            acc, row_sum, u, d_y, u_ptr, d_y_ptr, stride_uc, stride_ul, lse, delta, offs_m, num_queries,
            keys_ptr, stride_xc, stride_xl, offs_c, offs_n, BLOCK_N, C, BLOCK_K, False, INPUT_PRECISION,
        )  # fmt: skip
    if LAST_BY_LOOP:
        for _ in range(full_keys, num_keys, BLOCK_N):
            keys_ptr = x_ptr + tl.cast(full_keys, tl.int64) * stride_xl
            acc, row_sum = accumulate_query_gradient(
                acc, row_sum, u, d_y, u_ptr, d_y_ptr, stride_uc, stride_ul, lse, delta, offs_m, num_queries,
                keys_ptr, stride_xc, stride_xl, offs_c, offs_n, num_keys - full_keys, C, BLOCK_K, True, INPUT_PRECISION,
            )  # fmt: skip
    elif full_keys < num_keys:
        keys_ptr = x_ptr + tl.cast(full_keys, tl.int64) * stride_xl
        acc, row_sum = accumulate_query_gradient(
            acc, row_sum, u, d_y, u_ptr, d_y_ptr, stride_uc, stride_ul, lse, delta, offs_m, num_queries,
            keys_ptr, stride_xc, stride_xl, offs_c, offs_n, num_keys - full_keys, C, BLOCK_K, True, INPUT_PRECISION,
        )  # fmt: skip
    return acc, row_sum


@triton.jit
def store_query_gradient(
    acc, row_sum, y_ptr, d_u_ptr, stride_yc, stride_yl, first_c, offs_m, num_queries, C: tl.constexpr, HALVES: tl.constexpr
):  # fmt: skip
    """Writes acc (BLOCK_M, BLOCK_C) less row_sum (BLOCK_M) times y to d_u_ptr (C, num_queries), from channel first_c on.

    y_ptr (C, num_queries) has the strides of d_u_ptr. HALVES: `parts_to_store`.
    """
    parts = parts_to_store(acc, HALVES)
    for part in tl.static_range(len(parts)):
        du_part = parts[part]
        offs_c = first_c + part * du_part.shape[1] + tl.arange(0, du_part.shape[1])
        offsets = tile_offsets(offs_c, offs_m, stride_yc, stride_yl)
        y = tl.trans(load_tile(y_ptr, offsets, offs_c, offs_m, C, num_queries, True))
        d_u = (du_part - row_sum[:, None] * y.to(tl.float32)).to(y.dtype)
        store_tile(d_u_ptr, offsets, tl.trans(d_u), offs_c, offs_m, C, num_queries)
        if part + 1 < len(parts):
            tl.debug_barrier()  # or the next part would be loaded beside this one


@triton.jit
def query_gradient_kernel(
    x_ptr, stride_xn, stride_xc, stride_xl,
    d_out_ptr, stride_gn, stride_gc, stride_gl,
    u_ptr, d_y_ptr, stride_un, stride_uc, stride_ul,
    y_ptr, d_u_ptr, stride_yn, stride_yc, stride_yl,
    lse_ptr, delta_ptr, w_q_ptr, w_k_ptr,
    d_x_ptr, stride_dn, stride_dc, stride_dl,
    num_tokens, scale,
    C: tl.constexpr, D: tl.constexpr, RESIDUAL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr, INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """One program computes du of BLOCK_M tokens of one map, what reaches x through it and past it, and the mended Δ.

    x_ptr, d_out_ptr (N, C, L); u_ptr, d_y_ptr (N, C, L), one set of strides; y_ptr, d_u_ptr (N, C, L), one set of strides; lse_ptr
    (N, L) base 2; delta_ptr (N, L), read and written; w_q_ptr, w_k_ptr (D, C); d_x_ptr (N, C, L), or None where only the weights want
    a gradient. BLOCK_P channels of du are projected at a time; where that is less than BLOCK_K, registers are spared: the last tile of
    keys is taken by a loop, as in `attend_all_keys`, and results are stored in halves.
    """
    n, tile = locate(tl.cdiv(num_tokens, BLOCK_M))
    offs_c = tl.arange(0, BLOCK_C)
    offs_m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    u_ptr += n * stride_un
    d_y_ptr += n * stride_un
    u_offsets = tile_offsets(offs_c, offs_m, stride_uc, stride_ul)
    u = tl.trans(load_tile(u_ptr, u_offsets, offs_c, offs_m, C, num_tokens, True))
    d_y = tl.trans(load_tile(d_y_ptr, u_offsets, offs_c, offs_m, C, num_tokens, True))
    lse = tl.load(lse_ptr + n * num_tokens + offs_m, mask=offs_m < num_tokens, other=0.0)
    delta = tl.load(delta_ptr + n * num_tokens + offs_m, mask=offs_m < num_tokens, other=0.0)

    spare_registers: tl.constexpr = BLOCK_P < BLOCK_K
    acc, row_sum = query_gradient_of_all_keys(
        u, d_y, u_ptr, d_y_ptr, stride_uc, stride_ul, lse, delta, offs_m, num_tokens,
        x_ptr + n * stride_xn, stride_xc, stride_xl, offs_c, num_tokens, C, BLOCK_N, BLOCK_K, spare_registers, INPUT_PRECISION,
    )  # fmt: skip

    tl.store(delta_ptr + n * num_tokens + offs_m, delta + row_sum, mask=offs_m < num_tokens)
    d_u_ptr += n * stride_yn
    y_ptr += n * stride_yn
    store_query_gradient(acc, row_sum, y_ptr, d_u_ptr, stride_yc, stride_yl, 0, offs_m, num_tokens, C, spare_registers)
    if d_x_ptr is not None:
        tl.debug_barrier()  # every row of du is read back here, by other threads of this program
        d_x = project_there_and_back(
            d_u_ptr, stride_yc, stride_yl, offs_m, num_tokens, w_k_ptr, None, w_q_ptr, scale,
            C, D, BLOCK_C, BLOCK_P, BLOCK_D, INPUT_PRECISION,
        )  # fmt: skip
        store_sum(
            d_x, d_out_ptr + n * stride_gn if RESIDUAL else None, stride_gc, stride_gl,
            d_x_ptr + n * stride_dn, stride_dc, stride_dl, 0, offs_m, C, num_tokens, spare_registers,
        )  # fmt: skip


@triton.jit
def accumulate_key_value_gradient(
    acc, x_n, x_ptr, stride_xc, stride_xl, offs_n, num_keys,
    u_ptr, d_y_ptr, stride_yc, stride_yl, lse_ptr, delta_ptr, offs_c, offs_m, num_queries,
    C: tl.constexpr, BLOCK_K: tl.constexpr, MASK_TOKENS: tl.constexpr, INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds to acc (BLOCK_N, BLOCK_C) what one tile of queries, u_ptr and d_y_ptr (C, BLOCK_M), gives a tile of keys.

    The keys are x_n (BLOCK_N, BLOCK_C), or, where that is too wide to keep, lie behind x_ptr (C, num_keys).
    """
    offsets = tile_offsets(offs_c, offs_m, stride_yc, stride_yl)
    if C > BLOCK_K:
        logits = dot_over_channels(
            x_ptr, stride_xc, stride_xl, offs_n, num_keys, u_ptr, stride_yc, stride_yl, offs_m, num_queries, C, BLOCK_K, INPUT_PRECISION
        )
        d_p = dot_over_channels(
            x_ptr, stride_xc, stride_xl, offs_n, num_keys, d_y_ptr, stride_yc, stride_yl, offs_m, num_queries, C, BLOCK_K, INPUT_PRECISION
        )
        u = load_tile(u_ptr, offsets, offs_c, offs_m, C, num_queries, MASK_TOKENS)
        d_y = load_tile(d_y_ptr, offsets, offs_c, offs_m, C, num_queries, MASK_TOKENS)
    else:
        u = load_tile(u_ptr, offsets, offs_c, offs_m, C, num_queries, MASK_TOKENS)
        d_y = load_tile(d_y_ptr, offsets, offs_c, offs_m, C, num_queries, MASK_TOKENS)
        logits = tl.dot(x_n, u, input_precision=INPUT_PRECISION)
        d_p = tl.dot(x_n, d_y, input_precision=INPUT_PRECISION)
    if MASK_TOKENS:
        # A query that does not exist has an infinite lse, so each of its weights is exp2(-inf) = 0.
        lse = tl.load(lse_ptr + offs_m, mask=offs_m < num_queries, other=float("inf"))
        delta = tl.load(delta_ptr + offs_m, mask=offs_m < num_queries, other=0.0)
    else:
        lse = tl.load(lse_ptr + offs_m)
        delta = tl.load(delta_ptr + offs_m)
    p = tl.exp2(logits - lse[None, :])
    d_s = p * (d_p * LN2 - (delta * LN2)[None, :])  # u is log2(e) times too large
    acc = tl.dot(p.to(u.dtype), tl.trans(d_y), acc, input_precision=INPUT_PRECISION)
    return tl.dot(d_s.to(u.dtype), tl.trans(u), acc, input_precision=INPUT_PRECISION)


@triton.jit
def key_value_gradient_of_all_queries(
    x_n, x_ptr, stride_xc, stride_xl, offs_n, num_keys, u_ptr, d_y_ptr, stride_yc, stride_yl, lse_ptr, delta_ptr, offs_c, num_queries,
    C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, LAST_BY_LOOP: tl.constexpr, INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """What all queries, u_ptr and d_y_ptr (C, num_queries), give a tile of keys, as in `accumulate_key_value_gradient`: (BLOCK_N, BLOCK_C).

    LAST_BY_LOOP as in `attend_all_keys`.
    """
    acc = tl.zeros((offs_n.shape[0], offs_c.shape[0]), tl.float32)
    offs_m = tl.arange(0, BLOCK_M)
    full_queries = num_queries // BLOCK_M * BLOCK_M
    for start_m in range(0, full_queries, BLOCK_M):
        step = tl.cast(start_m, tl.int64) * stride_yl
        acc = accumulate_key_value_gradient(
            acc, x_n, x_ptr, stride_xc, stride_xl, offs_n, num_keys,
            u_ptr + step, d_y_ptr + step, stride_yc, stride_yl, lse_ptr + start_m, delta_ptr + start_m, offs_c, offs_m, BLOCK_M,
            C, BLOCK_K, False, INPUT_PRECISION,
        )  # fmt: skip
    if LAST_BY_LOOP:
        for _ in range(full_queries, num_queries, BLOCK_M):
            step = tl.cast(full_queries, tl.int64) * stride_yl
            acc = accumulate_key_value_gradient(
                acc, x_n, x_ptr, stride_xc, stride_xl, offs_n, num_keys,
                u_ptr + step, d_y_ptr + step, stride_yc, stride_yl, lse_ptr + full_queries, delta_ptr + full_queries, offs_c, offs_m,
                num_queries - full_queries, C, BLOCK_K, True, INPUT_PRECISION,
            )  # fmt: skip
    elif full_queries < num_queries:
        step = tl.cast(full_queries, tl.int64) * stride_yl
        acc = accumulate_key_value_gradient(
            acc, x_n, x_ptr, stride_xc, stride_xl, offs_n, num_keys,
            u_ptr + step, d_y_ptr + step, stride_yc, stride_yl, lse_ptr + full_queries, delta_ptr + full_queries, offs_c, offs_m,
            num_queries - full_queries, C, BLOCK_K, True, INPUT_PRECISION,
        )  # fmt: skip
    return acc


@triton.jit
def key_value_gradient_kernel(
    x_ptr, stride_xn, stride_xc, stride_xl,
    u_ptr, d_y_ptr, stride_yn, stride_yc, stride_yl,
    lse_ptr, delta_ptr,
    d_x_ptr, stride_dn, stride_dc, stride_dl,
    num_tokens,
    C: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, SPARE_REGISTERS: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """One program adds to d_x what BLOCK_N tokens of one map receive as keys and as values.

    x_ptr (N, C, L); u_ptr, d_y_ptr (N, C, L), one set of strides; lse_ptr (N, L) base 2; delta_ptr (N, L), mended;
    d_x_ptr (N, C, L), read and written. SPARE_REGISTERS: the last tile of queries is taken by a loop, as in `attend_all_keys`, and the
    result stored in halves.
    """
    parts: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    n, tile = locate(tl.cdiv(num_tokens, BLOCK_N) * parts)
    first_c = tile % parts * BLOCK_C
    offs_c = first_c + tl.arange(0, BLOCK_C)
    offs_n = tile // parts * BLOCK_N + tl.arange(0, BLOCK_N)
    x_ptr += n * stride_xn
    x_offsets = tile_offsets(offs_c, offs_n, stride_xc, stride_xl)
    x_n = tl.trans(load_tile(x_ptr, x_offsets, offs_c, offs_n, C, num_tokens, True))
    u_ptr += n * stride_yn
    d_y_ptr += n * stride_yn
    lse_ptr += n * num_tokens
    delta_ptr += n * num_tokens

    acc = key_value_gradient_of_all_queries(
        x_n, x_ptr, stride_xc, stride_xl, offs_n, num_tokens, u_ptr, d_y_ptr, stride_yc, stride_yl, lse_ptr, delta_ptr, offs_c, num_tokens,
        C, BLOCK_M, BLOCK_K, SPARE_REGISTERS, INPUT_PRECISION,
    )  # fmt: skip
    d_x_ptr += n * stride_dn
    store_sum(acc, d_x_ptr, stride_dc, stride_dl, d_x_ptr, stride_dc, stride_dl, first_c, offs_n, C, num_tokens, SPARE_REGISTERS)


@remembered
def _prepare_constants(num_channels: int, qk_channels: int, config: LaunchConfig) -> Constants:
    block_c = block_channels(num_channels)
    return dict(
        C=num_channels, D=qk_channels,
        BLOCK_M=config.block_m, BLOCK_C=block_c, BLOCK_K=min(config.block_k, block_c), BLOCK_D=config.block_d,
        INPUT_PRECISION=config.input_precision, **config.options,
    )  # fmt: skip


def prepare_backward(
    x: torch.Tensor,
    d_out: torch.Tensor,
    w_q: torch.Tensor,
    b_q: torch.Tensor | None,
    w_k: torch.Tensor,
    w_v: torch.Tensor,
    gamma: torch.Tensor | None,
    y: torch.Tensor,
    lse: torch.Tensor,
    *,
    scale: float,
    config: LaunchConfig,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`(u, dy, Δ)`: the folded queries with log2(e) and the gradient of y, both (N, C, L) with the strides of y, and Δ (N, L).

    x, d_out (N, C, L); `y` (N, C, L) and `lse` (N, L) as the forward pass left them; weights are contiguous.
    """
    num_maps, num_channels, num_tokens = x.shape
    u, d_y, delta = empty_with_strides_of(y), empty_with_strides_of(y), torch.empty_like(lse)
    launch(
        prepare_backward_kernel, num_maps * num_tiles(num_tokens, config.block_m),
        _prepare_constants(num_channels, w_q.shape[0], config),
        x, *x.stride(),
        d_out, *d_out.stride(),
        w_q, b_q, w_k, w_v, gamma,
        y, u, d_y, *y.stride(),
        delta,
        num_tokens, scale,
    )  # fmt: skip
    return u, d_y, delta


@remembered
def _query_constants(num_channels: int, qk_channels: int, residual: bool, config: LaunchConfig) -> Constants:
    return {**config.folded_constants(num_channels, qk_channels), "RESIDUAL": residual}


def query_gradient(
    x: torch.Tensor,
    d_out: torch.Tensor,
    u: torch.Tensor,
    d_y: torch.Tensor,
    y: torch.Tensor,
    lse: torch.Tensor,
    delta: torch.Tensor,
    w_q: torch.Tensor,
    w_k: torch.Tensor,
    d_x: torch.Tensor | None,
    *,
    scale: float,
    residual: bool,
    config: LaunchConfig,
) -> torch.Tensor:
    """The folded query's gradient du (N, C, L), without log2(e). Fills `d_x` (N, C, L), unless it is None, with what x receives through it.

    u, dy and Δ as `prepare_backward` gives them, the rest as it took it; Δ is mended. With `residual` d_x has d_out besides.
    """
    num_maps, num_channels, num_tokens = x.shape
    d_u = empty_with_strides_of(y)
    launch(
        query_gradient_kernel, num_maps * num_tiles(num_tokens, config.block_m),
        _query_constants(num_channels, w_q.shape[0], residual, config),
        x, *x.stride(),
        d_out, *d_out.stride(),
        u, d_y, *u.stride(),
        y, d_u, *y.stride(),
        lse, delta, w_q, w_k,
        d_x, *((0, 0, 0) if d_x is None else d_x.stride()),
        num_tokens, scale,
    )  # fmt: skip
    return d_u


@remembered
def key_value_constants(num_channels: int, config: LaunchConfig) -> Constants:
    """Those of the kernel whose queries are split as well."""
    return {**config.blocks(num_channels), "SPARE_REGISTERS": config.spares_registers(num_channels), **config.options}


def key_value_gradient(
    x: torch.Tensor, u: torch.Tensor, d_y: torch.Tensor, lse: torch.Tensor, delta: torch.Tensor, d_x: torch.Tensor, *, config: LaunchConfig
) -> None:
    """Adds to `d_x` (N, C, L) what x receives as keys and as values, for maps of any width.

    x, u (with log2(e)) and d_y (N, C, L), d_y with the strides of u; lse (N, L) base 2; delta (N, L), mended.
    """
    num_channels, num_tokens = x.shape[1:]
    launch(
        key_value_gradient_kernel, num_programs(config.block_n, *x.shape),
        key_value_constants(num_channels, config),
        x, *x.stride(),
        u, d_y, *u.stride(),
        lse, delta,
        d_x, *d_x.stride(),
        num_tokens,
    )  # fmt: skip
