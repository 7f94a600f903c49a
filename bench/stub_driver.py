"""Triton without a device: kernels are compiled for a Hopper GPU, loaded nowhere, and what would start them is told instead."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from triton import JITFunction
from triton.compiler import ASTSource

from .ahead_of_time import DEVICES
from .launches import nothing_remembered

DEVICE = 1000
"""No device has this number, so that what is compiled here is never taken for what another driver has loaded."""


class Start(NamedTuple):
    """What a compiled kernel was started with: one `Launcher` for each, and its grid and arguments."""

    launcher: "Launcher"
    grid: tuple[int, int, int]
    args: tuple[Any, ...]


Told = Callable[[Start], object]


class Launcher:
    """What Triton calls to start one compiled kernel."""

    def __init__(self, kernel: JITFunction, told: Told) -> None:
        self.kernel, self._told = kernel, told

    def __call__(self, x: int, y: int, z: int, *rest: Any) -> None:
        _stream, _function, _metadata, _launch_metadata, _enter, _exit, *args = rest
        self._told(Start(self, (x, y, z), tuple(args)))


class _Utilities:
    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": DEVICES["sm_90"].shared_memory, "multiprocessor_count": 132}

    def load_binary(self, *_: object) -> tuple[object, object, int, int, int]:
        """Module, function, registers, spills, threads a program may have."""
        return object(), object(), 0, 0, 1024

    def unload_module(self, module: object) -> None:
        pass


class _Driver:
    def __init__(self, told: Told) -> None:
        self.utils, self.kernels, self._told = _Utilities(), set[JITFunction](), told

    def get_current_device(self) -> int:
        return DEVICE

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        return DEVICES["sm_90"].target

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def launcher_cls(self, source: ASTSource, metadata: object) -> Launcher:
        self.kernels.add(source.fn)
        return Launcher(source.fn, self._told)


@contextmanager
def stubbed_driver(told: Told) -> Iterator[None]:
    """Within the block every launch goes through Triton, which compiles, as far as to `told` in place of the start."""
    driver = _Driver(told)
    with mock.patch.object(triton.runtime.driver, "_active", driver), nothing_remembered():
        try:
            yield
        finally:
            for kernel in driver.kernels:
                kernel.device_caches.pop(DEVICE, None)
