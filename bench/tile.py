"""The arithmetic of one iteration of a kernel's loop over tiles of tokens, from the launch alone: what the disassembly must come to."""

from collections.abc import Sequence
from dataclasses import dataclass

from .disassembly import Instruction, Loop, Work, inner_loops, work
from .launches import Launch

# Products of 16 bits or TF32 that stand for one product of fp32, by `input_precision` of `tl.dot`.
PRODUCTS = {"ieee": 1, "tf32": 1, "tf32x3": 3, "bf16x3": 3, "bf16x6": 6}

# Of each kernel that walks over tiles of pairs: the channels that its dots contract or produce, in the order of the source, and how
# many of them, from the first, contract channels and may therefore be streamed.
_DOTS = {
    "attention_forward_kernel": ("C C", 1),
    "query_gradient_kernel": ("C C C", 2),
    "key_value_gradient_kernel": ("C C C C", 2),
    "projected_attention_forward_kernel": ("D C_V", 1),
    "projected_query_gradient_kernel": ("D C_V D", 2),
    "projected_key_value_gradient_kernel": ("D C_V C_V D", 2),
    "wide_attention_forward_kernel": ("C C", 1),
    "wide_query_gradient_kernel": ("C C C", 2),
    "token_attention_forward_kernel": ("D C_V", 1),
    "token_query_gradient_kernel": ("D C_V D", 2),
    "token_key_value_gradient_kernel": ("D C_V D C_V", 2),
}
_BLOCKS = {"C": "BLOCK_C", "D": "BLOCK_D", "C_V": "BLOCK_CV"}


@dataclass(frozen=True)
class Tile:
    """A tile of `rows` × `columns`, the products of it that one iteration computes, and how.

    `widths` are the third dimensions of the dots as the map has them, `padded_widths` as the kernel computes them. `streamed` are those
    that a loop inside of the iteration takes `step` channels at a time. `exponentials` is 1 where every element of the tile takes one.
    `parts` programs, each with some of the channels of the result, share a tile.
    """

    rows: int
    columns: int
    widths: tuple[int, ...]
    padded_widths: tuple[int, ...]
    streamed: tuple[int, ...]
    step: int
    products: int
    element_bytes: int
    exponentials: int
    parts: int = 1

    @property
    def elements(self) -> int:
        """Of the tile, this program's share of them."""
        return self.rows * self.columns // self.parts

    @property
    def multiply_adds(self) -> int:
        """Of all dots as the kernel computes them: `rows · columns · padded width`, times the products of its precision."""
        return self.rows * self.columns * sum(self.padded_widths) * self.products


def tile_of(launch: Launch) -> Tile | None:
    """The tile of one iteration, None for a kernel whose main loop does not walk over tiles of tokens."""
    arguments = launch.arguments
    if launch.name not in _DOTS and launch.name != "token_moments_kernel":
        return None
    products = PRODUCTS[arguments["INPUT_PRECISION"]]
    element_bytes = next(iter(arguments.values())).element_size()  # a kernel's first argument is a map
    if launch.name == "token_moments_kernel":
        length = arguments["BLOCK_L"]
        return Tile(arguments["BLOCK_A"], arguments["BLOCK_C"], (length,), (length,), (), 0, products, element_bytes, 0)
    dots, contracting = _DOTS[launch.name]
    names = dots.split()
    widths, blocks = tuple(arguments[name] for name in names), tuple(arguments[_BLOCKS[name]] for name in names)
    step = arguments["BLOCK_K"]
    # A dot that contracts takes all channels even where the program owns but a part of the result's.
    padded = tuple(-(-w // step) * step if w > b and i < contracting else b for i, (w, b) in enumerate(zip(widths, blocks, strict=True)))
    streamed = tuple(width for width in padded[:contracting] if width > step)
    parts = max(-(-w // b) for w, b in zip(widths, blocks, strict=True))
    return Tile(arguments["BLOCK_M"], arguments["BLOCK_N"], widths, padded, streamed, step, products, element_bytes, 1, parts)


def work_of_tile(instructions: Sequence[Instruction], loop: Loop, tile: Tile | None, num_warps: int) -> Work:
    """One iteration of the main loop, the loops over channels inside of it counted as often as they run.

    How many steps one turn of such a loop takes is read off the bytes it loads, `(rows + columns) · step` elements a step. Where there
    are fewer loops than streamed dots the assembler has unrolled the narrowest. Without a tile inner loops count once.
    """
    inner = inner_loops(instructions, loop)
    if tile is None or not inner:
        return work(instructions, loop)
    if len(inner) > len(tile.streamed):
        raise ValueError(f"expected at most {len(tile.streamed)} loops over channels, found {len(inner)}")
    kept = sorted(sorted(range(len(tile.streamed)), key=lambda i: tile.streamed[i])[-len(inner) :])
    trips = {}
    for index, one in zip(kept, inner, strict=True):
        loaded = work(instructions, one).global_bytes * num_warps
        steps = max(1, round(loaded / ((tile.rows + tile.columns) * tile.step * tile.element_bytes)))
        trips[one] = tile.streamed[index] // tile.step // steps
    return work(instructions, loop, trips)
