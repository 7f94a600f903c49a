"""The only file that asks about the device and about Triton. No device is asked at import."""

import functools
import importlib.util
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch.backends.cuda import matmul

if TYPE_CHECKING:
    from .kernels import Target

MIN_COMPUTE_CAPABILITY = (8, 0)
NO_CONTEXT = nullcontext()
"""Does nothing, and can be entered any number of times."""

TRITON_IS_INSTALLED = importlib.util.find_spec("triton") is not None


Answer = TypeVar("Answer", bound=Callable[..., object])


def constant_for_compilers(function: Answer) -> Answer:
    """What `torch.compiler.assume_constant_result` does, without the compiler, whose import takes as long as PyTorch's."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@constant_for_compilers  # torch.compile looks through a cache, and warns that it does
def triton_is_interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors (TRITON_INTERPRET=1, set before visattn is first used)."""
    return _triton_is_interpreting()


@functools.cache
def _triton_is_interpreting() -> bool:
    return TRITON_IS_INSTALLED and os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def autocast_is_enabled(x: torch.Tensor) -> bool:
    """Whether autocast is on for tensors where x is. Of "meta", which has none, PyTorch refuses the question."""
    device_type = "cuda" if x.is_cuda else "cpu" if x.is_cpu else x.device.type  # whose text PyTorch puts together anew
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def without_autocast(x: torch.Tensor) -> AbstractContextManager[Any]:
    """Of operands that have the dtype they are to be computed in; autocast would round fp32 sums."""
    return torch.autocast(x.device.type, enabled=False) if autocast_is_enabled(x) else NO_CONTEXT


@constant_for_compilers
def compute_capability(device: torch.device) -> tuple[int, int]:
    return _compute_capability(device)


@functools.cache
def _compute_capability(device: torch.device) -> tuple[int, int]:
    properties = torch.cuda.get_device_properties(device)
    return properties.major, properties.minor


def chosen_device(name: str | None) -> torch.device:
    """The device of that name, or without one a GPU where there is one.

    Raises:
        RuntimeError: there is no device of that name, or none that holds numbers.
    """
    device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "meta":
        raise RuntimeError("the device must hold numbers, got meta; use cpu or cuda")
    if device.type == "cuda" and (device.index or 0) >= (number := torch.cuda.device_count()):
        raise RuntimeError(f"the device must be one that PyTorch finds, got {name}; it finds {number} GPUs, and cpu")
    return device


def float32_precision_is_highest() -> bool:
    """PyTorch's own switch for fp32 matrix products on CUDA: False where it permits TF32."""
    return matmul.fp32_precision != "tf32"


@contextmanager
def float32_precision(tf32: bool) -> Iterator[None]:
    """Within the block, fp32 matrix products and convolutions on CUDA compute in TF32, or in full precision."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def describe(device: torch.device) -> str:
    """What kind of processor it is, in words that can stand in a report."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    counted = f"{threads} thread{'s' * (threads != 1)}"
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            return f"{line.partition(':')[2].strip()}, {counted}"
    return f"{platform.machine()}, {counted}"


def kernel_target(device: torch.device) -> "Target":
    """What the kernels' launch configuration depends on, for this device and PyTorch's present fp32 switch."""
    return _kernel_target(device, float32_precision_is_highest())


@functools.cache
def _kernel_target(device: torch.device, highest: bool) -> "Target":
    from .kernels import Target

    if device.type != "cuda":
        return Target("hopper", "ieee")  # the interpreter's
    if torch.version.hip is not None:
        return Target("cdna", "ieee")  # fp32 has matrix instructions of its own there
    architectures = {9: "hopper", 10: "blackwell"}
    major, _ = torch.cuda.get_device_capability(device)
    return Target(architectures.get(major, "ampere"), "bf16x6" if highest else "tf32")


def on_device_of(x: torch.Tensor) -> AbstractContextManager[object]:
    """Makes x's device current, since kernels start on the current one; it mostly is."""
    return torch.cuda.device(x.device) if x.is_cuda and x.device.index != torch.cuda.current_device() else NO_CONTEXT
