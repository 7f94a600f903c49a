"""Compiles the kernels for devices that are not at hand, exactly as their launchers would start them.

What a launcher would have started (launches.py) is compiled for any target. No GPU is needed: Triton carries the assembler and the
disassembler.
"""

import functools
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from visattn import kernels

from .launches import Launch

KIB = 1024
MATRIX_INSTRUCTION_OF_PTX = re.compile(r"\b(mma\.sync|wgmma\.mma_async|tcgen05\.mma)")


@dataclass(frozen=True)
class Device:
    """One compilation target: its names here, in Triton and in `kernels.Target`, a program's shared memory, its matrix instructions."""

    name: str
    target: GPUTarget
    architecture: str
    shared_memory: int
    matrix_instruction: str

    def kernel_target(self, highest: bool) -> kernels.Target:
        """What `visattn.device.kernel_target` would say on this device."""
        fp32 = "ieee" if self.target.backend == "hip" else "bf16x6" if highest else "tf32"
        return kernels.Target(self.architecture, fp32)


def _cuda(capability: int, architecture: str, shared_kib: int, matrix_instruction: str) -> Device:
    return Device(f"sm_{capability}", GPUTarget("cuda", capability, 32), architecture, shared_kib * KIB, matrix_instruction)


DEVICES = {
    device.name: device
    for device in (
        _cuda(80, "ampere", 163, r"\bHMMA"),
        _cuda(86, "ampere", 99, r"\bHMMA"),
        _cuda(89, "ampere", 99, r"\bHMMA"),
        _cuda(90, "hopper", 227, r"\bHG?MMA"),
        _cuda(100, "blackwell", 227, r"\b(UTC\w*MMA|HMMA)"),
        _cuda(120, "ampere", 99, r"\bHMMA"),
        Device("gfx942", GPUTarget("hip", "gfx942", 64), "cdna", 64 * KIB, r"v_mfma"),
    )
}


@dataclass(frozen=True)
class Compiled:
    """What one kernel became on one device. Sizes are bytes; spills are bytes of local memory, or spilled registers on AMD.

    has_matrix_instructions: told from the text that the assembler was given, which is quicker than reading back what it made.
    """

    name: str
    registers: int
    spills: int
    shared_memory: int
    has_matrix_instructions: bool
    device: Device
    binary: bytes

    @functools.cached_property
    def assembly(self) -> str:
        """The disassembly, or on AMD the assembly."""
        if self.device.target.backend == "hip":
            return self.binary.decode()
        return _run_tool("cuobjdump", "--dump-sass", self.binary)

    @property
    def matrix_instructions(self) -> int:
        """Their number in the assembly."""
        return len(re.findall(self.device.matrix_instruction, self.assembly))


def compile_launch(launch: Launch, device: Device) -> Compiled:
    """Compiles a caught launch for `device` and reads what became of it.

    Raises:
        Exception: whatever Triton raises where the kernel does not compile for the device.
    """
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], list] = {}
    for index, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        kind, aligned = _specialise(value, parameter.is_constexpr, parameter.do_not_specialize)
        signature[parameter.name] = kind
        if kind == "constexpr":
            constants[parameter.name] = value
        elif aligned:
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=device.target, options=dict(launch.options))
    if device.target.backend == "hip":
        return _read_amd(launch.name, compiled, device)
    return _read_nvidia(launch.name, compiled, device)


def _specialise(value: Any, is_constexpr: bool, plain: bool) -> tuple[str, bool]:
    """The type of an argument, and whether it counts as divisible by 16, by the rules of Triton's own launcher; never if `plain`."""
    if is_constexpr or value is None or (isinstance(value, int) and value == 1 and not plain):
        return "constexpr", False
    if isinstance(value, torch.Tensor):
        names = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int32: "*i32"}
        return names[value.dtype], True
    if isinstance(value, float):
        return "fp32", False
    return ("i32" if -(2**31) <= value < 2**31 else "i64"), value % 16 == 0 and not plain


def _read_nvidia(name: str, compiled: Any, device: Device) -> Compiled:
    usage = _run_tool("cuobjdump", "--dump-resource-usage", compiled.asm["cubin"])
    resources = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    return Compiled(
        name=name,
        registers=resources["REG"],
        spills=resources["LOCAL"] + resources["STACK"],
        shared_memory=compiled.metadata.shared,
        has_matrix_instructions=bool(MATRIX_INSTRUCTION_OF_PTX.search(compiled.asm["ptx"])),
        device=device,
        binary=compiled.asm["cubin"],
    )


def _read_amd(name: str, compiled: Any, device: Device) -> Compiled:
    assembly = compiled.asm["amdgcn"]

    def field(key: str) -> int:
        found = re.search(rf"\.{key}:\s+(\d+)", assembly)
        assert found, f"{key} is missing in the assembly of {name}"
        return int(found[1])

    return Compiled(
        name=name,
        registers=field("vgpr_count"),
        spills=field("vgpr_spill_count") + field("sgpr_spill_count"),
        shared_memory=compiled.metadata.shared,
        has_matrix_instructions=bool(re.search(device.matrix_instruction, assembly)),
        device=device,
        binary=assembly.encode(),
    )


def _run_tool(name: str, argument: str, binary: bytes) -> str:
    """What one of the tools that come with Triton prints about a binary."""
    tool = getattr(triton.knobs.nvidia, name).path
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(binary)
        return subprocess.run([tool, argument, str(file)], check=True, capture_output=True, text=True).stdout
