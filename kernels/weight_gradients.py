"""Gradients of the weights from the sums over the tokens, for folded queries: the last launch of the backward pass.

With `Q = Σ du_i x_iᵀ`, `q = Σ du_i`, `V = Σ g_i y_iᵀ` and `v = Σ g_i`, du being the gradient of the folded query `W_kᵀ (W_q x + b_q)`:
`dW_q = scale · W_k Q`, `db_q = scale · W_k q`, `dW_k = scale · (W_q Qᵀ + b_q qᵀ)`, `dW_v = γ V`, `db_v = γ v` and
`dγ = Σ W_v ∘ V + b_v · v`. The sums come in parts, one of each split of the tokens, and are added up in a fixed order. Of dγ each tile of
dW_v knows a part; which program finishes last is left to chance, the order in which it adds them up is not.
"""

import torch
import triton
import triton.language as tl

from .launch_config import LaunchConfig, block_channels, num_tiles, remembered
from .launching import Constants, launch
from .primitives import load_rows
from .token_moments import PartialMoments


@triton.jit
def sum_of_splits(ptr, offsets, inside, splits, stride_s, BLOCK_S: tl.constexpr):
    """Sum (ROWS, COLUMNS) of `splits` matrices at `offsets` (ROWS, COLUMNS) from ptr, stride_s apart, BLOCK_S of them loaded at once."""
    acc = tl.zeros(offsets.shape, tl.float32)
    for start_s in tl.range(0, splits, BLOCK_S, num_stages=1):
        for i in tl.static_range(BLOCK_S):  # a tile of three dimensions would be added up across warps by Triton 3.6
            s = tl.full((1, 1), start_s + i, tl.int32)
            acc += tl.load(ptr + s * stride_s + offsets, mask=inside & (s < splits), other=0.0)
    return acc


@triton.jit
def sum_of_rows(ptr, offs, length: tl.constexpr, splits, stride_s, BLOCK_S: tl.constexpr):
    """Sum (ROWS) of `splits` vectors at offs (ROWS) of `length` from ptr, stride_s apart."""
    return tl.sum(sum_of_splits(ptr, offs[None, :], (offs < length)[None, :], splits, stride_s, BLOCK_S), 0)


@triton.jit
def weight_times_sums(
    w_ptr, product_ptr, offs_r, offs_j, splits, STRIDE_K: tl.constexpr, STRIDE_J: tl.constexpr,
    C: tl.constexpr, D: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_S: tl.constexpr, INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """`W M` (BLOCK_R, BLOCK_J) in fp32 for rows offs_r of w_ptr (D, C) and columns offs_j of M (C, C), the sum of splits, 2 C² apart."""
    acc = tl.zeros((offs_r.shape[0], offs_j.shape[0]), tl.float32)
    for start_k in tl.range(0, C, BLOCK_K, num_stages=1):
        offs_k = start_k + tl.arange(0, BLOCK_K)
        inside = (offs_k < C)[:, None] & (offs_j < C)[None, :]
        offsets = offs_k[:, None] * STRIDE_K + offs_j[None, :] * STRIDE_J
        m = sum_of_splits(product_ptr, offsets, inside, splits, 2 * C * C, BLOCK_S)
        w = load_rows(w_ptr, offs_r, offs_k, D, C).to(tl.float32)
        acc = tl.dot(w, m, acc, input_precision=INPUT_PRECISION)
    return acc


@triton.jit
def store_sum_of_parts(part, parts_ptr, arrived_ptr, sum_ptr, tile, TILES: tl.constexpr, BLOCK_T: tl.constexpr):
    """Leaves the part of one of TILES programs in parts_ptr (TILES) fp32; the last of them to arrive writes the sum to sum_ptr.

    arrived_ptr counts them, from zero.
    """
    tl.store(parts_ptr + tile, part)
    if tl.atomic_add(arrived_ptr, 1, sem="acq_rel") == TILES - 1:
        total = tl.zeros((BLOCK_T,), tl.float32)
        for start in range(0, TILES, BLOCK_T):
            offs = start + tl.arange(0, BLOCK_T)
            total += tl.load(parts_ptr + offs, mask=offs < TILES, other=0.0, cache_modifier=".cg")  # from L2, where others wrote
        tl.store(sum_ptr, tl.sum(total).to(sum_ptr.dtype.element_ty))


@triton.jit
def store_value_gradients(
    product_ptr, total_ptr, w_ptr, b_ptr, gamma_ptr, d_w_ptr, d_b_ptr, d_gamma_ptr, parts_ptr, arrived_ptr, tile, splits,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, PAIRS: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_S: tl.constexpr,
    b_y_ptr=None,
):  # fmt: skip
    """A tile (BLOCK_J, BLOCK_K) of the gradient of the weight in `γ (W (y + b_y) + b)`, b's beside the first, and what it adds to dγ.

    product_ptr, total_ptr: V and v, the first of PAIRS in each split; w_ptr, d_w_ptr (ROWS, COLUMNS); b_ptr, d_b_ptr (ROWS) or None;
    gamma_ptr, d_gamma_ptr (1), parts_ptr (tiles) and arrived_ptr as in `store_sum_of_parts`, or None; b_y_ptr (COLUMNS) or None.
    """
    parts: tl.constexpr = (COLUMNS + BLOCK_K - 1) // BLOCK_K
    tiles: tl.constexpr = (ROWS + BLOCK_J - 1) // BLOCK_J * parts
    offs_j, offs_k = tile // parts * BLOCK_J + tl.arange(0, BLOCK_J), tile % parts * BLOCK_K + tl.arange(0, BLOCK_K)
    inside_j = offs_j < ROWS
    inside = inside_j[:, None] & (offs_k < COLUMNS)[None, :]
    offsets = offs_j[:, None] * COLUMNS + offs_k[None, :]
    v = sum_of_splits(product_ptr, offsets, inside, splits, PAIRS * ROWS * COLUMNS, BLOCK_S)
    if b_y_ptr is not None:
        b_y = tl.load(b_y_ptr + offs_k, mask=offs_k < COLUMNS, other=0.0).to(tl.float32)
        v += sum_of_rows(total_ptr, offs_j, ROWS, splits, PAIRS * ROWS, BLOCK_S)[:, None] * b_y[None, :]
    gamma = 1.0
    d_gamma = 0.0
    if gamma_ptr is not None:
        gamma = tl.load(gamma_ptr).to(tl.float32)
        d_gamma += tl.sum(v * load_rows(w_ptr, offs_j, offs_k, ROWS, COLUMNS).to(tl.float32))
    tl.store(d_w_ptr + offsets, (gamma * v).to(d_w_ptr.dtype.element_ty), mask=inside)
    if b_ptr is not None and tile % parts == 0:
        total = sum_of_rows(total_ptr, offs_j, ROWS, splits, PAIRS * ROWS, BLOCK_S)
        if gamma_ptr is not None:
            d_gamma += tl.sum(total * tl.load(b_ptr + offs_j, mask=inside_j, other=0.0).to(tl.float32))
        tl.store(d_b_ptr + offs_j, (gamma * total).to(d_b_ptr.dtype.element_ty), mask=inside_j)
    if gamma_ptr is not None:
        store_sum_of_parts(d_gamma, parts_ptr, arrived_ptr, d_gamma_ptr, tile, tiles, BLOCK_J)


@triton.jit(do_not_specialize=["splits"])  # or a single one would be a kernel of its own
def weight_gradients_kernel(
    product_ptr, total_ptr,
    w_q_ptr, b_q_ptr, w_k_ptr, w_v_ptr, b_v_ptr, gamma_ptr,
    d_w_q_ptr, d_b_q_ptr, d_w_k_ptr, d_b_k_ptr, d_w_v_ptr, d_b_v_ptr, d_gamma_ptr,
    parts_ptr, arrived_ptr,
    splits, scale,
    C: tl.constexpr, D: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_S: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """One program computes BLOCK_J columns of BLOCK_R rows of dW_q or dW_k, or a tile of dW_v, and the biases' beside them: folded.

    product_ptr (splits, 2, C, C) and total_ptr (splits, 2, C), fp32: parts of V and Q, of v and q. w_q_ptr, w_k_ptr, d_w_q_ptr, d_w_k_ptr
    (D, C); b_q_ptr, d_b_q_ptr (D) or None; d_b_k_ptr (D), filled with zeros, or None; w_v_ptr, d_w_v_ptr (C, C); b_v_ptr, d_b_v_ptr (C) or
    None; gamma_ptr, d_gamma_ptr (1), parts_ptr fp32, one number of each tile of dW_v, and arrived_ptr (1) int32, zero, all four or None.
    """
    parts: tl.constexpr = (C + BLOCK_J - 1) // BLOCK_J
    row_parts: tl.constexpr = (D + BLOCK_R - 1) // BLOCK_R
    pid = tl.program_id(0)
    offs_j = pid % parts * BLOCK_J + tl.arange(0, BLOCK_J)
    offs_r = pid // parts % row_parts * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = (offs_r < D)[:, None] & (offs_j < C)[None, :]
    offsets = offs_r[:, None] * C + offs_j[None, :]
    if pid < parts * row_parts:
        d_w = weight_times_sums(w_k_ptr, product_ptr + C * C, offs_r, offs_j, splits, C, 1, C, D, BLOCK_K, BLOCK_S, INPUT_PRECISION)
        tl.store(d_w_q_ptr + offsets, (scale * d_w).to(d_w_q_ptr.dtype.element_ty), mask=inside)
        if b_q_ptr is not None and pid % parts == 0:
            d_b = tl.zeros((BLOCK_R,), tl.float32)
            for start_k in tl.range(0, C, BLOCK_K, num_stages=1):
                offs_k = start_k + tl.arange(0, BLOCK_K)
                total = sum_of_rows(total_ptr + C, offs_k, C, splits, 2 * C, BLOCK_S)
                d_b += tl.sum(load_rows(w_k_ptr, offs_r, offs_k, D, C).to(tl.float32) * total[None, :], 1)
            tl.store(d_b_q_ptr + offs_r, (scale * d_b).to(d_b_q_ptr.dtype.element_ty), mask=offs_r < D)
    elif pid < 2 * parts * row_parts:
        d_w = weight_times_sums(w_q_ptr, product_ptr + C * C, offs_r, offs_j, splits, 1, C, C, D, BLOCK_K, BLOCK_S, INPUT_PRECISION)
        if b_q_ptr is not None:
            b_q = tl.load(b_q_ptr + offs_r, mask=offs_r < D, other=0.0).to(tl.float32)
            d_w += b_q[:, None] * sum_of_rows(total_ptr + C, offs_j, C, splits, 2 * C, BLOCK_S)[None, :]
        tl.store(d_w_k_ptr + offsets, (scale * d_w).to(d_w_k_ptr.dtype.element_ty), mask=inside)
        if d_b_k_ptr is not None and pid % parts == 0:
            tl.store(d_b_k_ptr + offs_r, tl.zeros((BLOCK_R,), d_b_k_ptr.dtype.element_ty), mask=offs_r < D)
    else:
        store_value_gradients(
            product_ptr, total_ptr, w_v_ptr, b_v_ptr, gamma_ptr, d_w_v_ptr, d_b_v_ptr, d_gamma_ptr, parts_ptr, arrived_ptr,
            pid - 2 * parts * row_parts, splits, C, C, 2, BLOCK_J, BLOCK_K, BLOCK_S,
        )  # fmt: skip


def splits_at_once(splits: int, config: LaunchConfig) -> int:
    """BLOCK_S for so many splits: a power of two, no more than are needed."""
    return min(config.block_d, 1 << (splits - 1).bit_length())


@remembered
def _constants(channels: int, qk_channels: int, block_s: int, config: LaunchConfig) -> Constants:
    return dict(
        C=channels, D=qk_channels,
        BLOCK_R=min(config.block_m, block_channels(qk_channels)), BLOCK_J=config.block_n,
        BLOCK_K=min(config.block_k, block_channels(channels)), BLOCK_S=block_s,
        INPUT_PRECISION=config.input_precision, **config.options,
    )  # fmt: skip


def weight_gradients(
    moments: PartialMoments,
    w_q: torch.Tensor,
    b_q: torch.Tensor | None,
    w_k: torch.Tensor,
    b_k: torch.Tensor | None,
    w_v: torch.Tensor,
    b_v: torch.Tensor | None,
    gamma: torch.Tensor | None,
    *,
    scale: float,
    config: LaunchConfig,
) -> tuple[torch.Tensor | None, ...]:
    """The gradients of w_q, b_q, w_k, b_k, w_v, b_v and gamma, each in its weight's dtype and shape, None where there is no such weight.

    moments: those of g with y and of du with x, and with gamma a counter at zero. w_q, w_k (D, C), w_v (C, C), the weights of 1×1
    convolutions as well; all contiguous.
    """
    gradients = tuple(None if w is None else torch.empty_like(w) for w in (w_q, b_q, w_k, b_k, w_v, b_v, gamma))
    qk_channels, channels = w_q.shape[:2]
    splits = len(moments.product)
    constants = _constants(channels, qk_channels, splits_at_once(splits, config), config)
    parts = num_tiles(channels, config.block_n)
    value_tiles = parts * num_tiles(channels, constants["BLOCK_K"])
    parts_of_gamma = None if gamma is None else moments.product.new_empty(value_tiles)
    launch(
        weight_gradients_kernel, 2 * num_tiles(qk_channels, constants["BLOCK_R"]) * parts + value_tiles,
        constants,
        moments.product, moments.total,
        w_q, b_q, w_k, w_v, b_v, gamma,
        *gradients,
        parts_of_gamma, moments.arrived,
        splits, scale,
    )  # fmt: skip
    return gradients
