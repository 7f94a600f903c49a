"""Reads the disassembly of a kernel (SASS, as `cuobjdump --dump-sass` prints it): its loops, and what runs in the one that matters.

Every count is of instructions that one warp executes. A predicated instruction and a forward branch count as if they were taken.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

_LINE = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z]\w*(?:\.\w+)*)\s*([^;]*);", re.MULTILINE)
_WARPGROUP_SHAPE = re.compile(r"^HGMMA\.(\d+)x(\d+)x(\d+)")
_MATRIX = ("HMMA", "HGMMA")
_BLACKWELL = re.compile(r"UTC\w*MMA$")  # counted, but its shape is in a descriptor
_WARP_SHAPE = re.compile(r"^HMMA\.(\d+)")
_WARP_SHAPES = {"1684": (16, 8, 4), "1688": (16, 8, 8), "16816": (16, 8, 16)}
LANES = 32

# Which pipe executes an instruction, by NVIDIA's descriptions in the guide of Nsight Compute: FP32 arithmetic in FMA, and integer
# multiplication in a part of it; minima, selections, integers and the packing of two fp32 into 16 bits in ALU; transcendentals and all
# other conversions in XU; shuffles go the way of shared memory.
_NAMES = {
    "fp32": "FFMA FADD FMUL FSWZADD HADD2 HMUL2 HFMA2",
    "imad": "IMAD IMUL IDP",
    "alu": "FMNMX FSEL FSETP FSET FCHK SEL ISETP IADD IADD3 LOP LOP3 SHF SHL SHR LEA PRMT MOV VIADD VIMNMX IMNMX VIADDMNMX IABS F2FP I2FP "
    "PLOP3 SGXT BMSK P2R R2P CS2R HMNMX2 HSETP2",
    "mufu": "MUFU",
    "conversion": "F2F F2I I2F FRND POPC FLO BREV",
    "shared": "LDS STS LDSM STSM LDGSTS ATOMS",
    "shuffle": "SHFL",
    "global": "LDG STG ATOMG ATOM RED UTMALDG UTMASTG UBLKCP LD ST",
    "local": "LDL STL",
    "barrier": "BAR SYNCS",
    "wait": "DEPBAR LDGDEPBAR WARPGROUP MEMBAR FENCE ERRBAR WARPSYNC CCTL",
    "branch": "BRA BRX JMP CALL RET EXIT BSSY BSYNC BREAK BMOV NANOSLEEP YIELD KILL",
}
_CATEGORIES = {name: category for category, names in _NAMES.items() for name in names.split()}


@dataclass(frozen=True)
class Instruction:
    """One instruction: its byte address, e.g. "LDS.128", its operands as they are printed, and whether a predicate guards it."""

    address: int
    opcode: str
    operands: str
    guarded: bool = False

    @property
    def name(self) -> str:
        return self.opcode.partition(".")[0]

    @property
    def category(self) -> str:
        """One of "tensor", a key of `_NAMES`, "uniform" for what a warp computes once, and "other", which costs its issue alone."""
        if self.name in _MATRIX or _BLACKWELL.match(self.name):
            return "tensor"
        return _CATEGORIES.get(self.name) or ("uniform" if self.name.startswith("U") else "other")

    @property
    def lane_bytes(self) -> int:
        """Bytes that one lane moves: 4, unless the opcode tells another width."""
        found = re.search(r"\.(?:[US])?(8|16|64|128)\b", self.opcode.replace(".16.M", ".M"))
        return int(found[1]) // 8 if found else 4

    @property
    def shared_bytes(self) -> int:
        """Bytes of shared memory's bandwidth that one warp takes, without bank conflicts; matrix operands are in `Matrix`."""
        if self.name in ("LDSM", "STSM"):
            matrices = re.search(r"\.M\w*88(?:\.([24]))?", self.opcode)  # 8 × 8 elements of 16 bits, one, two or four of them
            return 128 * int((matrices and matrices[1]) or 1)
        if self.category == "shuffle" or (self.category == "shared" and self.lane_bytes < 4):
            return 4 * LANES
        return self.lane_bytes * LANES if self.category == "shared" else 0

    @property
    def global_bytes(self) -> int:
        """Bytes that one warp asks of global memory."""
        return self.lane_bytes * LANES if self.category == "global" or self.name == "LDGSTS" else 0


@dataclass(frozen=True)
class Matrix:
    """A matrix instruction: `(m, k) · (k, n)`, bytes an element, the warps that execute it together, whether A lies in shared memory.

    HGMMA reads B from shared memory, and A where it is not in registers; HMMA has both in registers.
    """

    m: int
    n: int
    k: int
    element_bytes: int
    warps: int
    a_is_shared: bool

    def __str__(self) -> str:
        """The shape, and for HGMMA where A and B are: "64x64x16 RS" has A in registers, SS has both in shared memory."""
        return f"{self.m}x{self.n}x{self.k}" + ("" if self.warps == 1 else " SS" if self.a_is_shared else " RS")

    @property
    def multiply_adds(self) -> int:
        return self.m * self.n * self.k

    @property
    def shared_bytes(self) -> int:
        """Bytes of operands read from shared memory, each once for all warps that work together."""
        rows = 0 if self.warps == 1 else self.n + (self.m if self.a_is_shared else 0)
        return rows * self.k * self.element_bytes


@dataclass(frozen=True)
class Loop:
    """The instructions from `start` to the backward branch at `end`, byte addresses."""

    start: int
    end: int

    def contains(self, other: "Loop") -> bool:
        return self != other and self.start <= other.start and other.end <= self.end

    def body(self, instructions: Sequence[Instruction]) -> list[Instruction]:
        return [i for i in instructions if self.start <= i.address <= self.end]


@dataclass
class Work:
    """What one warp executes in one iteration of a loop: instructions by category, matrix instructions, bytes of both memories."""

    instructions: int = 0
    categories: Counter[str] = field(default_factory=Counter)
    opcodes: Counter[str] = field(default_factory=Counter)
    matrices: Counter[Matrix] = field(default_factory=Counter)
    shared_bytes: int = 0
    global_bytes: int = 0

    def add(self, instruction: Instruction, times: int) -> None:
        self.instructions += times
        self.categories[instruction.category] += times
        self.opcodes[instruction.opcode] += times
        self.shared_bytes += times * instruction.shared_bytes
        self.global_bytes += times * instruction.global_bytes
        if instruction.name in _MATRIX:
            self.matrices[matrix(instruction)] += times

    def multiply_adds(self, num_warps: int) -> int:
        """Of all matrix instructions that `num_warps` warps execute."""
        return sum(count * shape.multiply_adds * num_warps // shape.warps for shape, count in self.matrices.items())


def parse(assembly: str) -> list[Instruction]:
    """The instructions of a disassembly, in order. It holds one function; several would have the same addresses.

    Raises:
        ValueError: it holds no instruction, or an address twice.
    """
    instructions = [Instruction(int(m[1], 16), m[3], m[4].strip(), bool(m[2])) for m in _LINE.finditer(assembly)]
    if not instructions:
        raise ValueError("expected the output of cuobjdump --dump-sass, got text without an instruction")
    if len({i.address for i in instructions}) < len(instructions):
        raise ValueError("expected the disassembly of one function, got several")
    return instructions


def matrix(instruction: Instruction) -> Matrix:
    """The shape of a matrix instruction.

    Raises:
        ValueError: its shape is not known here.
    """
    element_bytes = 4 if ".TF32" in instruction.opcode else 2
    if found := _WARPGROUP_SHAPE.match(instruction.opcode):
        a_is_shared = re.split(r",\s*", instruction.operands)[1].startswith("gdesc")
        return Matrix(int(found[1]), int(found[2]), int(found[3]), element_bytes, 4, a_is_shared)
    found = _WARP_SHAPE.match(instruction.opcode)
    if not found or found[1] not in _WARP_SHAPES:
        raise ValueError(f"expected HGMMA, or HMMA of a shape in {sorted(_WARP_SHAPES)}, got {instruction.opcode}")
    return Matrix(*_WARP_SHAPES[found[1]], element_bytes, 1, False)


def loops(instructions: Sequence[Instruction]) -> list[Loop]:
    """All loops, outermost first: one for each target of a backward branch.

    A branch to itself is the trap behind a kernel's end. One from behind the kernel's exit is the way back from code that the
    assembler has moved out of the way, such as a barrier's second try, and closes no loop either.
    """
    exits = [i.address for i in instructions if i.name == "EXIT" and not i.guarded]
    ends: dict[int, int] = {}
    for instruction in instructions:
        found = re.search(r"0x([0-9a-f]+)\s*$", instruction.operands) if instruction.name == "BRA" else None
        start = int(found[1], 16) if found else instruction.address
        if start < instruction.address and not any(start <= exit_ < instruction.address for exit_ in exits):
            ends[start] = instruction.address
    return sorted((Loop(*item) for item in ends.items()), key=lambda loop: (loop.start, -loop.end))


def main_loop(instructions: Sequence[Instruction]) -> Loop | None:
    """The loop a kernel spends its time in, None where nothing loops.

    Attention's loop over tiles of tokens is the innermost one that holds both an exponential and a matrix product, itself or in loops
    over channels inside of it. The masked remainder after it runs once and is no loop; where it became one as well, and everywhere
    without exponentials, the loop with the most matrix work is meant, the innermost of those that have the same.
    """
    found = [(loop, work(instructions, loop)) for loop in loops(instructions)]
    with_exp = [(loop, w) for loop, w in found if w.categories["tensor"] and w.opcodes["MUFU.EX2"]]
    innermost = [(loop, w) for loop, w in with_exp if not any(loop.contains(other) for other, _ in with_exp)]
    candidates = innermost or [(loop, w) for loop, w in found if w.categories["tensor"]]
    if not candidates:
        return None
    return max(candidates, key=lambda pair: (sum(s.multiply_adds * n for s, n in pair[1].matrices.items()), -pair[0].end))[0]


def work(instructions: Sequence[Instruction], loop: Loop, trips: Mapping[Loop, int] | None = None) -> Work:
    """What one iteration of `loop` executes; a loop inside of it as often as `trips` says, or once where that does not say."""
    inner = {other: times for other, times in (trips or {}).items() if loop.contains(other)}
    total = Work()
    for instruction in loop.body(instructions):
        times = 1
        for other, other_times in inner.items():
            if other.start <= instruction.address <= other.end:
                times *= other_times
        total.add(instruction, times)
    return total


def inner_loops(instructions: Sequence[Instruction], loop: Loop) -> list[Loop]:
    """The loops inside of `loop` that hold matrix instructions and no loop themselves."""
    inside = [other for other in loops(instructions) if loop.contains(other) and work(instructions, other).matrices]
    return [one for one in inside if not any(one.contains(other) for other in inside)]
