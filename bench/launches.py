"""What launchers ask Triton to start, caught before or while it starts."""

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any
from unittest import mock

from triton.runtime.jit import JITFunction

from visattn import kernels


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
