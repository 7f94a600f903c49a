"""What one iteration of a kernel's main loop costs each pipe of a streaming multiprocessor (SM), and how near that is to the floor.

A model of throughput, not of latency: every pipe at its full rate, no bank conflicts, every load in time. Resident programs (CTAs)
overlap perfectly, so the busiest pipe sets the pace; with a single one nothing is sure to overlap, and `Prediction.serial` adds up.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from .ahead_of_time import KIB
from .disassembly import LANES, Matrix, Work
from .tile import Tile

PIPES = ("tensor", "mufu", "fp32", "alu", "shared", "issue")


@dataclass(frozen=True)
class Machine:
    """One SM. Rates are a clock: multiply-adds of matrix instructions by bytes an element, lanes of other pipes, bytes, instructions.

    Tensor: 989 and 495 TFLOP/s dense in bf16 and TF32 on 132 SMs at 1.83 GHz (H100 datasheet), 312 and 156 on 108 at 1.41 GHz (A100
    datasheet). Lanes and limits: "Arithmetic Instructions" and "Compute Capabilities" of the CUDA C++ Programming Guide; that sm_90
    runs integer multiplies in one half of its FP32 lanes only is NVIDIA's word (forum, FMAheavy and FMAlite on GH100). `warp_matrix`:
    the share of the tensor rate that HMMA reaches; on Hopper about 0.62 were measured (arXiv 2402.13499), the rest needs HGMMA.
    """

    tensor: dict[int, int]
    warp_matrix: float
    fp32: int
    shared_memory: int
    mufu: int = 16
    imad: int = 64
    alu: int = 64
    shared: int = 128
    issue: int = 4
    registers: int = 65536
    threads: int = 2048
    programs: int = 32
    reserved_shared_memory: int = KIB  # of each CTA, by the driver


MACHINES = {
    "sm_80": Machine(tensor={2: 1024, 4: 512}, warp_matrix=1.0, fp32=64, shared_memory=164 * KIB),
    "sm_90": Machine(tensor={2: 2048, 4: 1024}, warp_matrix=0.62, fp32=128, shared_memory=228 * KIB),
}


@dataclass(frozen=True)
class Residency:
    """How many CTAs of a kernel one SM holds at once, and what limits them: "registers", "shared memory" or "threads"."""

    programs: int
    limit: str


@dataclass(frozen=True)
class Prediction:
    """Cycles of one iteration of one CTA: of each pipe, and of the floor, None where the kernel's floor is memory."""

    cycles: dict[str, float]
    serial: float
    floor: float | None

    @property
    def bound(self) -> str:
        return max(self.cycles, key=lambda pipe: self.cycles[pipe])

    @property
    def pace(self) -> float:
        """Cycles an iteration where resident CTAs overlap perfectly: those of the busiest pipe."""
        return self.cycles[self.bound]


def machine(target: str) -> Machine:
    """The SM of a target.

    Raises:
        NotImplementedError: no rates are known here; resources and instruction counts are all there is.
    """
    if target not in MACHINES:
        known = ", ".join(MACHINES)
        raise NotImplementedError(f"throughput is modelled for {known}, not for {target}: only resources and instruction counts are given")
    return MACHINES[target]


def residency(sm: Machine, registers: int, shared_memory: int, num_warps: int) -> Residency:
    """CTAs an SM. Registers, of a thread, go to warps in blocks of 256, and each quarter of an SM holds whole warps."""
    warp_registers = -(-registers * LANES // 256) * 256
    warps = 4 * (sm.registers // 4 // warp_registers)
    limits = {
        "registers": warps // num_warps,
        "shared memory": sm.shared_memory // (-(-shared_memory // 128) * 128 + sm.reserved_shared_memory),
        "threads": min(sm.threads // (num_warps * LANES), sm.programs),
    }
    limit = min(limits, key=lambda name: limits[name])
    return Residency(limits[limit], limit)


def predict(sm: Machine, work: Work, num_warps: int, tile: Tile | None, fp32_highest: bool = False) -> Prediction:
    """What `work`, one iteration of each of a CTA's warps, costs; `fp32_highest`: the floor may not be reached in TF32."""
    cycles = pipe_cycles(sm, work, num_warps)
    floor = None
    if tile is not None and tile.exponentials:
        floor = floor_cycles(sm, tile.widths, tile.elements, tile.element_bytes, fp32_highest)
    own_shared = num_warps * work.shared_bytes / sm.shared  # operands of a matrix instruction are read while it runs
    serial = cycles["tensor"] + cycles["mufu"] + cycles["fp32"] + cycles["alu"] + own_shared
    return Prediction(cycles, max(serial, *cycles.values()), floor)


def pipe_cycles(sm: Machine, work: Work, num_warps: int) -> dict[str, float]:
    """Cycles of each of `PIPES` for one iteration of a CTA."""
    lanes = num_warps * LANES
    count = work.categories
    operands = sum(times * shape.shared_bytes * num_warps / shape.warps for shape, times in work.matrices.items())
    return {
        "tensor": sum(times * matrix_cycles(sm, shape) * num_warps / shape.warps for shape, times in work.matrices.items()),
        "mufu": lanes * (count["mufu"] + count["conversion"]) / sm.mufu,
        "fp32": lanes * max((count["fp32"] + count["imad"]) / sm.fp32, count["imad"] / sm.imad),
        "alu": lanes * count["alu"] / sm.alu,
        "shared": (num_warps * work.shared_bytes + operands) / sm.shared,
        "issue": num_warps * work.instructions / sm.issue,
    }


def matrix_cycles(sm: Machine, shape: Matrix) -> float:
    """Cycles for which one matrix instruction keeps the SM's tensor cores, all four of them."""
    share = sm.warp_matrix if shape.warps == 1 else 1.0
    return shape.multiply_adds / (sm.tensor[shape.element_bytes] * share)


def floor_cycles(sm: Machine, widths: Sequence[int], elements: int, element_bytes: int, fp32_highest: bool) -> float:
    """The least cycles for `elements` pairs of tokens: one exponential each, and one product of each of `widths` at the dtype's best rate.

    For fp32 that is TF32's, or, where full precision is asked for, the best of FMA, three products of TF32, and six of bf16.
    """
    rate: float = sm.tensor[element_bytes]
    if fp32_highest and element_bytes == 4:
        rate = max(sm.fp32, sm.tensor[4] / 3, sm.tensor[2] / 6)
    return max(elements * sum(widths) / rate, elements / sm.mufu)
