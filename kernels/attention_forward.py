"""Forward: 1×1-convolution Q/K/V, softmax attention over all tokens, γ and the residual, in one kernel.

Q, K and V never exist in memory. With the folded query `u = scale · W_kᵀ(W_q x + b_q)` the keys are x itself (the keys'
bias only adds a constant to a row of logits, which softmax drops), and since the weights of a row sum to one the values
are x itself as well: `out = x + γ (W_v y + b_v)` with `y = softmax(u xᵀ) x`.
"""

import torch
import triton
import triton.language as tl

from .launch_config import LaunchConfig, num_tiles, remembered
from .launching import Constants, launch
from .primitives import (
    LOG2E,
    NORM_ROWS,
    attend_tile,
    dot_over_channels,
    load_norm,
    load_tile,
    locate,
    project_there_and_back,
    store_output,
    store_tile,
    tile_offsets,
)


@triton.jit
def attend_keys(
    acc, m_i, l_i, u, u_ptr, stride_uc, stride_ul, offs_m, num_queries,
    x_ptr, stride_xc, stride_xl, offs_c, offs_n, num_keys,
    C: tl.constexpr, BLOCK_K: tl.constexpr, MASK_TOKENS: tl.constexpr, INPUT_PRECISION: tl.constexpr, SUM_ROUNDED: tl.constexpr = False,
):  # fmt: skip
    """Lets a tile of folded queries meet one tile of the map behind x_ptr (C, BLOCK_N): its tokens are keys and values.

    The queries are u (BLOCK_M, BLOCK_C), or, where that is too wide to keep, lie behind u_ptr (C, num_queries).
    """
    offsets = tile_offsets(offs_c, offs_n, stride_xc, stride_xl)
    if C > BLOCK_K:
        logits = dot_over_channels(
            u_ptr, stride_uc, stride_ul, offs_m, num_queries, x_ptr, stride_xc, stride_xl, offs_n, num_keys, C, BLOCK_K, INPUT_PRECISION
        )
        x = load_tile(x_ptr, offsets, offs_c, offs_n, C, num_keys, MASK_TOKENS)
    else:
        x = load_tile(x_ptr, offsets, offs_c, offs_n, C, num_keys, MASK_TOKENS)
        logits = tl.dot(u, x, input_precision=INPUT_PRECISION)
    # Wider tiles leave no registers for the product that sums.
    return attend_tile(logits, x, acc, m_i, l_i, offs_n, num_keys, MASK_TOKENS, INPUT_PRECISION, SUM_ROUNDED, offs_c.shape[0] <= 64)


@triton.jit
def attend_all_keys(
    u, u_ptr, stride_uc, stride_ul, offs_m, num_queries, x_ptr, stride_xc, stride_xl, offs_c, num_keys,
    C: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, LAST_BY_LOOP: tl.constexpr, INPUT_PRECISION: tl.constexpr,
    SUM_ROUNDED: tl.constexpr = False,
):  # fmt: skip
    """Lets a tile of folded queries, as in `attend_keys`, meet all keys of x_ptr (C, num_keys): `(acc, m_i, l_i)` of `attend_tile`.

    The last, incomplete tile is masked. With LAST_BY_LOOP it is taken by a loop that runs once at most: what a loop loads gets to
    shared memory past the registers, which wide tiles have not to spare.
    """
    acc = tl.zeros((offs_m.shape[0], offs_c.shape[0]), tl.float32)
    m_i = tl.full((offs_m.shape[0],), float("-inf"), tl.float32)
    l_i = tl.zeros((offs_m.shape[0],), tl.float32)
    offs_n = tl.arange(0, BLOCK_N)
    full_keys = num_keys // BLOCK_N * BLOCK_N
    for start_n in range(0, full_keys, BLOCK_N):
        keys_ptr = x_ptr + tl.cast(start_n, tl.int64) * stride_xl
        acc, m_i, l_i = attend_keys(
            acc, m_i, l_i, u, u_ptr, stride_uc, stride_ul, offs_m, num_queries,
            keys_ptr, stride_xc, stride_xl, offs_c, offs_n, BLOCK_N, C, BLOCK_K, False, INPUT_PRECISION, SUM_ROUNDED,
        )  # fmt: skip
    if LAST_BY_LOOP:
        for _ in range(full_keys, num_keys, BLOCK_N):
            keys_ptr = x_ptr + tl.cast(full_keys, tl.int64) * stride_xl
            acc, m_i, l_i = attend_keys(
                acc, m_i, l_i, u, u_ptr, stride_uc, stride_ul, offs_m, num_queries,
                keys_ptr, stride_xc, stride_xl, offs_c, offs_n, num_keys - full_keys, C, BLOCK_K, True, INPUT_PRECISION, SUM_ROUNDED,
            )  # fmt: skip
    elif full_keys < num_keys:
        keys_ptr = x_ptr + tl.cast(full_keys, tl.int64) * stride_xl
        acc, m_i, l_i = attend_keys(
            acc, m_i, l_i, u, u_ptr, stride_uc, stride_ul, offs_m, num_queries,
            keys_ptr, stride_xc, stride_xl, offs_c, offs_n, num_keys - full_keys, C, BLOCK_K, True, INPUT_PRECISION, SUM_ROUNDED,
        )  # fmt: skip
    return acc, m_i, l_i


@triton.jit
def queries_of_raw_keys(u, norm_ptr, offs_c, C: tl.constexpr):
    """What takes raw keys x for folded queries u (BLOCK_M, BLOCK_C) of keys h: `(u', offset)` with `u · h_j = u' · x_j + offset`.

    u' = factor ∘ u, in the dtype of u, and offset (BLOCK_M) takes its rounding along, which otherwise would meet the mean of x.
    """
    mean, factor, bias = load_norm(norm_ptr, offs_c, C)
    raw = (u.to(tl.float32) * factor[None, :]).to(u.dtype)
    return raw, tl.sum(u.to(tl.float32) * bias[None, :] - raw.to(tl.float32) * mean[None, :], 1)


@triton.jit
def fold_queries(
    x_ptr, stride_xc, stride_xl, offs_m, num_tokens, w_q_ptr, b_q_ptr, w_k_ptr, scale, norm_ptr,
    u_ptr, stride_uc, stride_ul, offs_c,
    C: tl.constexpr, D: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """The folded queries u (BLOCK_M, BLOCK_C) of a tile of the map behind x_ptr (C, num_tokens), and the offset (BLOCK_M) of logits.

    They hold scale and log2(e), and are of the normalised map with norm_ptr (NORM_ROWS, C), but for raw keys; without, the offset is 0.
    With BLOCK_P < BLOCK_C the projection takes BLOCK_P channels at a time, and u is parked in u_ptr (C, num_tokens): read back it is an
    operand in shared memory instead of registers. With BLOCK_K < BLOCK_C it stays there.
    """
    u = project_there_and_back(
        x_ptr, stride_xc, stride_xl, offs_m, num_tokens, w_q_ptr, b_q_ptr, w_k_ptr, scale * LOG2E,
        C, D, BLOCK_C, BLOCK_P, BLOCK_D, INPUT_PRECISION, norm_ptr,
    ).to(x_ptr.dtype.element_ty)  # fmt: skip
    offset = 0.0
    if norm_ptr is not None:
        u, offset = queries_of_raw_keys(u, norm_ptr, offs_c, C)
    if BLOCK_P < BLOCK_C:
        offsets = tile_offsets(offs_c, offs_m, stride_uc, stride_ul)
        store_tile(u_ptr, offsets, tl.trans(u), offs_c, offs_m, C, num_tokens)
        tl.debug_barrier()
        if BLOCK_K == BLOCK_C:
            u = tl.trans(load_tile(u_ptr, offsets, offs_c, offs_m, C, num_tokens, True))
    return u, offset


@triton.jit
def attended(acc, m_i, l_i, norm_ptr, offset, offs_c, C: tl.constexpr):
    """y (BLOCK_M, BLOCK_C) and lse (BLOCK_M), in fp32, of what `attend_all_keys` found; with norm_ptr (NORM_ROWS, C) those of that map."""
    lse = m_i + tl.log2(l_i)
    y = acc / l_i[:, None]
    if norm_ptr is not None:
        tl.debug_barrier()  # or what was loaded for the queries would stay in registers till now
        mean, factor, bias = load_norm(norm_ptr, offs_c, C)
        y = (y - mean[None, :]) * factor[None, :] + bias[None, :]
        lse += offset
    return y, lse


@triton.jit
def attention_forward_kernel(
    x_ptr, stride_xn, stride_xc, stride_xl,
    w_q_ptr, b_q_ptr, w_k_ptr, w_v_ptr, b_v_ptr, gamma_ptr,
    out_ptr, y_ptr, stride_on, stride_oc, stride_ol,
    lse_ptr, norm_ptr,
    num_tokens, scale,
    C: tl.constexpr, D: tl.constexpr, RESIDUAL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr, INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """One program computes the output of BLOCK_M query tokens of one map. Folded queries take log2(e), so logits are base 2.

    x_ptr (N, C, L); w_q_ptr, w_k_ptr (D, C); b_q_ptr (D) or None; w_v_ptr (C, C); b_v_ptr (C) or None; gamma_ptr (1) or
    None; out_ptr (N, C, L); y_ptr (N, C, L) with the strides of out, or None where it is not wanted; lse_ptr (N, L) fp32,
    the base-2 log-sum-exp of the folded logits, or None. With norm_ptr (N, NORM_ROWS, C) it is the normalised map h that is projected
    and that attends, y and lse are those of h, and x is what is added. Keys and values are x even then.

    With BLOCK_P < BLOCK_C the folded queries are parked in this program's own rows of y_ptr, which must be given. With BLOCK_K < BLOCK_C
    they stay there, y takes their place after them, and every dot over channels reads BLOCK_K of them at a time.
    """
    n, tile = locate(tl.cdiv(num_tokens, BLOCK_M))
    offs_c = tl.arange(0, BLOCK_C)
    offs_m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    x_ptr += n * stride_xn
    out_ptr += n * stride_on
    if y_ptr is not None:
        y_ptr += n * stride_on
    if norm_ptr is not None:
        norm_ptr += n * NORM_ROWS * C

    u, offset = fold_queries(
        x_ptr, stride_xc, stride_xl, offs_m, num_tokens, w_q_ptr, b_q_ptr, w_k_ptr, scale, norm_ptr,
        y_ptr, stride_oc, stride_ol, offs_c, C, D, BLOCK_C, BLOCK_K, BLOCK_P, BLOCK_D, INPUT_PRECISION,
    )  # fmt: skip
    acc, m_i, l_i = attend_all_keys(
        u, y_ptr, stride_oc, stride_ol, offs_m, num_tokens, x_ptr, stride_xc, stride_xl, offs_c, num_tokens,
        C, BLOCK_N, BLOCK_K, BLOCK_P < BLOCK_K, INPUT_PRECISION, norm_ptr is not None,
    )  # fmt: skip
    y, lse = attended(acc, m_i, l_i, norm_ptr, offset, offs_c, C)
    y = y.to(x_ptr.dtype.element_ty)
    if BLOCK_P < BLOCK_C:
        tl.debug_barrier()  # the folded queries have been read for the last time
    if y_ptr is not None:
        store_tile(y_ptr, tile_offsets(offs_c, offs_m, stride_oc, stride_ol), tl.trans(y), offs_c, offs_m, C, num_tokens)
    if BLOCK_K < BLOCK_C:
        tl.debug_barrier()
    if lse_ptr is not None:
        tl.store(lse_ptr + n * num_tokens + offs_m, lse, mask=offs_m < num_tokens)

    store_output(
        y, y_ptr, stride_oc, stride_ol, w_v_ptr, b_v_ptr, gamma_ptr, x_ptr, stride_xc, stride_xl,
        out_ptr, stride_oc, stride_ol, offs_c, offs_m, num_tokens, C, C, RESIDUAL, BLOCK_K, BLOCK_D, INPUT_PRECISION,
    )  # fmt: skip


@remembered
def _constants(num_channels: int, qk_channels: int, residual: bool, config: LaunchConfig) -> Constants:
    return {**config.folded_constants(num_channels, qk_channels), "RESIDUAL": residual}


def attention_forward(
    x: torch.Tensor,
    w_q: torch.Tensor,
    b_q: torch.Tensor | None,
    w_k: torch.Tensor,
    w_v: torch.Tensor,
    b_v: torch.Tensor | None,
    gamma: torch.Tensor | None,
    out: torch.Tensor,
    y: torch.Tensor | None,
    lse: torch.Tensor | None,
    norm: torch.Tensor | None = None,
    *,
    scale: float,
    residual: bool,
    config: LaunchConfig,
) -> None:
    """Fills `out` (N, C, L), and `y` (N, C, L) and `lse` (N, L) where given, from `x` (N, C, L).

    Weights are contiguous, `out` and `y` share their strides; everything lies on one device. `y` must be given where
    `config.parks_queries`. norm: what `group_statistics` tells of x, where the normalised map attends.
    """
    num_maps, num_channels, num_tokens = x.shape
    launch(
        attention_forward_kernel, num_maps * num_tiles(num_tokens, config.block_m),
        _constants(num_channels, w_q.shape[0], residual, config),
        x, *x.stride(),
        w_q, b_q, w_k, w_v, b_v, gamma,
        out, y, *out.stride(),
        lse, norm,
        num_tokens, scale,
    )  # fmt: skip
