"""What every kernel compiles to, without a GPU: registers, spills, residency, the main loop's instructions, and what bounds it.

Each kernel is compiled for one target as the layer would launch it, with the block sizes of `kernels/block_sizes.py`. The
throughput of its main loop is predicted by `bench/throughput.py`; on targets without a model only resources and counts are printed.
"""

import argparse
import json
import multiprocessing
import os
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
import triton

from visattn import files
from visattn.provenance import commit

from .ahead_of_time import DEVICES, Compiled, Device, compile_launch
from .disassembly import Instruction, Work, main_loop, parse
from .launches import Launch
from .passes import layer_launches, token_launches
from .static_tables import markdown, passes_table, rows_table
from .throughput import MACHINES, machine, predict, residency
from .tile import Tile, tile_of, work_of_tile

__all__ = ["configure", "markdown", "row", "rows_of", "run"]

# dtype, and whether PyTorch's switch for fp32 says "highest"
DTYPES = {
    "bf16": (torch.bfloat16, True),
    "fp16": (torch.float16, True),
    "fp32-highest": (torch.float32, True),
    "fp32-high": (torch.float32, False),
}
CHANNELS = (16, 32, 64, 128, 256, 512)
QK_DIVISOR = 8  # SAGAN's queries and keys have an eighth of the map's channels
_COUNTED = ("tensor", "mufu", "conversion", "fp32", "imad", "alu", "shared", "shuffle", "global", "local", "barrier", "wait", "branch")

Row = dict[str, Any]


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--target", choices=sorted(DEVICES), default="sm_90")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--channels", nargs="+", type=int, default=list(CHANNELS), help="of the map, 1 to 512")
    parser.add_argument(
        "--qk", choices=("full", "eighth", "both"), default="both",
        help="channels of queries and keys: as many as the map, an eighth, projected, or both",
    )  # fmt: skip
    parser.add_argument(
        "--heads", nargs="+", type=int, default=[], metavar="CHANNELS",
        help="attention on queries, keys and values as well, of as many channels a head, 1 to 128",
    )  # fmt: skip
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes that compile")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there as well")


def run(options: argparse.Namespace) -> int:
    """Prints the tables; 1 where a default configuration spills, with a sentence that names it."""
    forms = [*_forms(options.channels, options.qk), *((width, None) for width in options.heads)]
    rows = list(_compiled(options.target, options.dtype, forms, options.jobs))
    print(rows_table(rows))
    try:
        machine(options.target)
        print(passes_table(rows))
    except NotImplementedError as reason:
        print(f"{reason}.\n")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        files.write(options.json, filed(options.target, rows))
    spilling = [r for r in rows if r["spills"]]
    for r in spilling:
        print(_spill(r), file=sys.stderr)
    return 1 if spilling else 0


def _spill(row: Row) -> str:
    unit = "bytes" if DEVICES[row["target"]].target.backend == "cuda" else "registers"
    sentence = f"{row['kernel']} spills {row['spills']} {unit} on {row['target']}: {row['dtype']}, {row['channels']} channels, "
    sentence += f"queries and keys of {row['qk_channels']}, {row['registers']} registers"
    return sentence + (f", {row['loop']['local']} accesses in the loop." if row["loop"] else ".")


def filed(target: str, rows: list[Row]) -> str:
    """JSON: what was compiled with what, and one row a line."""
    head = json.dumps({"target": target, "triton": triton.__version__, "commit": commit()})
    lines = ",\n".join(json.dumps(row, separators=(",", ":")) for row in rows)
    return f'{head[:-1]}, "rows": [\n{lines}\n]}}\n'


def _forms(channels: Iterable[int], qk: str) -> Iterator[tuple[int, int]]:
    """The widths of map and queries to compile for; an eighth only where the layer would then project its keys."""
    from visattn.kernels import has_narrow_queries

    for width in channels:
        if qk != "eighth":
            yield width, width
        if qk != "full" and has_narrow_queries(width, narrow := max(1, width // QK_DIVISOR)):
            yield width, narrow


def _compiled(target: str, dtypes: list[str], forms: list[tuple[int, int | None]], jobs: int) -> Iterator[Row]:
    tasks = [(target, dtype, width, qk) for dtype in dtypes for width, qk in forms]
    if jobs == 1:
        for task in tasks:
            yield from rows_of(*task)
        return
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        for rows in pool.map(rows_of, *zip(*tasks, strict=True)):
            yield from rows


def rows_of(target: str, dtype: str, channels: int, qk_channels: int | None) -> list[Row]:
    """One row for each kernel of the layer's forward and backward pass; without qk_channels of attention on tokens, heads of `channels`."""
    device = DEVICES[target]
    torch_dtype, highest = DTYPES[dtype]
    if qk_channels is None:
        launches = token_launches(device, torch_dtype, channels, channels, highest=highest)
    else:
        launches = layer_launches(device, torch_dtype, channels, qk_channels=qk_channels, highest=highest)
    head = {"target": target, "dtype": dtype, "channels": channels, "qk_channels": qk_channels or channels}
    rows: list[Row] = []
    for launch in launches:
        found = head | row(launch, compile_launch(launch, device), device, dtype == "fp32-highest")
        if found not in rows:  # narrow queries are projected in both passes
            rows.append(found)
    return rows


def row(launch: Launch, compiled: Compiled, device: Device, fp32_highest: bool = False) -> Row:
    """What one kernel became. Sizes are bytes; `loop` and `prediction` are None where there is none.

    `loop` counts instructions of one warp in one iteration; `products` is the matrix work found over that which the tile needs: above
    1 warps repeat each other's work. `prediction` holds cycles of one iteration of one CTA, `floor` and `share` only for loops over
    pairs of tokens, and `l2_bytes`, those that an SM asks of L2 a clock at that pace: an A100's L2 gives its SMs at most 47 each.
    """
    num_warps = int(launch.options["num_warps"])
    known = {
        "kernel": compiled.name.removesuffix("_kernel"),
        "config": _config(launch),
        "registers": compiled.registers,
        "spills": compiled.spills,
        "shared_memory": compiled.shared_memory,
        "matrix_instructions": compiled.matrix_instructions,
        "programs": None,
        "limit": None,
        "loop": None,
        "prediction": None,
    }
    if device.name in MACHINES:
        resident = residency(machine(device.name), compiled.registers, compiled.shared_memory, num_warps)
        known |= {"programs": resident.programs, "limit": resident.limit}
    if device.target.backend != "cuda":
        return known
    instructions = parse(compiled.assembly)
    loop = main_loop(instructions)
    if loop is None:
        return known
    tile = tile_of(launch) if device.name in MACHINES else None
    work = work_of_tile(instructions, loop, tile, num_warps)
    known["loop"] = _counts(work, tile, num_warps)
    if device.name in MACHINES:
        known["prediction"] = _prediction(device.name, work, tile, num_warps, fp32_highest)
    return known


def _config(launch: Launch) -> str:
    """Blocks as the kernel has them, e.g. "M64 N64 K32, 4 warps, 2 stages, bf16x6"."""
    arguments, options = launch.arguments, launch.options
    blocks = " ".join(f"{k.removeprefix('BLOCK_')}{v}" for k, v in arguments.items() if k in ("BLOCK_M", "BLOCK_N", "BLOCK_A", "BLOCK_L"))
    step = arguments.get("BLOCK_K")
    if step is not None and step < max(arguments.get("BLOCK_C", 0), arguments.get("BLOCK_CV", 0)):
        blocks += f" K{step}"
    precision = arguments.get("INPUT_PRECISION", "ieee")  # a kernel without products has none
    words = [blocks, f"{options['num_warps']}w", f"{options['num_stages']}s", "" if precision == "ieee" else precision]
    return " ".join(filter(None, words))


def _counts(work: Work, tile: Tile | None, num_warps: int) -> Row:
    shapes = [f"{times} {shape}" for shape, times in sorted(work.matrices.items(), key=lambda item: -item[1])]
    return {
        "instructions": work.instructions,
        "matrices": ", ".join(shapes),
        **{name: work.categories[name] for name in _COUNTED},
        "asynchronous_copies": sum(n for opcode, n in work.opcodes.items() if Instruction(0, opcode, "").name == "LDGSTS"),
        "global_bytes": work.global_bytes * num_warps,
        "products": round(work.multiply_adds(num_warps) / tile.multiply_adds, 3) if tile else None,
        "elements": tile.elements if tile else None,
    }


def _prediction(target: str, work: Work, tile: Tile | None, num_warps: int, fp32_highest: bool) -> Row:
    predicted = predict(machine(target), work, num_warps, tile, fp32_highest)
    floor = predicted.floor
    return {
        "cycles": {pipe: round(cycles, 1) for pipe, cycles in predicted.cycles.items()},
        "bound": predicted.bound,
        "serial": round(predicted.serial, 1),
        "floor": floor if floor is None else round(floor, 1),
        "share": floor and round(floor / predicted.pace, 3),
        "share_alone": floor and round(floor / predicted.serial, 3),
        "l2_bytes": round(work.global_bytes * num_warps / predicted.pace, 1),
    }
