"""Sums over all tokens of all maps: what the gradients of the weights are made of."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .launch_config import FUSED_CHANNELS, MAX_SPLITS, LaunchConfig, block_channels, num_tiles, remembered
from .launching import Constants, launch
from .primitives import load_tile, tile_offsets


class PartialMoments(NamedTuple):
    """Sums of one or two pairs of left (N, A, L) and right (N, C, L) in fp32, in parts, each over a split of the tokens of its own."""

    product: torch.Tensor  # Σ left_i right_iᵀ (splits, pairs, A, C)
    total: torch.Tensor  # Σ left_i (splits, pairs, A)
    right_total: torch.Tensor | None = None  # Σ right_i (splits, pairs, C), where it was wanted
    arrived: torch.Tensor | None = None  # (1) int32, zero, where it was wanted: for programs of the next launch to count themselves


@triton.jit(do_not_specialize=["num_tiles", "tiles_per_split"])  # or small batches would compile a kernel of their own
def token_moments_kernel(
    left_ptr, stride_an, stride_ac, stride_al,
    right_ptr, stride_bn, stride_bc, stride_bl,
    second_left_ptr, stride_cn, stride_cc, stride_cl,
    second_right_ptr, stride_dn, stride_dc, stride_dl,
    product_ptr, total_ptr, right_total_ptr, arrived_ptr,
    num_tiles, tiles_per_split, num_tokens,
    A: tl.constexpr, C: tl.constexpr,
    BLOCK_A: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """One program sums `left_i right_iᵀ`, left_i and right_i over a split of the tokens, for BLOCK_A channels of left and BLOCK_C of right.

    left_ptr, second_left_ptr (N, A, L); right_ptr, second_right_ptr (N, C, L), the second pair or None; product_ptr (splits, pairs, A, C)
    fp32; total_ptr (splits, pairs, A) fp32; right_total_ptr (splits, pairs, C) fp32, or None where it is not wanted; arrived_ptr (1) int32,
    filled with zero, or None. The N maps are cut into num_tiles tiles of BLOCK_L tokens, of which each split owns tiles_per_split
    neighbours.
    """
    parts: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    tiles: tl.constexpr = (A + BLOCK_A - 1) // BLOCK_A
    pid = tl.program_id(0)
    offs_c = pid % parts * BLOCK_C + tl.arange(0, BLOCK_C)
    offs_a = pid // parts % tiles * BLOCK_A + tl.arange(0, BLOCK_A)
    split = pid // (parts * tiles)
    row = split
    if second_left_ptr is not None:
        second = split % 2 == 1
        split = split // 2
        left_ptr, right_ptr = tl.where(second, second_left_ptr, left_ptr), tl.where(second, second_right_ptr, right_ptr)
        stride_an, stride_bn = tl.where(second, stride_cn, stride_an), tl.where(second, stride_dn, stride_bn)
        stride_ac, stride_bc = tl.where(second, stride_cc, stride_ac), tl.where(second, stride_dc, stride_bc)
        stride_al, stride_bl = tl.where(second, stride_cl, stride_al), tl.where(second, stride_dl, stride_bl)

    tiles_per_map = tl.cdiv(num_tokens, BLOCK_L)
    acc = tl.zeros((BLOCK_A, BLOCK_C), tl.float32)
    total = tl.zeros((BLOCK_A,), tl.float32)
    right_total = tl.zeros((BLOCK_C,), tl.float32)
    first = split * tiles_per_split
    for tile in range(first, tl.minimum(first + tiles_per_split, num_tiles)):
        n = tl.cast(tile // tiles_per_map, tl.int64)
        offs_l = tile % tiles_per_map * BLOCK_L + tl.arange(0, BLOCK_L)
        left_offsets = n * stride_an + tile_offsets(offs_a, offs_l, stride_ac, stride_al)
        left = load_tile(left_ptr, left_offsets, offs_a, offs_l, A, num_tokens, True)
        right_offsets = n * stride_bn + tile_offsets(offs_c, offs_l, stride_bc, stride_bl)
        right = load_tile(right_ptr, right_offsets, offs_c, offs_l, C, num_tokens, True)
        acc = tl.dot(left, tl.trans(right), acc, input_precision=INPUT_PRECISION)
        total += tl.sum(left.to(tl.float32), 1)
        if right_total_ptr is not None:
            right_total += tl.sum(right.to(tl.float32), 1)
    rows = tl.cast(row, tl.int64) * A + offs_a
    inside = (offs_a < A)[:, None] & (offs_c < C)[None, :]
    tl.store(product_ptr + rows[:, None] * C + offs_c[None, :], acc, mask=inside)
    if pid % parts == 0:
        tl.store(total_ptr + rows, total, mask=offs_a < A)
    if right_total_ptr is not None and pid // parts % tiles == 0:
        tl.store(right_total_ptr + tl.cast(row, tl.int64) * C + offs_c, right_total, mask=offs_c < C)
    if arrived_ptr is not None and pid == 0:
        tl.store(arrived_ptr, 0)


@remembered
def _constants(left_channels: int, channels: int, config: LaunchConfig) -> Constants:
    return dict(
        A=left_channels, C=channels,
        BLOCK_A=min(config.block_m, block_channels(left_channels)), BLOCK_L=config.block_n,
        BLOCK_C=min(block_channels(channels), FUSED_CHANNELS),
        INPUT_PRECISION=config.input_precision, **config.options,
    )  # fmt: skip


def partial_moments(
    left: torch.Tensor,
    right: torch.Tensor,
    second: tuple[torch.Tensor, torch.Tensor] | None = None,
    *,
    need_right: bool = False,
    need_arrived: bool = False,
    config: LaunchConfig,
) -> PartialMoments:
    """The sums of left (N, A, L) and right (N, C, L), and of `second`, another pair of the same shapes, in the same launch.

    Those of right by itself with `need_right`; a counter at zero with `need_arrived`.
    """
    num_maps, left_channels, num_tokens = left.shape
    num_channels = right.shape[1]
    pairs = 1 if second is None else 2
    constants = _constants(left_channels, num_channels, config)
    token_tiles = num_maps * num_tiles(num_tokens, config.block_n)
    programs = pairs * num_tiles(left_channels, constants["BLOCK_A"]) * num_tiles(num_channels, constants["BLOCK_C"])
    tiles_per_split = num_tiles(token_tiles, max(1, MAX_SPLITS // programs))
    splits = num_tiles(token_tiles, tiles_per_split)
    product = torch.empty((splits, pairs, left_channels, num_channels), dtype=torch.float32, device=left.device)
    total = torch.empty((splits, pairs, left_channels), dtype=torch.float32, device=left.device)
    right_total = torch.empty((splits, pairs, num_channels), dtype=torch.float32, device=left.device) if need_right else None
    arrived = torch.empty(1, dtype=torch.int32, device=left.device) if need_arrived else None
    of_second: tuple[torch.Tensor | int | None, ...] = (None, 0, 0, 0, None, 0, 0, 0)
    if second is not None:
        of_second = (second[0], *second[0].stride(), second[1], *second[1].stride())
    launch(
        token_moments_kernel, splits * programs,
        constants,
        left, *left.stride(),
        right, *right.stride(),
        *of_second,
        product, total, right_total, arrived,
        token_tiles, tiles_per_split, num_tokens,
    )  # fmt: skip
    return PartialMoments(product, total, right_total, arrived)
