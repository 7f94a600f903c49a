"""Measures layers: each provider is checked against float64, and timed only if it is right."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from visattn.device import float32_precision

from . import environment, problems, timing
from .cases import Case
from .floors import Ceilings
from .problems import Problem, Truth
from .providers import COMPILED, PROVIDERS, Built, CannotRun, first_line, noted_backends
from .rows import CANNOT_RUN, TIMED, WRONG, Row

MATMUL = ("naive", "naive_compiled")
SCORES_HELD = {"forward": 2, "training": 4}
"""(H·W)² matrices that attention by matrix products holds at once: logits and softmax, and the gradients of both."""


@dataclass(frozen=True)
class How:
    """Where and for how long: `seconds` a timing; and what every row says besides."""

    device: torch.device
    seconds: float
    size: str
    ceilings: Ceilings
    environment: dict[str, Any]

    @property
    def executions(self) -> tuple[str, ...]:
        """The ways in which a call is timed on this type of device."""
        return tuple(EXECUTIONS[self.device.type])


@dataclass(frozen=True)
class Naive:
    """What the others are compared with: the call, and its errors; None and nothing where it does not fit into memory."""

    call: timing.Call | None
    errors: dict[str, float]


def measure_layer(case: Case, names: list[str], how: How) -> Iterator[Row]:
    """The rows of each provider, one an execution, as soon as they are there. naive always runs, to compare with."""
    with float32_precision(case.tf32):
        problem = problems.make_problem(case, how.device, num_inputs=1 if how.device.type == "cpu" else 3)
        truths = problems.truths_of(problem)
        naive = _naive(problem, truths)
        for name in names:
            yield from _provider_rows(name, problem, truths, naive, how)


def _naive(problem: Problem, truths: list[Truth]) -> Naive:
    try:
        _check_memory("naive", problem)
        built = PROVIDERS["naive"](problem, no_choice)
        return Naive(calls(built, problem)[0], problems.errors(built.forward, built.parameters, problem, truths))
    except (CannotRun, torch.OutOfMemoryError):
        return Naive(None, {})


def _provider_rows(name: str, problem: Problem, truths: list[Truth], naive: Naive, how: How) -> Iterator[Row]:
    case = problem.case
    row = Row(
        case.suite, str(case), name, how.executions[0], case.form, list(case.shape), case.dtype, case.tf32, case.mode,
        CANNOT_RUN, floor=how.ceilings.floor(case), size=how.size, environment=how.environment,
    )  # fmt: skip
    if name in COMPILED:
        torch._dynamo.reset()  # of the shapes before, of which Dynamo keeps only so many
    with failure_as_row(row) as failed:
        _check_memory(name, problem)
        built = PROVIDERS[name](problem, lambda built: _trial(built, problem, how))
        with built.context(), noted_backends() as noted:
            errors = problems.errors(built.forward, built.parameters, problem, truths)
        row = replace(row, backend=built.backend(noted), errors=errors)
        wrong = problems.complaints(errors, naive.errors, case.precision)
        if wrong:
            yield replace(row, state=WRONG, reason="; ".join(wrong))
            return
        with in_force(built, case):
            yield from timed_rows(row, calls(built, problem), naive.call, how)
    yield from of_failure(failed, how)


@contextlib.contextmanager
def failure_as_row(row: Row) -> Iterator[list[Row]]:
    """Whatever a peer fails with within the block becomes a row, in the list, for `of_failure`."""
    failed: list[Row] = []
    try:
        yield failed
    except timing.DeadDevice:
        raise
    except CannotRun as reason:
        failed.append(replace(row, reason=str(reason)))
    except Exception as error:
        failed.append(replace(row, reason=f"{type(error).__name__}: {first_line(error)}"))


def of_failure(failed: list[Row], how: How) -> Iterator[Row]:
    """The row of a failure, if there was one; once that is kept, a device that is dead ends the run.

    Raises:
        DeadDevice: it does not answer any more, so that whatever came next would fail as well.
    """
    yield from failed
    if failed:
        timing.check_alive(how.device)


def timed_rows(row: Row, same_work: list[timing.Call], naive: timing.Call | None, how: How) -> Iterator[Row]:
    """The row with what was timed, once for each execution; `same_work` is the same work on different inputs."""
    row = replace(row, peak_bytes=timing.peak_bytes(same_work[0], how.device))
    state: environment.State | None = None
    for execution, take in EXECUTIONS[how.device.type].items():
        row = replace(row, execution=execution)
        with failure_as_row(row) as failed:
            taken = take(same_work, naive, how.seconds)
            state = state or environment.state(how.device)  # once: the answer may take longer than a timing
            yield replace(
                row, state=TIMED, p20=taken.p20, p50=taken.p50, p80=taken.p80, ratio_p20=taken.ratio_p20, ratio_p50=taken.ratio_p50,
                ratio_p80=taken.ratio_p80, share=row.floor / taken.p50 if row.floor else None, clock=state.clock, power=state.power,
            )  # fmt: skip
        yield from of_failure(failed, how)


def calls(built: Built, problem: Problem) -> list[timing.Call]:
    """One call for each input. Gradients are those of the input and of every parameter."""
    if problem.case.mode == "forward":
        return [lambda x=x: built.forward(x) for x in problem.inputs]  # type: ignore[misc]

    def train(x: torch.Tensor) -> object:
        return torch.autograd.grad(built.forward(x), [x, *built.parameters], problem.d_out)

    return [lambda x=x: train(x) for x in (x.detach().requires_grad_() for x in problem.inputs)]  # type: ignore[misc]


def in_force(built: Built, case: Case) -> contextlib.ExitStack:
    """What holds around the calls, so that it does not count in any."""
    stack = contextlib.ExitStack()
    stack.enter_context(built.context())
    stack.enter_context(torch.set_grad_enabled(case.mode == "training"))
    return stack


def _pairs(calls: list[timing.Call], naive: timing.Call | None, seconds: float) -> timing.Timing:
    return timing.pairs(calls[0], naive, seconds) if naive else timing.alone(calls[0], seconds)


EXECUTIONS: dict[str, dict[str, Callable[[list[timing.Call], timing.Call | None, float], timing.Timing]]] = {
    "cpu": {"pairs": _pairs},
    "cuda": {
        "eager": lambda calls, _, seconds: timing.events(calls, seconds),
        "back to back": lambda calls, _, seconds: timing.back_to_back(calls, seconds),
        "graph": lambda calls, _, seconds: timing.graph_replay(calls[0], seconds),
    },
}
"""How a call is timed on each type of device."""


def _trial(built: Built, problem: Problem, how: How) -> float:
    with in_force(built, problem.case):
        return timing.estimate(calls(built, problem)[0], how.device)


def no_choice(built: Built) -> float:
    raise AssertionError("naive attention has nothing to choose from")


def _check_memory(name: str, problem: Problem) -> None:
    """
    Raises:
        CannotRun: full matrices of this size would take most of the memory that is left. On a GPU the allocator says so itself.
    """
    case, free = problem.case, Path("/proc/meminfo")
    if name not in MATMUL or problem.d_out.is_cuda or not free.exists():
        return
    available = 1024 * next(int(line.split()[1]) for line in free.read_text().splitlines() if line.startswith("MemAvailable"))
    needed = SCORES_HELD[case.mode] * case.batch * case.tokens**2 * problem.d_out.element_size()
    if needed > 0.6 * available:
        raise CannotRun(f"its {case.tokens}×{case.tokens} matrices take {needed / 2**30:.0f} GiB, {available / 2**30:.0f} GiB are free")
