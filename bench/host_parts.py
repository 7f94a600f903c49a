"""One call of the layer with its launches stubbed, and the parts that it is made of, each to be called again by itself."""

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from triton.runtime.jit import JITFunction

from visattn import Attention, autograd, device, dispatch, functional, kernels, triton_backend, use_backend, validation

from .launches import nothing_remembered

MODES = ("forward", "forward, graph kept", "forward + backward")
COLDER = "colder caches"
FUNCTION, ENGINE = "autograd.Function", "PyTorch's engine, node and saved tensors"


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
    return Attention._projections(layer)  # type: ignore[arg-type, return-value]


class _CompiledToNothing:
    """What Triton would have compiled, to be started as that is."""

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return _nothing


def _nothing(*_: object) -> None:
    pass


_COMPILED_TO_NOTHING = _CompiledToNothing()


@contextmanager
def stubbed_launches(run: Callable[..., Any] = lambda *_, **__: _COMPILED_TO_NOTHING) -> Iterator[None]:
    """Within the block tensors on the CPU take the kernels' path on a Hopper GPU, as far as to what Triton would have compiled.

    `run` stands for Triton's own launch, which takes place where it is not known yet what that returns, or where that was None.
    """
    with (
        mock.patch.object(JITFunction, "run", run),
        nothing_remembered(),
        mock.patch.object(device, "triton_is_interpreting", _always),
        mock.patch.object(triton_backend, "kernel_target", _hopper),
        use_backend("auto"),
    ):
        yield


class Asked(NamedTuple):
    """What Triton is asked to start."""

    kernel: JITFunction
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    constants: dict[str, Any]


def asked_launches(case: Case) -> list[Asked]:
    """Those of a forward and a backward pass, none of which takes place."""
    asked = []

    def run(kernel: JITFunction, *args: Any, grid: tuple[int, ...], warmup: bool, **constants: Any) -> None:
        asked.append(Asked(kernel, grid, args, constants))

    with stubbed_launches(run):
        with_graph(Step(case, "forward + backward"))()
    return asked


def _always() -> bool:
    return True


def _hopper(place: torch.device) -> kernels.Target:
    """What `device.kernel_target` answers on such a GPU, at the same price."""
    return _hopper_target(place.index, device.float32_precision_is_highest())


@functools.cache
def _hopper_target(index: int | None, highest: bool) -> kernels.Target:
    return kernels.Target("hopper", "bf16x6" if highest else "tf32")


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
    (kernels, "single_tile_config", "launch configuration"),
    (kernels, "weight_gradients_config", "launch configuration"),
    (kernels, "key_splits", "launch configuration"),
    (kernels, "gradient_splits", "launch configuration"),
    (triton_backend, "empty_map_like", "allocation"),
    (torch, "zeros_like", "allocation"),
    (kernels, "attention_forward", "arguments of launches"),
    (kernels, "prepare_backward", "arguments of launches"),
    (kernels, "query_gradient", "arguments of launches"),
    (kernels, "key_value_gradient_in_splits", "arguments of launches"),
    (kernels, "projected_attention_forward", "arguments of launches"),
    (kernels, "projected_attention_backward", "arguments of launches"),
    (kernels, "qkv_projection", "arguments of launches"),
    (kernels, "single_tile_backward", "arguments of launches"),
    (kernels, "partial_moments", "arguments of launches"),
    (kernels, "weight_gradients", "arguments of launches"),
    (kernels, "projection_gradients", "arguments of launches"),
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
        self._note("launches, stubbed", lambda: kernels.launching.launch(kernel, *grid, kwargs, *args))

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
    if name in ("empty", "empty_like", "empty_strided", "new_empty", "zeros_like"):
        return "allocation"
    return "views" if name in ("__get__", "flatten", "reshape", "contiguous") else "other operations"


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
        timed[FUNCTION] = [(1, with_graph(forward)), (-1, with_graph(allocation))]
        not_of_the_row, last = [(-1, with_graph(allocation))], with_graph(forward)
        if step.mode == "forward + backward":
            last = with_graph(lambda: torch.autograd.grad(forward(), step.inputs, step.d_out))
            timed[ENGINE] = [(1, last), (-1, with_graph(forward))]
        in_a_row.append(last)
        counts |= {part: 1 for part in (FUNCTION, ENGINE) if part in timed}
    timed[COLDER] = [(1, functools.partial(_replay, in_a_row)), *not_of_the_row]
    return timed, counts | {COLDER: 1}


def _replay(calls: list[Callable[[], object]]) -> None:
    for call in calls:
        call()


def with_graph(call: Callable[[], object]) -> Callable[[], None]:
    def call_with_graph() -> None:
        torch.set_grad_enabled(True)
        call()
        torch.set_grad_enabled(False)

    return call_with_graph
