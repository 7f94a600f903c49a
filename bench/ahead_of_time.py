"""Compiles the kernels for devices that are not at hand, exactly as their launchers would start them.

A launcher is run on meta tensors while the launch itself is caught; what it would have started is compiled for any target.
No GPU is needed: Triton carries the assembler and the disassembler.
"""

import contextlib
import functools
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from visattn import kernels

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
class Launch:
    """A launch that a launcher asked for: the kernel, its arguments by name, its options, and how many programs."""

    kernel: JITFunction
    arguments: dict[str, Any]
    options: dict[str, int | bool]
    grid: tuple[int, ...]

    @property
    def name(self) -> str:
        return self.kernel.__name__

    def start(self) -> Any:
        """Launches it on the device at hand; returns the compiled kernel."""
        return self.kernel.run(grid=self.grid, warmup=False, **self.arguments, **self.options)

    def compile(self) -> None:
        """Compiles it for the device at hand, as `start` would."""
        self.kernel.run(grid=self.grid, warmup=True, **self.arguments, **self.options)


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


@contextlib.contextmanager
def caught_launches(start: bool = False) -> Iterator[list[Launch]]:
    """Every launch that is asked for within the block is in the list; unless `start`, none takes place."""
    launches: list[Launch] = []
    run = JITFunction.run

    def catch(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        options = {name: kwargs[name] for name in set(kwargs) - set(self.arg_names)}
        arguments = dict(zip(self.arg_names, args, strict=False)) | {k: v for k, v in kwargs.items() if k not in options}
        launches.append(Launch(self, arguments, options, grid))
        if start:
            run(self, *args, grid=grid, warmup=warmup, **kwargs)

    with mock.patch.object(JITFunction, "run", catch), nothing_remembered():
        yield launches


def nothing_remembered() -> AbstractContextManager[object]:
    """Within the block every launch is Triton's own until one returns what it has compiled, and nothing is known of that afterwards."""
    return mock.patch.dict(kernels.launching._remembered, clear=True)


def layer_launches(
    device: Device,
    dtype: torch.dtype,
    channels: int,
    tokens: int = 1024,
    *,
    qk_channels: int | None = None,
    highest: bool = True,
    channels_last: bool = False,
    maps: int = 128,
) -> list[Launch]:
    """Every launch of one forward and backward pass of the layer, with biases, γ and residual, on maps of `tokens` pixels.

    So many maps that none has its keys split among programs, unless `maps` is small. Queries and keys are as wide as the map, or of
    `qk_channels`; the form of the kernels is the one that the layer would take.
    """

    def empty(*shape: int, of: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=of, device="meta")

    def new_map() -> torch.Tensor:
        return kernels.writable(empty(maps, tokens, channels).transpose(1, 2) if channels_last else empty(maps, channels, tokens))

    target = device.kernel_target(highest)
    width = qk_channels or channels
    x, d_out, y, out, d_x = (new_map() for _ in range(5))
    w_q, w_k, w_v = empty(width, channels), empty(width, channels), empty(channels, channels)
    b_q, b_v, gamma, lse = empty(width), empty(channels), empty(1), empty(maps, tokens, of=torch.float32)
    with caught_launches() as launches:
        if channels > kernels.FUSED_CHANNELS:
            wide, u, d_y = kernels.wide_configs(dtype, target), new_map(), new_map()
            kernels.wide_attention_forward(x, u, y, lse, config=wide.forward)
            d_u, delta = kernels.wide_query_gradient(x, u, d_y, y, lse, config=wide.query_gradient)
            kernels.wide_key_value_gradient(x, u, d_y, lse, delta, d_x, config=wide.key_value_gradient)
            kernels.token_moments(d_out, y, (d_u, x), config=wide.token_moments)
            return launches
        configs, of_weights = kernels.backward_configs(channels, dtype, target), kernels.weight_gradients_config(target)
        if kernels.projects_keys(maps, channels, tokens, width, dtype, target):
            projected = kernels.projected_configs(channels, dtype, target)
            q, k, *_ = kernels.qkv_projection(
                x, kernels.Projection(w_q, b_q, 0.125), kernels.Projection(w_k), config=projected.qkv_projection
            )
            kernels.projected_attention_forward(q, k, x, x, w_v, b_v, gamma, out, y, lse, residual=True, config=projected.forward)
            d_q, d_k = kernels.projected_attention_backward(
                q, k, x, d_out, w_q, w_k, w_v, gamma, y, lse, d_x, scale=0.125, residual=True, configs=projected
            )
            sums = kernels.partial_moments(d_q, x, (d_k, x), need_right=True, config=configs.token_moments)
            value_sums = kernels.partial_moments(d_out, y, config=configs.token_moments)
            kernels.projection_gradients(
                sums, value_sums, w_q, b_q, w_k, b_q, w_v, b_v, gamma, num_tokens=tokens, scale=0.125, config=of_weights
            )
            return launches
        forward = kernels.forward_config(channels, dtype, target)
        splits, keys = kernels.key_splits(maps, channels, tokens, forward)
        if splits > 1:
            kernels.split_attention_forward(x, w_q, b_q, w_k, y, lse, scale=0.125, splits=splits, keys_per_split=keys, config=forward)
            output = kernels.projection_configs(channels, dtype, target).qkv_projection
            kernels.output_projection(y, w_v, None, b_v, gamma, x, out, residual=True, factor=None, config=output)
        else:
            kernels.attention_forward(x, w_q, b_q, w_k, w_v, b_v, gamma, out, y, lse, scale=0.125, residual=True, config=forward)
        operands = (x, d_out, w_q, b_q, w_k, w_v, gamma, y, lse, d_x)
        single_tile = kernels.single_tile_config(maps, channels, tokens, dtype, target)
        if single_tile is not None:
            of_tiles = kernels.single_tile_backward(*operands, scale=0.125, residual=True, need_sums=True, config=single_tile)
            assert of_tiles is not None
            sums = of_tiles
        else:
            d_u = kernels.attention_backward(*operands, scale=0.125, residual=True, configs=configs)
            sums = kernels.partial_moments(d_out, y, (d_u, x), config=configs.token_moments)
        kernels.weight_gradients(sums, w_q, b_q, w_k, b_q, w_v, b_v, gamma, scale=0.125, config=of_weights)
    return launches


def token_launches(
    device: Device,
    dtype: torch.dtype,
    qk_channels: int,
    value_channels: int,
    queries: int = 1024,
    keys: int = 1024,
    *,
    highest: bool = True,
    channels_last: bool = False,
) -> list[Launch]:
    """Every launch of one forward and backward pass of attention on tokens, with heads of these widths.

    In channels_last all tensors are as a single head has them whose map lies so in memory.
    """

    def tokens(channels: int, length: int) -> torch.Tensor:
        empty = torch.empty((2, length, channels), dtype=dtype, device="meta")
        return empty.transpose(1, 2) if channels_last else kernels.empty_aligned(empty, (2, channels, length))

    configs = kernels.token_configs(qk_channels, value_channels, dtype, device.kernel_target(highest))
    q, d_q = (tokens(qk_channels, queries) for _ in range(2))
    k, d_k = (tokens(qk_channels, keys) for _ in range(2))
    v, d_v = (tokens(value_channels, keys) for _ in range(2))
    y, d_y = (tokens(value_channels, queries) for _ in range(2))
    c = torch.empty(2, value_channels, dtype=dtype, device="meta")
    lse = torch.empty(2, queries, dtype=torch.float32, device="meta")
    with caught_launches() as launches:
        kernels.token_attention_forward(q, k, v, c, y, lse, config=configs.forward)
        kernels.token_attention_backward(q, k, v, c, d_y, y, lse, d_q, d_k, d_v, scale=0.125, configs=configs)
    return launches


def projection_launches(
    device: Device,
    dtype: torch.dtype,
    channels: int,
    qk_channels: int,
    value_channels: int,
    tokens: int = 1024,
    *,
    highest: bool = True,
    channels_last: bool = False,
) -> list[Launch]:
    """What attention on tokens launches before and after itself, on a map of `tokens` pixels: projections, and their gradients.

    The output is projected by a kernel up to `kernels.FUSED_CHANNELS`.
    """

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    maps = (empty(2, tokens, channels).mT if channels_last else empty(2, channels, tokens) for _ in range(2))
    x, d_x = (kernels.writable(m) for m in maps)
    w_q, w_k, w_v = (empty(width, channels) for width in (qk_channels, qk_channels, value_channels))
    d_q, d_k, d_v = (kernels.empty_aligned(x, (2, width, tokens)) for width in (qk_channels, qk_channels, value_channels))
    target = device.kernel_target(highest)
    configs, of_weights = kernels.projection_configs(channels, dtype, target), kernels.weight_gradients_config(target)
    b_q, centre, y_total = empty(qk_channels), torch.empty(2, channels, device="meta"), torch.empty(value_channels, device="meta")
    with caught_launches() as launches:
        keys, values = kernels.Projection(w_k), kernels.Projection(w_v)
        kernels.qkv_projection(x, kernels.Projection(w_q, b_q, 0.125), keys, values, centre=centre, config=configs.qkv_projection)
        kernels.qkv_projection_backward(d_q, d_k, d_v, w_q, w_k, w_v, d_x, config=configs.backward)
        if max(channels, value_channels) <= kernels.FUSED_CHANNELS:
            of_output = kernels.projection_configs(value_channels, dtype, target)
            w_o, b_v, b_o, gamma = empty(channels, value_channels), empty(value_channels), empty(channels), empty(1)
            kernels.output_projection(d_v, w_o, b_v, b_o, gamma, x, d_x, residual=True, factor=0.5, config=of_output.qkv_projection)
            kernels.output_projection_backward(x, w_o, gamma, config=of_output.backward)
            sums = kernels.partial_moments(x, d_v, config=of_output.token_moments)
            kernels.output_gradients(sums, w_o, b_v, b_o, gamma, config=of_weights)
        sums = kernels.partial_moments(d_q, x, (d_k, x), need_right=True, config=configs.token_moments)
        value_sums = kernels.partial_moments(d_v, x, config=configs.token_moments)
        kernels.projection_gradients(
            sums, value_sums, w_q, b_q, w_k, None, w_v, None, None, y_total, num_tokens=tokens, scale=1.0, config=of_weights
        )
    return launches


def normalized_launches(
    device: Device, dtype: torch.dtype, channels: int, tokens: int = 1024, *, highest: bool = True, channels_last: bool = False
) -> list[Launch]:
    """What a normalised map of `tokens` pixels launches that is not launched for others: statistics, and kernels that normalise.

    Which of the two that normalise a block takes is left open here.
    """

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    maps = (empty(128, tokens, channels).mT if channels_last else empty(128, channels, tokens) for _ in range(3))
    x, y, out = (kernels.writable(m) for m in maps)
    lse = torch.empty(128, tokens, device="meta")
    weight, vector, target = empty(channels, channels), empty(channels), device.kernel_target(highest)
    with caught_launches() as launches:
        norm = kernels.group_statistics(x, vector, vector, channels // 2, 1e-6)
        projection, config = kernels.Projection(weight), kernels.projection_configs(channels, dtype, target)
        kernels.qkv_projection(x, projection, projection, projection, norm, norm[:, -1], config=config.qkv_projection)
        if kernels.attends_normalized(channels, dtype, target):
            forward = kernels.forward_config(channels, dtype, target, True)
            kernels.attention_forward(
                x, weight, vector, weight, weight, vector, vector[:1], out, y, lse, norm, scale=0.125, residual=True, config=forward
            )
            kernels.split_attention_forward(
                x, weight, vector, weight, y, lse, norm, scale=0.125, splits=2, keys_per_split=tokens // 128 * 64, config=forward
            )
    return launches


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
        names = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32"}
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
