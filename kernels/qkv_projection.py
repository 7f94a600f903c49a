"""Queries, keys and values as 1×1 convolutions of a map, any of the three in one pass over it, and the gradient that all three return."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .alignment import empty_aligned
from .launch_config import LaunchConfig, block_channels, num_tiles, remembered
from .launching import Constants, launch
from .primitives import NORM_ROWS, load_normalized, locate, project_back, project_tile, store_tile, tile_offsets


class Projection(NamedTuple):
    """`factor · (W x + b)`: weight (D, C), bias (D) or None, both contiguous, factor a number or None."""

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    factor: float | None = None


@triton.jit
def qkv_projection_kernel(
    x_ptr, stride_xn, stride_xc, stride_xl,
    w_q_ptr, b_q_ptr, factor_q, q_ptr, stride_qn, stride_qc, stride_ql,
    w_k_ptr, b_k_ptr, factor_k, k_ptr, stride_kn, stride_kc, stride_kl,
    w_v_ptr, b_v_ptr, factor_v, v_ptr, stride_vn, stride_vc, stride_vl,
    norm_ptr, centre_ptr, stride_centre, shift_ptr, num_tokens,
    C: tl.constexpr, D_Q: tl.constexpr, D_K: tl.constexpr, D_V: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """One program projects BLOCK_L tokens of one map, of which it reads its tile once.

    x_ptr (N, C, L); for each of q, k and v: weight (D, C), bias (D) or None, factor or None, and what is written (N, D, L), or None where
    it is not wanted, and then D is 0; norm_ptr (N, NORM_ROWS, C), by which x is normalised, or None; centre_ptr (N, C) fp32, stride_centre
    apart, which keys and values are less, or None; shift_ptr (N, D_V) fp32, W_v of it, None without values to be centred.
    """
    n, tile = locate(tl.cdiv(num_tokens, BLOCK_L))
    offs_c = tl.arange(0, BLOCK_C)
    offs_l = tile * BLOCK_L + tl.arange(0, BLOCK_L)
    if norm_ptr is not None:
        norm_ptr += n * NORM_ROWS * C
    if centre_ptr is not None:
        centre_ptr += n * stride_centre
    if shift_ptr is not None:
        shift_ptr += n * D_V  # the same from every tile of a map
    x_ptr += n * stride_xn
    x = load_normalized(x_ptr, tile_offsets(offs_c, offs_l, stride_xc, stride_xl), offs_c, offs_l, C, num_tokens, norm_ptr)
    if q_ptr is not None:
        project_tile(
            x, w_q_ptr, b_q_ptr, factor_q, q_ptr + n * stride_qn, stride_qc, stride_ql, offs_c, offs_l, num_tokens,
            C, D_Q, BLOCK_R, INPUT_PRECISION,
        )  # fmt: skip
    if k_ptr is not None:
        project_tile(
            x, w_k_ptr, b_k_ptr, factor_k, k_ptr + n * stride_kn, stride_kc, stride_kl, offs_c, offs_l, num_tokens,
            C, D_K, BLOCK_R, INPUT_PRECISION, centre_ptr,
        )  # fmt: skip
    if v_ptr is not None:
        project_tile(
            x, w_v_ptr, b_v_ptr, factor_v, v_ptr + n * stride_vn, stride_vc, stride_vl, offs_c, offs_l, num_tokens,
            C, D_V, BLOCK_R, INPUT_PRECISION, centre_ptr, shift_ptr,
        )  # fmt: skip


@remembered
def _constants(channels: int, d_q: int, d_k: int, d_v: int, config: LaunchConfig) -> Constants:
    return dict(
        C=channels, D_Q=d_q, D_K=d_k, D_V=d_v,
        BLOCK_L=config.block_m, BLOCK_C=block_channels(channels), BLOCK_R=config.block_d,
        INPUT_PRECISION=config.input_precision, **config.options,
    )  # fmt: skip


def qkv_projection(
    x: torch.Tensor,
    q: Projection | None = None,
    k: Projection | None = None,
    v: Projection | None = None,
    norm: torch.Tensor | None = None,
    centre: torch.Tensor | None = None,
    *,
    config: LaunchConfig,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """The three projections of x (N, C, L), each (N, D, L) in aligned rows, with a D of its own, or None where not asked for.

    norm: what `group_statistics` tells of x, where it is the normalised map that is projected. centre (N, C) fp32, each row contiguous: a
    vector of each map that is taken off it before it is projected to keys and values; a fourth result is `W_v centre` (N, D) in fp32 then.
    """
    num_maps, num_channels, num_tokens = x.shape
    rows = [0 if p is None else p.weight.shape[0] for p in (q, k, v)]
    out_q, out_k, out_v = (empty_aligned(x, (num_maps, d, num_tokens)) if d else None for d in rows)
    shift = None if v is None or centre is None else centre.new_empty((num_maps, rows[2]))
    arguments: list[torch.Tensor | float | None] = []
    for projection, out in ((q, out_q), (k, out_k), (v, out_v)):
        arguments += [*(projection or (None, None, None)), out, *((0, 0, 0) if out is None else out.stride())]
    launch(
        qkv_projection_kernel, num_maps * num_tiles(num_tokens, config.block_m),
        _constants(num_channels, *rows, config),
        x, *x.stride(),
        *arguments,
        norm, centre, 0 if centre is None else centre.stride(0), shift, num_tokens,
    )  # fmt: skip
    return out_q, out_k, out_v, shift


@triton.jit
def qkv_projection_backward_kernel(
    d_q_ptr, stride_qn, stride_qc, stride_ql, w_q_ptr,
    d_k_ptr, stride_kn, stride_kc, stride_kl, w_k_ptr,
    d_v_ptr, stride_vn, stride_vc, stride_vl, w_v_ptr,
    d_x_ptr, stride_dn, stride_dc, stride_dl,
    num_tokens,
    C: tl.constexpr, D_QK: tl.constexpr, D_V: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """One program computes `W_qᵀ dq + W_kᵀ dk + W_vᵀ dv` of BLOCK_L tokens of one map, rounded once.

    d_q_ptr, d_k_ptr (N, D_QK, L); d_v_ptr (N, D_V, L); w_q_ptr, w_k_ptr (D_QK, C); w_v_ptr (D_V, C); d_x_ptr (N, C, L).
    """
    n, tile = locate(tl.cdiv(num_tokens, BLOCK_L))
    offs_c = tl.arange(0, BLOCK_C)
    offs_l = tile * BLOCK_L + tl.arange(0, BLOCK_L)
    d_x = tl.zeros((BLOCK_L, BLOCK_C), tl.float32)
    d_x = project_back(
        d_x, d_q_ptr + n * stride_qn, stride_qc, stride_ql, w_q_ptr, offs_c, offs_l, num_tokens, C, D_QK, BLOCK_R, INPUT_PRECISION
    )
    d_x = project_back(
        d_x, d_k_ptr + n * stride_kn, stride_kc, stride_kl, w_k_ptr, offs_c, offs_l, num_tokens, C, D_QK, BLOCK_R, INPUT_PRECISION
    )
    d_x = project_back(
        d_x, d_v_ptr + n * stride_vn, stride_vc, stride_vl, w_v_ptr, offs_c, offs_l, num_tokens, C, D_V, BLOCK_R, INPUT_PRECISION
    )
    store_tile(d_x_ptr, n * stride_dn + tile_offsets(offs_c, offs_l, stride_dc, stride_dl), tl.trans(d_x), offs_c, offs_l, C, num_tokens)


@remembered
def _backward_constants(channels: int, d_qk: int, d_v: int, config: LaunchConfig) -> Constants:
    return dict(
        C=channels, D_QK=d_qk, D_V=d_v,
        BLOCK_L=config.block_m, BLOCK_C=block_channels(channels), BLOCK_R=config.block_d,
        INPUT_PRECISION=config.input_precision, **config.options,
    )  # fmt: skip


def qkv_projection_backward(
    d_q: torch.Tensor,
    d_k: torch.Tensor,
    d_v: torch.Tensor,
    w_q: torch.Tensor,
    w_k: torch.Tensor,
    w_v: torch.Tensor,
    d_x: torch.Tensor,
    *,
    config: LaunchConfig,
) -> None:
    """Fills `d_x` (N, C, L) with the gradient that projections without factors hand back.

    d_q, d_k (N, E, L) and d_v (N, V, L), any strides; w_q, w_k (E, C) and w_v (V, C), contiguous.
    """
    num_maps, num_channels, num_tokens = d_x.shape
    launch(
        qkv_projection_backward_kernel, num_maps * num_tiles(num_tokens, config.block_m),
        _backward_constants(num_channels, d_q.shape[1], d_v.shape[1], config),
        d_q, *d_q.stride(), w_q,
        d_k, *d_k.stride(), w_k,
        d_v, *d_v.stride(), w_v,
        d_x, *d_x.stride(),
        num_tokens,
    )  # fmt: skip
