"""What a call costs the host before a kernel runs: validation, dispatch, autograd and the start of each kernel.

The launch itself is replaced by nothing, and tensors on the CPU stand for those on a GPU, so that the host's work is all there is.
PyTorch's own operations, allocations, views and the small products behind the gradients of the weights, do run. On a GPU they
would only be queued; here they compute, which at 32 channels takes no time beside calling them. The cases with 32 channels
are therefore the ones to be held against the targets; those with more also contain arithmetic that is not the host's.

Where the time goes is found by recording the calls of one step with their arguments and timing each kind in isolation, in the
same rounds as the whole. A part that is repeated runs from warm caches, as it never does in a step: "colder caches" is the
time of all parts one after another less their sum. "Not explained" is the rest of the whole: the lines between the parts.

What `kernel[grid](...)` costs beyond the stub, and the questions that only a GPU can answer, such as making its device
current, cannot be measured this way.
"""

import argparse
import dataclasses
import functools
import gc
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from triton.runtime.jit import JITFunction

from visattn import Attention, autograd, device, dispatch, files, functional, kernels, report, triton_backend, use_backend, validation

MODES = ("forward", "forward, graph kept", "forward + backward")
TARGETS = {"forward": 20.0, "forward + backward": 60.0}
"""Microseconds a call."""

WHOLE, COLDER, UNEXPLAINED = "whole", "colder caches", "not explained"
FUNCTION, ENGINE = "autograd.Function", "PyTorch's engine, node and saved tensors"
ROUNDS = 200
BATCH = 200.0
"""Microseconds that a batch of calls takes: a small part of a scheduler's time slice."""


@dataclass(frozen=True)
class Case:
    """A layer and a map. Queries and keys have `qk_channels`: as many as the map folds them, many fewer project them."""

    shape: tuple[int, int, int, int]
    qk_channels: int
    channels_last: bool

    @property
    def name(self) -> str:
        form = "folded" if self.qk_channels == self.shape[1] else f"{self.qk_channels} query channels"
        return f"{'×'.join(map(str, self.shape))}, {'channels_last' if self.channels_last else 'NCHW'}, {form}"


CASES = [
    Case(shape, qk_channels, channels_last)
    for shape in ((2, 32, 8, 8), (2, 64, 16, 16), (64, 128, 8, 8))
    for qk_channels in (shape[1], shape[1] // 8)
    for channels_last in (False, True)
]


@dataclass(frozen=True)
class Row:
    """One figure: microseconds a call, and how often the part is called in it. What is a difference may fall below zero."""

    case: str
    mode: str
    part: str
    calls: int
    p20: float
    p50: float
    p80: float


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there as well")


def run(options: argparse.Namespace) -> int:
    rows = measure()
    print(markdown(rows))
    if options.json:
        write(options.json, rows)
    return 0


def write(path: Path, rows: Sequence[Row]) -> None:
    files.write(path, json.dumps([dataclasses.asdict(row) for row in rows], indent=1) + "\n")


def measure(cases: Sequence[Case] = tuple(CASES), rounds: int = ROUNDS) -> list[Row]:
    """All figures of all cases.

    Raises:
        RuntimeError: TRITON_INTERPRET is set; then nothing is launched, and kernels run in Python.
    """
    if device.triton_is_interpreting():
        raise RuntimeError("host overhead is that of launches, which the interpreter has none of; unset TRITON_INTERPRET")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # memory that no kernel has filled may hold them, and they are slow
    try:
        rows = [row for case in cases for mode in MODES for row in _measure_one(case, mode, rounds)]
        return [_yardstick(rounds), *rows]
    finally:
        torch.set_flush_denormal(False)
        torch.set_num_threads(threads)


def markdown(rows: Sequence[Row]) -> str:
    """The wholes of all cases beside the targets, and the parts of the first two forms."""
    wholes = []
    for row in rows:
        if row.part == WHOLE:
            target = f"{TARGETS[row.mode]:.0f}" if row.mode in TARGETS else ""
            wholes.append([row.case, row.mode, *(f"{value:.1f}" for value in (row.p20, row.p50, row.p80)), target])
    text = [
        f"Host overhead in µs a call, launches stubbed, CPU tensors in place of a GPU's; {device.describe(torch.device('cpu'))}, "
        f"torch {torch.__version__}, load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores.\n",
        report.markdown_table(["case", "mode", "p20", "p50", "p80", "target"], wholes),
    ]
    for case in dict.fromkeys(row.case for row in rows if row.part == UNEXPLAINED):
        cells = {(row.part, row.mode): row for row in rows if row.case == case}
        lines = []
        parts = dict.fromkeys(part for part, _ in cells)
        for part in (*(part for part in parts if part not in (COLDER, UNEXPLAINED, WHOLE)), COLDER, UNEXPLAINED, WHOLE):
            found = [cells.get((part, mode)) for mode in MODES]
            lines.append([part, *("" if row is None else f"{row.p20:.1f} ({row.calls})" for row in found)])
        text.append(f"Where it goes, {case}: p20 of each part in µs (calls)\n\n" + report.markdown_table(["part", *MODES], lines))
    text.append("Not contained: what a real launch costs beyond the stub, and questions that only a GPU can answer.")
    return "\n".join(text)


# The step that is measured.


class Step:
    """One call of the layer in one mode: with γ and all biases where queries are narrow, else the `Attention` module."""

    def __init__(self, case: Case, mode: str) -> None:
        channels = case.shape[1]
        generator = torch.Generator().manual_seed(0)
        memory_format = torch.channels_last if case.channels_last else torch.contiguous_format
        self.training = mode != "forward"
        self.mode = mode
        x, d_out = (torch.randn(case.shape, generator=generator).contiguous(memory_format=memory_format) for _ in range(2))
        self.x, self.d_out = x.requires_grad_(self.training), d_out
        self.layer: nn.Module = Attention(channels) if case.qk_channels == channels else _Narrow(channels, case.qk_channels)
        self.inputs = [self.x, *self.layer.parameters()]

    def __call__(self) -> object:
        out = self.layer(self.x)
        return torch.autograd.grad(out, self.inputs, self.d_out) if self.mode == "forward + backward" else out


class _Narrow(nn.Module):
    """The SAGAN block's form: queries and keys narrower than the map."""

    def __init__(self, channels: int, qk_channels: int) -> None:
        super().__init__()
        self.conv_query, self.conv_key = (nn.Conv2d(channels, qk_channels, 1) for _ in range(2))
        self.conv_value = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return functional.self_attention_2d(x, *parameters_of(self))


def parameters_of(layer: nn.Module) -> tuple[Tensor, ...]:
    """The three weights and the three biases, looked up in the way of `Attention`."""
    return Attention._parameters_in_order(layer)  # type: ignore[arg-type, return-value]


@contextmanager
def stubbed_launches(run: Callable[..., None] = lambda *_, **__: None) -> Iterator[None]:
    """Within the block tensors on the CPU take the kernels' path on a Hopper GPU, as far as to `run` in place of each launch."""
    with (
        mock.patch.object(JITFunction, "run", run),
        mock.patch.object(device, "triton_is_interpreting", _always),
        mock.patch.object(triton_backend, "kernel_target", _hopper),
        use_backend("auto"),
    ):
        yield


def _always() -> bool:
    return True


def _hopper(place: torch.device) -> kernels.Target:
    """What `device.kernel_target` answers on such a GPU, at the same price."""
    return _hopper_target(place.index, device.float32_precision_is_highest())


@functools.cache
def _hopper_target(index: int | None, highest: bool) -> kernels.Target:
    return kernels.Target("hopper", "bf16x6" if highest else "tf32")


# Its parts.


@dataclass(frozen=True)
class Call:
    """A call that a step has made: what it belongs to, within a call of which part it was made, and how to make it again."""

    part: str
    parent: str | None
    replay: Callable[[], object]


RECORDED: list[tuple[Any, str, str]] = [
    (validation, "check_self_attention_2d", "validation"),
    (dispatch, "select_backend", "dispatch"),
    (triton_backend, "kernel_target", "launch configuration"),
    (kernels, "projects_keys", "launch configuration"),
    (kernels, "forward_config", "launch configuration"),
    (kernels, "backward_configs", "launch configuration"),
    (kernels, "projected_configs", "launch configuration"),
    (triton_backend, "empty_map_like", "allocation"),
    (torch, "zeros_like", "allocation"),
    (kernels, "attention_forward", "arguments of launches"),
    (kernels, "attention_backward", "arguments of launches"),
    (kernels, "projected_attention_forward", "arguments of launches"),
    (kernels, "projected_attention_backward", "arguments of launches"),
    (kernels, "qkv_projection", "arguments of launches"),
    (kernels, "token_moments", "arguments of launches"),
    (autograd, "weight_gradients", "gradients of weights, beside their operations"),
]
"""Module, function, and the part that its own lines count as."""


class Recorder(TorchFunctionMode):
    """Lists the calls of `RECORDED`, the launches and, while it is entered as a mode, PyTorch's operations."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self._open: list[str] = []

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self._note(_kind_of(function), functools.partial(function, *args, **(kwargs or {})))
        return result

    def launch(self, kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        self._note("launches, stubbed", lambda: kernel[grid](*args, **kwargs))

    def recorded(self, function: Callable[..., Any], part: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self._note(part, functools.partial(function, *args, **kwargs))
            self._open.append(part)
            try:
                return function(*args, **kwargs)
            finally:
                self._open.pop()

        return call

    def with_operations(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with self:
                return function(*args, **kwargs)

        return call

    def _note(self, part: str, replay: Callable[[], object]) -> None:
        self.calls.append(Call(part, self._open[-1] if self._open else None, replay))


def _kind_of(function: Any) -> str:
    name = function.__name__
    if name in ("empty", "empty_like", "new_empty", "zeros_like"):
        return "allocation"
    return "views" if name in ("__get__", "flatten", "reshape", "contiguous") else "operations of the gradients of weights"


def record(step: Step) -> list[Call]:
    """The calls of one step, in their order, whose parts are not PyTorch's autograd."""
    recorder = Recorder()
    with ExitStack() as patches, torch.set_grad_enabled(step.training):
        patches.enter_context(stubbed_launches(lambda *args, **kwargs: recorder.launch(*args, **kwargs)))
        for module, name, part in RECORDED:
            patches.enter_context(mock.patch.object(module, name, recorder.recorded(getattr(module, name), part)))
        for name in ("compute_forward", "compute_backward"):
            patches.enter_context(mock.patch.object(autograd, name, recorder.with_operations(getattr(autograd, name))))
        step()
    return recorder.calls


class _EmptyNode(torch.autograd.Function):
    """What is left of the layer's node without the layer: the same inputs, saved tensors and gradients."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        *tensors, _settings = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, tensors[0], tensors[0])
        return torch.empty_like(tensors[0])

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple:
        return (*ctx.saved_tensors[:-2], None)


# Timing.

Timed = list[tuple[int, Callable[[], object]]]
"""What to time for a part, each with the sign that its time has in it."""


def parts_of(step: Step) -> tuple[dict[str, Timed], dict[str, int]]:
    """For each part what to time, and how many calls of it a step makes; `COLDER` is all of them in a row, once more."""
    identity = nn.Identity()
    timed: dict[str, Timed] = {
        "module call": [(1, lambda: identity(step.x))],
        "parameters": [(1, lambda: parameters_of(step.layer))],
        "autocast": [(1, lambda: torch.is_autocast_enabled(step.x.device.type))],
    }
    if step.mode == "forward + backward":
        timed["autocast"].append((1, lambda: autograd.without_autocast(step.x).__enter__()))
    in_a_row = [call for calls in timed.values() for _, call in calls]
    counts = {part: len(calls) for part, calls in timed.items()}

    groups: dict[tuple[str, str | None], list[Callable[[], object]]] = {}
    for call in record(step):
        groups.setdefault((call.part, call.parent), []).append(call.replay)
        counts[call.part] = counts.get(call.part, 0) + (call.part != call.parent)
    for (part, parent), replays in groups.items():
        together = functools.partial(_replay, replays)
        if parent is None:
            in_a_row.append(together)
        if part != parent:
            timed.setdefault(part, []).append((1, together))
            if parent is not None:
                timed.setdefault(parent, []).append((-1, together))

    not_of_the_row: Timed = []
    if step.training:
        allocation = functools.partial(torch.empty_like, step.x)
        forward = functools.partial(_EmptyNode.apply, *step.inputs, None)
        timed[FUNCTION] = [(1, _with_graph(forward)), (-1, _with_graph(allocation))]
        not_of_the_row, last = [(-1, _with_graph(allocation))], _with_graph(forward)
        if step.mode == "forward + backward":
            last = _with_graph(lambda: torch.autograd.grad(forward(), step.inputs, step.d_out))
            timed[ENGINE] = [(1, last), (-1, _with_graph(forward))]
        in_a_row.append(last)
        counts |= {part: 1 for part in (FUNCTION, ENGINE) if part in timed}
    timed[COLDER] = [(1, functools.partial(_replay, in_a_row)), *not_of_the_row]
    return timed, counts | {COLDER: 1}


def _replay(calls: list[Callable[[], object]]) -> None:
    for call in calls:
        call()


def _with_graph(call: Callable[[], object]) -> Callable[[], None]:
    def with_graph() -> None:
        torch.set_grad_enabled(True)
        call()
        torch.set_grad_enabled(False)

    return with_graph


def _measure_one(case: Case, mode: str, rounds: int) -> list[Row]:
    step = Step(case, mode)
    whole = _with_graph(step) if step.training else step
    with torch.no_grad():
        timed, counts = parts_of(step)
        timed[WHOLE] = [(1, whole)]
        batches = [(part, sign, _Batches(call)) for part, calls in timed.items() for sign, call in calls]
        with stubbed_launches(), _quiet():
            for _ in range(rounds):
                for _, _, batch in batches:
                    batch.time()
    figures = {part: torch.zeros(3, dtype=torch.float64) for part in timed}
    for part, sign, batch in batches:
        figures[part] += sign * torch.tensor(batch.percentiles(), dtype=torch.float64)
    total = figures.pop(WHOLE)
    figures[COLDER] -= sum(figures[part] for part in figures if part != COLDER)
    figures |= {UNEXPLAINED: total - sum(figures.values()), WHOLE: total}
    counts |= {UNEXPLAINED: 1, WHOLE: 1}
    return [Row(case.name, mode, part, counts[part], *values.tolist()) for part, values in figures.items()]


def _yardstick(rounds: int) -> Row:
    """One allocation, to compare machines and loads by."""
    batches = _Batches(functools.partial(torch.empty_like, torch.empty(2, 32, 8, 8)))
    with _quiet():
        for _ in range(rounds):
            batches.time()
    return Row("yardstick", "torch.empty_like", WHOLE, 1, *batches.percentiles())


class _Batches:
    """Times a call in batches, so short that mostly nothing else gets the core meanwhile."""

    def __init__(self, call: Callable[[], object]) -> None:
        self._call = call
        self._calls = 0
        self._times: list[float] = []

    def time(self) -> None:
        if not self._calls:
            self._calls = 3
            self._calls = max(3, round(BATCH / min(self._batch() for _ in range(10))))
        self._times.append(self._batch())

    def _batch(self) -> float:
        """Microseconds a call; as many calls before the clock starts fill the caches."""
        call = self._call
        for _ in range(self._calls):
            call()
        start = time.perf_counter_ns()
        for _ in range(self._calls):
            call()
        return (time.perf_counter_ns() - start) / self._calls / 1e3

    def percentiles(self) -> tuple[float, float, float]:
        """p20, p50 and p80."""
        ordered = sorted(self._times)
        p20, p50, p80 = (ordered[round(share * (len(ordered) - 1))] for share in (0.2, 0.5, 0.8))
        return p20, p50, p80


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the garbage collector."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
