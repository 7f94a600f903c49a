"""Attention on a map that may be normalised before, as one differentiable function of the map.

What is kept for the backward pass is the map, not its normalised copy: it is normalised again, attention hands a gradient back to it, and
PyTorch derives the normalisation.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from . import autograd
from .device import without_autocast
from .folding import Weights
from .normalization import GroupNorm, normalized

Tensors = Sequence[Tensor | None]


class AttentionKind(Protocol):
    """What attends to h = norm(x), or to h = x, given tensors besides."""

    @property
    def adds_input(self) -> bool:
        """Whether x is added to what it makes of h."""

    def forward(self, x: Tensor, norm: GroupNorm | None, tensors: Tensors, save: bool) -> tuple[Tensor, Tensors]:
        """The result for the map x, and with `save` what `backward` wants of it."""

    def backward(self, d_out: Tensor, h: Tensor, tensors: Tensors, saved: Tensors, need_h: bool, need_tensors: bool) -> Tensors:
        """The gradients of h and of each tensor, each where needed; x is not its concern."""

    def in_steps(self, h: Tensor, tensors: Tensors) -> Tensor:
        """What it makes of h, by functions that autograd derives as often as is asked for."""


def attend(x: Tensor, norm: GroupNorm | None, kind: AttentionKind, tensors: Tensors) -> Tensor:
    """What `kind` makes of the map x (N, C, H, W), in an eager call. The tensors of `norm` are in x's dtype."""
    norm_tensors = (None, None) if norm is None else (norm.weight, norm.bias)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *norm_tensors, *tensors)):
        return MapAttention.apply(kind, norm, x, *norm_tensors, *tensors)
    return kind.forward(x, norm, tensors, save=False)[0]


class MapAttention(torch.autograd.Function):
    """(kind, norm, x, weight and bias of the norm, *tensors) → out."""

    @staticmethod
    def forward(ctx: Any, kind: AttentionKind, norm: GroupNorm | None, *inputs: Tensor) -> Tensor:
        x, _, _, *tensors = inputs
        out, saved = kind.forward(x, norm, tensors, save=True)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs, *saved)
        ctx.kind, ctx.num_inputs = kind, len(inputs)
        ctx.norm = None if norm is None else norm._replace(weight=None, bias=None)  # they are among the inputs
        return out

    @staticmethod
    def backward(ctx: Any, d_out: Tensor | None) -> tuple:
        needed = ctx.needs_input_grad[2:]
        if d_out is None:
            return (None,) * (2 + len(needed))
        tensors = ctx.saved_tensors  # once: activation checkpointing gives them out a single time
        inputs, saved = tensors[: ctx.num_inputs], tensors[ctx.num_inputs :]
        with without_autocast(d_out):
            if torch.is_grad_enabled() or autograd.transforms_are_active():
                gradients = _differentiable_gradients(d_out, ctx.kind, ctx.norm, inputs, needed)
            else:
                gradients = _gradients(d_out, ctx.kind, ctx.norm, inputs, saved, needed)
        return None, None, *gradients


def _gradients(
    d_out: Tensor, kind: AttentionKind, norm: GroupNorm | None, inputs: Tensors, saved: Tensors, needed: Sequence[bool]
) -> list[Tensor | None]:
    """One for each input, None where not needed."""
    need_h, need_tensors = any(needed[:3]), any(needed[3:])
    leaves = [t if t is None else t.detach().requires_grad_(need) for t, need in zip(inputs[:3], needed, strict=False)]
    with torch.enable_grad():
        h = _normalized(leaves, norm)
    d_h, *d_tensors = kind.backward(d_out, h.detach(), inputs[3:], saved, need_h, need_tensors)
    if norm is None:
        d_leaves: list[Tensor | None] = [d_h, None, None]
    else:
        wanted = [t for t, need in zip(leaves, needed, strict=False) if t is not None and need]
        found = iter(torch.autograd.grad(h, wanted, d_h) if wanted else ())
        d_leaves = [next(found) if need else None for need in needed[:3]]
    if kind.adds_input and d_leaves[0] is not None:
        d_leaves[0] = d_leaves[0] + d_out
    return [d if need else None for d, need in zip((*d_leaves, *d_tensors), needed, strict=True)]


def _differentiable_gradients(
    d_out: Tensor, kind: AttentionKind, norm: GroupNorm | None, inputs: Tensors, needed: Sequence[bool]
) -> list[Tensor | None]:
    """The same with a graph behind them."""

    def steps(views: list[Tensor | None]) -> Tensor:
        x = views[0]
        assert x is not None
        out = kind.in_steps(_normalized(views, norm), views[3:])
        if kind.adds_input:
            out = out + x
        return out

    return autograd.gradients_of_steps(steps, d_out, inputs, needed)


def _normalized(inputs: Tensors, norm: GroupNorm | None) -> Tensor:
    x, weight, bias, *_ = inputs
    assert x is not None
    return normalized(x, None if norm is None else norm._replace(weight=weight, bias=bias))


class AttentionOnMap(NamedTuple):
    """The plain layer, for a map that is normalised before. Tensors are those of `folding.Weights`."""

    settings: autograd.Settings

    @property
    def adds_input(self) -> bool:
        return self.settings.residual

    def forward(self, x: Tensor, norm: GroupNorm | None, tensors: Tensors, save: bool) -> tuple[Tensor, Tensors]:
        weights, (scale, residual, _, backend) = _weights(tensors), self.settings
        implementation = autograd.implementation(self.settings)
        if backend == "triton" and implementation.normalizes(x, weights):
            out, *saved = implementation.forward(x, weights, scale, residual, save, norm)
        else:
            out, *saved = implementation.forward(normalized(x, norm), weights, scale, False, save)
            if residual:
                out += x
        return out, saved

    def backward(self, d_out: Tensor, h: Tensor, tensors: Tensors, saved: Tensors, need_h: bool, need_tensors: bool) -> Tensors:
        y, lse = saved
        d_h, d_weights = autograd.compute_backward(d_out, h, _weights(tensors), y, lse, self._of_h, need_h, need_tensors)
        return d_h, *d_weights

    def in_steps(self, h: Tensor, tensors: Tensors) -> Tensor:
        return autograd.differentiable(h, _weights(tensors), self._of_h)

    @property
    def _of_h(self) -> autograd.Settings:
        return self.settings._replace(residual=False)


def _weights(tensors: Tensors) -> Weights:
    w_q, b_q, w_k, b_k, w_v, b_v, gamma = tensors
    assert w_q is not None
    assert w_k is not None
    assert w_v is not None
    return Weights(w_q, b_q, w_k, b_k, w_v, b_v, gamma)
