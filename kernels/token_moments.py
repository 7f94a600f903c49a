"""Sums over all tokens of all maps: what the gradients of the weights are made of."""

import torch
import triton
import triton.language as tl

from .launch_config import FUSED_CHANNELS, LaunchConfig, block_channels, num_tiles
from .primitives import load_tile, tile_offsets

# Enough programs to fill the largest chips a few times over; a constant, so that the order of summation, and with it
# every bit of the result, is the same on all of them.
NUM_PROGRAMS = 256


@triton.jit(do_not_specialize=["num_tiles", "tiles_per_split"])  # or small batches would compile a kernel of their own
def token_moments_kernel(
    left_ptr, stride_an, stride_ac, stride_al,
    right_ptr, stride_bn, stride_bc, stride_bl,
    product_ptr, total_ptr,
    num_tiles, tiles_per_split, num_tokens,
    A: tl.constexpr, C: tl.constexpr,
    BLOCK_A: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """One program sums `left_i right_iᵀ` over one split of the tokens, for BLOCK_A channels of left and BLOCK_C of right, and `left_i`.

    left_ptr (N, A, L); right_ptr (N, C, L); product_ptr (splits, A, C) fp32; total_ptr (splits, A) fp32. The N maps are cut
    into num_tiles tiles of BLOCK_L tokens, of which each split owns tiles_per_split neighbours.
    """
    parts: tl.constexpr = tl.cdiv(C, BLOCK_C)
    pid = tl.program_id(0) // parts
    part = tl.program_id(0) % parts
    split = pid // tl.cdiv(A, BLOCK_A)
    offs_a = pid % tl.cdiv(A, BLOCK_A) * BLOCK_A + tl.arange(0, BLOCK_A)
    offs_c = part * BLOCK_C + tl.arange(0, BLOCK_C)
    tiles_per_map = tl.cdiv(num_tokens, BLOCK_L)
    acc = tl.zeros((BLOCK_A, BLOCK_C), tl.float32)
    total = tl.zeros((BLOCK_A,), tl.float32)
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
    rows = tl.cast(split, tl.int64) * A + offs_a
    inside = (offs_a < A)[:, None] & (offs_c < C)[None, :]
    tl.store(product_ptr + rows[:, None] * C + offs_c[None, :], acc, mask=inside)
    if part == 0:
        tl.store(total_ptr + rows, total, mask=offs_a < A)


def token_moments(left: torch.Tensor, right: torch.Tensor, *, config: LaunchConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """`Σ left_i right_iᵀ` (A, C) and `Σ left_i` (A), in fp32, over all tokens i of `left` (N, A, L) and `right` (N, C, L)."""
    num_maps, left_channels, num_tokens = left.shape
    num_channels = right.shape[1]
    token_tiles = num_maps * num_tiles(num_tokens, config.block_n)
    channel_tiles = num_tiles(left_channels, config.block_m)
    tiles_per_split = num_tiles(token_tiles, max(1, NUM_PROGRAMS // channel_tiles))
    splits = num_tiles(token_tiles, tiles_per_split)
    product = torch.empty((splits, left_channels, num_channels), dtype=torch.float32, device=left.device)
    total = torch.empty((splits, left_channels), dtype=torch.float32, device=left.device)
    block_c = min(block_channels(num_channels), FUSED_CHANNELS)
    token_moments_kernel[(splits * channel_tiles * num_tiles(num_channels, block_c),)](
        left, *left.stride(),
        right, *right.stride(),
        product, total,
        token_tiles, tiles_per_split, num_tokens,
        A=left_channels, C=num_channels, BLOCK_A=config.block_m, BLOCK_L=config.block_n, BLOCK_C=block_c,
        INPUT_PRECISION=config.input_precision, **config.options,
    )  # fmt: skip
    return product.sum(0), total.sum(0)
