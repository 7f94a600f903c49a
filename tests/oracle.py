"""How correctness is judged: against float64, relative to what the same formula written naively loses in the same dtype.

A tensor passes if r = max|ours - truth| / max|eager - truth| stays under 2 (forward) or 3 (gradients), and if its relative RMS
error stays under twice eager's or the floor of its dtype. The attention branch is judged, without the residual beside
which its errors would vanish.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from visattn import autograd, device, functional, projected_tokens, reference, token_attention, use_backend

RMS_FLOOR = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
R_FORWARD, R_GRADIENT = 2.0, 3.0

Results = dict[str, Tensor]
Attention = Callable[..., Tensor]


@dataclass(frozen=True)
class Problem:
    """One call of the layer's function and the gradient that comes back to it."""

    x: Tensor
    w_q: Tensor
    w_k: Tensor
    w_v: Tensor
    b_q: Tensor | None
    b_k: Tensor | None
    b_v: Tensor | None
    gamma: Tensor | None
    d_out: Tensor
    residual: bool = False
    normalize: str = "keys"

    TENSORS = ("x", "w_q", "w_k", "w_v", "b_q", "b_k", "b_v", "gamma")

    @property
    def without_effect(self) -> str:
        """The bias that softmax drops."""
        return "b_k" if self.normalize == "keys" else "b_q"

    def to(self, *args: torch.dtype | torch.device) -> "Problem":
        moved = {name: t.to(*args) for name in (*self.TENSORS, "d_out") if (t := getattr(self, name)) is not None}
        return replace(self, **moved)


def make_problem(
    shape: tuple[int, int, int, int],
    dtype: torch.dtype = torch.float32,
    *,
    qk_channels: int | None = None,
    regime: str = "uniform",
    bias: bool = True,
    gamma: bool = True,
    mean: float = 0.0,
    gain: float = 1.0,
    seed: int = 0,
    normalize: str = "keys",
) -> Problem:
    """Random input for a map of `shape`; regime "uniform" as after default initialisation, "peaked" with q and k weights ×6."""
    channels = shape[1]
    qk = qk_channels or channels
    generator = torch.Generator().manual_seed(seed)
    factor = 6.0 if regime == "peaked" else 1.0

    def uniform(*size: int) -> Tensor:
        return (torch.rand(size, generator=generator, dtype=torch.float64) * 2 - 1) * channels**-0.5

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    problem = Problem(
        x=(normal(*shape) + mean) * gain,
        w_q=factor * uniform(qk, channels),
        w_k=factor * uniform(qk, channels),
        w_v=uniform(channels, channels),
        b_q=uniform(qk) if bias else None,
        b_k=uniform(qk) if bias else None,
        b_v=uniform(channels) if bias else None,
        gamma=torch.tensor([0.7], dtype=torch.float64) if gamma else None,
        d_out=normal(*shape),
        normalize=normalize,
    )
    return problem.to(dtype)


def mask_trap(shape: tuple[int, int, int, int], dtype: torch.dtype, seed: int = 0, qk_channels: int | None = None) -> Problem:
    """Logits so negative that a key which does not exist, read as zeros, would win the softmax with weight one."""
    problem = make_problem(shape, dtype, gamma=False, seed=seed)
    channels = qk_channels or shape[1]
    eye = torch.eye(channels, shape[1], dtype=dtype)
    noise = problem.x.to(torch.float64) * 0.2
    return replace(
        problem,
        x=(2 + noise).to(dtype),
        w_q=eye,
        w_k=-eye,
        b_q=torch.zeros(channels, dtype=dtype),
        b_k=torch.zeros(channels, dtype=dtype),
    )


def run(attention: Attention, problem: Problem) -> Results:
    """Output and gradients, by name: out, x, w_q, …"""
    leaves = {name: t.detach().requires_grad_() for name in Problem.TENSORS if (t := getattr(problem, name)) is not None}
    out = attention(**leaves, residual=problem.residual, normalize=problem.normalize)
    gradients = torch.autograd.grad(out, list(leaves.values()), problem.d_out.to(out.dtype), allow_unused=True)
    found = {name: g if g is not None else torch.zeros_like(t) for (name, t), g in zip(leaves.items(), gradients, strict=True)}
    return {"out": out.detach(), **found}


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fills what torch.empty returns with NaN, so that an element that is never written cannot look right."""
    previous = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = previous


@contextlib.contextmanager
def recorded_backends() -> Iterator[list[str]]:
    """The names of the backends that really ran within the block."""
    ran: list[str] = []
    original, on_tokens, of_maps = autograd.implementation, token_attention.implementation, projected_tokens.implementation

    def record(settings: autograd.Settings) -> object:
        ran.append(settings.backend)
        return original(settings)

    def record_on_tokens(backend: str) -> object:
        ran.append(backend)
        return on_tokens(backend)

    def record_of_maps() -> object:
        ran.append("triton")
        return of_maps()

    with (
        mock.patch.object(autograd, "implementation", record),
        mock.patch.object(token_attention, "implementation", record_on_tokens),
        mock.patch.object(projected_tokens, "implementation", record_of_maps),
    ):
        yield ran


def run_layer(problem: Problem, backend: str, place: torch.device | None = None) -> Results:
    """What visattn computes on `backend`, after making sure that it was that backend."""
    moved = problem if place is None else problem.to(place)
    with use_backend(backend), recorded_backends() as ran:
        results = run(functional.self_attention_2d, moved)
    assert ran == [backend, backend], f"expected forward and backward on {backend}, ran {ran}"
    return {name: t.cpu() for name, t in results.items()}


def truth_of(problem: Problem, attention: Attention = reference.self_attention_2d) -> Results:
    """The float64 reference, and W_v/γ, which turns an error of the gradient of W_v into one of the gradient of γ."""
    results = run(attention, problem.to(torch.float64).to(torch.device("cpu")))
    if problem.gamma is not None:
        results["w_v / gamma"] = (problem.w_v.double() / problem.gamma).cpu()
    return results


def eager_of(problem: Problem, attention: Attention = reference.self_attention_2d) -> Results:
    """The naive formula in the problem's own dtype."""
    return run(attention, problem.to(torch.device("cpu")))


def relative_rms(actual: Tensor, truth: Tensor) -> float:
    return float((actual.double() - truth).norm() / truth.norm())


def complaints(ours: Results, truth: Results, eager: Results, without_effect: str | None = "b_k") -> list[str]:
    """What is wrong with our results, in sentences; none where every gate is passed.

    The gradient of the bias `without_effect` has to be exactly zero.
    """
    found = []
    noise = _noise_of_zero(truth)
    for name, expected in truth.items():
        if name not in ours:
            continue
        actual = ours[name].double()
        dtype = eager[name].dtype
        if ours[name].dtype != dtype or actual.shape != expected.shape:
            found.append(f"{name}: {ours[name].dtype} {tuple(actual.shape)}, expected {dtype} {tuple(expected.shape)}")
            continue
        if not torch.equal(actual.isfinite(), eager[name].isfinite()):
            found.append(f"{name}: NaN or Inf where eager has none, or the reverse")
            continue
        if name == without_effect:
            if actual.abs().max() > 0:
                found.append(f"{name}: gradient {actual.abs().max():.1e}, expected exactly zero")
            continue
        if not expected.isfinite().all():
            continue
        error, eager_error = (actual - expected).abs().max().item(), (eager[name].double() - expected).abs().max().item()
        if dtype == torch.float64:
            if error > 1e-11 * max(expected.abs().max().item(), noise):
                found.append(f"{name}: error {error:.1e} in float64")
            continue
        limit = R_FORWARD if name == "out" else R_GRADIENT
        # No kernel can be held to less than one rounding of a tensor's largest element, or of the terms that cancel to zero.
        unavoidable = torch.finfo(dtype).eps * max(expected.abs().max().item(), noise)
        if name == "gamma":
            # One number, ⟨W_v, ∂W_v⟩/γ, whose own error is chance: it is held to what eager loses in ∂W_v.
            unavoidable = max(unavoidable, (truth["w_v / gamma"] * (eager["w_v"].double() - truth["w_v"])).norm().item())
        allowed = limit * max(eager_error, unavoidable)
        if error > allowed:
            found.append(f"{name}: r = {limit * error / allowed:.2f}, max error {error:.2e}, limit {limit}")
        if name != "gamma" and expected.norm() > noise * 1e-6:
            rms, allowed_rms = relative_rms(actual, expected), max(2 * relative_rms(eager[name], expected), RMS_FLOOR[dtype])
            if rms > allowed_rms:
                found.append(f"{name}: relative RMS error {rms:.2e}, allowed {allowed_rms:.2e}")
    return found


def assert_correct(problem: Problem | list[Problem], backend: str, place: torch.device | None = None) -> None:
    """Passes every gate; several problems of one shape are judged as one, so that small tensors are not judged by chance."""
    problems = problem if isinstance(problem, list) else [problem]
    ours = stacked([run_layer(p, backend, place) for p in problems])
    truth, eager = stacked([truth_of(p) for p in problems]), stacked([eager_of(p) for p in problems])
    found = complaints(ours, truth, eager, problems[0].without_effect)
    assert not found, "\n".join(found)


def assert_keys_get_no_mean(
    shape: tuple[int, int, int, int], qk_channels: int | None, dtype: torch.dtype, backend: str, place: torch.device | None = None
) -> None:
    """Map and queries have a mean a hundred times their spread, keys have none, so that eager's own error leaves room.

    Measured 0.03 of eager's error at most, and 0.3 at least where Δ is not mended, or what rounding leaves of Σ dS meets the map.
    """
    problems = [make_problem(shape, dtype, qk_channels=qk_channels, mean=100.0, gain=0.1, seed=seed) for seed in range(3)]
    problems = [replace(p, w_q=p.w_q.abs(), w_k=p.w_k - p.w_k.mean(1, keepdim=True)) for p in problems]
    truth, eager = stacked([truth_of(p) for p in problems]), stacked([eager_of(p) for p in problems])
    ours = stacked([run_layer(p, backend, place) for p in problems])
    for name in ("x", "w_k") if dtype == torch.float16 else ("w_k",):
        error, allowed = ((found[name].double() - truth[name]).abs().max() for found in (ours, eager))
        assert error < 0.1 * allowed, name


def make_problems(shape: tuple[int, int, int, int], dtype: torch.dtype = torch.float32, **options: Any) -> list[Problem]:
    """One problem of `make_problem`, or several of different seeds where the map is so small that one says little.

    In the interpreter, which takes a second for what takes a millisecond elsewhere, fewer, and of fewer maps.
    """
    several, small = (3, 6000) if device.triton_is_interpreting() else (6, 32768)
    count = several if math.prod(shape) < small else 1
    return [make_problem(shape, dtype, seed=seed, **options) for seed in range(count)]


def stacked(results: list[Results]) -> Results:
    return {name: torch.stack([r[name] for r in results]) for name in results[0]}


def _noise_of_zero(truth: Results) -> float:
    """The size of the terms that cancel where a gradient is exactly zero, as with a single pixel: that of the values' gradient."""
    return 0.01 * truth["w_v"].abs().max().item()
