"""The numbers of a case, what is right for them, and how far a result may be from it."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .cases import DTYPES, Case

RMS_FLOORS = {"float32": 1e-6, "tf32": 1e-3, "float16": 2e-3, "bfloat16": 1e-2}
"""Relative RMS errors that are right in any case; beyond, a result may be twice as far off as naive attention."""

QUERIES_AT_ONCE = 1024
PAIRS_JUDGED = {"forward": 1, "training": 3}


class Weights(NamedTuple):
    """Three 1×1 convolutions, and γ in the SAGAN form."""

    w_q: Tensor
    b_q: Tensor
    w_k: Tensor
    b_k: Tensor
    w_v: Tensor
    b_v: Tensor
    gamma: Tensor | None

    def given(self) -> list[Tensor]:
        return [weight for weight in self if weight is not None]


@dataclass(frozen=True)
class Problem:
    """A case with its numbers: inputs x (N, C, H, W), several so that no call finds its data in a cache; d_out; the weights."""

    case: Case
    inputs: list[Tensor]
    d_out: Tensor
    weights: Weights


class Truth(NamedTuple):
    """What a layer has to give on two maps of a problem: everything in float64, the branch without the residual."""

    maps: list[int]
    d_out: Tensor  # zero but for those maps
    tensors: dict[str, Tensor]  # "branch", and in training a gradient for each input but the keys' bias, which has none


def make_problem(case: Case, device: torch.device, num_inputs: int = 1, seed: int = 0) -> Problem:
    """Random numbers whose logits have a standard deviation of 2: a softmax neither uniform nor saturated."""
    generator = torch.Generator(device).manual_seed(seed)
    c, d = case.channels, case.qk_channels

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        return (std * torch.randn(shape, generator=generator, device=device)).to(DTYPES[case.dtype])

    weights = Weights(
        normal(d, c, std=2 / (case.scale * (c * d) ** 0.5)), normal(d, std=0.1),
        normal(d, c, std=c**-0.5), normal(d, std=0.1),
        normal(c, c, std=c**-0.5), normal(c, std=0.1),
        normal(1, std=0.1) + 0.7 if case.form == "sagan" else None,
    )  # fmt: skip
    inputs = [normal(*case.shape) for _ in range(num_inputs)]
    return Problem(case, inputs, normal(*case.shape), weights)


def truths_of(problem: Problem) -> list[Truth]:
    """The truth on the first and the last map, and in training on the next pairs inwards, by themselves.

    The gradient of a bias of a few channels is a few numbers, whose errors are chance; those of several are not.
    """
    pairs = [sorted({map_, problem.case.batch - 1 - map_}) for map_ in range((problem.case.batch + 1) // 2)]
    return [_truth_of(problem, maps) for maps in pairs[: PAIRS_JUDGED[problem.case.mode]]]


def _truth_of(problem: Problem, maps: list[int]) -> Truth:
    """The formula in float64, a block of queries at a time, so that the largest maps can be judged too."""
    case, x = problem.case, problem.inputs[0]
    d_out = torch.zeros_like(problem.d_out)
    d_out[maps] = problem.d_out[maps]

    leaves = [t.double().requires_grad_() for t in (x[maps].flatten(2), *problem.weights.given())]
    tokens, w_q, b_q, w_k, b_k, w_v, b_v, *gamma = leaves
    projected = [w @ tokens + b[:, None] for w, b in ((w_q, b_q), (w_k, b_k), (w_v, b_v))]
    q, k, v = (t.detach().requires_grad_() for t in projected)
    branch = torch.empty_like(tokens)
    g = d_out[maps].flatten(2).double()
    for map_ in range(len(maps)):
        for rows in torch.arange(case.tokens, device=x.device).split(QUERIES_AT_ONCE):
            weights = torch.softmax(case.scale * q[map_, :, rows].mT @ k[map_], -1)
            part = v[map_] @ weights.mT * (gamma[0] if gamma else 1.0)
            branch.data[map_, :, rows] = part.detach()
            if case.mode == "training":
                part.backward(g[map_, :, rows])
    tensors = {"branch": branch.detach()}
    if case.mode == "training":
        torch.autograd.backward(projected, [q.grad, k.grad, v.grad])
        names = ("x", "w_q", "b_q", "w_k", "b_k", "w_v", "b_v", "gamma")
        tensors |= {name: leaf.grad for name, leaf in zip(names, leaves, strict=False) if name != "b_k" and leaf.grad is not None}
    return Truth(maps, d_out, tensors)


def errors(
    forward: Callable[[Tensor], Tensor], parameters: list[torch.nn.Parameter], problem: Problem, truths: list[Truth]
) -> dict[str, float]:
    """The relative RMS error of everything that `truths` hold, over all of them: of the branch, and in training of each gradient."""
    squares = [_squares(_found(forward, parameters, problem, truth), truth) for truth in truths]
    return {name: math.sqrt(sum(s[name][0] for s in squares) / sum(s[name][1] for s in squares)) for name in squares[0]}


def _found(forward: Callable[[Tensor], Tensor], parameters: list[torch.nn.Parameter], problem: Problem, truth: Truth) -> dict[str, Tensor]:
    """What a layer gives, under the names of `truth.tensors`."""
    x = problem.inputs[0]
    if problem.case.mode == "forward":
        with torch.no_grad():
            return {"branch": _branch(forward(x), x, truth)}
    x = x.detach().requires_grad_()
    out = forward(x)
    d_x, *gradients = torch.autograd.grad(out, [x, *parameters], truth.d_out)
    names = ("w_q", "b_q", "w_k", "b_k", "w_v", "b_v", "gamma")
    found = {"branch": _branch(out.detach(), x.detach(), truth), "x": _branch(d_x, truth.d_out, truth)}
    return found | dict(zip(names, gradients, strict=False))


def complaints(found: dict[str, float], naive: dict[str, float], precision: str) -> list[str]:
    """What is too far off, in words; `naive` is empty where naive attention cannot run."""
    limits = {name: max(2 * naive.get(name, 0.0), RMS_FLOORS[precision]) for name in found}
    return [f"{name}: {error:.1e}, allowed {limits[name]:.1e}" for name, error in found.items() if not error <= limits[name]]


def _branch(out: Tensor, residual: Tensor, truth: Truth) -> Tensor:
    return (out[truth.maps].double() - residual[truth.maps].double()).flatten(2)


def _squares(found: dict[str, Tensor], truth: Truth) -> dict[str, tuple[float, float]]:
    """Of each tensor the squared norms of the error and of what it is measured against."""
    result = {}
    for name, expected in truth.tensors.items():
        size = expected.norm()
        if name == "gamma":
            # One number, a sum of C² products that cancel: its error is measured against their size.
            size = max(size, truth.tensors["w_v"].norm())
        if name.startswith("b_"):
            # One column of a weight more, for a channel of ones; where its terms happen to cancel it is measured against a usual column.
            weight = truth.tensors["w" + name[1:]]
            size = max(size, weight.norm() / weight.shape[1] ** 0.5)
        error = (found[name].double().view_as(expected) - expected).norm()
        result[name] = float(error**2), float(size**2)
    return result
