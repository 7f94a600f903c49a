"""Backward of maps whose tokens fit into one tile, in one launch: on such maps starting kernels takes longer than running them.

One program goes through the kernels of attention_backward.py for its map, one after the other, and then sums over the map's tokens what
the gradients of the weights are made of, as token_moments.py does over those of several maps.
"""

import torch
import triton
import triton.language as tl

from .alignment import empty_with_strides_of
from .attention_backward import key_value_gradient_kernel, prepare_backward_kernel, query_gradient_kernel
from .launch_config import LaunchConfig, block_channels, remembered
from .launching import Constants, launch
from .primitives import load_tile, tile_offsets
from .token_moments import PartialMoments


@triton.jit
def store_moments(
    left_ptr, stride_ac, stride_al, right_ptr, stride_bc, stride_bl, product_ptr, total_ptr, num_tokens,
    C: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_C: tl.constexpr, INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """Writes `Σ left_i right_iᵀ` to product_ptr (C, C) and `Σ left_i` to total_ptr (C), fp32, of left_ptr, right_ptr (C, num_tokens).

    BLOCK_A channels of left are taken at a time.
    """
    offs_c, offs_l = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_L)
    for start_a in tl.range(0, C, BLOCK_A, num_stages=1):
        offs_a = start_a + tl.arange(0, BLOCK_A)
        left = load_tile(left_ptr, tile_offsets(offs_a, offs_l, stride_ac, stride_al), offs_a, offs_l, C, num_tokens, True)
        right = load_tile(right_ptr, tile_offsets(offs_c, offs_l, stride_bc, stride_bl), offs_c, offs_l, C, num_tokens, True)
        product = tl.dot(left, tl.trans(right), input_precision=INPUT_PRECISION)
        inside = (offs_a < C)[:, None] & (offs_c < C)[None, :]
        tl.store(product_ptr + offs_a[:, None] * C + offs_c[None, :], product, mask=inside)
        tl.store(total_ptr + offs_a, tl.sum(left.to(tl.float32), 1), mask=offs_a < C)


@triton.jit
def single_tile_backward_kernel(
    x_ptr, stride_xn, stride_xc, stride_xl,
    d_out_ptr, stride_gn, stride_gc, stride_gl,
    w_q_ptr, b_q_ptr, w_k_ptr, w_v_ptr, gamma_ptr,
    y_ptr, u_ptr, d_y_ptr, d_u_ptr, stride_yn, stride_yc, stride_yl,
    lse_ptr, delta_ptr,
    d_x_ptr, stride_dn, stride_dc, stride_dl,
    product_ptr, total_ptr, arrived_ptr,
    num_tokens, scale,
    C: tl.constexpr, D: tl.constexpr, RESIDUAL: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """One program computes the gradient of one map of at most BLOCK_L tokens, and the map's share of those of the weights.

    x_ptr, d_out_ptr (N, C, L); w_q_ptr, w_k_ptr (D, C); b_q_ptr (D) or None; w_v_ptr (C, C); gamma_ptr (1) or None; y_ptr, u_ptr, d_y_ptr,
    d_u_ptr (N, C, L), one set of strides; lse_ptr, delta_ptr (N, L) fp32; d_x_ptr (N, C, L), or None where x wants no gradient;
    product_ptr (N, 2, C, C), Σ g_i y_iᵀ and Σ du_i x_iᵀ, and total_ptr (N, 2, C), Σ g_i and Σ du_i, fp32, or None where the weights want
    no gradient; arrived_ptr (1) int32, filled with zero, or None. Keys, and then queries, are taken BLOCK_N at a time.
    """
    # There always are tokens. Without a branch of its own what one kernel has computed would stay in registers for the next.
    if num_tokens > 0:
        prepare_backward_kernel(
            x_ptr, stride_xn, stride_xc, stride_xl, d_out_ptr, stride_gn, stride_gc, stride_gl,
            w_q_ptr, b_q_ptr, w_k_ptr, w_v_ptr, gamma_ptr, y_ptr, u_ptr, d_y_ptr, stride_yn, stride_yc, stride_yl, delta_ptr,
            num_tokens, scale, C, D, BLOCK_L, BLOCK_C, BLOCK_K, BLOCK_D, INPUT_PRECISION,
        )  # fmt: skip
    tl.debug_barrier()  # each reads what other threads of this program have written in the one before
    if num_tokens > 0:
        query_gradient_kernel(
            x_ptr, stride_xn, stride_xc, stride_xl, d_out_ptr, stride_gn, stride_gc, stride_gl,
            u_ptr, d_y_ptr, stride_yn, stride_yc, stride_yl, y_ptr, d_u_ptr, stride_yn, stride_yc, stride_yl, lse_ptr, delta_ptr,
            w_q_ptr, w_k_ptr, d_x_ptr, stride_dn, stride_dc, stride_dl, num_tokens, scale,
            C, D, RESIDUAL, BLOCK_L, BLOCK_N, BLOCK_C, BLOCK_K, BLOCK_K, BLOCK_D, INPUT_PRECISION,
        )  # fmt: skip
    tl.debug_barrier()
    if d_x_ptr is not None:
        if num_tokens > 0:
            key_value_gradient_kernel(
                x_ptr, stride_xn, stride_xc, stride_xl, u_ptr, d_y_ptr, stride_yn, stride_yc, stride_yl, lse_ptr, delta_ptr,
                d_x_ptr, stride_dn, stride_dc, stride_dl, num_tokens, C, BLOCK_N, BLOCK_L, BLOCK_C, BLOCK_K, False, INPUT_PRECISION,
            )  # fmt: skip
        tl.debug_barrier()
    if product_ptr is not None:
        n = tl.program_id(0).to(tl.int64)
        if arrived_ptr is not None and n == 0:
            tl.store(arrived_ptr, 0)
        product_ptr += n * 2 * C * C
        total_ptr += n * 2 * C
        if num_tokens > 0:
            store_moments(
                d_out_ptr + n * stride_gn, stride_gc, stride_gl, y_ptr + n * stride_yn, stride_yc, stride_yl,
                product_ptr, total_ptr, num_tokens, C, BLOCK_L, BLOCK_D, BLOCK_C, INPUT_PRECISION,
            )  # fmt: skip
            store_moments(
                d_u_ptr + n * stride_yn, stride_yc, stride_yl, x_ptr + n * stride_xn, stride_xc, stride_xl,
                product_ptr + C * C, total_ptr + C, num_tokens, C, BLOCK_L, BLOCK_D, BLOCK_C, INPUT_PRECISION,
            )  # fmt: skip


@remembered
def _constants(num_channels: int, qk_channels: int, residual: bool, config: LaunchConfig) -> Constants:
    block_c = block_channels(num_channels)
    return dict(
        C=num_channels, D=qk_channels, RESIDUAL=residual,
        BLOCK_L=config.block_m, BLOCK_N=config.block_n, BLOCK_C=block_c, BLOCK_K=min(config.block_k, block_c), BLOCK_D=config.block_d,
        INPUT_PRECISION=config.input_precision, **config.options,
    )  # fmt: skip


def single_tile_backward(
    x: torch.Tensor,
    d_out: torch.Tensor,
    w_q: torch.Tensor,
    b_q: torch.Tensor | None,
    w_k: torch.Tensor,
    w_v: torch.Tensor,
    gamma: torch.Tensor | None,
    y: torch.Tensor,
    lse: torch.Tensor,
    d_x: torch.Tensor | None,
    *,
    scale: float,
    residual: bool,
    need_sums: bool,
    config: LaunchConfig,
) -> PartialMoments | None:
    """Fills `d_x` (N, C, L), unless it is None, and returns the sums that `weight_gradients` takes, or None without `need_sums`.

    x, d_out (N, C, L), L no more than `config.block_m`; `y` (N, C, L) and `lse` (N, L) as the forward pass left them; weights are
    contiguous.
    """
    num_maps, num_channels, num_tokens = x.shape
    u, d_y, d_u = (empty_with_strides_of(y) for _ in range(3))
    product = lse.new_empty((num_maps, 2, num_channels, num_channels)) if need_sums else None
    total = lse.new_empty((num_maps, 2, num_channels)) if need_sums else None
    arrived = lse.new_empty(1, dtype=torch.int32) if need_sums and gamma is not None else None
    launch(
        single_tile_backward_kernel, num_maps,
        _constants(num_channels, w_q.shape[0], residual, config),
        x, *x.stride(),
        d_out, *d_out.stride(),
        w_q, b_q, w_k, w_v, gamma,
        y, u, d_y, d_u, *y.stride(),
        lse, torch.empty_like(lse),
        d_x, *((0, 0, 0) if d_x is None else d_x.stride()),
        product, total, arrived,
        num_tokens, scale,
    )  # fmt: skip
    return None if product is None or total is None else PartialMoments(product, total, None, arrived)
