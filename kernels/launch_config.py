"""The block sizes of every kernel: the only ones in the repository, chosen by a pure function."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Target:
    """What the choice of block sizes depends on besides the problem.

    `shared_memory` is what one program may use, in bytes. `fp32_precision` is how a dot of fp32 operands is computed
    (`input_precision` of `tl.dot`).
    """

    shared_memory: int
    fp32_precision: str


@dataclass(frozen=True)
class LaunchConfig:
    """How one kernel is launched.

    block_m: query tokens a program, for `token_moments` channels of the left factor. block_n: key tokens a step, for
    `token_moments` tokens a step. block_k: channels of a dot between two tiles of tokens taken at once; fewer than the
    map has means that they are read from memory step by step. block_d: rows of a weight a step.
    """

    block_m: int
    block_n: int
    block_k: int
    block_d: int
    num_warps: int
    num_stages: int
    input_precision: str

    def steps_over_channels(self, num_channels: int) -> bool:
        """Whether tiles of tokens are too wide to stay in registers, so that the forward kernel parks them in `y`."""
        return self.block_k < block_channels(num_channels)


@dataclass(frozen=True)
class BackwardConfigs:
    """One configuration for each kernel of the backward pass."""

    prepare: LaunchConfig
    key_value_gradient: LaunchConfig
    query_gradient: LaunchConfig
    token_moments: LaunchConfig


def block_channels(num_channels: int) -> int:
    """Channels of a tile: the next power of two, and at least the 16 that a dot needs."""
    return max(16, 1 << (num_channels - 1).bit_length())


def forward_config(num_channels: int, dtype: torch.dtype, target: Target) -> LaunchConfig:
    return _config("forward", num_channels, dtype, target)


def backward_configs(num_channels: int, dtype: torch.dtype, target: Target) -> BackwardConfigs:
    return BackwardConfigs(
        prepare=_config("prepare", num_channels, dtype, target),
        key_value_gradient=_config("key_value_gradient", num_channels, dtype, target),
        query_gradient=_config("query_gradient", num_channels, dtype, target),
        token_moments=_config("token_moments", num_channels, dtype, target),
    )


def _config(kernel: str, num_channels: int, dtype: torch.dtype, target: Target) -> LaunchConfig:
    block_c = block_channels(num_channels)
    if dtype == torch.float32:
        sizes = (32, 32, 32, 16, 8, 1) if block_c > 64 else (64, 32, 64, 16, 4, 2)
    else:
        sizes = (64, 64, 256, 32, 4, 2) if block_c <= 128 else (64, 32, 64, 32, 8, 2)
    return LaunchConfig(*sizes, input_precision=target.fp32_precision if dtype == torch.float32 else "ieee")
