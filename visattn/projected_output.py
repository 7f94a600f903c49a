"""The end of a block with heads, `res_scale · (x + γ (W_o (y + b_v) + b_o))`: one function on the kernels, steps everywhere else."""

from typing import Any

import torch
from torch import Tensor

from . import block
from .autograd import gradients_of_steps, is_looked_at, transforms_are_active
from .device import kernel_target, on_device_of, without_autocast
from .layout import contiguous, deliver, empty_map_like, in_memory


def joined(x: Tensor, y: Tensor, weights: block.Weights, num_heads: int, residual: bool, res_scale: float, backend: str) -> Tensor:
    """A map like x (N, C, H, W), for y (N·heads, V/heads, L) without b_v."""
    if backend == "triton" and not is_looked_at(backend, x, y, *weights) and _projects(x, weights):
        y = y.reshape(len(x), y.shape[1] * num_heads, y.shape[2])
        return ProjectedOutput.apply(x, y, weights.w_o, weights.b_v, weights.b_o, weights.gamma, residual, res_scale)
    return block.joined(x, block.branch_of(y, weights, num_heads, x.shape), residual, res_scale)


def _projects(x: Tensor, weights: block.Weights) -> bool:
    """Whether the kernels project y, of as many channels as they hold, to a map x of y's dtype."""
    from . import kernels

    w_o = weights.w_o
    return w_o is not None and x.dtype == w_o.dtype and max(x.shape[1], w_o.shape[1]) <= kernels.FUSED_CHANNELS


class ProjectedOutput(torch.autograd.Function):
    """(x, y (N, V, L), w_o, b_v, b_o, gamma, residual, res_scale) → out, a map like x, on the kernels."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        y: Tensor,
        w_o: Tensor,
        b_v: Tensor | None,
        b_o: Tensor | None,
        gamma: Tensor | None,
        residual: bool,
        res_scale: float,
    ) -> Tensor:
        from . import kernels

        out = empty_map_like(x)
        if x.numel():
            config = kernels.projection_configs(y.shape[1], x.dtype, kernel_target(x.device)).qkv_projection
            with on_device_of(x):
                written = kernels.writable(out.flatten(2))
                weights = (None if t is None else contiguous(t) for t in (w_o.flatten(1), b_v, b_o, gamma))
                kernels.output_projection(
                    kernels.readable(y), *weights, kernels.readable(in_memory(x).flatten(2)), written,
                    residual=residual, factor=None if res_scale == 1.0 else res_scale, config=config,
                )  # fmt: skip
                deliver(written, out)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, y, w_o, b_v, b_o, gamma)
        ctx.settings = residual, res_scale
        return out

    @staticmethod
    def backward(ctx: Any, d_out: Tensor | None) -> tuple:
        if d_out is None:
            return (None,) * 8
        needed = ctx.needs_input_grad[:6]
        with without_autocast(d_out):
            if torch.is_grad_enabled() or transforms_are_active():
                gradients = _differentiable_gradients(d_out, ctx.saved_tensors, needed, *ctx.settings)
            else:
                gradients = _gradients(d_out, ctx.saved_tensors, needed, *ctx.settings)
        return *gradients, None, None


def _gradients(
    d_out: Tensor, inputs: tuple[Tensor | None, ...], needed: tuple[bool, ...], residual: bool, res_scale: float
) -> list[Tensor | None]:
    """One for each input, None where not needed."""
    from . import kernels

    _, y, *weights = inputs
    assert y is not None
    g = d_out if res_scale == 1.0 else res_scale * d_out
    d_x = g if residual else None
    if not g.numel():
        return [d_x, *(None if t is None else torch.zeros_like(t) for t in inputs[1:])]
    d_y, d_weights = None, (None,) * len(weights)
    target = kernel_target(g.device)
    with on_device_of(g):
        tokens = kernels.readable(in_memory(g).flatten(2))
        w_o, b_v, b_o, gamma = (None if w is None else contiguous(w) for w in weights)
        assert w_o is not None
        configs = kernels.projection_configs(y.shape[1], g.dtype, target)
        if needed[1]:
            d_y = kernels.output_projection_backward(tokens, w_o.flatten(1), gamma, config=configs.backward)
        if any(needed[2:]):
            y = kernels.readable(y)
            moments = kernels.partial_moments(tokens, y, need_arrived=gamma is not None, config=configs.token_moments)
            d_weights = kernels.output_gradients(moments, w_o, b_v, b_o, gamma, config=kernels.weight_gradients_config(target))
    return [d if need else None for d, need in zip((d_x, d_y, *d_weights), needed, strict=True)]


def _differentiable_gradients(
    d_out: Tensor, inputs: tuple[Tensor | None, ...], needed: tuple[bool, ...], residual: bool, res_scale: float
) -> list[Tensor | None]:
    """The same with a graph behind them."""

    def steps(views: list[Tensor]) -> Tensor:
        x, y, w_o, b_v, b_o, gamma = views
        branch = block.projected_branch(y.unflatten(2, x.shape[2:]), w_o, block.output_bias(w_o, b_v, b_o, y.dtype), gamma)
        return block.joined(x, branch, residual, res_scale)

    need_x, *need_others = needed
    return gradients_of_steps(steps, d_out, inputs, (need_x and residual, *need_others))
