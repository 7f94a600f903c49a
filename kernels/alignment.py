"""Rows of tokens that begin where several numbers can be loaded at once.

Triton loads numbers together where it knows their strides to be multiples of 16. Else, as on a contiguous map of 7×7 or 14×14 pixels,
each has an address of its own, and of tiles of many channels so many that they do not fit into registers. Such maps are copied to rows
that are a little longer; what is spilled otherwise is more than a copy moves.
"""

import torch

from .launch_config import num_tiles

MULTIPLE = 16
NARROW = 64
"""Channels of the widest tile whose addresses fit."""


def is_aligned(tokens: torch.Tensor) -> bool:
    """Whether numbers of (N, C, L) can be loaded several at once, those of neighbouring tokens or channels."""
    stride_n, stride_c, stride_l = tokens.stride()
    side_by_side = (stride_l == 1 and stride_c % MULTIPLE == 0) or (stride_c == 1 and stride_l % MULTIPLE == 0)
    return side_by_side and stride_n % MULTIPLE == 0 and tokens.data_ptr() % 16 == 0


def readable(tokens: torch.Tensor) -> torch.Tensor:
    """tokens (N, C, L), or a copy in aligned rows where a kernel could not read tokens without spilling."""
    if tokens.shape[1] <= NARROW or is_aligned(tokens):
        return tokens
    return empty_aligned(tokens, tokens.shape).copy_(tokens)


def writable(tokens: torch.Tensor) -> torch.Tensor:
    """tokens (N, C, L), or uninitialised memory of its shape, to be copied there when it is filled."""
    return tokens if tokens.shape[1] <= NARROW or is_aligned(tokens) else empty_aligned(tokens, tokens.shape)


def empty_aligned(like: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Uninitialised (N, C, L) of the dtype and on the device of `like`, with rows of tokens that begin at multiples of 16 elements."""
    *outer, length = shape
    return like.new_empty((*outer, num_tiles(length, MULTIPLE) * MULTIPLE))[..., :length]


def empty_with_strides_of(tokens: torch.Tensor) -> torch.Tensor:
    """Uninitialised, with gaps where tokens has some, for kernels that are told the strides of both once."""
    return torch.empty_strided(tokens.shape, tokens.stride(), dtype=tokens.dtype, device=tokens.device)
