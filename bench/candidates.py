"""What could be tuned, which launch configurations are worth a measurement, and which of those measured wins: pure functions."""

import itertools
import statistics
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from visattn import kernels

from .cases import Case

# The names of `bench static`: dtype, and whether PyTorch's switch for fp32 permits TF32.
DTYPES = {"bf16": ("bfloat16", False), "fp16": ("float16", False), "fp32-high": ("float32", True), "fp32-highest": ("float32", False)}
CHANNELS = (64, 128, 32, 256)

SMALLEST_BLOCK, LARGEST_BLOCK = 16, 128
MARGIN = 1.03  # by so much a configuration has to be quicker than the present one


@dataclass(frozen=True)
class Kernel:
    """A kernel's name as Triton has it, and the sizes of its `LaunchConfig` that it reads, besides warps, stages and registers."""

    function: str
    blocks: tuple[str, ...]


# (form of the layer) → field of its configurations → kernel, in the order of a row of `FOLDED_TABLE` and of `PROJECTED_TABLE`.
KERNELS = {
    "folded": {
        "forward": Kernel("attention_forward_kernel", ("block_m", "block_n", "block_k")),
        "prepare": Kernel("prepare_backward_kernel", ("block_m", "block_k")),
        "query_gradient": Kernel("query_gradient_kernel", ("block_m", "block_n", "block_k")),
        "key_value_gradient": Kernel("key_value_gradient_kernel", ("block_m", "block_n", "block_k")),
        "token_moments": Kernel("token_moments_kernel", ("block_m", "block_n")),
    },
    "narrow": {
        "qkv_projection": Kernel("qkv_projection_kernel", ("block_m",)),
        "forward": Kernel("projected_attention_forward_kernel", ("block_m", "block_n", "block_k")),
        "prepare": Kernel("prepare_projected_backward_kernel", ("block_m",)),
        "query_gradient": Kernel("projected_query_gradient_kernel", ("block_m", "block_n", "block_k")),
        "key_value_gradient": Kernel("projected_key_value_gradient_kernel", ("block_m", "block_n", "block_k")),
    },
}
BY_WEIGHT = ("forward", "key_value_gradient", "query_gradient", "token_moments", "qkv_projection", "prepare")
"""The kernels that take most of a step's time come first."""


@dataclass(frozen=True)
class Entry:
    """One entry of a table: form "folded" for `FOLDED_TABLE` or "narrow" for `PROJECTED_TABLE`, a kernel, a name in `DTYPES`, channels."""

    form: str
    kernel: str
    dtype: str
    channels: int

    @property
    def function(self) -> str:
        return KERNELS[self.form][self.kernel].function

    def cases(self) -> list[Case]:
        """Where it is timed. The first is the one that ranks: maps of the CIFAR models; then one large map.

        Of maps that are one tile the backward pass has a kernel of its own.
        """
        form, (dtype, tf32) = "sagan" if self.form == "narrow" else "attention", DTYPES[self.dtype]
        return [Case("tune", form, batch, self.channels, side, side, dtype, tf32, "training") for batch, side in ((64, 32), (1, 128))]

    def operands(self, target: kernels.Target) -> str:
        """The tables' name for the operands' class."""
        return "half" if not self.dtype.startswith("fp32") else "tf32" if target.fp32_precision == "tf32" else "fp32"


def entries(dtypes: Collection[str], channels: Collection[int], chosen: Collection[str]) -> Iterator[Entry]:
    """The most important first: every dtype's folded kernels, then the ones with narrow queries."""
    for form in KERNELS:
        for dtype, width in itertools.product(dtypes, channels):
            for kernel in BY_WEIGHT:
                if kernel in chosen and kernel in KERNELS[form] and (form == "folded" or kernels.has_narrow_queries(width, width // 8)):
                    yield Entry(form, kernel, dtype, width)


def table_row(entry: Entry, target: kernels.Target) -> dict[str, kernels.LaunchConfig]:
    """The present configurations of the entry's row, by kernel, in the table's order."""
    dtype = getattr(torch, DTYPES[entry.dtype][0])
    if entry.form == "narrow":
        return dict(vars(kernels.projected_configs(entry.channels, dtype, target)))
    forward = {"forward": kernels.forward_config(entry.channels, dtype, target)}
    return forward | vars(kernels.backward_configs(entry.channels, dtype, target))


def neighbours(entry: Entry, present: kernels.LaunchConfig) -> list[kernels.LaunchConfig]:
    """What differs from the present configuration in one size, then what differs in two; a size that is not read stays as it is."""
    block_c = kernels.launch_config.block_channels(entry.channels)
    half, whole = block_c // 2, kernels.block_sizes.ALL
    largest_m = block_c if entry.kernel == "token_moments" else LARGEST_BLOCK  # rows of its tiles are channels
    values: dict[str, list[Any]] = {
        "block_m": [v for v in (2 * present.block_m, present.block_m // 2) if SMALLEST_BLOCK <= v <= largest_m],
        "block_n": [v for v in (2 * present.block_n, present.block_n // 2) if SMALLEST_BLOCK <= v <= LARGEST_BLOCK],
        "block_k": [v for v in (whole, half) if v >= SMALLEST_BLOCK and min(v, block_c) != min(present.block_k, block_c)],
    }
    values = {block: values[block] for block in KERNELS[entry.form][entry.kernel].blocks}
    values["num_warps"] = [v for v in (4, 8) if v != present.num_warps]
    values["num_stages"] = [v for v in (1, 2, 3) if v != present.num_stages]
    values["max_registers"] = [255 if present.max_registers is None else None]
    ones = [{name: value} for name, found in values.items() for value in found]
    twos = [a | b for a, b in itertools.combinations(ones, 2) if a.keys() != b.keys()]
    return [present._replace(**changes) for changes in ones + twos]


def winner(present: kernels.LaunchConfig, rounds: dict[kernels.LaunchConfig, list[float]]) -> kernels.LaunchConfig:
    """The quickest of those that beat the present configuration, by its times in every round, or the present one where none does.

    To beat it is to be `MARGIN` quicker in the even rounds and in the odd ones, each by the median of ratios round by round.
    """

    def beats(config: kernels.LaunchConfig) -> bool:
        ratios = [before / after for before, after in zip(rounds[present], rounds[config], strict=True)]
        return all(statistics.median(half) >= MARGIN for half in (ratios[::2], ratios[1::2]))

    return min([present, *filter(beats, rounds)], key=lambda config: statistics.median(rounds[config]))


def sizes_text(config: kernels.LaunchConfig) -> str:
    """As a table has it."""
    block_k = "ALL" if config.block_k == kernels.block_sizes.ALL else str(config.block_k)
    sizes = [config.block_m, config.block_n, block_k, config.block_d, config.num_warps, config.num_stages]
    return f"({', '.join(map(str, sizes + [config.max_registers] * (config.max_registers is not None)))})"
