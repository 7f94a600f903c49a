"""What ends a block with heads: output projection, γ, residual and the factor of the sum, in one pass; and what it hands back."""

import torch
import triton
import triton.language as tl

from .alignment import empty_aligned
from .launch_config import LaunchConfig, block_channels, num_tiles, remembered
from .launching import Constants, launch
from .primitives import gradient_of_y, load_tile, locate, store_output, store_tile, tile_offsets


@triton.jit
def output_projection_kernel(
    y_ptr, stride_yn, stride_yc, stride_yl,
    w_ptr, b_y_ptr, b_ptr, gamma_ptr,
    x_ptr, stride_xn, stride_xc, stride_xl,
    out_ptr, stride_on, stride_oc, stride_ol,
    num_tokens, factor,
    C: tl.constexpr, V: tl.constexpr, RESIDUAL: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_R: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """One program computes `factor · (x + γ (W (y + b_y) + b))` of BLOCK_L tokens of one map, rounded once.

    y_ptr (N, V, L); w_ptr (C, V); b_y_ptr (V), b_ptr (C) and gamma_ptr (1), each or None; x_ptr, out_ptr (N, C, L), x only with RESIDUAL;
    factor a number or None.
    """
    n, tile = locate(tl.cdiv(num_tokens, BLOCK_L))
    offs_v = tl.arange(0, BLOCK_V)
    offs_l = tile * BLOCK_L + tl.arange(0, BLOCK_L)
    y = load_tile(y_ptr + n * stride_yn, tile_offsets(offs_v, offs_l, stride_yc, stride_yl), offs_v, offs_l, V, num_tokens, True)
    store_output(
        tl.trans(y), None, 0, 0, w_ptr, b_ptr, gamma_ptr, x_ptr + n * stride_xn, stride_xc, stride_xl,
        out_ptr + n * stride_on, stride_oc, stride_ol, offs_v, offs_l, num_tokens,
        C, V, RESIDUAL, BLOCK_V, BLOCK_R, INPUT_PRECISION, factor, b_y_ptr,
    )  # fmt: skip


@remembered
def _constants(channels: int, value_channels: int, residual: bool, config: LaunchConfig) -> Constants:
    return dict(
        C=channels, V=value_channels, RESIDUAL=residual,
        BLOCK_L=config.block_m, BLOCK_V=block_channels(value_channels), BLOCK_R=config.block_d,
        INPUT_PRECISION=config.input_precision, **config.options,
    )  # fmt: skip


def output_projection(
    y: torch.Tensor,
    weight: torch.Tensor,
    b_y: torch.Tensor | None,
    bias: torch.Tensor | None,
    gamma: torch.Tensor | None,
    x: torch.Tensor,
    out: torch.Tensor,
    *,
    residual: bool,
    factor: float | None,
    config: LaunchConfig,
) -> None:
    """Fills `out` (N, C, L) from y (N, V, L) and x (N, C, L), any strides; weight (C, V), b_y (V), bias (C), gamma (1), contiguous."""
    num_maps, value_channels, num_tokens = y.shape
    launch(
        output_projection_kernel, num_maps * num_tiles(num_tokens, config.block_m),
        _constants(x.shape[1], value_channels, residual, config),
        y, *y.stride(),
        weight, b_y, bias, gamma,
        x, *x.stride(),
        out, *out.stride(),
        num_tokens, factor,
    )  # fmt: skip


@triton.jit
def output_projection_backward_kernel(
    g_ptr, stride_gn, stride_gc, stride_gl,
    w_ptr, gamma_ptr,
    d_y_ptr, stride_yn, stride_yc, stride_yl,
    num_tokens,
    C: tl.constexpr, V: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_R: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """One program computes `γ Wᵀ g` of BLOCK_L tokens of one map.

    g_ptr (N, C, L), the gradient of the sum; w_ptr (C, V); gamma_ptr (1) or None; d_y_ptr (N, V, L).
    """
    n, tile = locate(tl.cdiv(num_tokens, BLOCK_L))
    offs_v = tl.arange(0, BLOCK_V)
    offs_l = tile * BLOCK_L + tl.arange(0, BLOCK_L)
    d_y = gradient_of_y(
        g_ptr + n * stride_gn, stride_gc, stride_gl, w_ptr, gamma_ptr, offs_v, offs_l, num_tokens, C, V, BLOCK_R, INPUT_PRECISION
    )
    store_tile(d_y_ptr, n * stride_yn + tile_offsets(offs_v, offs_l, stride_yc, stride_yl), d_y, offs_v, offs_l, V, num_tokens)


@remembered
def _backward_constants(channels: int, value_channels: int, config: LaunchConfig) -> Constants:
    return dict(
        C=channels, V=value_channels,
        BLOCK_L=config.block_m, BLOCK_V=block_channels(value_channels), BLOCK_R=config.block_d,
        INPUT_PRECISION=config.input_precision, **config.options,
    )  # fmt: skip


def output_projection_backward(g: torch.Tensor, weight: torch.Tensor, gamma: torch.Tensor | None, *, config: LaunchConfig) -> torch.Tensor:
    """The gradient of y (N, V, L), in aligned rows, from g (N, C, L), that of the sum times its factor, any strides; weight (C, V)."""
    num_maps, num_channels, num_tokens = g.shape
    value_channels = weight.shape[1]
    d_y = empty_aligned(g, (num_maps, value_channels, num_tokens))
    launch(
        output_projection_backward_kernel, num_maps * num_tiles(num_tokens, config.block_m),
        _backward_constants(num_channels, value_channels, config),
        g, *g.stride(),
        weight, gamma,
        d_y, *d_y.stride(),
        num_tokens,
    )  # fmt: skip
    return d_y
