"""Forward with queries and keys that have been projected: for those that are much narrower than the values.

Folding the keys' weight into the query (attention_forward.py) would widen the product of queries and keys to all channels
of the map. Here it is as wide as the projections are. The values are still the map itself, and W_v, its bias, γ and the
residual come after: `out = x + γ (W_v y + b_v)` with `y = softmax(q kᵀ) v`.
"""

import torch
import triton
import triton.language as tl

from .launch_config import LaunchConfig, block_channels, num_tiles, remembered
from .launching import Constants, launch
from .primitives import attend_tile, dot_over_channels, load_tile, locate, store_output, store_tile, tile_offsets


@triton.jit
def attend_projected_keys(
    acc, m_i, l_i, q, q_ptr, stride_qd, stride_ql, offs_m, num_queries,
    k_ptr, stride_kd, stride_kl, v_ptr, stride_vc, stride_vl, offs_d, offs_cv, offs_n, num_keys,
    D: tl.constexpr, C_V: tl.constexpr, BLOCK_K: tl.constexpr, MASK_TOKENS: tl.constexpr, INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """Lets a tile of queries meet one tile of keys, k_ptr (D, BLOCK_N), and of values, v_ptr (C_V, BLOCK_N).

    The queries are q (BLOCK_M, BLOCK_D), or, where that is too wide to keep, lie behind q_ptr (D, num_queries).
    """
    if offs_d.shape[0] > BLOCK_K:
        logits = dot_over_channels(
            q_ptr, stride_qd, stride_ql, offs_m, num_queries, k_ptr, stride_kd, stride_kl, offs_n, num_keys, D, BLOCK_K, INPUT_PRECISION
        )
    else:
        k = load_tile(k_ptr, tile_offsets(offs_d, offs_n, stride_kd, stride_kl), offs_d, offs_n, D, num_keys, MASK_TOKENS)
        logits = tl.dot(q, k, input_precision=INPUT_PRECISION)
    v = load_tile(v_ptr, tile_offsets(offs_cv, offs_n, stride_vc, stride_vl), offs_cv, offs_n, C_V, num_keys, MASK_TOKENS)
    return attend_tile(logits, v, acc, m_i, l_i, offs_n, num_keys, MASK_TOKENS, INPUT_PRECISION)


@triton.jit
def projected_attention_forward_kernel(
    q_ptr, stride_qn, stride_qd, stride_ql,
    k_ptr, stride_kn, stride_kd, stride_kl,
    v_ptr, stride_vn, stride_vc, stride_vl,
    x_ptr, stride_xn, stride_xc, stride_xl,
    w_v_ptr, b_v_ptr, gamma_ptr,
    out_ptr, stride_on, stride_oc, stride_ol,
    y_ptr, stride_yn, stride_yc, stride_yl,
    lse_ptr,
    num_queries, num_keys,
    C: tl.constexpr, C_V: tl.constexpr, D: tl.constexpr, RESIDUAL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_CV: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """One program computes the output of BLOCK_M query tokens of one map. Queries hold scale and log2(e), so logits are base 2.

    q_ptr (N, D, L); k_ptr (N, D, Lk); v_ptr (N, C_V, Lk); x_ptr (N, C, L); w_v_ptr (C, C_V); b_v_ptr (C) or None; gamma_ptr (1)
    or None; out_ptr (N, C, L); y_ptr (N, C_V, L) or None where it is not wanted; lse_ptr (N, L) fp32, the base-2 log-sum-exp of
    the logits, or None. L is num_queries, Lk num_keys.

    With BLOCK_K < BLOCK_CV a tile of y is too wide to be multiplied whole: it is read back from y_ptr, which must be given.
    """
    n, tile = locate(tl.cdiv(num_queries, BLOCK_M))
    offs_d = tl.arange(0, BLOCK_D)
    offs_cv = tl.arange(0, BLOCK_CV)
    offs_m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    q_ptr += n * stride_qn
    k_ptr += n * stride_kn
    v_ptr += n * stride_vn
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

    y = (acc / l_i[:, None]).to(v_ptr.dtype.element_ty)
    if y_ptr is not None:
        y_ptr += n * stride_yn
        store_tile(y_ptr, tile_offsets(offs_cv, offs_m, stride_yc, stride_yl), tl.trans(y), offs_cv, offs_m, C_V, num_queries)
    if BLOCK_K < BLOCK_CV:
        tl.debug_barrier()  # y is read back by other threads of this program
    if lse_ptr is not None:
        tl.store(lse_ptr + n * num_queries + offs_m, m_i + tl.log2(l_i), mask=offs_m < num_queries)
    store_output(
        y, y_ptr, stride_yc, stride_yl, w_v_ptr, b_v_ptr, gamma_ptr, x_ptr + n * stride_xn, stride_xc, stride_xl,
        out_ptr + n * stride_on, stride_oc, stride_ol, offs_cv, offs_m, num_queries,
        C, C_V, RESIDUAL, BLOCK_K, BLOCK_R, INPUT_PRECISION,
    )  # fmt: skip


@remembered
def _constants(channels: int, value_channels: int, qk_channels: int, residual: bool, config: LaunchConfig) -> Constants:
    block_cv = block_channels(value_channels)
    return dict(
        C=channels, C_V=value_channels, D=qk_channels, RESIDUAL=residual,
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_CV=block_cv, BLOCK_D=block_channels(qk_channels),
        BLOCK_K=min(config.block_k, block_cv), BLOCK_R=config.block_d,
        INPUT_PRECISION=config.input_precision, **config.options,
    )  # fmt: skip


def projected_attention_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    x: torch.Tensor,
    w_v: torch.Tensor,
    b_v: torch.Tensor | None,
    gamma: torch.Tensor | None,
    out: torch.Tensor,
    y: torch.Tensor | None,
    lse: torch.Tensor | None,
    *,
    residual: bool,
    config: LaunchConfig,
) -> None:
    """Fills `out` (N, C, L), and `y` (N, C_V, L) and `lse` (N, L) where given.

    q (N, D, L) holds scale and log2(e); k (N, D, Lk); v (N, C_V, Lk); x (N, C, L), read only with `residual`; w_v (C, C_V) and
    the other weights are contiguous. `y` must be given where `config.steps_over_channels`.
    """
    num_maps, qk_channels, num_queries = q.shape
    value_channels, num_keys = v.shape[1:]
    launch(
        projected_attention_forward_kernel, num_maps * num_tiles(num_queries, config.block_m),
        _constants(x.shape[1], value_channels, qk_channels, residual, config),
        q, *q.stride(),
        k, *k.stride(),
        v, *v.stride(),
        x, *x.stride(),
        w_v, b_v, gamma,
        out, *out.stride(),
        y, *((0, 0, 0) if y is None else y.stride()),
        lse,
        num_queries, num_keys,
    )  # fmt: skip
