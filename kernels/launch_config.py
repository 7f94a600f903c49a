"""How each kernel is launched: a row of block_sizes.py, chosen by pure functions of the problem and the class of device."""

import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch

from .block_sizes import (
    EQUAL_WIDTHS_TABLE,
    FOLDED_TABLE,
    NORMALIZED_TABLE,
    PROJECTED_TABLE,
    PROJECTED_TF32X3_FROM,
    PROJECTIONS_TF32X3_FROM,
    SINGLE_TILE_TABLE,
    TF32X3_FROM,
    TOKEN_TABLE,
    WEIGHT_GRADIENTS_SIZES,
    WEIGHT_PRODUCT_SIZES,
    WIDE_HEADS_TABLE,
    WIDE_TABLE,
    Sizes,
    Table,
)

FUSED_CHANNELS = 256
"""The widest map whose projections are part of the kernels, and the channels that one program accumulates where a map is wider."""

QUERY_STEP = 64
"""Channels of the widest tiles that the projection of folded queries takes at once."""

MAX_SPLITS = 256
"""Parts that the sums for the gradients of the weights come in at most: enough programs to fill the largest chips a few times over. A
constant, so that the order of summation, and with it every bit of the result, is the same on all of them."""

FILLS_A_CHIP = 128
"""So many programs keep the larger chips busy, which have 108 to 148 multiprocessors. It is not asked of the device: results would
depend on it."""

MAX_REGISTERS = 255
"""Of a thread, on NVIDIA GPUs."""

SPLITS_TAKE = 16_000
"""Cycles that a program has to be saved by splitting the keys: about 9 µs."""

remembered = functools.lru_cache(maxsize=4096)
"""For answers about a problem, of which there are as many as sizes of maps."""


class Target(NamedTuple):
    """What the choice of block sizes depends on besides the problem.

    `architecture` is "hopper" (sm_90), "blackwell" (sm_100), "cdna" (AMD) or "ampere" (sm_80, 86, 89, 120 and what is not listed:
    mma.sync and at most 99 KB of shared memory).
    `fp32_precision` is how a dot of fp32 operands is computed (`input_precision` of `tl.dot`). A tuple, whose hash costs a look-up less.
    """

    architecture: str
    fp32_precision: str


class LaunchConfig(NamedTuple):
    """How one kernel is launched. A tuple, whose hash costs little: constants of launches are remembered by it.

    block_m: query tokens a program, for `qkv_projection` tokens a program, for `token_moments` channels of the left factor.
    block_n: key tokens a step, for `token_moments` tokens a step. block_k: channels of a dot between two tiles of tokens
    taken at once; fewer than the map has means that they are read from memory step by step. block_d: rows of a weight a
    step. For `weight_gradients` and `weight_product` the four are as WEIGHT_…_SIZES names them. max_registers: of a thread, where
    the assembler's own choice would spill; NVIDIA only.
    """

    block_m: int
    block_n: int
    block_k: int
    block_d: int
    num_warps: int
    num_stages: int
    input_precision: str
    max_registers: int | None = None

    @property
    def options(self) -> dict[str, int | bool]:
        """The compiler's options, as a launch takes them. Fusing a multiply and an add is asked for, not left to a default."""
        options: dict[str, int | bool] = {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}
        if self.max_registers is not None:
            options["maxnreg"] = self.max_registers
        return options

    def blocks(self, num_channels: int) -> dict[str, int | str]:
        """The constants of kernels whose programs accumulate FUSED_CHANNELS of maps that have more, and else all."""
        block_c = min(block_channels(num_channels), FUSED_CHANNELS)
        return {
            "C": num_channels,
            "BLOCK_M": self.block_m,
            "BLOCK_N": self.block_n,
            "BLOCK_C": block_c,
            "BLOCK_K": min(self.block_k, block_c),
            "INPUT_PRECISION": self.input_precision,
        }

    def folded_constants(self, num_channels: int, qk_channels: int) -> dict[str, int | str | bool]:
        """Those of kernels that fold the queries of a map of up to FUSED_CHANNELS and meet all keys, but RESIDUAL; and the options."""
        return {
            **self.blocks(num_channels),
            "D": qk_channels,
            "BLOCK_P": self.query_step(num_channels),
            "BLOCK_D": self.block_d,
            **self.options,
        }

    def steps_over_channels(self, num_channels: int) -> bool:
        """Whether tiles of tokens are too wide to stay in registers, so that the forward kernel parks them in `y`."""
        return self.block_k < block_channels(num_channels)

    def query_step(self, num_channels: int) -> int:
        """Channels that the projection of folded queries takes at once: more would not fit beside the queries of the widest tiles."""
        block_c = block_channels(num_channels)
        return min(self.block_k, block_c if block_c < FUSED_CHANNELS else QUERY_STEP)

    def parks_queries(self, num_channels: int) -> bool:
        """Whether the forward kernel of folded queries parks them in `y`: it then needs one."""
        return self.query_step(num_channels) < block_channels(num_channels)

    def spares_registers(self, num_channels: int) -> bool:
        """Whether tiles stay whole that leave hardly a register: the last one is taken by a loop of its own, results go in halves."""
        return self.query_step(num_channels) < min(self.block_k, block_channels(num_channels))


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


@functools.cache
def block_channels(num_channels: int) -> int:
    """Channels of a tile: the next power of two, and at least the 16 that a dot needs."""
    return max(16, 1 << (num_channels - 1).bit_length())


def num_tiles(length: int, block: int) -> int:
    """Tiles of `block` that cover `length`. `triton.cdiv` is the same, and takes microseconds of every launch."""
    return -(-length // block)


def attends_normalized(num_channels: int, dtype: torch.dtype, target: Target) -> bool:
    """Whether the forward kernel normalises a map itself, with raw keys and values, or the normalised map is written first.

    Products of raw 16-bit tokens are exact in fp32, so that their mean costs nothing; those of fp32 tokens are not. The queries of raw
    keys are as many times larger or smaller as the map is, for which fp16 has not the range. On AMD it would spill.
    """
    return dtype == torch.bfloat16 and num_channels <= FUSED_CHANNELS and target.architecture != "cdna"


def num_programs(block: int, num_maps: int, num_channels: int, num_tokens: int) -> int:
    """Programs that own `block` tokens each, and of maps wider than FUSED_CHANNELS so many channels."""
    return num_maps * num_tiles(num_tokens, block) * num_tiles(num_channels, FUSED_CHANNELS)


class Splits(NamedTuple):
    """Into how many parts a loop over tokens is split, and tokens of each but the last, which may have fewer."""

    number: int
    tokens: int


@remembered
def token_splits(programs: int, num_tokens: int, block: int) -> Splits:
    """Where so many programs would go through all tokens by steps of `block`: as many as a chip takes, with four steps at least."""
    steps = num_tiles(num_tokens, block)
    tokens = num_tiles(steps, max(1, min(FILLS_A_CHIP // programs, steps // 4))) * block
    return Splits(num_tiles(num_tokens, tokens), tokens)


def key_splits(num_maps: int, num_channels: int, num_tokens: int, config: LaunchConfig) -> Splits:
    """Splits of the keys for the forward pass of folded queries; one where more would not pay."""
    return _splits_that_pay(num_maps, num_channels, num_tokens, config.block_m, config.block_n)


def gradient_splits(num_maps: int, num_channels: int, num_tokens: int, configs: BackwardConfigs | WideConfigs) -> tuple[Splits, Splits]:
    """Splits of the keys for the gradient of folded queries, and of the queries for that of keys and values; one where more would not pay.

    Nor are keys split over fewer than 16 channels: the gradient is then projected with `W_qᵀ W_k`, whose rounding would not average out.
    """
    query, key_value = configs.query_gradient, configs.key_value_gradient
    keys = _splits_that_pay(num_maps, num_channels, num_tokens, query.block_m, query.block_n)
    queries = _splits_that_pay(num_maps, num_channels, num_tokens, key_value.block_n, key_value.block_m)
    return keys if num_channels >= 16 else Splits(1, num_tokens), queries


def split_config(config: LaunchConfig, target: Target) -> LaunchConfig:
    """The configuration of a backward kernel whose loop is split: a thread may have all registers where as many programs run at once.

    Else the assembler may spill to let more programs run on a multiprocessor than FILLS_A_CHIP puts there: two, and on Blackwell one. Two
    of four warps have all registers.
    """
    if target.architecture == "blackwell" or (target.architecture != "cdna" and config.num_warps == 4):
        return config._replace(max_registers=MAX_REGISTERS)
    return config


@remembered
def _splits_that_pay(num_maps: int, num_channels: int, num_tokens: int, block: int, step: int) -> Splits:
    """`token_splits` for programs that own `block` tokens each, or one split where that would not pay.

    Forward a program meets 64 keys in some 560 + 5 C cycles, counted on Hopper for 64 queries in bf16; backward it takes longer. What
    splits take besides, two launches more and results in fp32, is SPLITS_TAKE.
    """
    programs = num_programs(block, num_maps, num_channels, num_tokens)
    if not 0 < 2 * programs <= FILLS_A_CHIP:
        return Splits(1, num_tokens)
    splits = token_splits(programs, num_tokens, step)
    saved = (num_tokens - splits.tokens) // 64 * (560 + 5 * block_channels(min(num_channels, FUSED_CHANNELS)))
    return splits if saved >= SPLITS_TAKE else Splits(1, num_tokens)


@remembered
def projects_keys(num_maps: int, num_channels: int, num_tokens: int, qk_channels: int, dtype: torch.dtype, target: Target) -> bool:
    """Whether queries and keys of `qk_channels` are projected, or the keys' weight is folded into the query.

    Narrow ones are, but on maps of one tile, which take longer to start kernels for, of which folded there are fewest; and where so few
    programs go through all keys that folded they are split among twice as many, or more: the products that folding costs are no more than
    that (`has_narrow_queries` counts them).
    """
    if not has_narrow_queries(num_channels, qk_channels):
        return False
    if single_tile_config(num_maps, num_channels, num_tokens, dtype, target) is not None:
        return False
    return key_splits(num_maps, num_channels, num_tokens, forward_config(num_channels, dtype, target)).number == 1


@functools.cache
def has_narrow_queries(num_channels: int, qk_channels: int) -> bool:
    """Whether queries and keys of `qk_channels` are so much narrower than the map that projecting them spares products.

    Counted in matrix products of padded width per pair of tokens, B being `block_channels`: folded, the forward pass takes
    2 B(C) and the backward pass 7 B(C); projected, B(D) + B(C) and 4 B(D) + 3 B(C), one kernel more, and queries and keys in
    memory. At B(D) = B(C)/2 that is a quarter less; a narrower B(D) only gains, a wider one gains nothing. Maps of at most
    16 channels always fold, since no product is narrower than 16, and so do those wider than `FUSED_CHANNELS`.
    """
    return num_channels <= FUSED_CHANNELS and 2 * block_channels(qk_channels) <= block_channels(num_channels)


@functools.cache
def forward_config(num_channels: int, dtype: torch.dtype, target: Target, normalized: bool = False) -> LaunchConfig:
    """The configuration of `attention_forward` for maps of `num_channels`, 1 to 256, or for one that is normalised there."""
    return _rows(NORMALIZED_TABLE if normalized else FOLDED_TABLE, num_channels, dtype, target)[0]


@functools.cache
def backward_configs(num_channels: int, dtype: torch.dtype, target: Target) -> BackwardConfigs:
    """The configurations of the backward kernels of folded queries and `token_moments` for maps of `num_channels`, 1 to 256."""
    return BackwardConfigs(*_configs(num_channels, dtype, target)[1:])


@remembered
def single_tile_config(num_maps: int, num_channels: int, num_tokens: int, dtype: torch.dtype, target: Target) -> LaunchConfig | None:
    """The configuration of `single_tile_backward`, or None where a map is not one tile, or the kernels of larger maps have to do it.

    With many maps starting the kernels no longer counts, and the sums for the weights, one of each map, would. A tile of more than 64
    tokens has a multiprocessor to itself: of those there are no more than fill a chip.
    """
    operands, precision = _operands(num_channels, dtype, target)
    tiles = SINGLE_TILE_TABLE.get((target.architecture, operands), {}).get(block_channels(num_channels), ())
    sizes = next((sizes for sizes in tiles if num_tokens <= sizes[0]), None)
    if sizes is None or num_maps > (MAX_SPLITS if sizes[0] <= 64 else FILLS_A_CHIP):
        return None
    return _config(sizes, precision)


@functools.cache
def weight_gradients_config(target: Target) -> LaunchConfig:
    """The configuration of `weight_gradients`, whose sums are in fp32 whatever the map is in."""
    *sizes, max_registers = WEIGHT_GRADIENTS_SIZES
    if target.architecture != "cdna":
        sizes.append(max_registers)
    return _config(tuple(sizes), _precision_of_weights(target))


@functools.cache
def weight_product_config(target: Target) -> LaunchConfig:
    """The configuration of `weight_product`, for weights of any size."""
    return _config(WEIGHT_PRODUCT_SIZES, _precision_of_weights(target))


@functools.cache
def projected_configs(num_channels: int, dtype: torch.dtype, target: Target) -> ProjectedConfigs:
    """The configurations of the kernels with projected keys for values of `num_channels`, 17 to 256, and keys of half or less."""
    qkv_projection, *_ = _rows(PROJECTED_TABLE, num_channels, dtype, target, PROJECTIONS_TF32X3_FROM)
    _, *others = _rows(PROJECTED_TABLE, num_channels, dtype, target, PROJECTED_TF32X3_FROM)
    return ProjectedConfigs(qkv_projection, *others)


@functools.cache
def projection_configs(num_channels: int, dtype: torch.dtype, target: Target) -> ProjectionConfigs:
    """The configurations of the projections of maps of `num_channels`, 1 to 256; the row of 32 channels serves fewer as well.

    What takes gradients back has the tiles of the kernel that makes the gradient of y out of that of the output.
    """
    qkv_projection, *_ = _rows(PROJECTED_TABLE, max(32, num_channels), dtype, target, PROJECTIONS_TF32X3_FROM)
    _, _, prepare, *_ = _rows(PROJECTED_TABLE, max(32, num_channels), dtype, target, PROJECTED_TF32X3_FROM)
    return ProjectionConfigs(qkv_projection, prepare, _configs(num_channels, dtype, target)[-1])


@functools.cache
def wide_configs(dtype: torch.dtype, target: Target) -> WideConfigs:
    """The configurations of the kernels for maps of 257 to 512 channels."""
    return WideConfigs(*_rows(WIDE_TABLE, 2 * FUSED_CHANNELS, dtype, target), *_configs(FUSED_CHANNELS, dtype, target)[-1:])


def has_wide_heads(qk_channels: int, value_channels: int) -> bool:
    """Whether heads on tokens have more channels than one program accumulates: more than 128 in queries and keys, or 256 in values."""
    return qk_channels > FUSED_CHANNELS // 2 or value_channels > FUSED_CHANNELS


@functools.cache
def token_configs(qk_channels: int, value_channels: int, dtype: torch.dtype, target: Target) -> TokenConfigs:
    """The configurations of the kernels on tokens for queries, keys and values of 1 to 512 channels.

    A row of the tables is for values of its width and keys of up to half of it. Values that are no wider than the keys fill one half.
    """
    if has_wide_heads(qk_channels, value_channels):
        return TokenConfigs(*_rows(WIDE_HEADS_TABLE, 2 * FUSED_CHANNELS, dtype, target))
    block_d, block_cv = block_channels(qk_channels), block_channels(value_channels)
    table = EQUAL_WIDTHS_TABLE if block_cv <= block_d else TOKEN_TABLE
    return TokenConfigs(*_rows(table, max(32, 2 * block_d, block_cv), dtype, target))


def _configs(num_channels: int, dtype: torch.dtype, target: Target) -> list[LaunchConfig]:
    return _rows(FOLDED_TABLE, num_channels, dtype, target)


def _rows(
    table: Table, num_channels: int, dtype: torch.dtype, target: Target, tf32x3_from: dict[str, int] = TF32X3_FROM
) -> list[LaunchConfig]:
    operands, precision = _operands(num_channels, dtype, target, tf32x3_from)
    return [_config(sizes, precision) for sizes in table[target.architecture, operands][block_channels(num_channels)]]


def _operands(num_channels: int, dtype: torch.dtype, target: Target, tf32x3_from: dict[str, int] = TF32X3_FROM) -> tuple[str, str]:
    """The kind of rows that is looked for in the tables, and the precision of dots."""
    if dtype != torch.float32:
        return "half", "ieee"
    if target.fp32_precision == "tf32":
        return "tf32", "tf32"
    splits_into_tf32 = target.fp32_precision == "bf16x6" and block_channels(num_channels) >= tf32x3_from[target.architecture]
    return "fp32", "tf32x3" if splits_into_tf32 else target.fp32_precision


def _precision_of_weights(target: Target) -> str:
    """Of dots of fp32 weights, which are few: of both ways to the class of fp32 the one with fewer registers."""
    return "tf32x3" if target.fp32_precision == "bf16x6" else target.fp32_precision


def _config(sizes: Sizes, precision: str) -> LaunchConfig:
    block_m, block_n, block_k, block_d, num_warps, num_stages, *registers = sizes
    return LaunchConfig(block_m, block_n, block_k, block_d, num_warps, num_stages, precision, registers[0] if registers else None)
