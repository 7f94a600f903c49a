"""Statistics of group normalisation (Wu and He 2018), so that other kernels can normalise what they load.

`h = factor · (x - mean) + bias` for each map and channel, with `factor = weight / √(variance + ε)`, mean and variance those of the group.
One pass over the map: each program sums a part of the tokens, and what they find is merged in a fixed order. Variances are merged as sums
of squares about means (Chan, Golub and LeVeque 1979), and numbers are counted from a channel's first token, so that a large common mean
costs no digits.
"""

import torch
import triton
import triton.language as tl

from .block_sizes import MOMENTS_OPTIONS, MOMENTS_TILE
from .launch_config import num_tiles, remembered, token_splits
from .launching import Constants, launch
from .primitives import NORM_ROWS, load_tile, locate, tile_offsets


@triton.jit
def merge_moments(count, mean, square, other_count, other_mean, other_square):
    """`(mean, sum of squares about it)` of two samples together, of which the second is not empty."""
    difference = other_mean - mean
    share = other_count / (count + other_count)
    return mean + difference * share, square + other_square + difference * difference * (count * share)


@triton.jit
def load_first_token(x_ptr, stride_xc, offs_c, inside):
    """Channels offs_c of the first token of the map behind x_ptr (C, L), in fp32."""
    return tl.load(x_ptr + tl.cast(offs_c, tl.int64) * stride_xc, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def channel_moments_kernel(
    x_ptr, stride_xn, stride_xc, stride_xl,
    moments_ptr,
    num_tokens, splits, tokens_per_split,
    C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """One program takes the moments of BLOCK_C channels over one split of the tokens of one map.

    x_ptr (N, C, L); moments_ptr (N, splits, 2, C) fp32, for each split the means, less the map's first token, and the sums of squares
    about them.
    """
    parts: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    pid = tl.program_id(0)
    part, row = pid % parts, pid // parts
    n, first = (row // splits).to(tl.int64), row % splits * tokens_per_split
    offs_c = part * BLOCK_C + tl.arange(0, BLOCK_C)
    x_ptr += n * stride_xn
    origin = load_first_token(x_ptr, stride_xc, offs_c, offs_c < C)
    mean = tl.zeros((BLOCK_C,), tl.float32)
    square = tl.zeros((BLOCK_C,), tl.float32)
    last = tl.minimum(first + tokens_per_split, num_tokens)
    for start in range(first, last, BLOCK_L):
        offs_l = start + tl.arange(0, BLOCK_L)
        count = tl.cast(tl.minimum(last - start, BLOCK_L), tl.float32)
        x = load_tile(x_ptr, tile_offsets(offs_c, offs_l, stride_xc, stride_xl), offs_c, offs_l, C, last, True).to(tl.float32)
        x = tl.where((offs_l < last)[None, :], x - origin[:, None], 0.0)
        tile_mean = tl.sum(x, 1) / count
        centred = tl.where((offs_l < last)[None, :], x - tile_mean[:, None], 0.0)
        mean, square = merge_moments(tl.cast(start - first, tl.float32), mean, square, count, tile_mean, tl.sum(centred * centred, 1))
    moments_ptr += row.to(tl.int64) * 2 * C + offs_c
    tl.store(moments_ptr, mean, mask=offs_c < C)
    tl.store(moments_ptr + C, square, mask=offs_c < C)


@triton.jit
def group_statistics_kernel(
    x_ptr, stride_xn, stride_xc,
    moments_ptr, weight_ptr, bias_ptr, norm_ptr,
    num_tokens, splits, tokens_per_split, eps,
    C: tl.constexpr, GROUPS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program merges the moments of one group of channels of one map.

    x_ptr (N, C, L), of which the first tokens are read; moments_ptr (N, splits, 2, C); weight_ptr, bias_ptr (C) or None; norm_ptr
    (N, NORM_ROWS, C) fp32. What rounding leaves of the mean is part of the bias.
    """
    n, group = locate(GROUPS)
    width: tl.constexpr = C // GROUPS
    inside = tl.arange(0, BLOCK_C) < width
    offs_c = group * width + tl.arange(0, BLOCK_C)
    mean = tl.zeros((BLOCK_C,), tl.float32)
    square = tl.zeros((BLOCK_C,), tl.float32)
    for split in range(splits):
        first = split * tokens_per_split
        count = tl.cast(tl.minimum(tokens_per_split, num_tokens - first), tl.float32)
        split_ptr = moments_ptr + (n * splits + split) * 2 * C + offs_c
        split_mean = tl.load(split_ptr, mask=inside, other=0.0)
        split_square = tl.load(split_ptr + C, mask=inside, other=0.0)
        mean, square = merge_moments(tl.cast(first, tl.float32), mean, square, count, split_mean, split_square)
    origin = load_first_token(x_ptr + n * stride_xn, stride_xc, offs_c, inside)
    group_origin = load_first_token(x_ptr + n * stride_xn, stride_xc, group * width, True)
    mean = tl.where(inside, mean + (origin - group_origin), 0.0)
    centre = tl.sum(mean, 0) / width
    group_mean = group_origin + centre
    off_centre = tl.where(inside, mean - centre, 0.0)
    variance = tl.sum(square / num_tokens + off_centre * off_centre, 0) / width
    factor = tl.full((BLOCK_C,), 1.0, tl.float32) / tl.sqrt_rn(variance + eps)
    bias = tl.zeros((BLOCK_C,), tl.float32)
    if weight_ptr is not None:
        factor *= tl.load(weight_ptr + offs_c, mask=inside, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + offs_c, mask=inside, other=0.0).to(tl.float32)
    norm_ptr += n * NORM_ROWS * C + offs_c
    tl.store(norm_ptr, tl.zeros((BLOCK_C,), tl.float32) + group_mean, mask=inside)
    tl.store(norm_ptr + C, factor, mask=inside)
    tl.store(norm_ptr + 2 * C, bias - factor * (group_origin - group_mean + centre), mask=inside)
    tl.store(norm_ptr + 3 * C, factor * off_centre + bias, mask=inside)


@remembered
def _moments_constants(num_channels: int) -> Constants:
    return {"C": num_channels, "BLOCK_C": MOMENTS_TILE, "BLOCK_L": MOMENTS_TILE, **MOMENTS_OPTIONS}


@remembered
def _statistics_constants(num_channels: int, num_groups: int) -> Constants:
    block_c = triton.next_power_of_2(num_channels // num_groups)
    return {"C": num_channels, "GROUPS": num_groups, "BLOCK_C": block_c, **MOMENTS_OPTIONS}


def group_statistics(x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, num_groups: int, eps: float) -> torch.Tensor:
    """(N, 4, C) in fp32 for x (N, C, L): the rows `mean`, `factor` and `bias` of `h = factor · (x - mean) + bias`, and the mean of h.

    weight and bias are (C), contiguous, or None. L is not 0, and num_groups divides C.
    """
    num_maps, num_channels, num_tokens = x.shape
    parts = num_tiles(num_channels, MOMENTS_TILE)
    splits, tokens_per_split = token_splits(num_maps * parts, num_tokens, MOMENTS_TILE)
    moments = torch.empty((num_maps, splits, 2, num_channels), dtype=torch.float32, device=x.device)
    launch(
        channel_moments_kernel, num_maps * splits * parts,
        _moments_constants(num_channels),
        x, *x.stride(),
        moments,
        num_tokens, splits, tokens_per_split,
    )  # fmt: skip
    norm = torch.empty((num_maps, NORM_ROWS.value, num_channels), dtype=torch.float32, device=x.device)
    launch(
        group_statistics_kernel, num_maps * num_groups,
        _statistics_constants(num_channels, num_groups),
        x, *x.stride()[:2],
        moments, weight, bias, norm,
        num_tokens, splits, tokens_per_split, eps,
    )  # fmt: skip
    return norm
