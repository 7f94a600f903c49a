"""Who is measured: the layer as each of seven peers computes it, all from the same weights.

A provider builds a module for a problem. One that cannot take it raises `CannotRun` with the reason; nobody is silently replaced
by somebody else, and what a module really ran on is named after it has run.
"""

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import pad, scaled_dot_product_attention

import visattn
from visattn import autograd, models

from .cases import Case
from .problems import Problem

Forward = Callable[[Tensor], Tensor]


class CannotRun(Exception):
    """Why a provider cannot take a case, in one sentence."""


@dataclass(frozen=True)
class Built:
    """A layer ready to run.

    forward: x (N, C, H, W) to (N, C, H, W). parameters: in the order of `Weights`. backend: from what visattn noted while it ran
    to the name of what ran. context: what has to be in force around every call.
    """

    forward: Forward
    parameters: list[nn.Parameter]
    backend: Callable[[list[str]], str]
    context: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext


Trial = Callable[[Built], float]
"""Seconds that a layer takes for the case at hand; RuntimeError where it cannot run it. For providers that have a choice."""

Provider = Callable[[Problem, Trial], Built]


class PeerAttention(nn.Module):
    """What the peers share: the naive layer's parameters, and tokens (N, 1, L, C) that are contiguous, as their kernels want them."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        layer = _naive_layer(case)
        self.query, self.key, self.value = (child for child in layer.children() if isinstance(child, nn.Conv2d))
        self.gamma = nn.Parameter(torch.zeros(1)) if case.form == "sagan" else None
        self.scale = case.scale

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, C, H, W)."""
        q, k, v = (c(x).flatten(2).transpose(1, 2).contiguous()[:, None] for c in (self.query, self.key, self.value))
        branch = self.attend(q, k, v)[:, 0].transpose(1, 2).reshape(x.shape)
        return x + branch if self.gamma is None else x + self.gamma * branch


class SdpaAttention(PeerAttention):
    """With `scaled_dot_product_attention`. Kernels that want queries, keys and values of one width get zeros added to the thin ones."""

    def __init__(self, case: Case, padded: bool) -> None:
        super().__init__(case)
        self.missing = case.channels - case.qk_channels if padded else 0

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.missing:
            q, k = pad(q, (0, self.missing)), pad(k, (0, self.missing))
        return scaled_dot_product_attention(q, k, v, scale=self.scale)


class FlexAttention(PeerAttention):
    """With `flex_attention`, which without a compiler computes the full matrix."""

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        from torch.nn.attention.flex_attention import flex_attention

        self.compiled = torch.compile(flex_attention, dynamic=False)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.compiled(q, k, v, scale=self.scale)


def naive(problem: Problem, trial: Trial) -> Built:
    return _built(_naive_layer(problem.case), problem, _always("matmul"))


def naive_compiled(problem: Problem, trial: Trial) -> Built:
    from torch._dynamo.utils import counters

    before = counters["inductor"]["fuse_attention"]

    def backend(_: list[str]) -> str:
        return "inductor, rewritten into SDPA" if counters["inductor"]["fuse_attention"] > before else "inductor"

    return _compiled(_built(_naive_layer(problem.case), problem, backend))


def sdpa(problem: Problem, trial: Trial) -> Built:
    """The quickest of the backends that need no full matrix."""
    case, on_gpu = problem.case, problem.d_out.is_cuda
    backends = [SDPBackend.FLASH_ATTENTION]
    if on_gpu:
        backends += [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION]
    timed: list[tuple[float, Built]] = []
    refusals = []
    for backend in backends:
        for padded in (False, True) if case.qk_channels != case.channels else (False,):
            name = backend.name.lower() + ", queries and keys padded" * padded
            built = _built(SdpaAttention(case, padded), problem, _always(name), partial(sdpa_kernel, backend))
            try:
                timed.append((trial(built), built))
            except RuntimeError as error:
                refusals.append(f"{name}: {first_line(error)}")
    if not timed:
        raise CannotRun("no backend of SDPA takes it but the full matrix: " + "; ".join(refusals))
    return min(timed, key=lambda t: t[0])[1]


def sdpa_compiled(problem: Problem, trial: Trial) -> Built:
    return _compiled(sdpa(problem, trial))


def flex(problem: Problem, trial: Trial) -> Built:
    if problem.d_out.device.type == "cpu" and problem.case.mode == "training":
        raise CannotRun("flex_attention has no backward pass on the CPU")
    return _built(FlexAttention(problem.case), problem, _always("flex_attention, inductor"))


def ours(problem: Problem, trial: Trial) -> Built:
    case = problem.case
    layer = models.SaganAttention(case.channels) if case.form == "sagan" else visattn.Attention(case.channels)
    return _built(layer, problem, lambda noted: ", ".join(sorted(set(noted))))


def ours_compiled(problem: Problem, trial: Trial) -> Built:
    return _compiled(ours(problem, trial))


PROVIDERS: dict[str, Provider] = {
    "naive": naive, "naive_compiled": naive_compiled, "sdpa": sdpa, "sdpa_compiled": sdpa_compiled, "flex": flex,
    "visattn": ours, "visattn_compiled": ours_compiled,
}  # fmt: skip
"""naive comes first: the others' errors and times are compared with it."""

COMPILED = frozenset({"naive_compiled", "sdpa_compiled", "flex", "visattn_compiled"})


@contextlib.contextmanager
def noted_backends() -> Iterator[list[str]]:
    """What visattn's passes within the block ran on: "triton" or "torch", one entry each."""
    noted: list[str] = []
    original = autograd.implementation

    def note(settings: autograd.Settings) -> Any:
        noted.append(settings.backend)
        return original(settings)

    with mock.patch.object(autograd, "implementation", note):
        yield noted


def first_line(error: BaseException) -> str:
    """An error in a row of a table."""
    return (str(error).strip().split("\n")[0] or type(error).__name__)[:200]


def _always(name: str) -> Callable[[list[str]], str]:
    return lambda _: name


def _naive_layer(case: Case) -> nn.Module:
    return models.NaiveSaganAttention(case.channels) if case.form == "sagan" else models.NaiveAttention(case.channels)


def _built(
    layer: nn.Module,
    problem: Problem,
    backend: Callable[[list[str]], str],
    context: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext,
) -> Built:
    """The layer with the problem's weights, device and dtype."""
    layer = layer.to(problem.d_out.device, problem.d_out.dtype)
    parameters = _ordered_parameters(layer)
    with torch.no_grad():
        for parameter, value in zip(parameters, problem.weights.given(), strict=True):
            parameter.copy_(value.view_as(parameter))
    return Built(layer, parameters, backend, context)


def _compiled(built: Built) -> Built:
    return Built(torch.compile(built.forward, dynamic=False), built.parameters, built.backend, built.context)


def _ordered_parameters(layer: nn.Module) -> list[nn.Parameter]:
    """Queries' weight and bias, keys', values', and γ if there is one, by whatever names the layer has for them."""
    named = dict(layer.named_parameters())

    def of(part: str, kind: str) -> nn.Parameter:
        return next(p for name, p in named.items() if part in name and name.endswith(kind))

    parameters = [of(part, kind) for part in ("query", "key", "value") for kind in ("weight", "bias")]
    return parameters + [p for name, p in named.items() if "gamma" in name]
