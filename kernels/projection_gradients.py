"""Gradients of weights that project a map, from sums over the tokens: the last launch of a backward pass with projected queries and keys.

With h the map that is projected, h̄ its mean over the tokens of all maps, dq the gradient of `W_q h + b_q` by `scale`, and dk and dv those
of `W_k h` and `W_v h`: `dW_q = scale · Σ dq_i h_iᵀ`, `db_q = scale · Σ dq_i`, `dW_k = Σ dk_i (h_i - h̄)ᵀ`, since Σ dk_i is zero but for
rounding, which h̄ is kept from multiplying, and `dW_v = Σ dv_i h_iᵀ - (Σ dv_i - Σ dy_i) h̄ᵀ`, since Σ dv_i is Σ dy_i but for rounding.
Where values are the map itself, `out = x + γ (W_v y + b_v)`, and `dW_v = γ Σ g_i y_iᵀ` as in weight_gradients.py, and so it is for W_o
in `γ (W_o (y + b_v) + b_o)`, y + b_v in the place of y.
"""

import torch
import triton
import triton.language as tl

from .launch_config import LaunchConfig, block_channels, num_tiles, remembered
from .launching import Constants, launch
from .primitives import load_rows
from .token_moments import PartialMoments
from .weight_gradients import splits_at_once, store_value_gradients, sum_of_rows, sum_of_splits


@triton.jit
def store_centred_gradient(
    product_ptr, total_ptr, expected_ptr, map_total_ptr, d_w_ptr, offs_r, offs_j, splits, map_splits, per_token,
    ROWS: tl.constexpr, C: tl.constexpr, PAIRS: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """`Σ d_i h_iᵀ - (Σ d_i - expected) h̄ᵀ` for rows offs_r and columns offs_j of d_w_ptr (ROWS, C).

    product_ptr, total_ptr: parts of the first two sums, PAIRS of them in each split; expected_ptr (ROWS) fp32, or None for zeros;
    map_total_ptr (map_splits, 2, C): parts of Σ h_i; per_token: one by the number of tokens.
    """
    inside = (offs_r < ROWS)[:, None] & (offs_j < C)[None, :]
    offsets = offs_r[:, None] * C + offs_j[None, :]
    d_w = sum_of_splits(product_ptr, offsets, inside, splits, PAIRS * ROWS * C, BLOCK_S)
    residue = sum_of_rows(total_ptr, offs_r, ROWS, splits, PAIRS * ROWS, BLOCK_S)
    if expected_ptr is not None:
        residue -= tl.load(expected_ptr + offs_r, mask=offs_r < ROWS, other=0.0)
    mean = per_token * sum_of_rows(map_total_ptr, offs_j, C, map_splits, 2 * C, BLOCK_S)
    tl.store(d_w_ptr + offsets, (d_w - residue[:, None] * mean[None, :]).to(d_w_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["splits", "value_splits"])  # or single ones would be kernels of their own
def projection_gradients_kernel(
    product_ptr, total_ptr, map_total_ptr, value_product_ptr, value_total_ptr, y_total_ptr,
    w_v_ptr, b_v_ptr, gamma_ptr,
    d_w_q_ptr, d_b_q_ptr, d_w_k_ptr, d_b_k_ptr, d_w_v_ptr, d_b_v_ptr, d_gamma_ptr,
    parts_ptr, arrived_ptr,
    splits, value_splits, scale, per_token,
    C: tl.constexpr, D: tl.constexpr, V: tl.constexpr,
    BLOCK_J: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """One program computes a tile of dW_q, dW_k or dW_v, and the bias's gradient beside the first of its rows.

    product_ptr (splits, 2, D, C), total_ptr (splits, 2, D) and map_total_ptr (splits, 2, C), fp32: parts of the sums of dq and dk with h,
    of either, and of h, twice; value_product_ptr (value_splits, V, C) and value_total_ptr (value_splits, V), fp32: parts of those of dv
    with h, y_total_ptr (V), fp32, being Σ dy_i; or of those of g with y, and y_total_ptr None. w_v_ptr (V, C), b_v_ptr (V) or None and
    gamma_ptr (1) or None are read in the latter case. d_w_q_ptr, d_w_k_ptr (D, C); d_b_q_ptr (D), d_b_k_ptr (D), filled with zeros, each or
    None; d_w_v_ptr (V, C); d_b_v_ptr (V) or None; d_gamma_ptr (1), parts_ptr and arrived_ptr as in weight_gradients.py, or None.
    """
    parts: tl.constexpr = (C + BLOCK_J - 1) // BLOCK_J
    tiles: tl.constexpr = (D + BLOCK_J - 1) // BLOCK_J * parts
    pid = tl.program_id(0)
    offs_r, offs_j = pid % tiles // parts * BLOCK_J + tl.arange(0, BLOCK_J), pid % parts * BLOCK_J + tl.arange(0, BLOCK_J)
    if pid < tiles:
        offsets = offs_r[:, None] * C + offs_j[None, :]
        inside = (offs_r < D)[:, None] & (offs_j < C)[None, :]
        d_w = sum_of_splits(product_ptr, offsets, inside, splits, 2 * D * C, BLOCK_S)
        tl.store(d_w_q_ptr + offsets, (scale * d_w).to(d_w_q_ptr.dtype.element_ty), mask=inside)
        if d_b_q_ptr is not None and pid % parts == 0:
            d_b = scale * sum_of_rows(total_ptr, offs_r, D, splits, 2 * D, BLOCK_S)
            tl.store(d_b_q_ptr + offs_r, d_b.to(d_b_q_ptr.dtype.element_ty), mask=offs_r < D)
    elif pid < 2 * tiles:
        store_centred_gradient(
            product_ptr + D * C, total_ptr + D, None, map_total_ptr, d_w_k_ptr, offs_r, offs_j, splits, splits, per_token, D, C, 2, BLOCK_S
        )
        if d_b_k_ptr is not None and pid % parts == 0:
            tl.store(d_b_k_ptr + offs_r, tl.zeros((BLOCK_J,), d_b_k_ptr.dtype.element_ty), mask=offs_r < D)
    elif y_total_ptr is not None:
        tile = pid - 2 * tiles
        offs_r, offs_j = tile // parts * BLOCK_J + tl.arange(0, BLOCK_J), tile % parts * BLOCK_J + tl.arange(0, BLOCK_J)
        store_centred_gradient(
            value_product_ptr, value_total_ptr, y_total_ptr, map_total_ptr, d_w_v_ptr, offs_r, offs_j, value_splits, splits, per_token,
            V, C, 1, BLOCK_S,
        )  # fmt: skip
    else:
        store_value_gradients(
            value_product_ptr, value_total_ptr, w_v_ptr, b_v_ptr, gamma_ptr, d_w_v_ptr, d_b_v_ptr, d_gamma_ptr, parts_ptr, arrived_ptr,
            pid - 2 * tiles, value_splits, V, C, 1, BLOCK_J, BLOCK_K, BLOCK_S,
        )  # fmt: skip


@remembered
def _constants(channels: int, qk_channels: int, value_channels: int, block_s: int, config: LaunchConfig) -> Constants:
    return dict(
        C=channels, D=qk_channels, V=value_channels,
        BLOCK_J=config.block_n, BLOCK_K=min(config.block_k, block_channels(channels)), BLOCK_S=block_s, **config.options,
    )  # fmt: skip


def projection_gradients(
    moments: PartialMoments,
    value_moments: PartialMoments,
    w_q: torch.Tensor,
    b_q: torch.Tensor | None,
    w_k: torch.Tensor,
    b_k: torch.Tensor | None,
    w_v: torch.Tensor,
    b_v: torch.Tensor | None,
    gamma: torch.Tensor | None,
    y_total: torch.Tensor | None = None,
    *,
    num_tokens: int,
    scale: float,
    config: LaunchConfig,
) -> tuple[torch.Tensor | None, ...]:
    """The gradients of w_q, b_q, w_k, b_k, w_v, b_v and gamma, each in its weight's dtype and shape, None where there is no such weight.

    moments: those of dq with the map and of dk with the map, with Σ of the map; value_moments: those of dv with the map, and then y_total
    (V) is Σ dy in fp32, b_v and gamma None; or of the output's gradient with y, and with gamma a counter at zero. num_tokens: of all maps
    together. w_q, w_k (D, C), w_v (V, C), the weights of 1×1 convolutions as well; all contiguous.
    """
    (qk_channels, channels), value_channels = w_q.shape[:2], w_v.shape[0]
    gradients = tuple(None if w is None else torch.empty_like(w) for w in (w_q, b_q, w_k, b_k, w_v, b_v, gamma))
    splits, value_splits = len(moments.product), len(value_moments.product)
    constants = _constants(channels, qk_channels, value_channels, splits_at_once(max(splits, value_splits), config), config)
    tiles = num_tiles(qk_channels, config.block_n) * num_tiles(channels, config.block_n)
    columns = constants["BLOCK_K"] if y_total is None else config.block_n
    value_tiles = num_tiles(value_channels, config.block_n) * num_tiles(channels, columns)
    parts_of_gamma = None if gamma is None else moments.product.new_empty(value_tiles)
    launch(
        projection_gradients_kernel, 2 * tiles + value_tiles,
        constants,
        moments.product, moments.total, moments.right_total, value_moments.product, value_moments.total, y_total,
        w_v, b_v, gamma,
        *gradients,
        parts_of_gamma, value_moments.arrived,
        splits, value_splits, scale, 1 / num_tokens,
    )  # fmt: skip
    return gradients


@triton.jit(do_not_specialize=["splits"])
def output_gradients_kernel(
    product_ptr, total_ptr, w_ptr, b_y_ptr, b_ptr, gamma_ptr,
    d_w_ptr, d_b_y_ptr, d_b_ptr, d_gamma_ptr,
    parts_ptr, arrived_ptr,
    splits,
    C: tl.constexpr, V: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """One program computes a tile of the gradient of W_o, and that of b beside the first of its rows, or BLOCK_K numbers of that of b_y.

    product_ptr (splits, C, V) and total_ptr (splits, C), fp32: parts of `Σ g_i y_iᵀ` and `Σ g_i`; w_ptr, d_w_ptr (C, V); b_y_ptr,
    d_b_y_ptr (V) or None; b_ptr, d_b_ptr (C) or None; gamma_ptr, d_gamma_ptr (1), parts_ptr and arrived_ptr as in weight_gradients.py, or
    None.
    """
    tiles: tl.constexpr = (C + BLOCK_J - 1) // BLOCK_J * ((V + BLOCK_K - 1) // BLOCK_K)
    pid = tl.program_id(0)
    if pid < tiles:
        store_value_gradients(
            product_ptr, total_ptr, w_ptr, b_ptr, gamma_ptr, d_w_ptr, d_b_ptr, d_gamma_ptr, parts_ptr, arrived_ptr, pid, splits,
            C, V, 1, BLOCK_J, BLOCK_K, BLOCK_S, b_y_ptr,
        )  # fmt: skip
    else:  # there are such programs where there is b_y
        offs_v = (pid - tiles) * BLOCK_K + tl.arange(0, BLOCK_K)
        d_b_y = tl.zeros((BLOCK_K,), tl.float32)
        for start_c in tl.range(0, C, BLOCK_J, num_stages=1):
            offs_c = start_c + tl.arange(0, BLOCK_J)
            total = sum_of_rows(total_ptr, offs_c, C, splits, C, BLOCK_S)
            d_b_y += tl.sum(load_rows(w_ptr, offs_c, offs_v, C, V).to(tl.float32) * total[:, None], 0)
        if gamma_ptr is not None:
            d_b_y *= tl.load(gamma_ptr).to(tl.float32)
        tl.store(d_b_y_ptr + offs_v, d_b_y.to(d_b_y_ptr.dtype.element_ty), mask=offs_v < V)


@remembered
def _output_constants(channels: int, value_channels: int, block_s: int, config: LaunchConfig) -> Constants:
    return dict(
        C=channels, V=value_channels,
        BLOCK_J=config.block_n, BLOCK_K=min(config.block_k, block_channels(value_channels)), BLOCK_S=block_s, **config.options,
    )  # fmt: skip


def output_gradients(
    moments: PartialMoments,
    w: torch.Tensor,
    b_y: torch.Tensor | None,
    b: torch.Tensor | None,
    gamma: torch.Tensor | None,
    *,
    config: LaunchConfig,
) -> tuple[torch.Tensor | None, ...]:
    """The gradients of w (C, V), b_y (V), b (C) and gamma in `γ (W (y + b_y) + b)`, each in its own dtype and shape, None where absent.

    moments: those of the gradient of the sum with y, and with gamma a counter at zero. w, also that of a 1×1 convolution, and the biases
    are contiguous.
    """
    channels, value_channels = w.shape[:2]
    gradients = tuple(None if t is None else torch.empty_like(t) for t in (w, b_y, b, gamma))
    splits = len(moments.product)
    constants = _output_constants(channels, value_channels, splits_at_once(splits, config), config)
    parts = num_tiles(value_channels, constants["BLOCK_K"])
    tiles = num_tiles(channels, config.block_n) * parts
    parts_of_gamma = None if gamma is None else moments.product.new_empty(tiles)
    launch(
        output_gradients_kernel, tiles if b_y is None else tiles + parts,
        constants,
        moments.product, moments.total,
        w, b_y, b, gamma,
        *gradients,
        parts_of_gamma, moments.arrived,
        splits,
    )  # fmt: skip
    return gradients
