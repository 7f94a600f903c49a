"""Attention on queries, keys and values that exist, forward and backward: for several heads, pooled keys and thin values.

`y_i = Σ_j P_ij v_j + c` with `P_ij = exp2(q_i · k_j - lse_i)`. Queries hold scale and log2(e). Keys and values come less a vector
of their own, about their mean over the tokens: softmax drops that of the keys, and that of the values, c, is added to y again, since
the weights of a row sum to one.

Backward, in two kernels without atomics, so that repeats are bitwise equal. With g the gradient of y and `Δ_i = g_i · (y_i - c)`,
`dS_ij = P_ij (g_i · v_j - Δ_i)`: `dq_i = scale · Σ_j dS_ij k_j`, `dk_j = ln(2) Σ_i dS_ij q_i` and `dv_j = Σ_i P_ij g_i`. What rounding
leaves of `Σ_j dS_ij`, which is zero, is the error of Δ: it meets keys without a mean, and is added to Δ for the key and value gradient.

A program owns BLOCK_D channels of the keys and BLOCK_CV of the values that it accumulates. Where heads are wider than that, programs that
share a tile of tokens each compute its weights, from all channels, as in wide_attention.py.
"""

import torch
import triton
import triton.language as tl

from .launch_config import FUSED_CHANNELS, LaunchConfig, TokenConfigs, block_channels, has_wide_heads, num_tiles, remembered
from .launching import Constants, launch
from .primitives import load_tile, locate, store_tile, tile_offsets
from .projected_attention_backward import accumulate_projected_key_value_gradient, accumulate_projected_query_gradient
from .projected_attention_forward import attend_projected_keys


@triton.jit
def token_attention_forward_kernel(
    q_ptr, stride_qb, stride_qd, stride_ql,
    k_ptr, stride_kb, stride_kd, stride_kl,
    v_ptr, stride_vb, stride_vc, stride_vl,
    c_ptr,
    y_ptr, stride_yb, stride_yc, stride_yl,
    lse_ptr,
    num_queries, num_keys,
    C_V: tl.constexpr, D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_CV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """One program computes BLOCK_CV channels of y for BLOCK_M query tokens of one head of one map.

    q_ptr (B, D, L); k_ptr (B, D, Lk); v_ptr (B, C_V, Lk); c_ptr (B, C_V), contiguous; y_ptr (B, C_V, L); lse_ptr (B, L) fp32, the
    base-2 log-sum-exp of the logits. L is num_queries, Lk num_keys.
    """
    parts: tl.constexpr = (C_V + BLOCK_CV - 1) // BLOCK_CV
    b, tile = locate(tl.cdiv(num_queries, BLOCK_M) * parts)
    part = tile % parts
    offs_d = tl.arange(0, BLOCK_D)
    offs_cv = part * BLOCK_CV + tl.arange(0, BLOCK_CV)
    offs_m = tile // parts * BLOCK_M + tl.arange(0, BLOCK_M)
    q_ptr += b * stride_qb
    k_ptr += b * stride_kb
    v_ptr += b * stride_vb
    q = tl.trans(load_tile(q_ptr, tile_offsets(offs_d, offs_m, stride_qd, stride_ql), offs_d, offs_m, D, num_queries, True))

    acc = tl.zeros((BLOCK_M, BLOCK_CV), tl.float32)
    m_i = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    l_i = tl.zeros((BLOCK_M,), tl.float32)
    offs_n = tl.arange(0, BLOCK_N)
    full_keys = num_keys // BLOCK_N * BLOCK_N
    for start_n in range(0, full_keys, BLOCK_N):
        first = tl.cast(start_n, tl.int64)
        acc, m_i, l_i = attend_projected_keys(
            acc, m_i, l_i, q, q_ptr, stride_qd, stride_ql, offs_m, num_queries,
            k_ptr + first * stride_kl, stride_kd, stride_kl, v_ptr + first * stride_vl, stride_vc, stride_vl,
            offs_d, offs_cv, offs_n, BLOCK_N, D, C_V, BLOCK_K, False, INPUT_PRECISION,
        )  # fmt: skip
    if full_keys < num_keys:
        first = tl.cast(full_keys, tl.int64)
        acc, m_i, l_i = attend_projected_keys(
            acc, m_i, l_i, q, q_ptr, stride_qd, stride_ql, offs_m, num_queries,
            k_ptr + first * stride_kl, stride_kd, stride_kl, v_ptr + first * stride_vl, stride_vc, stride_vl,
            offs_d, offs_cv, offs_n, num_keys - full_keys, D, C_V, BLOCK_K, True, INPUT_PRECISION,
        )  # fmt: skip

    c = tl.load(c_ptr + b * C_V + offs_cv, mask=offs_cv < C_V, other=0.0).to(tl.float32)
    y = acc / l_i[:, None] + c[None, :]
    y_offsets = b * stride_yb + tile_offsets(offs_cv, offs_m, stride_yc, stride_yl)
    store_tile(y_ptr, y_offsets, tl.trans(y), offs_cv, offs_m, C_V, num_queries)
    if part == 0:
        tl.store(lse_ptr + b * num_queries + offs_m, m_i + tl.log2(l_i), mask=offs_m < num_queries)


@triton.jit
def _row_products(
    d_y_ptr, stride_gc, stride_gl, y_ptr, stride_yc, stride_yl, c_ptr, offs_cv, offs_m, num_queries, C_V: tl.constexpr
):  # fmt: skip
    """A tile of d_y (BLOCK_CV, BLOCK_M), and its part of Δ (BLOCK_M); d_y_ptr, y_ptr (C_V, num_queries), c_ptr (C_V)."""
    d_y = load_tile(d_y_ptr, tile_offsets(offs_cv, offs_m, stride_gc, stride_gl), offs_cv, offs_m, C_V, num_queries, True)
    y = load_tile(y_ptr, tile_offsets(offs_cv, offs_m, stride_yc, stride_yl), offs_cv, offs_m, C_V, num_queries, True)
    c = tl.load(c_ptr + offs_cv, mask=offs_cv < C_V, other=0.0).to(tl.float32)
    return d_y, tl.sum(d_y.to(tl.float32) * (y.to(tl.float32) - c[:, None]), 0)


@triton.jit
def token_query_gradient_kernel(
    q_ptr, stride_qb, stride_qd, stride_ql,
    k_ptr, stride_kb, stride_kd, stride_kl,
    v_ptr, stride_vb, stride_vc, stride_vl,
    c_ptr,
    d_y_ptr, stride_gb, stride_gc, stride_gl,
    y_ptr, stride_yb, stride_yc, stride_yl,
    lse_ptr, delta_ptr,
    d_q_ptr, stride_dqb, stride_dqd, stride_dql,
    num_queries, num_keys, scale,
    C_V: tl.constexpr, D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_CV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """One program computes BLOCK_D channels of dq, the gradient of queries without scale and log2(e), for BLOCK_M query tokens, and the
    first of a tile their mended Δ.

    q_ptr, d_q_ptr (B, D, L); k_ptr (B, D, Lk); v_ptr (B, C_V, Lk); c_ptr (B, C_V), contiguous; d_y_ptr, y_ptr (B, C_V, L); lse_ptr
    (B, L) base 2; delta_ptr (B, L) fp32. L is num_queries, Lk num_keys.
    """
    parts: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    tl.static_assert((parts == 1 or BLOCK_K < BLOCK_D) and (C_V <= BLOCK_CV or BLOCK_K < BLOCK_CV), "a part of a head is all it has")
    b, tile = locate(tl.cdiv(num_queries, BLOCK_M) * parts)
    part = tile % parts
    offs_d = part * BLOCK_D + tl.arange(0, BLOCK_D)
    offs_cv = tl.arange(0, BLOCK_CV)
    offs_m = tile // parts * BLOCK_M + tl.arange(0, BLOCK_M)
    q_ptr += b * stride_qb
    k_ptr += b * stride_kb
    v_ptr += b * stride_vb
    d_y_ptr += b * stride_gb
    q = tl.trans(load_tile(q_ptr, tile_offsets(offs_d, offs_m, stride_qd, stride_ql), offs_d, offs_m, D, num_queries, True))
    y_ptr += b * stride_yb
    c_ptr += b * C_V
    d_y, delta = _row_products(
        d_y_ptr, stride_gc, stride_gl, y_ptr, stride_yc, stride_yl, c_ptr, offs_cv, offs_m, num_queries, C_V
    )  # fmt: skip
    if C_V > BLOCK_CV:
        for start_c in tl.range(BLOCK_CV, C_V, BLOCK_CV, num_stages=1):
            _, rest = _row_products(
                d_y_ptr, stride_gc, stride_gl, y_ptr, stride_yc, stride_yl, c_ptr, start_c + offs_cv, offs_m, num_queries, C_V
            )
            delta += rest
    d_y = tl.trans(d_y)
    lse = tl.load(lse_ptr + b * num_queries + offs_m, mask=offs_m < num_queries, other=0.0)

    offs_n = tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)
    full_keys = num_keys // BLOCK_N * BLOCK_N
    for start_n in range(0, full_keys, BLOCK_N):
        first = tl.cast(start_n, tl.int64)
        acc, row_sum = accumulate_projected_query_gradient(
            acc, row_sum, q, d_y, q_ptr, stride_qd, stride_ql, d_y_ptr, stride_gc, stride_gl, lse, delta, offs_m, num_queries,
            k_ptr + first * stride_kl, stride_kd, stride_kl, v_ptr + first * stride_vl, stride_vc, stride_vl,
            offs_d, offs_cv, offs_n, BLOCK_N, D, C_V, BLOCK_K, False, INPUT_PRECISION,
        )  # fmt: skip
    if full_keys < num_keys:
        first = tl.cast(full_keys, tl.int64)
        acc, row_sum = accumulate_projected_query_gradient(
            acc, row_sum, q, d_y, q_ptr, stride_qd, stride_ql, d_y_ptr, stride_gc, stride_gl, lse, delta, offs_m, num_queries,
            k_ptr + first * stride_kl, stride_kd, stride_kl, v_ptr + first * stride_vl, stride_vc, stride_vl,
            offs_d, offs_cv, offs_n, num_keys - full_keys, D, C_V, BLOCK_K, True, INPUT_PRECISION,
        )  # fmt: skip

    if part == 0:
        tl.store(delta_ptr + b * num_queries + offs_m, delta + row_sum, mask=offs_m < num_queries)
    d_q_offsets = b * stride_dqb + tile_offsets(offs_d, offs_m, stride_dqd, stride_dql)
    store_tile(d_q_ptr, d_q_offsets, tl.trans(acc * scale), offs_d, offs_m, D, num_queries)


@triton.jit
def token_key_value_gradient_kernel(
    q_ptr, stride_qb, stride_qd, stride_ql,
    k_ptr, stride_kb, stride_kd, stride_kl,
    v_ptr, stride_vb, stride_vc, stride_vl,
    d_y_ptr, stride_gb, stride_gc, stride_gl,
    lse_ptr, delta_ptr,
    d_k_ptr, stride_dkb, stride_dkd, stride_dkl,
    d_v_ptr, stride_dvb, stride_dvc, stride_dvl,
    num_queries, num_keys,
    C_V: tl.constexpr, D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_CV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """One program computes BLOCK_D channels of dk and BLOCK_CV of dv for BLOCK_N key tokens of one head of one map.

    q_ptr (B, D, L); k_ptr, d_k_ptr (B, D, Lk); v_ptr, d_v_ptr (B, C_V, Lk); d_y_ptr (B, C_V, L); lse_ptr (B, L) base 2; delta_ptr
    (B, L), mended. L is num_queries, Lk num_keys.
    """
    key_parts: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    value_parts: tl.constexpr = (C_V + BLOCK_CV - 1) // BLOCK_CV
    parts: tl.constexpr = max(key_parts, value_parts)
    tl.static_assert((key_parts == 1 or BLOCK_K < BLOCK_D) and (value_parts == 1 or BLOCK_K < BLOCK_CV), "a part of a head is all it has")
    b, tile = locate(tl.cdiv(num_keys, BLOCK_N) * parts)
    part = tile % parts
    offs_d = part % key_parts * BLOCK_D + tl.arange(0, BLOCK_D)
    offs_cv = part % value_parts * BLOCK_CV + tl.arange(0, BLOCK_CV)
    offs_n = tile // parts * BLOCK_N + tl.arange(0, BLOCK_N)
    q_ptr += b * stride_qb
    k_ptr += b * stride_kb
    v_ptr += b * stride_vb
    d_y_ptr += b * stride_gb
    lse_ptr += b * num_queries
    delta_ptr += b * num_queries
    k = tl.trans(load_tile(k_ptr, tile_offsets(offs_d, offs_n, stride_kd, stride_kl), offs_d, offs_n, D, num_keys, True))
    v = tl.trans(load_tile(v_ptr, tile_offsets(offs_cv, offs_n, stride_vc, stride_vl), offs_cv, offs_n, C_V, num_keys, True))

    offs_m = tl.arange(0, BLOCK_M)
    d_k = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    d_v = tl.zeros((BLOCK_N, BLOCK_CV), tl.float32)
    full_queries = num_queries // BLOCK_M * BLOCK_M
    for start_m in range(0, full_queries, BLOCK_M):
        first = tl.cast(start_m, tl.int64)
        d_k, d_v = accumulate_projected_key_value_gradient(
            d_k, d_v, k, v, k_ptr, stride_kd, stride_kl, v_ptr, stride_vc, stride_vl, offs_n, num_keys,
            q_ptr + first * stride_ql, stride_qd, stride_ql, d_y_ptr + first * stride_gl, stride_gc, stride_gl,
            lse_ptr + start_m, delta_ptr + start_m, offs_d, offs_cv, offs_m, BLOCK_M,
            D, C_V, True, BLOCK_K, False, INPUT_PRECISION,
        )  # fmt: skip
    if full_queries < num_queries:
        first = tl.cast(full_queries, tl.int64)
        d_k, d_v = accumulate_projected_key_value_gradient(
            d_k, d_v, k, v, k_ptr, stride_kd, stride_kl, v_ptr, stride_vc, stride_vl, offs_n, num_keys,
            q_ptr + first * stride_ql, stride_qd, stride_ql, d_y_ptr + first * stride_gl, stride_gc, stride_gl,
            lse_ptr + full_queries, delta_ptr + full_queries, offs_d, offs_cv, offs_m, num_queries - full_queries,
            D, C_V, True, BLOCK_K, True, INPUT_PRECISION,
        )  # fmt: skip

    if part < key_parts:
        d_k_offsets = b * stride_dkb + tile_offsets(offs_d, offs_n, stride_dkd, stride_dkl)
        store_tile(d_k_ptr, d_k_offsets, tl.trans(d_k), offs_d, offs_n, D, num_keys)
    if part < value_parts:
        d_v_offsets = b * stride_dvb + tile_offsets(offs_cv, offs_n, stride_dvc, stride_dvl)
        store_tile(d_v_ptr, d_v_offsets, tl.trans(d_v), offs_cv, offs_n, C_V, num_keys)


def _constants(qk_channels: int, value_channels: int, block_d: int, block_cv: int, config: LaunchConfig) -> Constants:
    """With tiles of `block_d` channels of the keys and `block_cv` of the values."""
    return dict(
        C_V=value_channels, D=qk_channels,
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_CV=block_cv, BLOCK_D=block_d,
        BLOCK_K=min(config.block_k, max(block_d, block_cv)),
        INPUT_PRECISION=config.input_precision, **config.options,
    )  # fmt: skip


@remembered
def _forward_constants(qk_channels: int, value_channels: int, config: LaunchConfig) -> Constants:
    block_d, block_cv = block_channels(qk_channels), min(block_channels(value_channels), FUSED_CHANNELS)
    return _constants(qk_channels, value_channels, block_d, block_cv, config)


def token_attention_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    c: torch.Tensor,
    y: torch.Tensor,
    lse: torch.Tensor,
    *,
    config: LaunchConfig,
) -> None:
    """Fills `y` (B, V, L), and `lse` (B, L) with the base-2 log-sum-exp of the logits.

    q (B, E, L) holds scale and log2(e); k (B, E, K) and v (B, V, K) are about centred, c (B, V), contiguous, is what v is short of.
    The strides of the others are free; lse is contiguous.
    """
    constants = _forward_constants(q.shape[1], v.shape[1], config)
    programs = q.shape[0] * num_tiles(q.shape[2], config.block_m) * num_tiles(v.shape[1], constants["BLOCK_CV"])
    launch(
        token_attention_forward_kernel, programs,
        constants,
        q, *q.stride(),
        k, *k.stride(),
        v, *v.stride(),
        c,
        y, *y.stride(),
        lse,
        q.shape[2], k.shape[2],
    )  # fmt: skip


def _blocks_backward(qk_channels: int, value_channels: int) -> tuple[int, int]:
    """Of keys and of values, which take no fewer channels than keys.

    Thinner ones would make all warps compute the same part of the keys' gradient, since the product of the values divides the tiles
    among them.
    """
    block_d = block_channels(qk_channels)
    return block_d, max(block_d, block_channels(value_channels))


@remembered
def _query_constants(qk_channels: int, value_channels: int, config: LaunchConfig) -> Constants:
    block_d, block_cv = (min(block, FUSED_CHANNELS) for block in _blocks_backward(qk_channels, value_channels))
    return _constants(qk_channels, value_channels, block_d, block_cv, config)


@remembered
def _key_value_constants(qk_channels: int, value_channels: int, config: LaunchConfig) -> Constants:
    widest = FUSED_CHANNELS // 2 if has_wide_heads(qk_channels, value_channels) else FUSED_CHANNELS
    block_d, block_cv = (min(block, widest) for block in _blocks_backward(qk_channels, value_channels))
    return _constants(qk_channels, value_channels, block_d, block_cv, config)


def token_attention_backward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    c: torch.Tensor,
    d_y: torch.Tensor,
    y: torch.Tensor,
    lse: torch.Tensor,
    d_q: torch.Tensor,
    d_k: torch.Tensor,
    d_v: torch.Tensor,
    *,
    scale: float,
    configs: TokenConfigs,
) -> None:
    """Fills `d_q` (B, E, L), the gradient of queries without scale and log2(e), `d_k` (B, E, K) and `d_v` (B, V, K).

    q, k, v, c, y and lse as in the forward pass; d_y (B, V, L), any strides.
    """
    delta = torch.empty_like(lse)
    widths = q.shape[1], v.shape[1]

    constants = _query_constants(*widths, configs.query_gradient)
    programs = q.shape[0] * num_tiles(q.shape[2], constants["BLOCK_M"]) * num_tiles(q.shape[1], constants["BLOCK_D"])
    launch(
        token_query_gradient_kernel, programs,
        constants,
        q, *q.stride(),
        k, *k.stride(),
        v, *v.stride(),
        c,
        d_y, *d_y.stride(),
        y, *y.stride(),
        lse, delta,
        d_q, *d_q.stride(),
        q.shape[2], k.shape[2], scale,
    )  # fmt: skip

    constants = _key_value_constants(*widths, configs.key_value_gradient)
    parts = max(num_tiles(q.shape[1], constants["BLOCK_D"]), num_tiles(v.shape[1], constants["BLOCK_CV"]))
    launch(
        token_key_value_gradient_kernel, q.shape[0] * num_tiles(k.shape[2], constants["BLOCK_N"]) * parts,
        constants,
        q, *q.stride(),
        k, *k.stride(),
        v, *v.stride(),
        d_y, *d_y.stride(),
        lse, delta,
        d_k, *d_k.stride(),
        d_v, *d_v.stride(),
        q.shape[2], k.shape[2],
    )  # fmt: skip
