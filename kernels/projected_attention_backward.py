"""Backward with projected queries and keys, in three kernels, without atomics, so that repeats are bitwise equal.

With g = dOut, `dy = γ W_vᵀ g`, `Δ_i = dy_i · y_i`, `P_ij = exp(q_i · k_j - lse_i)` and `dS_ij = P_ij (dy_i · v_j - Δ_i)`, scale being
part of q: `dq_i = Σ_j dS_ij k_j`, `dk_j = Σ_i dS_ij q_i` and `dv_j = Σ_i P_ij dy_i`. Where keys and values come from the map that is
attended to, `dx = g + scale · W_qᵀ dq + W_kᵀ dk + dv`.

As in attention_backward.py what is left of `Σ_j dS_ij` after rounding would be multiplied by the mean of the keys; so the query
gradient takes `k̄_i Σ_j dS_ij` off again, `k̄_i = Σ_j P_ij k_j` being W_k y_i, and mends Δ for the key and value gradient.
"""

import torch
import triton
import triton.language as tl

from .alignment import empty_with_strides_of
from .launch_config import LaunchConfig, ProjectedConfigs, block_channels, num_tiles, remembered
from .launching import Constants, launch
from .primitives import (
    LN2,
    dot_over_channels,
    gradient_of_y,
    load_tile,
    locate,
    project_back,
    project_tile,
    row_sums,
    store_tile,
    tile_offsets,
)


@triton.jit
def prepare_projected_backward_kernel(
    d_out_ptr, stride_gn, stride_gc, stride_gl,
    y_ptr, d_y_ptr, stride_yn, stride_yc, stride_yl,
    mean_k_ptr, stride_qn, stride_qd, stride_ql,
    w_k_ptr, w_v_ptr, gamma_ptr,
    delta_ptr,
    num_queries,
    C: tl.constexpr, C_V: tl.constexpr, D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_CV: tl.constexpr, BLOCK_R: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """One program computes dy, Δ and the mean of the keys, each query's own, of BLOCK_M query tokens of one map.

    d_out_ptr (N, C, L); y_ptr, d_y_ptr (N, C_V, L), one set of strides; mean_k_ptr (N, D, L); w_k_ptr (D, C_V); w_v_ptr (C, C_V);
    gamma_ptr (1) or None; delta_ptr (N, L) fp32.
    """
    n, tile = locate(tl.cdiv(num_queries, BLOCK_M))
    offs_cv = tl.arange(0, BLOCK_CV)
    offs_m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    y_offsets = n * stride_yn + tile_offsets(offs_cv, offs_m, stride_yc, stride_yl)
    d_y = gradient_of_y(
        d_out_ptr + n * stride_gn, stride_gc, stride_gl, w_v_ptr, gamma_ptr, offs_cv, offs_m, num_queries, C, C_V, BLOCK_R, INPUT_PRECISION
    )
    store_tile(d_y_ptr, y_offsets, d_y, offs_cv, offs_m, C_V, num_queries)
    y = load_tile(y_ptr, y_offsets, offs_cv, offs_m, C_V, num_queries, True)
    delta = tl.sum(d_y.to(tl.float32) * y.to(tl.float32), 0)
    tl.store(delta_ptr + n * num_queries + offs_m, delta, mask=offs_m < num_queries)
    project_tile(
        y, w_k_ptr, None, None, mean_k_ptr + n * stride_qn, stride_qd, stride_ql, offs_cv, offs_m, num_queries,
        C_V, D, BLOCK_R, INPUT_PRECISION,
    )  # fmt: skip


@triton.jit
def accumulate_projected_query_gradient(
    acc, row_sum, q, d_y, q_ptr, stride_qd, stride_ql, d_y_ptr, stride_yc, stride_yl, lse, delta, offs_m, num_queries,
    k_ptr, stride_kd, stride_kl, v_ptr, stride_vc, stride_vl, offs_d, offs_cv, offs_n, num_keys,
    D: tl.constexpr, C_V: tl.constexpr, BLOCK_K: tl.constexpr, MASK_TOKENS: tl.constexpr, INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds what one tile of keys, k_ptr (D, BLOCK_N) and v_ptr (C_V, BLOCK_N), gives a tile of queries: to acc (BLOCK_M, BLOCK_D),
    to row_sum (BLOCK_M) Σ dS.

    The queries are q (BLOCK_M, BLOCK_D) and their gradient of y is d_y (BLOCK_M, BLOCK_CV), or, each where it is wider than
    BLOCK_K, lie behind q_ptr (D, num_queries) and d_y_ptr (C_V, num_queries).
    """
    k = load_tile(k_ptr, tile_offsets(offs_d, offs_n, stride_kd, stride_kl), offs_d, offs_n, D, num_keys, MASK_TOKENS)
    if offs_d.shape[0] > BLOCK_K:
        logits = dot_over_channels(
            q_ptr, stride_qd, stride_ql, offs_m, num_queries, k_ptr, stride_kd, stride_kl, offs_n, num_keys, D, BLOCK_K, INPUT_PRECISION
        )
    else:
        logits = tl.dot(q, k, input_precision=INPUT_PRECISION)
    if offs_cv.shape[0] > BLOCK_K:
        d_p = dot_over_channels(
            d_y_ptr, stride_yc, stride_yl, offs_m, num_queries, v_ptr, stride_vc, stride_vl, offs_n, num_keys, C_V, BLOCK_K, INPUT_PRECISION
        )
    else:
        v = load_tile(v_ptr, tile_offsets(offs_cv, offs_n, stride_vc, stride_vl), offs_cv, offs_n, C_V, num_keys, MASK_TOKENS)
        d_p = tl.dot(d_y, v, input_precision=INPUT_PRECISION)
    d_s = tl.exp2(logits - lse[:, None]) * (d_p - delta[:, None])
    if MASK_TOKENS:
        # The weight of a key that does not exist is exp2(-lse), which may overflow: zero times it would be NaN.
        d_s = tl.where((offs_n < num_keys)[None, :], d_s, 0.0)
    rounded = d_s.to(k.dtype)
    acc = tl.dot(rounded, tl.trans(k), acc, input_precision=INPUT_PRECISION)
    return acc, row_sum + row_sums(rounded, offs_cv.shape[0] <= BLOCK_K)


@triton.jit
def projected_query_gradient_kernel(
    q_ptr, mean_k_ptr, d_q_ptr, stride_qn, stride_qd, stride_ql,
    k_ptr, stride_kn, stride_kd, stride_kl,
    v_ptr, stride_vn, stride_vc, stride_vl,
    d_y_ptr, stride_yn, stride_yc, stride_yl,
    lse_ptr, delta_ptr,
    d_out_ptr, stride_gn, stride_gc, stride_gl,
    w_q_ptr, d_x_ptr, stride_dn, stride_dc, stride_dl,
    num_queries, num_keys, scale,
    C: tl.constexpr, C_V: tl.constexpr, D: tl.constexpr, RESIDUAL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_CV: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """One program computes dq of BLOCK_M query tokens of one map, what reaches x through it and past it, and the mended Δ.

    q_ptr, mean_k_ptr, d_q_ptr (N, D, L), one set of strides; k_ptr (N, D, Lk); v_ptr (N, C_V, Lk); d_y_ptr (N, C_V, L); lse_ptr
    (N, L) base 2; delta_ptr (N, L), read and written; d_out_ptr (N, C, L); w_q_ptr (D, C); d_x_ptr (N, C, L), or None where x wants
    no gradient. L is num_queries, Lk num_keys. dq is the gradient of the query with scale and without log2(e).
    """
    n, tile = locate(tl.cdiv(num_queries, BLOCK_M))
    offs_d = tl.arange(0, BLOCK_D)
    offs_cv = tl.arange(0, BLOCK_CV)
    offs_m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    q_ptr += n * stride_qn
    d_q_ptr += n * stride_qn
    k_ptr += n * stride_kn
    v_ptr += n * stride_vn
    d_y_ptr += n * stride_yn
    q_offsets = tile_offsets(offs_d, offs_m, stride_qd, stride_ql)
    q = tl.trans(load_tile(q_ptr, q_offsets, offs_d, offs_m, D, num_queries, True))
    d_y = tl.trans(load_tile(d_y_ptr, tile_offsets(offs_cv, offs_m, stride_yc, stride_yl), offs_cv, offs_m, C_V, num_queries, True))
    lse = tl.load(lse_ptr + n * num_queries + offs_m, mask=offs_m < num_queries, other=0.0)
    delta = tl.load(delta_ptr + n * num_queries + offs_m, mask=offs_m < num_queries, other=0.0)

    offs_n = tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)
    full_keys = num_keys // BLOCK_N * BLOCK_N
    for start_n in range(0, full_keys, BLOCK_N):
        first = tl.cast(start_n, tl.int64)
        acc, row_sum = accumulate_projected_query_gradient(
            acc, row_sum, q, d_y, q_ptr, stride_qd, stride_ql, d_y_ptr, stride_yc, stride_yl, lse, delta, offs_m, num_queries,
            k_ptr + first * stride_kl, stride_kd, stride_kl, v_ptr + first * stride_vl, stride_vc, stride_vl,
            offs_d, offs_cv, offs_n, BLOCK_N, D, C_V, BLOCK_K, False, INPUT_PRECISION,
        )  # fmt: skip
    if full_keys < num_keys:
        first = tl.cast(full_keys, tl.int64)
        acc, row_sum = accumulate_projected_query_gradient(
            acc, row_sum, q, d_y, q_ptr, stride_qd, stride_ql, d_y_ptr, stride_yc, stride_yl, lse, delta, offs_m, num_queries,
            k_ptr + first * stride_kl, stride_kd, stride_kl, v_ptr + first * stride_vl, stride_vc, stride_vl,
            offs_d, offs_cv, offs_n, num_keys - full_keys, D, C_V, BLOCK_K, True, INPUT_PRECISION,
        )  # fmt: skip

    tl.store(delta_ptr + n * num_queries + offs_m, delta + row_sum, mask=offs_m < num_queries)
    mean_k = tl.trans(load_tile(mean_k_ptr + n * stride_qn, q_offsets, offs_d, offs_m, D, num_queries, True))
    d_q = acc - row_sum[:, None] * mean_k.to(tl.float32)
    store_tile(d_q_ptr, q_offsets, tl.trans(d_q), offs_d, offs_m, D, num_queries)
    if d_x_ptr is not None:
        tl.debug_barrier()  # every row of dq is read back here, by other threads of this program
        offs_c = tl.arange(0, BLOCK_C)
        d_x = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
        d_x = project_back(d_x, d_q_ptr, stride_qd, stride_ql, w_q_ptr, offs_c, offs_m, num_queries, C, D, BLOCK_R, INPUT_PRECISION)
        d_x = tl.trans(d_x * scale)
        if RESIDUAL:
            d_out_offsets = n * stride_gn + tile_offsets(offs_c, offs_m, stride_gc, stride_gl)
            d_x += load_tile(d_out_ptr, d_out_offsets, offs_c, offs_m, C, num_queries, True)
        d_x_offsets = n * stride_dn + tile_offsets(offs_c, offs_m, stride_dc, stride_dl)
        store_tile(d_x_ptr, d_x_offsets, d_x, offs_c, offs_m, C, num_queries)


@triton.jit
def accumulate_projected_key_value_gradient(
    d_k, d_v, k, v, k_ptr, stride_kd, stride_kl, v_ptr, stride_vc, stride_vl, offs_n, num_keys,
    q_ptr, stride_qd, stride_ql, d_y_ptr, stride_yc, stride_yl, lse_ptr, delta_ptr, offs_d, offs_cv, offs_m, num_queries,
    D: tl.constexpr, C_V: tl.constexpr, VALUES: tl.constexpr, BLOCK_K: tl.constexpr, MASK_TOKENS: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds to d_k (BLOCK_N, BLOCK_D), and with VALUES to d_v (BLOCK_N, BLOCK_CV), what one tile of queries gives a tile of keys.

    The queries lie behind q_ptr (D, BLOCK_M) and d_y_ptr (C_V, BLOCK_M). The keys are k (BLOCK_N, BLOCK_D) and v (BLOCK_N,
    BLOCK_CV), or, each where it is wider than BLOCK_K, lie behind k_ptr (D, num_keys) and v_ptr (C_V, num_keys).
    """
    q = load_tile(q_ptr, tile_offsets(offs_d, offs_m, stride_qd, stride_ql), offs_d, offs_m, D, num_queries, MASK_TOKENS)
    if offs_d.shape[0] > BLOCK_K:
        logits = dot_over_channels(
            k_ptr, stride_kd, stride_kl, offs_n, num_keys, q_ptr, stride_qd, stride_ql, offs_m, num_queries, D, BLOCK_K, INPUT_PRECISION
        )
    else:
        logits = tl.dot(k, q, input_precision=INPUT_PRECISION)
    d_y_offsets = tile_offsets(offs_cv, offs_m, stride_yc, stride_yl)
    if offs_cv.shape[0] > BLOCK_K:
        d_p = dot_over_channels(
            v_ptr, stride_vc, stride_vl, offs_n, num_keys, d_y_ptr, stride_yc, stride_yl, offs_m, num_queries, C_V, BLOCK_K, INPUT_PRECISION
        )
        d_y = load_tile(d_y_ptr, d_y_offsets, offs_cv, offs_m, C_V, num_queries, MASK_TOKENS)
    else:
        d_y = load_tile(d_y_ptr, d_y_offsets, offs_cv, offs_m, C_V, num_queries, MASK_TOKENS)
        d_p = tl.dot(v, d_y, input_precision=INPUT_PRECISION)
    if MASK_TOKENS:
        # A query that does not exist has an infinite lse, so each of its weights is exp2(-inf) = 0.
        lse = tl.load(lse_ptr + offs_m, mask=offs_m < num_queries, other=float("inf"))
        delta = tl.load(delta_ptr + offs_m, mask=offs_m < num_queries, other=0.0)
    else:
        lse = tl.load(lse_ptr + offs_m)
        delta = tl.load(delta_ptr + offs_m)
    p = tl.exp2(logits - lse[None, :])
    d_s = p * (d_p * LN2 - (delta * LN2)[None, :])  # q is log2(e) times too large
    # Keys first: the last product decides how the warps divide the tiles, and thin keys would give all of them the same columns.
    d_k = tl.dot(d_s.to(q.dtype), tl.trans(q), d_k, input_precision=INPUT_PRECISION)
    if VALUES:
        d_v = tl.dot(p.to(q.dtype), tl.trans(d_y), d_v, input_precision=INPUT_PRECISION)
    return d_k, d_v


@triton.jit
def projected_key_value_gradient_kernel(
    q_ptr, stride_qn, stride_qd, stride_ql,
    k_ptr, d_k_ptr, stride_kn, stride_kd, stride_kl,
    v_ptr, stride_vn, stride_vc, stride_vl,
    d_y_ptr, stride_yn, stride_yc, stride_yl,
    lse_ptr, delta_ptr, w_k_ptr,
    d_x_ptr, stride_dn, stride_dc, stride_dl,
    num_queries, num_keys,
    C_V: tl.constexpr, D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_CV: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """One program computes dk of BLOCK_N key tokens of one map, and adds to d_x what they receive as keys and as values.

    q_ptr (N, D, L); k_ptr, d_k_ptr (N, D, Lk), one set of strides; v_ptr (N, C_V, Lk); d_y_ptr (N, C_V, L); lse_ptr (N, L) base 2;
    delta_ptr (N, L), mended; w_k_ptr (D, C_V); d_x_ptr (N, C_V, Lk), read and written, or None where x wants no gradient. L is
    num_queries, Lk num_keys.
    """
    n, tile = locate(tl.cdiv(num_keys, BLOCK_N))
    offs_d = tl.arange(0, BLOCK_D)
    offs_cv = tl.arange(0, BLOCK_CV)
    offs_n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    q_ptr += n * stride_qn
    k_ptr += n * stride_kn
    v_ptr += n * stride_vn
    d_y_ptr += n * stride_yn
    lse_ptr += n * num_queries
    delta_ptr += n * num_queries
    k_offsets = tile_offsets(offs_d, offs_n, stride_kd, stride_kl)
    k = tl.trans(load_tile(k_ptr, k_offsets, offs_d, offs_n, D, num_keys, True))
    v = tl.trans(load_tile(v_ptr, tile_offsets(offs_cv, offs_n, stride_vc, stride_vl), offs_cv, offs_n, C_V, num_keys, True))

    offs_m = tl.arange(0, BLOCK_M)
    d_k = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    d_v = tl.zeros((BLOCK_N, BLOCK_CV), tl.float32)
    full_queries = num_queries // BLOCK_M * BLOCK_M
    for start_m in range(0, full_queries, BLOCK_M):
        first = tl.cast(start_m, tl.int64)
        d_k, d_v = accumulate_projected_key_value_gradient(
            d_k, d_v, k, v, k_ptr, stride_kd, stride_kl, v_ptr, stride_vc, stride_vl, offs_n, num_keys,
            q_ptr + first * stride_ql, stride_qd, stride_ql, d_y_ptr + first * stride_yl, stride_yc, stride_yl,
            lse_ptr + start_m, delta_ptr + start_m, offs_d, offs_cv, offs_m, BLOCK_M,
            D, C_V, d_x_ptr is not None, BLOCK_K, False, INPUT_PRECISION,
        )  # fmt: skip
    if full_queries < num_queries:
        first = tl.cast(full_queries, tl.int64)
        d_k, d_v = accumulate_projected_key_value_gradient(
            d_k, d_v, k, v, k_ptr, stride_kd, stride_kl, v_ptr, stride_vc, stride_vl, offs_n, num_keys,
            q_ptr + first * stride_ql, stride_qd, stride_ql, d_y_ptr + first * stride_yl, stride_yc, stride_yl,
            lse_ptr + full_queries, delta_ptr + full_queries, offs_d, offs_cv, offs_m, num_queries - full_queries,
            D, C_V, d_x_ptr is not None, BLOCK_K, True, INPUT_PRECISION,
        )  # fmt: skip

    d_k_ptr += n * stride_kn
    store_tile(d_k_ptr, k_offsets, tl.trans(d_k), offs_d, offs_n, D, num_keys)
    if d_x_ptr is not None:
        tl.debug_barrier()  # every row of dk is read back here, by other threads of this program
        d_x = tl.trans(
            project_back(d_v, d_k_ptr, stride_kd, stride_kl, w_k_ptr, offs_cv, offs_n, num_keys, C_V, D, BLOCK_R, INPUT_PRECISION)
        )
        d_x_offsets = n * stride_dn + tile_offsets(offs_cv, offs_n, stride_dc, stride_dl)
        d_x += load_tile(d_x_ptr, d_x_offsets, offs_cv, offs_n, C_V, num_keys, True)
        store_tile(d_x_ptr, d_x_offsets, d_x, offs_cv, offs_n, C_V, num_keys)


@remembered
def _prepare_constants(channels: int, value_channels: int, qk_channels: int, config: LaunchConfig) -> Constants:
    return dict(
        C=channels, C_V=value_channels, D=qk_channels,
        BLOCK_M=config.block_m, BLOCK_CV=block_channels(value_channels), BLOCK_R=config.block_d,
        INPUT_PRECISION=config.input_precision, **config.options,
    )  # fmt: skip


@remembered
def _query_constants(channels: int, value_channels: int, qk_channels: int, residual: bool, config: LaunchConfig) -> Constants:
    block_cv = block_channels(value_channels)
    return dict(
        C=channels, C_V=value_channels, D=qk_channels, RESIDUAL=residual,
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_C=block_channels(channels), BLOCK_CV=block_cv,
        BLOCK_D=block_channels(qk_channels), BLOCK_K=min(config.block_k, block_cv), BLOCK_R=config.block_d,
        INPUT_PRECISION=config.input_precision, **config.options,
    )  # fmt: skip


@remembered
def _key_value_constants(value_channels: int, qk_channels: int, config: LaunchConfig) -> Constants:
    block_cv = block_channels(value_channels)
    return dict(
        C_V=value_channels, D=qk_channels,
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_CV=block_cv, BLOCK_D=block_channels(qk_channels),
        BLOCK_K=min(config.block_k, block_cv), BLOCK_R=config.block_d,
        INPUT_PRECISION=config.input_precision, **config.options,
    )  # fmt: skip


def projected_attention_backward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    d_out: torch.Tensor,
    w_q: torch.Tensor,
    w_k: torch.Tensor,
    w_v: torch.Tensor,
    gamma: torch.Tensor | None,
    y: torch.Tensor,
    lse: torch.Tensor,
    d_x: torch.Tensor | None,
    *,
    scale: float,
    residual: bool,
    configs: ProjectedConfigs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Fills `d_x` (N, C, L), unless it is None, and returns the gradients of queries and keys, dq and dk (N, D, L).

    q, k (N, D, L) as in the forward pass, q with scale and log2(e); v (N, C, L) is the map itself; d_out (N, C, L); `y` (N, C, L) and
    `lse` (N, L) as the forward pass left them; weights are contiguous. dq is the gradient of `scale · (W_q x + b_q)`.
    """
    num_maps, qk_channels, num_queries = q.shape
    value_channels, num_keys = v.shape[1:]
    widths = (d_out.shape[1], value_channels, qk_channels)
    d_y, mean_k, d_q, d_k = (empty_with_strides_of(t) for t in (y, q, q, k))
    delta = torch.empty_like(lse)
    d_x_strides = (0, 0, 0) if d_x is None else d_x.stride()

    launch(
        prepare_projected_backward_kernel, num_maps * num_tiles(num_queries, configs.prepare.block_m),
        _prepare_constants(*widths, configs.prepare),
        d_out, *d_out.stride(),
        y, d_y, *y.stride(),
        mean_k, *q.stride(),
        w_k, w_v, gamma,
        delta,
        num_queries,
    )  # fmt: skip

    launch(
        projected_query_gradient_kernel, num_maps * num_tiles(num_queries, configs.query_gradient.block_m),
        _query_constants(*widths, residual, configs.query_gradient),
        q, mean_k, d_q, *q.stride(),
        k, *k.stride(),
        v, *v.stride(),
        d_y, *y.stride(),
        lse, delta,
        d_out, *d_out.stride(),
        w_q, d_x, *d_x_strides,
        num_queries, num_keys, scale,
    )  # fmt: skip

    launch(
        projected_key_value_gradient_kernel, num_maps * num_tiles(num_keys, configs.key_value_gradient.block_n),
        _key_value_constants(value_channels, qk_channels, configs.key_value_gradient),
        q, *q.stride(),
        k, d_k, *k.stride(),
        v, *v.stride(),
        d_y, *y.stride(),
        lse, delta, w_k,
        d_x, *d_x_strides,
        num_queries, num_keys,
    )  # fmt: skip
    return d_q, d_k
