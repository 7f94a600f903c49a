"""Calls of the general layer: the blocks of published image models as settings, with random tensors of their shapes."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from visattn import functional, use_backend
from visattn.functional import GroupNorm

from .oracle import Results, recorded_backends


@dataclass(frozen=True)
class Block:
    """What a block is made of; `settings` are arguments of `self_attention_2d`. No group norm where `groups` is 0."""

    channels: int
    qk_channels: int
    value_channels: int
    out: bool = True
    bias: bool = True
    gamma: bool = False
    groups: int = 0
    settings: dict[str, Any] = field(default_factory=dict)


BLOCKS = {
    "SAGAN": Block(32, 4, 32, out=False, gamma=True, settings={"scale": 1.0}),
    "BigGAN": Block(16, 2, 8, bias=False, gamma=True, settings={"scale": 1.0, "pool": 2}),
    "non-local": Block(16, 8, 8, settings={"pool": 2}),
    "timm NonLocal": Block(64, 8, 8, settings={"scale": 64**-0.5}),
    "timm Attention2d": Block(16, 16, 16, settings={"num_heads": 4, "residual": False}),
    "VQGAN": Block(16, 16, 16, groups=4),
    "diffusers VAE": Block(32, 32, 32, groups=8, settings={"num_heads": 4, "res_scale": 0.5}),
    "guided-diffusion": Block(16, 16, 16, groups=4, settings={"num_heads": 2}),
    "EDM": Block(16, 16, 16, groups=16, settings={"res_scale": 2**-0.5}),
    "score_sde": Block(16, 16, 16, groups=4, settings={"scale": 0.25, "res_scale": 2**-0.5}),
    "everything": Block(12, 8, 20, gamma=True, groups=3, settings={"num_heads": 4, "pool": 2, "res_scale": 0.7, "scale": 0.6}),
    "everything that folds": Block(12, 8, 20, gamma=True, groups=3, settings={"res_scale": 0.7, "scale": 0.6}),
}


@dataclass(frozen=True)
class Problem:
    """Named tensors, the gradient of the output, and what goes with them unchanged. `groups` as in `Block`."""

    tensors: dict[str, Tensor]
    d_out: Tensor
    groups: int
    settings: dict[str, Any]

    def to(self, where: torch.dtype | torch.device) -> "Problem":
        return replace(self, tensors={name: t.to(where) for name, t in self.tensors.items()}, d_out=self.d_out.to(where))

    def named(self) -> list[tuple[str, Tensor]]:
        return [*self.tensors.items(), ("d_out", self.d_out)]

    def call(self, function: Callable[..., Tensor], tensors: dict[str, Tensor]) -> Tensor:
        arguments = dict(tensors)
        weight, bias = arguments.pop("norm_weight", None), arguments.pop("norm_bias", None)
        norm = GroupNorm(self.groups, weight, bias) if self.groups else None
        return function(**arguments, norm=norm, **self.settings)

    def leaves(self) -> dict[str, Tensor]:
        return {name: t.detach().requires_grad_() for name, t in self.tensors.items()}


def make_problem(
    block: Block, dtype: torch.dtype = torch.float64, *, maps: int = 2, size: tuple[int, int] = (5, 7), regime: str = "uniform",
    mean: float = 0.0, seed: int = 0, **settings: Any,
) -> Problem:  # fmt: skip
    """Random tensors for a block; regime "peaked" with q and k weights ×6. Further settings replace the block's own."""
    generator = torch.Generator().manual_seed(seed)
    channels, qk, value = block.channels, block.qk_channels, block.value_channels
    factor = 6.0 if regime == "peaked" else 1.0

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def uniform(*shape: int) -> Tensor:
        return (torch.rand(shape, generator=generator, dtype=torch.float64) * 2 - 1) * shape[-1] ** -0.5

    tensors = {"x": normal(maps, channels, *size) + mean, "w_q": factor * uniform(qk, channels), "w_k": factor * uniform(qk, channels)}
    tensors["w_v"] = uniform(value, channels)
    if block.bias:
        tensors |= {"b_q": uniform(qk), "b_k": uniform(qk), "b_v": uniform(value)}
    if block.out:
        tensors["w_o"] = uniform(channels, value)
        if block.bias:
            tensors["b_o"] = uniform(channels)
    if block.gamma:
        tensors["gamma"] = torch.tensor([0.7], dtype=torch.float64)
    if block.groups:
        tensors |= {"norm_weight": 1 + 0.3 * normal(channels), "norm_bias": 0.3 * normal(channels)}
    return Problem(tensors, normal(maps, channels, *size), block.groups, block.settings | settings).to(dtype)


def run(function: Callable[..., Tensor], problem: Problem) -> Results:
    """Output and gradients, by name: out, x, w_q, …"""
    leaves = problem.leaves()
    out = problem.call(function, leaves)
    gradients = torch.autograd.grad(out, list(leaves.values()), problem.d_out, allow_unused=True)
    found = {name: g if g is not None else torch.zeros_like(t) for (name, t), g in zip(leaves.items(), gradients, strict=True)}
    return {"out": out.detach(), **found}


def run_on_kernels(problem: Problem, place: torch.device) -> Results:
    """What the layer computes on the kernels, after making sure that it was they."""
    with use_backend("triton"), recorded_backends() as ran:
        results = run(functional.self_attention_2d, problem.to(place))
    assert ran == ["triton", "triton"]
    return {name: t.cpu() for name, t in results.items()}


def truth_of(function: Callable[..., Tensor], problem: Problem) -> Results:
    """In float64, and the factor that turns an error of the gradient of W_v into one of that of γ."""
    results = run(function, problem.to(torch.float64))
    if "gamma" in problem.tensors:
        results["w_v / gamma"] = problem.tensors["w_v"].double() / problem.tensors["gamma"].double()
    return results
