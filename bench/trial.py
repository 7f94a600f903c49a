"""Launch configurations put to the test, one kernel at a time: on the GPU at hand, or in a rehearsal without one.

The tool that tunes knows a `Machine`, which opens a `Trial` of an entry: configurations are compiled, judged, and those that are right
timed. No configuration is ever chosen while somebody's call runs; here the functions of `kernels/launch_config.py` are stood in for.
"""

import contextlib
import math
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol
from unittest import mock

import torch
import triton

from visattn import kernels, provenance
from visattn.device import float32_precision, kernel_target

from . import environment, layers, problems, timing
from .ahead_of_time import Compiled, Device, compile_launch
from .candidates import Entry
from .cases import DTYPES, Case
from .launches import Launch, caught_launches
from .passes import layer_launches
from .problems import Problem, Truth
from .providers import PROVIDERS, Built

Errors = list[dict[str, float]]  # of each case of an entry


class Verdict(NamedTuple):
    """What is known of a configuration before it is timed; reason: why it is not, None where it may be."""

    reason: str | None
    errors: Errors
    registers: int | None = None
    shared_memory: int | None = None


class Trial(Protocol):
    """One entry on one machine."""

    def compile(self, configs: list[kernels.LaunchConfig]) -> None:
        """Compiles the entry's kernel with each of them, all at once where the machine can; says nothing of those that fail."""

    def judge(self, config: kernels.LaunchConfig, limits: Errors | None) -> Verdict:
        """Whether the kernel compiles with it, without spills, and the layer is right; with `limits`, of the errors there too."""

    def time(self, config: kernels.LaunchConfig, case: int) -> float:
        """Microseconds of the kernel on one of the entry's cases, for a configuration that was judged right."""


class Machine(Protocol):
    """environment: what a row says of it. workers: configurations that it compiles at once."""

    environment: dict[str, Any]
    workers: int

    def target(self, entry: Entry) -> kernels.Target: ...

    def open(self, entry: Entry) -> Trial: ...

    def state(self) -> dict[str, float | None]:
        """Its clocks, power and temperature."""


@contextlib.contextmanager
def in_place(entry: Entry, config: kernels.LaunchConfig) -> Iterator[None]:
    """Within the block the launchers get this configuration for the entry's kernel, and the table's for all others."""
    if (entry.form, entry.kernel) == ("folded", "forward"):
        with mock.patch.object(kernels, "forward_config", return_value=config):
            yield
        return
    name = "projected_configs" if entry.form == "narrow" else "backward_configs"
    of_table = getattr(kernels, name)
    with mock.patch.object(kernels, name, lambda *problem: replace(of_table(*problem), **{entry.kernel: config})):
        yield


@dataclass(frozen=True)
class Stage:
    """A case with its numbers, the layer, and what naive attention makes of it."""

    problem: Problem
    truths: list[Truth]
    built: Built
    naive: dict[str, float]

    def run(self) -> None:
        """A forward and a backward pass on random numbers, so that what is timed with them does no work on zeros."""
        layers.calls(self.built, self.problem)[0]()

    def errors(self) -> dict[str, float]:
        return problems.errors(self.built.forward, self.built.parameters, self.problem, self.truths)


class GpuTrial:
    """On the GPU at hand. A kernel is timed by itself, with the very arguments that the layer gave it while it was judged."""

    def __init__(self, entry: Entry, stages: list[Stage], workers: int) -> None:
        self.entry, self.stages, self.workers = entry, stages, workers
        self.launches: dict[tuple[kernels.LaunchConfig, int], Launch] = {}

    def compile(self, configs: list[kernels.LaunchConfig]) -> None:
        launches = []
        for config in configs:
            with self._in_force(config), caught_launches() as caught:
                self.stages[0].run()
            launches.append(launch_of(self.entry, caught))
        with ThreadPoolExecutor(self.workers) as pool, triton.AsyncCompileMode(pool, ignore_errors=True):
            for launch in launches:
                launch.compile()

    def judge(self, config: kernels.LaunchConfig, limits: Errors | None) -> Verdict:
        errors: Errors = []
        try:
            for index, stage in enumerate(self.stages):
                with self._in_force(config), caught_launches(start=True) as started:
                    stage.run()
                launch = launch_of(self.entry, started)
                compiled = launch.start()
                used = compiled.n_regs, compiled.metadata.shared
                if compiled.n_spills:
                    return Verdict(f"spills {compiled.n_spills}", errors, *used)
                with self._in_force(config):
                    errors.append(stage.errors())
                case = stage.problem.case
                wrong = problems.complaints(errors[index], stage.naive, case.precision)
                wrong += problems.complaints(errors[index], limits[index], case.precision) if limits else []
                if wrong:
                    return Verdict(f"{case}: {'; '.join(wrong)}", errors, *used)
                self.launches[config, index] = launch
        except Exception as error:
            timing.synchronize(stage.problem.d_out.device)  # a device that is dead ends the run
            return Verdict(in_words(error), errors)
        return Verdict(None, errors, *used)

    def time(self, config: kernels.LaunchConfig, case: int) -> float:
        return timing.events([self.launches[config, case].start], seconds=0.0, min_rounds=20).p50

    @contextlib.contextmanager
    def _in_force(self, config: kernels.LaunchConfig) -> Iterator[None]:
        with in_place(self.entry, config), float32_precision(self.stages[0].problem.case.tf32):
            yield


class Gpu:
    """The GPU at hand, where every configuration is judged against float64 and timed by events with the L2 cache flushed."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.environment = environment.environment(device)
        self.workers = os.cpu_count() or 1
        self._stages_of: list[Case] = []
        self._stages: list[Stage] = []

    def target(self, entry: Entry) -> kernels.Target:
        with float32_precision(entry.cases()[0].tf32):
            return kernel_target(self.device)

    def open(self, entry: Entry) -> Trial:
        if self._stages_of != entry.cases():  # the kernels of one layer come one after another
            self._stages.clear()
            self._stages_of = entry.cases()
            self._stages = [self._stage(case) for case in self._stages_of]
        return GpuTrial(entry, self._stages, self.workers)

    def state(self) -> dict[str, float | None]:
        return dict(vars(environment.state(self.device)))

    def _stage(self, case: Case) -> Stage:
        with float32_precision(case.tf32):
            problem = problems.make_problem(case, self.device)
            truths = problems.truths_of(problem)
            naive, ours = (PROVIDERS[name](problem, layers.no_choice) for name in ("naive", "visattn"))
            return Stage(problem, truths, ours, problems.errors(naive.forward, naive.parameters, problem, truths))


class RehearsalTrial:
    """Compiles the first few configurations ahead of time; every other is right, and takes a time made up from its sizes."""

    def __init__(self, entry: Entry, rehearsal: "Rehearsal") -> None:
        self.entry, self.rehearsal = entry, rehearsal

    def compile(self, configs: list[kernels.LaunchConfig]) -> None:
        pass

    def judge(self, config: kernels.LaunchConfig, limits: Errors | None) -> Verdict:
        if not self.rehearsal.compiles:
            return Verdict(None, [])
        self.rehearsal.compiles -= 1
        try:
            compiled = compiled_for(self.entry, config, self.rehearsal.device)
        except Exception as error:
            return Verdict(in_words(error), [])
        used = compiled.registers, compiled.shared_memory
        if compiled.spills:
            return Verdict(f"spills {compiled.spills}", [], *used)
        if compiled.shared_memory > self.rehearsal.device.shared_memory:
            return Verdict(f"{compiled.shared_memory} bytes of shared memory", [], *used)
        return Verdict(None, [], *used)

    def time(self, config: kernels.LaunchConfig, case: int) -> float:
        return invented_time(config, self.entry.cases()[case])


class Rehearsal:
    """A device that is not here, and `compiles`, how many configurations are really compiled for it."""

    workers = 1

    def __init__(self, device: Device, compiles: int) -> None:
        self.device, self.compiles = device, compiles
        self.environment = {"device": f"rehearsal of {device.name}"} | provenance.versions("torch", "triton", "visattn")

    def target(self, entry: Entry) -> kernels.Target:
        return self.device.kernel_target(highest=not entry.cases()[0].tf32)

    def open(self, entry: Entry) -> Trial:
        return RehearsalTrial(entry, self)

    def state(self) -> dict[str, float | None]:
        return {}


def launch_of(entry: Entry, launches: list[Launch]) -> Launch:
    """The entry's launch of the last pass.

    Raises:
        RuntimeError: there is none, since the layer ran on something else.
    """
    for launch in reversed(launches):
        if launch.name == entry.function:
            return launch
    raise RuntimeError(
        f"the layer launched no {entry.function}, but {', '.join(sorted({launch.name for launch in launches})) or 'nothing'}"
    )


def in_words(error: Exception) -> str:
    """Triton shows the source first and says what is wrong with it last."""
    *_, last = ["", *str(error).strip().splitlines()]
    return f"{type(error).__name__}: {last}"[:200]


def compiled_for(entry: Entry, config: kernels.LaunchConfig, device: Device) -> Compiled:
    """The entry's kernel with this configuration on a device that need not be here."""
    case = entry.cases()[0]
    with in_place(entry, config):
        launches = layer_launches(
            device, DTYPES[case.dtype], case.channels, case.tokens, qk_channels=case.qk_channels, highest=not case.tf32
        )
    return compile_launch(launch_of(entry, launches), device)


def invented_time(config: kernels.LaunchConfig, case: Case) -> float:
    """Microseconds, a pure function: as the work, and longer the further the sizes are from 128×64, 8 warps and 3 stages."""
    distance = abs(math.log2(config.block_m / 128)) + abs(math.log2(config.block_n / 64)) + (config.num_warps != 8) + 3 - config.num_stages
    return case.batch * case.tokens**2 * case.channels * 1e-8 * (1 + 0.1 * distance)
