"""The block sizes of every kernel: the only ones in the repository, chosen by a pure function.

They come from compiling for each class of devices and reading registers, spills and shared memory; none has been timed yet.
"""

import functools
from dataclasses import dataclass

import torch

FUSED_CHANNELS = 256
"""The widest map whose projections are part of the kernels, and the channels that one program accumulates where a map is wider."""


MERGE_TILE = 32
"""Channels, and tokens, of one program that merges what splits of the keys have found."""
MERGE_OPTIONS = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}

FILLS_A_CHIP = 128
"""So many programs keep the larger chips busy, which have 108 to 148 multiprocessors. It is not asked of the device: results would
depend on it."""


@dataclass(frozen=True)
class Target:
    """What the choice of block sizes depends on besides the problem.

    `architecture` is "hopper" (sm_90), "blackwell" (sm_100), "cdna" (AMD) or "ampere" (sm_80, 86, 89, 120 and what is not listed:
    mma.sync and at most 99 KB of shared memory).
    `fp32_precision` is how a dot of fp32 operands is computed (`input_precision` of `tl.dot`).
    """

    architecture: str
    fp32_precision: str


@dataclass(frozen=True)
class LaunchConfig:
    """How one kernel is launched.

    block_m: query tokens a program, for `qkv_projection` tokens a program, for `token_moments` channels of the left factor.
    block_n: key tokens a step, for `token_moments` tokens a step. block_k: channels of a dot between two tiles of tokens
    taken at once; fewer than the map has means that they are read from memory step by step. block_d: rows of a weight a
    step. max_registers: of a thread, where the assembler's own choice would spill; NVIDIA only.
    """

    block_m: int
    block_n: int
    block_k: int
    block_d: int
    num_warps: int
    num_stages: int
    input_precision: str
    max_registers: int | None = None

    @functools.cached_property
    def options(self) -> dict[str, int | bool]:
        """The compiler's options, as a launch takes them. Fusing a multiply and an add is asked for, not left to a default."""
        options: dict[str, int | bool] = {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}
        if self.max_registers is not None:
            options["maxnreg"] = self.max_registers
        return options

    def steps_over_channels(self, num_channels: int) -> bool:
        """Whether tiles of tokens are too wide to stay in registers, so that the forward kernel parks them in `y`."""
        return self.block_k < block_channels(num_channels)


@dataclass(frozen=True)
class BackwardConfigs:
    """One configuration for each kernel of the backward pass."""

    prepare: LaunchConfig
    query_gradient: LaunchConfig
    key_value_gradient: LaunchConfig
    token_moments: LaunchConfig


@dataclass(frozen=True)
class ProjectedConfigs:
    """One configuration for each kernel of both passes with projected keys; `token_moments` takes that of `BackwardConfigs`."""

    qkv_projection: LaunchConfig
    forward: LaunchConfig
    prepare: LaunchConfig
    query_gradient: LaunchConfig
    key_value_gradient: LaunchConfig


@dataclass(frozen=True)
class WideConfigs:
    """One configuration for each kernel of maps wider than `FUSED_CHANNELS`."""

    forward: LaunchConfig
    query_gradient: LaunchConfig
    key_value_gradient: LaunchConfig
    token_moments: LaunchConfig


@dataclass(frozen=True)
class ProjectionConfigs:
    """One configuration for each kernel that projects a map to queries, keys and values of any width, and takes their gradients back."""

    qkv_projection: LaunchConfig
    backward: LaunchConfig
    token_moments: LaunchConfig


@dataclass(frozen=True)
class TokenConfigs:
    """One configuration for each kernel of attention on tokens."""

    forward: LaunchConfig
    query_gradient: LaunchConfig
    key_value_gradient: LaunchConfig


def block_channels(num_channels: int) -> int:
    """Channels of a tile: the next power of two, and at least the 16 that a dot needs."""
    return max(16, 1 << (num_channels - 1).bit_length())


def num_tiles(length: int, block: int) -> int:
    """Tiles of `block` that cover `length`. `triton.cdiv` is the same, and takes microseconds of every launch."""
    return -(-length // block)


@functools.cache
def key_splits(programs: int, num_tokens: int, config: LaunchConfig) -> tuple[int, int]:
    """`(splits, keys of each)` where so many programs would go through all keys: as many as a chip takes, with four steps at least."""
    steps = num_tiles(num_tokens, config.block_n)
    keys = num_tiles(steps, max(1, min(FILLS_A_CHIP // programs, steps // 4))) * config.block_n
    return num_tiles(num_tokens, keys), keys


@functools.cache
def projects_keys(num_channels: int, qk_channels: int) -> bool:
    """Whether queries and keys of `qk_channels` are projected, or the keys' weight is folded into the query.

    Counted in matrix products of padded width per pair of tokens, B being `block_channels`: folded, the forward pass takes
    2 B(C) and the backward pass 7 B(C); projected, B(D) + B(C) and 4 B(D) + 3 B(C), one kernel more, and queries and keys in
    memory. At B(D) = B(C)/2 that is a quarter less; a narrower B(D) only gains, a wider one gains nothing. Maps of at most
    16 channels always fold, since no product is narrower than 16, and so do those wider than `FUSED_CHANNELS`.
    """
    return num_channels <= FUSED_CHANNELS and 2 * block_channels(qk_channels) <= block_channels(num_channels)


@functools.cache
def forward_config(num_channels: int, dtype: torch.dtype, target: Target) -> LaunchConfig:
    """The configuration of `attention_forward` for maps of `num_channels`, 1 to 256."""
    return _configs(num_channels, dtype, target)[0]


@functools.cache
def backward_configs(num_channels: int, dtype: torch.dtype, target: Target) -> BackwardConfigs:
    """The configurations of `attention_backward` and `token_moments` for maps of `num_channels`, 1 to 256."""
    return BackwardConfigs(*_configs(num_channels, dtype, target)[1:])


@functools.cache
def projected_configs(num_channels: int, dtype: torch.dtype, target: Target) -> ProjectedConfigs:
    """The configurations of the kernels with projected keys for values of `num_channels`, 17 to 256, and keys of half or less."""
    return ProjectedConfigs(*_rows(_PROJECTED_TABLE, num_channels, dtype, target))


@functools.cache
def projection_configs(num_channels: int, dtype: torch.dtype, target: Target) -> ProjectionConfigs:
    """The configurations of the projections of maps of `num_channels`, 1 to 256; the row of 32 channels serves fewer as well.

    What takes gradients back has the tiles of the kernel that makes the gradient of y out of that of the output.
    """
    qkv_projection, _, prepare, *_ = _rows(_PROJECTED_TABLE, max(32, num_channels), dtype, target)
    return ProjectionConfigs(qkv_projection, prepare, _configs(num_channels, dtype, target)[-1])


@functools.cache
def wide_configs(dtype: torch.dtype, target: Target) -> WideConfigs:
    """The configurations of the kernels for maps of 257 to 512 channels."""
    return WideConfigs(*_rows(_WIDE_TABLE, 2 * FUSED_CHANNELS, dtype, target), *_configs(FUSED_CHANNELS, dtype, target)[-1:])


@functools.cache
def token_configs(qk_channels: int, value_channels: int, dtype: torch.dtype, target: Target) -> TokenConfigs:
    """The configurations of the kernels on tokens for queries and keys of 1 to 128 channels, and values of 1 to 256.

    A row of the tables is for values of its width and keys of up to half of it. Values that are no wider than the keys fill one half.
    """
    block_d, block_cv = block_channels(qk_channels), block_channels(value_channels)
    table = _EQUAL_WIDTHS_TABLE if block_cv <= block_d else _TOKEN_TABLE
    return TokenConfigs(*_rows(table, max(32, 2 * block_d, block_cv), dtype, target))


def _configs(num_channels: int, dtype: torch.dtype, target: Target) -> list[LaunchConfig]:
    return _rows(_TABLE, num_channels, dtype, target)


def _rows(table: "_Table", num_channels: int, dtype: torch.dtype, target: Target) -> list[LaunchConfig]:
    if dtype != torch.float32:
        operands, precision = "half", "ieee"
    else:
        operands, precision = ("tf32" if target.fp32_precision == "tf32" else "fp32"), target.fp32_precision
    block_c = block_channels(num_channels)
    if precision == "bf16x6" and block_c >= _TF32X3_FROM[target.architecture]:
        precision = "tf32x3"
    row = table[target.architecture, operands][block_c]
    configs = []
    for block_m, block_n, block_k, block_d, num_warps, num_stages, *registers in row:
        max_registers = registers[0] if registers else None
        configs.append(LaunchConfig(block_m, block_n, block_k, block_d, num_warps, num_stages, precision, max_registers))
    return configs


_Sizes = tuple[int, ...]
_Row = tuple[_Sizes, ...]
_Table = dict[tuple[str, str], dict[int, _Row]]

# From so many channels of a tile on fp32 is split into two parts of TF32 instead of three of bf16: of fp32 class as well, with fewer
# registers and conversions. Narrower tiles have registers to spare, and bf16's parts take less shared memory.
_TF32X3_FROM = {"hopper": 64, "blackwell": 256, "ampere": 256}

ALL = 256  # a tile of tokens stays in registers with all its channels

# (architecture, operands) → channels of a tile → one entry for each kernel, in the order
#     forward, prepare, query gradient, key and value gradient, token moments,
# and each entry (block_m, block_n, block_k, block_d, num_warps, num_stages[, max_registers]).
_TABLE: _Table = {
    ("hopper", "half"): {
        16: ((64, 64, ALL, 32, 4, 2), (64, 64, ALL, 32, 4, 1), (64, 64, ALL, 32, 4, 2), (64, 64, ALL, 32, 4, 2), (16, 64, ALL, 32, 4, 2)),
        32: ((64, 64, ALL, 32, 4, 2), (64, 64, ALL, 32, 4, 1), (64, 64, ALL, 32, 4, 2), (64, 64, ALL, 32, 4, 2), (32, 64, ALL, 32, 4, 2)),
        64: ((64, 64, ALL, 32, 4, 2), (64, 64, ALL, 32, 4, 1), (64, 64, ALL, 32, 4, 2), (64, 64, ALL, 32, 4, 2), (64, 64, ALL, 32, 4, 2)),
        128: ((64, 64, ALL, 32, 4, 2), (64, 64, ALL, 32, 4, 1), (64, 64, ALL, 32, 4, 2), (64, 64, ALL, 32, 4, 2), (64, 64, ALL, 32, 4, 2)),
        256: ((64, 64, 64, 32, 8, 2), (64, 64, ALL, 32, 4, 1), (64, 64, 64, 32, 8, 2), (32, 64, 64, 32, 4, 1), (64, 64, ALL, 32, 4, 2)),
    },
    ("hopper", "tf32"): {
        16: ((64, 64, ALL, 16, 4, 2), (64, 64, ALL, 32, 4, 1), (64, 64, ALL, 16, 4, 2), (64, 64, ALL, 16, 4, 2), (16, 64, ALL, 32, 4, 2)),
        32: ((64, 64, ALL, 16, 4, 2), (64, 64, ALL, 32, 4, 1), (64, 64, ALL, 16, 4, 2), (64, 64, ALL, 16, 4, 2), (32, 64, ALL, 32, 4, 2)),
        64: ((64, 64, ALL, 16, 4, 2), (64, 64, ALL, 32, 4, 1), (64, 64, ALL, 16, 4, 2), (64, 64, ALL, 16, 4, 2), (64, 64, ALL, 32, 4, 2)),
        128: ((128, 32, ALL, 16, 8, 1), (64, 64, ALL, 32, 4, 1), (128, 32, ALL, 16, 8, 1),
              (32, 128, ALL, 16, 8, 1), (64, 32, ALL, 32, 4, 2)),
        256: ((64, 32, 64, 16, 8, 1), (64, 64, 64, 16, 8, 1), (64, 32, 32, 16, 8, 1), (16, 32, 64, 16, 8, 1), (64, 32, ALL, 32, 8, 1)),
    },
    ("hopper", "fp32"): {
        16: ((64, 64, ALL, 16, 4, 2), (64, 64, ALL, 32, 4, 1), (64, 64, ALL, 16, 4, 2), (64, 64, ALL, 16, 4, 2), (16, 32, ALL, 32, 4, 2)),
        32: ((64, 32, ALL, 16, 4, 2, 255), (64, 64, ALL, 32, 4, 1), (64, 32, ALL, 16, 4, 1),
             (32, 64, ALL, 16, 4, 2, 255), (32, 32, ALL, 32, 4, 2, 255)),
        64: ((64, 64, 32, 16, 4, 1, 255), (64, 64, 32, 32, 4, 1, 255), (64, 32, 32, 16, 4, 1, 255),
             (32, 64, 32, 16, 4, 1, 255), (64, 32, ALL, 32, 4, 2)),
        128: ((128, 32, 32, 16, 8, 1, 255), (64, 64, 32, 16, 4, 1), (128, 16, 32, 16, 8, 1, 255),
              (16, 64, 16, 16, 8, 1, 255), (64, 32, ALL, 32, 4, 2)),
        256: ((32, 16, 16, 16, 8, 1, 255), (16, 64, 16, 16, 8, 1, 255), (16, 32, 16, 16, 8, 1, 255),
              (16, 32, 16, 16, 8, 1), (32, 32, ALL, 32, 8, 1)),
    },
    ("ampere", "half"): {
        16: ((64, 64, ALL, 32, 4, 2), (64, 64, ALL, 32, 4, 1), (64, 64, ALL, 32, 4, 2), (64, 64, ALL, 16, 4, 2), (16, 64, ALL, 32, 4, 2)),
        32: ((64, 64, ALL, 32, 4, 2), (64, 64, ALL, 32, 4, 1), (64, 64, ALL, 32, 4, 2), (32, 64, ALL, 16, 4, 2), (32, 64, ALL, 32, 4, 2)),
        64: ((64, 64, ALL, 32, 4, 2), (64, 64, ALL, 32, 4, 1), (64, 32, ALL, 32, 4, 2), (32, 64, ALL, 16, 4, 2),
             (64, 64, ALL, 32, 4, 2, 255)),
        128: ((64, 64, 64, 32, 8, 1), (64, 64, ALL, 32, 4, 1), (64, 64, 64, 32, 8, 1), (64, 64, 64, 32, 8, 1), (64, 64, ALL, 32, 4, 2)),
        256: ((32, 64, 64, 32, 8, 2), (64, 64, ALL, 16, 8, 1), (32, 32, 64, 32, 8, 1),
              (16, 16, ALL, 32, 8, 1), (64, 32, ALL, 32, 8, 2)),
    },
    ("ampere", "tf32"): {
        16: ((64, 64, ALL, 16, 4, 2), (64, 64, ALL, 32, 4, 1), (64, 64, ALL, 16, 4, 2), (64, 64, ALL, 16, 4, 2), (16, 64, ALL, 32, 4, 2)),
        32: ((64, 64, ALL, 16, 4, 2), (64, 64, ALL, 32, 4, 1), (64, 32, ALL, 16, 4, 2), (32, 64, ALL, 16, 4, 2), (32, 64, ALL, 32, 4, 2)),
        64: ((64, 32, ALL, 16, 4, 2), (64, 64, ALL, 16, 4, 1), (64, 32, ALL, 16, 8, 2), (32, 32, ALL, 16, 4, 2),
             (64, 64, ALL, 32, 4, 2, 255)),
        128: ((64, 32, 64, 16, 8, 1), (64, 64, ALL, 16, 4, 1), (64, 32, 64, 16, 8, 1), (32, 64, 64, 16, 8, 1),
              (64, 64, ALL, 32, 4, 2, 255)),
        256: ((16, 32, 64, 16, 8, 1, 255), (32, 64, 64, 16, 8, 1, 255), (16, 16, 64, 16, 8, 1),
              (16, 32, 64, 16, 8, 1), (64, 32, ALL, 32, 8, 1)),
    },
    ("ampere", "fp32"): {
        16: ((64, 32, ALL, 16, 4, 2), (64, 64, ALL, 16, 4, 1), (64, 32, ALL, 16, 4, 1, 255),
             (32, 64, ALL, 16, 4, 1), (16, 64, ALL, 32, 4, 2)),
        32: ((64, 32, ALL, 16, 8, 1), (64, 64, ALL, 16, 8, 1), (16, 32, ALL, 16, 4, 1),
             (16, 32, ALL, 16, 4, 1), (32, 32, ALL, 32, 4, 2, 255)),
        64: ((32, 32, 32, 16, 8, 1), (32, 64, 32, 16, 8, 1, 255), (32, 32, 32, 16, 8, 1), (32, 32, 16, 16, 4, 1), (64, 32, ALL, 32, 4, 2)),
        128: ((32, 32, 16, 16, 8, 1), (64, 64, 32, 16, 8, 1), (16, 32, 32, 16, 8, 1, 255), (32, 32, 16, 16, 8, 1),
              (64, 16, ALL, 32, 4, 2, 255)),
        256: ((32, 16, 16, 16, 8, 1, 255), (16, 64, 16, 16, 8, 1, 255), (16, 32, 16, 16, 8, 1, 255),
              (16, 32, 16, 16, 8, 1, 255), (32, 32, ALL, 32, 8, 1)),
    },
    ("cdna", "half"): {
        16: ((64, 64, ALL, 32, 4, 1), (64, 64, ALL, 32, 4, 1), (64, 32, ALL, 32, 4, 1), (32, 64, ALL, 16, 4, 1), (16, 64, ALL, 32, 4, 2)),
        32: ((64, 64, ALL, 32, 4, 2), (64, 64, ALL, 32, 4, 1), (64, 32, ALL, 32, 4, 1), (32, 64, ALL, 16, 4, 1), (32, 64, ALL, 32, 4, 2)),
        64: ((64, 64, ALL, 32, 4, 1), (64, 64, ALL, 32, 4, 1), (64, 32, ALL, 32, 4, 1), (64, 64, ALL, 16, 4, 2), (64, 64, ALL, 32, 4, 2)),
        128: ((64, 64, ALL, 32, 4, 1), (64, 64, ALL, 32, 4, 1), (64, 64, ALL, 32, 4, 2), (32, 64, ALL, 16, 4, 1), (64, 64, ALL, 32, 4, 2)),
        256: ((64, 32, ALL, 16, 4, 2), (64, 64, ALL, 32, 4, 1), (64, 16, ALL, 32, 4, 2), (32, 32, ALL, 16, 4, 1), (64, 64, ALL, 32, 4, 2)),
    },
    ("cdna", "fp32"): {
        16: ((64, 64, ALL, 16, 4, 2), (64, 64, ALL, 32, 4, 1), (64, 64, ALL, 16, 4, 2), (64, 64, ALL, 16, 4, 2), (16, 64, ALL, 32, 4, 2)),
        32: ((64, 64, ALL, 16, 4, 2), (64, 64, ALL, 32, 4, 1), (64, 64, ALL, 16, 4, 2), (64, 64, ALL, 16, 4, 2), (32, 64, ALL, 32, 4, 2)),
        64: ((64, 64, ALL, 16, 4, 2), (64, 64, ALL, 32, 4, 1), (64, 64, ALL, 16, 4, 2), (64, 64, ALL, 16, 4, 2), (64, 64, ALL, 32, 4, 2)),
        128: ((16, 32, ALL, 16, 4, 2), (64, 64, ALL, 32, 4, 1), (16, 32, ALL, 16, 4, 2), (32, 16, ALL, 16, 4, 2), (64, 64, ALL, 32, 4, 2)),
        256: ((16, 32, ALL, 16, 4, 2), (64, 64, ALL, 32, 4, 1), (16, 32, ALL, 16, 4, 2), (32, 16, ALL, 16, 4, 1), (64, 32, ALL, 32, 4, 2)),
    },
}  # fmt: skip

# Blackwell takes Hopper's sizes, but for rows that would spill there or that were only counted on Hopper.
_TABLE |= {("blackwell", operands): _TABLE["hopper", operands] for operands in ("half", "tf32", "fp32")}
_TABLE["blackwell", "half"] = _TABLE["hopper", "half"] | {
    256: ((64, 64, 64, 32, 8, 2), (64, 64, ALL, 32, 4, 1), (64, 64, 64, 32, 8, 2), (32, 64, 64, 32, 8, 1), (64, 64, ALL, 32, 4, 2)),
}
_TABLE["blackwell", "tf32"] = _TABLE["hopper", "tf32"] | {
    128: ((64, 32, 64, 16, 8, 1), (64, 64, ALL, 32, 4, 1), (64, 16, ALL, 16, 4, 2), (32, 64, ALL, 16, 4, 2),
          (64, 32, ALL, 32, 4, 2, 255)),
    256: ((64, 32, 64, 16, 8, 1), (64, 64, 64, 16, 8, 1), (64, 32, 64, 16, 8, 1), (16, 32, 64, 16, 8, 1), (64, 32, ALL, 32, 8, 1)),
}  # fmt: skip
_TABLE["blackwell", "fp32"] = _TABLE["hopper", "fp32"] | {
    64: ((64, 32, 32, 16, 8, 1), (64, 64, 32, 32, 4, 1, 255), (64, 32, 32, 16, 8, 1), (32, 64, 32, 16, 8, 1),
         (64, 32, ALL, 32, 4, 2, 255)),
    128: ((64, 32, 32, 16, 8, 1, 255), (64, 64, 32, 16, 4, 1), (64, 32, 32, 16, 8, 1), (16, 64, 32, 16, 8, 1), (64, 32, ALL, 32, 4, 2)),
}  # fmt: skip

# The kernels with projected keys; the order of a row is
#     qkv projection, forward, prepare, query gradient, key and value gradient,
# and a row holds for keys of any width up to half the channels.
_PROJECTED_TABLE: _Table = {
    ("hopper", "half"): {
        32: ((64, 64, ALL, 16, 4, 1), (64, 64, ALL, 32, 4, 2), (64, 64, ALL, 32, 4, 1), (64, 64, ALL, 32, 4, 2), (64, 64, ALL, 32, 4, 2)),
        64: ((64, 64, ALL, 16, 4, 1), (64, 64, ALL, 32, 4, 2), (64, 64, ALL, 32, 4, 1), (64, 64, ALL, 32, 4, 2), (64, 64, ALL, 32, 4, 2)),
        128: ((64, 64, ALL, 16, 4, 1), (64, 64, ALL, 32, 4, 2), (64, 64, ALL, 32, 4, 1), (64, 64, ALL, 32, 4, 2), (64, 64, ALL, 32, 4, 2)),
        256: ((64, 64, ALL, 16, 8, 1), (64, 64, ALL, 32, 8, 2), (64, 64, ALL, 16, 8, 1), (64, 64, ALL, 16, 8, 2), (32, 64, 128, 16, 8, 1)),
    },
    ("hopper", "tf32"): {
        32: ((64, 64, ALL, 16, 4, 1), (64, 64, ALL, 16, 4, 2), (64, 64, ALL, 32, 4, 1), (64, 64, ALL, 16, 4, 2), (64, 64, ALL, 16, 4, 2)),
        64: ((64, 64, ALL, 16, 4, 1), (64, 64, ALL, 16, 4, 2), (64, 64, ALL, 32, 4, 1), (64, 64, ALL, 16, 4, 2), (64, 64, ALL, 16, 4, 2)),
        128: ((64, 64, ALL, 16, 4, 1), (128, 32, ALL, 16, 8, 1), (64, 64, ALL, 32, 4, 1), (64, 16, ALL, 16, 4, 2), (32, 64, 64, 16, 4, 1)),
        256: ((64, 64, ALL, 16, 4, 1), (64, 32, 64, 16, 8, 1), (32, 64, ALL, 16, 8, 1),
             (64, 32, 32, 16, 8, 1), (32, 64, 32, 16, 8, 1)),
    },
    ("hopper", "fp32"): {
        32: ((64, 64, ALL, 16, 4, 1), (64, 64, ALL, 32, 4, 2), (64, 64, ALL, 32, 4, 1),
             (64, 32, ALL, 16, 4, 2, 255), (16, 32, ALL, 16, 4, 1)),
        64: ((64, 64, ALL, 16, 4, 1), (64, 64, ALL, 16, 4, 1, 255), (64, 64, ALL, 32, 4, 1),
             (64, 32, ALL, 16, 4, 1, 255), (32, 64, 32, 16, 4, 1, 255)),
        128: ((64, 64, ALL, 16, 8, 1), (128, 32, 32, 16, 8, 1, 255), (32, 64, ALL, 16, 8, 1),
              (64, 32, 32, 16, 4, 1, 255), (16, 64, 32, 16, 8, 1, 255)),
        256: ((64, 64, ALL, 16, 8, 1), (32, 16, 16, 16, 8, 1, 255), (32, 64, ALL, 16, 8, 1),
             (16, 32, 16, 16, 8, 1, 255), (16, 16, 32, 16, 8, 1, 255)),
    },
    ("ampere", "half"): {
        32: ((64, 64, ALL, 16, 4, 1), (64, 64, ALL, 32, 4, 2), (64, 64, ALL, 32, 4, 1), (64, 64, ALL, 32, 4, 2), (64, 64, ALL, 32, 4, 2)),
        64: ((64, 64, ALL, 32, 4, 1), (64, 64, ALL, 32, 4, 2), (64, 64, ALL, 32, 4, 1), (64, 64, ALL, 32, 4, 2), (32, 64, ALL, 16, 4, 1)),
        128: ((64, 64, ALL, 16, 8, 1), (64, 32, ALL, 32, 8, 2), (64, 64, ALL, 32, 4, 1), (64, 32, ALL, 32, 4, 2), (32, 32, 64, 16, 8, 1)),
        256: ((64, 64, ALL, 16, 8, 1), (32, 32, 128, 16, 8, 1), (64, 64, ALL, 16, 8, 1), (32, 32, 128, 16, 8, 1), (16, 16, 64, 16, 8, 1)),
    },
    ("ampere", "tf32"): {
        32: ((64, 64, ALL, 16, 4, 1), (64, 64, ALL, 16, 4, 2), (64, 64, ALL, 32, 4, 1), (64, 32, ALL, 16, 4, 2), (32, 64, ALL, 16, 4, 2)),
        64: ((64, 64, ALL, 16, 4, 1, 255), (64, 64, ALL, 16, 4, 2), (64, 64, ALL, 16, 4, 1),
             (64, 32, ALL, 16, 8, 2), (32, 32, 32, 16, 8, 1)),
        128: ((64, 64, ALL, 16, 4, 1), (32, 32, 64, 16, 8, 1), (64, 64, ALL, 16, 4, 1),
              (32, 64, 64, 16, 8, 1, 255), (16, 32, 64, 16, 8, 1)),
        256: ((64, 64, ALL, 16, 4, 1), (16, 32, 64, 16, 8, 1, 255), (32, 64, ALL, 16, 8, 1),
              (16, 16, 64, 16, 8, 1), (16, 16, 128, 16, 8, 1, 255)),
    },
    ("ampere", "fp32"): {
        32: ((64, 64, ALL, 16, 4, 1), (64, 32, ALL, 16, 8, 1), (64, 64, ALL, 16, 8, 1, 255),
             (16, 32, ALL, 16, 4, 1), (16, 32, ALL, 16, 4, 1)),
        64: ((64, 64, ALL, 16, 4, 1), (32, 32, 32, 16, 8, 1), (32, 64, ALL, 16, 8, 1, 255),
             (16, 32, 16, 16, 8, 1, 255), (16, 32, 16, 16, 8, 1, 255)),
        128: ((32, 64, ALL, 16, 8, 1), (32, 32, 16, 16, 8, 1), (32, 64, ALL, 16, 4, 1),
              (16, 32, 32, 16, 8, 1, 255), (16, 16, 16, 16, 8, 1)),
        256: ((32, 64, ALL, 16, 8, 1), (32, 16, 16, 16, 8, 1, 255), (32, 64, ALL, 16, 8, 1),
             (16, 32, 16, 16, 8, 1, 255), (16, 16, 64, 16, 8, 1)),
    },
    ("cdna", "half"): {
        32: ((64, 64, ALL, 16, 4, 1), (64, 64, ALL, 32, 4, 2), (64, 64, ALL, 32, 4, 1), (64, 32, ALL, 32, 4, 1), (32, 32, 16, 16, 8, 1)),
        64: ((64, 64, ALL, 16, 4, 1), (64, 64, ALL, 32, 4, 2), (64, 64, ALL, 32, 4, 1), (64, 32, ALL, 32, 4, 1), (32, 32, 32, 16, 8, 1)),
        128: ((64, 64, ALL, 16, 4, 1), (64, 64, ALL, 32, 4, 2), (64, 64, ALL, 32, 4, 1), (64, 32, ALL, 32, 4, 1), (32, 64, ALL, 16, 4, 1)),
        256: ((64, 64, ALL, 16, 4, 1), (64, 32, ALL, 32, 4, 2), (64, 64, ALL, 32, 4, 1), (64, 16, ALL, 32, 4, 2), (32, 16, ALL, 16, 4, 1)),
    },
    ("cdna", "fp32"): {
        32: ((64, 64, ALL, 16, 4, 1), (64, 64, ALL, 16, 4, 2), (64, 64, ALL, 32, 4, 1), (64, 64, ALL, 16, 4, 2), (64, 64, ALL, 16, 4, 2)),
        64: ((64, 64, ALL, 16, 4, 1), (64, 64, ALL, 16, 4, 2), (64, 64, ALL, 32, 4, 1), (64, 64, ALL, 16, 4, 2), (32, 32, 32, 16, 8, 1)),
        128: ((64, 64, ALL, 16, 4, 1), (16, 32, ALL, 16, 4, 2), (64, 64, ALL, 32, 4, 1), (16, 32, ALL, 16, 4, 2), (32, 16, ALL, 16, 4, 2)),
        256: ((64, 64, ALL, 16, 4, 1), (16, 32, ALL, 16, 4, 2), (64, 64, ALL, 32, 4, 1), (16, 32, ALL, 16, 4, 2), (32, 16, ALL, 16, 4, 1)),
    },
}  # fmt: skip
_PROJECTED_TABLE |= {("blackwell", operands): _PROJECTED_TABLE["hopper", operands] for operands in ("half", "tf32", "fp32")}
_PROJECTED_TABLE["blackwell", "half"] = _PROJECTED_TABLE["hopper", "half"] | {
    256: ((64, 64, ALL, 16, 8, 1), (64, 64, ALL, 32, 8, 2), (64, 64, ALL, 16, 8, 1), (64, 64, ALL, 16, 8, 2), (32, 64, 128, 16, 8, 1, 255)),
}
_PROJECTED_TABLE["blackwell", "tf32"] = _PROJECTED_TABLE["hopper", "tf32"] | {
    128: ((64, 64, ALL, 16, 4, 1), (64, 32, 64, 16, 8, 1), (64, 64, ALL, 32, 4, 1), (64, 16, ALL, 16, 4, 2), (16, 32, 64, 16, 8, 1)),
    256: ((64, 64, ALL, 16, 4, 1), (64, 32, 64, 16, 8, 1), (32, 64, ALL, 16, 8, 1),
          (64, 32, 32, 16, 8, 1), (16, 16, 128, 16, 8, 1, 255)),
}  # fmt: skip
_PROJECTED_TABLE["blackwell", "fp32"] = _PROJECTED_TABLE["hopper", "fp32"] | {
    64: ((64, 64, ALL, 16, 4, 1), (64, 32, ALL, 16, 8, 2, 255), (64, 64, ALL, 32, 4, 1),
         (64, 32, 32, 16, 8, 1), (16, 32, 16, 16, 8, 1, 255)),
    128: ((64, 64, ALL, 16, 8, 1), (64, 32, 32, 16, 8, 1, 255), (32, 64, ALL, 16, 8, 1),
          (64, 32, 32, 16, 8, 1), (16, 64, 16, 16, 8, 1)),
}  # fmt: skip

# The kernels of wider maps, which take channels step by step; the order of a row is
#     forward, query gradient, key and value gradient.
_WIDE_TABLE: _Table = {
    ("hopper", "half"): {512: ((128, 64, 64, 16, 8, 2), (64, 64, 64, 16, 8, 2), (32, 128, 64, 16, 8, 1))},
    ("hopper", "tf32"): {512: ((64, 64, 64, 16, 8, 1), (64, 32, 64, 16, 8, 1), (16, 32, 64, 16, 8, 1))},
    ("hopper", "fp32"): {512: ((32, 32, 32, 16, 8, 1, 255), (16, 32, 32, 16, 8, 1, 255), (16, 32, 32, 16, 8, 1, 255))},
    ("blackwell", "half"): {512: ((64, 64, 64, 16, 8, 2), (64, 64, 64, 16, 8, 2), (32, 64, 64, 16, 8, 2))},
    ("blackwell", "tf32"): {512: ((64, 32, 64, 16, 8, 1), (64, 32, 64, 16, 8, 1), (32, 64, 64, 16, 8, 1))},
    ("blackwell", "fp32"): {512: ((64, 16, 32, 16, 8, 1, 255), (32, 32, 32, 16, 8, 1, 255), (16, 32, 32, 16, 8, 1, 255))},
    ("ampere", "half"): {512: ((64, 32, 64, 16, 8, 2), (64, 32, 32, 16, 8, 2), (32, 32, 64, 16, 8, 2))},
    ("ampere", "tf32"): {512: ((16, 32, 32, 16, 8, 1), (16, 16, 64, 16, 8, 1), (16, 16, 32, 16, 8, 1))},
    ("ampere", "fp32"): {512: ((32, 32, 32, 16, 8, 1, 255), (16, 32, 32, 16, 8, 1, 255), (16, 32, 32, 16, 8, 1, 255))},
    ("cdna", "half"): {512: ((64, 32, 64, 16, 8, 1), (64, 16, 64, 16, 8, 1), (32, 32, 64, 16, 8, 1))},
    ("cdna", "fp32"): {512: ((32, 32, 32, 16, 8, 1), (32, 32, 32, 16, 8, 1), (16, 32, 32, 16, 8, 1))},
}  # fmt: skip

# The kernels on tokens; the order of a row is
#     forward, query gradient, key and value gradient,
# and a row holds for queries and keys of any width up to half of that of the values.
_TOKEN_TABLE: _Table = {
    ("hopper", "half"): {
        32: ((64, 64, ALL, 32, 4, 2), (64, 64, ALL, 32, 4, 2), (64, 64, ALL, 32, 4, 2)),
        64: ((64, 64, ALL, 32, 4, 2), (64, 64, ALL, 32, 4, 2), (64, 64, ALL, 32, 4, 2)),
        128: ((64, 64, ALL, 32, 4, 2), (64, 64, ALL, 32, 4, 2), (64, 64, ALL, 32, 4, 2)),
        256: ((64, 64, ALL, 32, 8, 2), (64, 64, ALL, 16, 8, 2), (32, 64, 128, 16, 8, 1)),
    },
    ("hopper", "tf32"): {
        32: ((64, 64, ALL, 16, 4, 2), (64, 64, ALL, 16, 4, 2), (64, 64, ALL, 16, 4, 2)),
        64: ((64, 64, ALL, 16, 4, 2), (64, 64, ALL, 16, 4, 2), (64, 64, ALL, 16, 4, 2)),
        128: ((64, 32, 64, 16, 8, 1), (64, 16, ALL, 16, 4, 2), (16, 32, 64, 16, 8, 1)),
        256: ((64, 32, 64, 16, 8, 1), (64, 32, 32, 16, 8, 1), (16, 16, 128, 16, 8, 1, 255)),
    },
    ("hopper", "fp32"): {
        32: ((64, 64, ALL, 32, 4, 2), (64, 32, ALL, 16, 4, 2, 255), (16, 32, ALL, 16, 4, 1)),
        64: ((64, 32, ALL, 16, 8, 2, 255), (64, 32, 32, 16, 8, 1), (16, 64, 16, 16, 8, 1)),
        128: ((64, 32, 32, 16, 8, 1, 255), (64, 32, 32, 16, 8, 1), (16, 64, 16, 16, 8, 1)),
        256: ((32, 16, 16, 16, 8, 1, 255), (16, 32, 16, 16, 8, 1, 255), (16, 16, 32, 16, 8, 1, 255)),
    },
    ("ampere", "half"): {
        32: ((64, 64, ALL, 32, 4, 2), (64, 64, ALL, 32, 4, 2), (64, 64, ALL, 32, 4, 2)),
        64: ((64, 64, ALL, 32, 4, 2), (64, 64, ALL, 32, 4, 2), (32, 64, ALL, 16, 4, 1)),
        128: ((64, 32, ALL, 32, 8, 2), (64, 32, ALL, 32, 4, 2), (32, 32, 64, 16, 8, 1)),
        256: ((32, 32, 128, 16, 8, 1), (32, 32, 128, 16, 8, 1), (16, 16, 64, 16, 8, 1)),
    },
    ("ampere", "tf32"): {
        32: ((64, 64, ALL, 16, 4, 2), (64, 32, ALL, 16, 4, 2), (32, 64, ALL, 16, 4, 2)),
        64: ((64, 64, ALL, 16, 4, 2), (64, 32, ALL, 16, 8, 2), (32, 32, 32, 16, 8, 1)),
        128: ((32, 32, 64, 16, 8, 1), (32, 64, 64, 16, 8, 1, 255), (16, 32, 64, 16, 8, 1)),
        256: ((16, 32, 64, 16, 8, 1, 255), (16, 16, 64, 16, 8, 1), (16, 16, 128, 16, 8, 1, 255)),
    },
    ("ampere", "fp32"): {
        32: ((64, 32, ALL, 16, 8, 1), (16, 32, ALL, 16, 4, 1), (16, 32, ALL, 16, 4, 1)),
        64: ((32, 32, 32, 16, 8, 1), (16, 32, 16, 16, 8, 1, 255), (16, 32, 16, 16, 8, 1, 255)),
        128: ((32, 32, 16, 16, 8, 1, 255), (16, 32, 32, 16, 8, 1, 255), (16, 16, 16, 16, 8, 1)),
        256: ((32, 16, 16, 16, 8, 1, 255), (16, 32, 16, 16, 8, 1, 255), (16, 16, 64, 16, 8, 1)),
    },
    ("cdna", "half"): {
        32: ((64, 64, ALL, 32, 4, 2), (64, 32, ALL, 32, 4, 1), (16, 32, ALL, 16, 4, 1)),
        64: ((64, 64, ALL, 32, 4, 2), (64, 32, ALL, 32, 4, 1), (32, 32, ALL, 16, 4, 1)),
        128: ((64, 64, ALL, 32, 4, 2), (64, 32, ALL, 32, 4, 1), (32, 64, ALL, 16, 4, 1)),
        256: ((64, 32, ALL, 32, 4, 2), (64, 16, ALL, 32, 4, 2), (32, 16, ALL, 16, 4, 1)),
    },
    ("cdna", "fp32"): {
        32: ((64, 64, ALL, 16, 4, 2), (64, 64, ALL, 16, 4, 2), (64, 64, ALL, 16, 4, 2)),
        64: ((64, 64, ALL, 16, 4, 2), (64, 64, ALL, 16, 4, 2), (32, 32, 32, 16, 8, 1)),
        128: ((16, 32, ALL, 16, 4, 2), (16, 32, ALL, 16, 4, 2), (32, 16, ALL, 16, 4, 2)),
        256: ((16, 32, ALL, 16, 4, 2), (16, 32, ALL, 16, 4, 2), (32, 16, ALL, 16, 4, 1)),
    },
}  # fmt: skip
_TOKEN_TABLE |= {("blackwell", operands): _TOKEN_TABLE["hopper", operands] for operands in ("half", "tf32", "fp32")}
_TOKEN_TABLE["blackwell", "half"] = _TOKEN_TABLE["hopper", "half"] | {
    32: ((64, 64, ALL, 32, 4, 2, 255), (64, 64, ALL, 32, 4, 2), (64, 64, ALL, 32, 4, 2)),
    256: ((64, 64, ALL, 32, 8, 2), (64, 64, ALL, 16, 8, 2), (32, 64, 128, 16, 8, 1, 255)),
}

# Of values and keys of one width, half of that of a row, tiles would stay in registers that the row reads step by step, and some do
# not fit: shorter steps then. Hopper's of 128 channels in 16 bits fit into four warps, of which none repeats another's work.
_EQUAL_WIDTHS_TABLE: _Table = dict(_TOKEN_TABLE)
_EQUAL_WIDTHS_TABLE["hopper", "half"] = _TOKEN_TABLE["hopper", "half"] | {
    256: ((64, 64, ALL, 32, 4, 2), (64, 64, ALL, 32, 4, 2), (32, 64, ALL, 32, 4, 2)),
}
_EQUAL_WIDTHS_TABLE["hopper", "tf32"] = _TOKEN_TABLE["hopper", "tf32"] | {
    256: ((64, 32, 64, 16, 8, 1), (64, 32, 32, 16, 8, 1), (16, 32, 64, 16, 4, 1)),
}
_EQUAL_WIDTHS_TABLE["blackwell", "half"] = _TOKEN_TABLE["blackwell", "half"] | {
    256: ((64, 64, ALL, 32, 8, 2), (64, 64, ALL, 16, 8, 2, 255), (32, 64, 128, 16, 8, 1, 255)),
}
_EQUAL_WIDTHS_TABLE["blackwell", "tf32"] = _EQUAL_WIDTHS_TABLE["hopper", "tf32"]
_EQUAL_WIDTHS_TABLE["ampere", "half"] = _TOKEN_TABLE["ampere", "half"] | {
    256: ((32, 32, 128, 16, 8, 1), (32, 32, 64, 16, 8, 1, 255), (16, 16, 64, 16, 8, 1)),
}
_EQUAL_WIDTHS_TABLE["ampere", "tf32"] = _TOKEN_TABLE["ampere", "tf32"] | {
    128: ((32, 32, 64, 16, 8, 1), (32, 64, 32, 16, 8, 1), (16, 32, 32, 16, 4, 1, 255)),
    256: ((16, 32, 64, 16, 8, 1, 255), (16, 16, 64, 16, 8, 1, 255), (16, 32, 64, 16, 4, 1)),
}
_EQUAL_WIDTHS_TABLE["cdna", "half"] = _TOKEN_TABLE["cdna", "half"] | {
    128: ((64, 64, ALL, 32, 4, 2), (64, 32, ALL, 32, 4, 1), (32, 32, ALL, 16, 4, 1)),
}
