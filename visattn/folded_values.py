"""The values' weights where one head's output is projected, `W_o W_v` and `W_o b_v + b_o`: one function on the kernels, steps elsewhere."""

from typing import Any

import torch
from torch import Tensor

from . import block
from .autograd import gradients_of_steps, is_looked_at, transforms_are_active
from .device import kernel_target, on_device_of, without_autocast
from .layout import contiguous, in_memory


def folded_values(weights: block.Weights, backend: str) -> tuple[Tensor, Tensor | None]:
    """`W_o W_v` (C, C) and `W_o b_v + b_o` (C), computed in fp32 or wider and rounded once to the dtype of the weights."""
    w_o, w_v, b_v, b_o = weights.w_o, weights.w_v, weights.b_v, weights.b_o
    if w_o is None or backend != "triton" or is_looked_at(backend, w_o, w_v, b_v, b_o):
        return block.folded_values(w_o, w_v, b_v, b_o)
    if b_v is None:
        return FoldedValues.apply(w_o, w_v, None, None)[0], b_o
    return FoldedValues.apply(w_o, w_v, b_v, b_o)


class FoldedValues(torch.autograd.Function):
    """(w_o, w_v, b_v, b_o) → (w, b), on the kernels; b_o goes with b_v only, and without b_v there is no b."""

    @staticmethod
    def forward(ctx: Any, w_o: Tensor, w_v: Tensor, b_v: Tensor | None, b_o: Tensor | None) -> tuple[Tensor, Tensor | None]:
        from . import kernels

        ctx.save_for_backward(w_o, w_v, b_v, b_o)
        with on_device_of(w_o):
            return kernels.weight_product(
                *_matrices(w_o, w_v), *_contiguous(b_v, b_o), config=kernels.weight_product_config(kernel_target(w_o.device))
            )

    @staticmethod
    def backward(ctx: Any, d_w: Tensor, d_b: Tensor | None) -> tuple[Tensor | None, ...]:
        with without_autocast(d_w):
            if torch.is_grad_enabled() or transforms_are_active():
                return _differentiable_gradients(d_w, d_b, ctx.saved_tensors, ctx.needs_input_grad)
            gradients = _gradients(d_w, d_b, *ctx.saved_tensors)
        return tuple(d if need else None for d, need in zip(gradients, ctx.needs_input_grad, strict=True))


def _gradients(
    d_w: Tensor, d_b: Tensor | None, w_o: Tensor, w_v: Tensor, b_v: Tensor | None, b_o: Tensor | None
) -> tuple[Tensor | None, ...]:
    """`dW W_vᵀ + db b_vᵀ`, `W_oᵀ dW`, `W_oᵀ db` and db, each shaped like its weight."""
    from . import kernels

    config = kernels.weight_product_config(kernel_target(d_w.device))
    with on_device_of(d_w):
        (of_o, of_v, d_w), (b_v, d_b) = _matrices(w_o, w_v, d_w), _contiguous(b_v, d_b)
        outer = None if b_v is None or d_b is None else (d_b, b_v)
        d_w_o, _ = kernels.weight_product(d_w, of_v.mT, outer=outer, config=config)
        d_w_v, d_b_v = kernels.weight_product(of_o.mT, d_w, d_b, config=config)
    return d_w_o.view_as(w_o), d_w_v.view_as(w_v), d_b_v, None if b_o is None else d_b


def _differentiable_gradients(
    d_w: Tensor, d_b: Tensor | None, inputs: tuple[Tensor | None, ...], needed: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """The same with a graph behind them."""

    def steps(views: list[Tensor]) -> tuple[Tensor, ...]:
        w, b = block.folded_values(*views)
        return (w,) if b is None else (w, b)

    return tuple(gradients_of_steps(steps, (d_w,) if d_b is None else (d_w, d_b), inputs, needed))


def _matrices(*weights: Tensor) -> list[Tensor]:
    return [in_memory(w).flatten(1) for w in weights]


def _contiguous(*biases: Tensor | None) -> list[Tensor | None]:
    return [None if b is None else contiguous(b) for b in biases]
