"""The layer as a differentiable function, for eager calls: one forward, one backward, one backward of the backward.

All implementations have the same two functions, `forward` and `backward`; what follows from their results (gradients of weights,
second derivatives) is computed here once for both. ops.py wires the same steps into torch.library.
"""

import functools
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import query_normalized, torch_backend
from .device import without_autocast
from .folding import Gradients, Weights
from .second_order import LastDerivative, backward_of_backward
from .validation import refuse_vmap

_PLAIN = frozenset((Tensor, torch.nn.Parameter, type(None)))
_STANDING_FOR_NUMBERS = (torch._C._TorchDispatchModeKey.FAKE, torch._C._TorchDispatchModeKey.PROXY)


class Settings(NamedTuple):
    """What a call is told besides tensors. `normalize` is "keys" or "queries", `backend` is "triton" or "torch".

    With "queries" the roles of query and key are exchanged in all that follows: `Weights.w_q` and `Weights.b_q` are the key's,
    `Weights.w_k` and `Weights.b_k`, the bias that softmax drops, are the query's.
    """

    scale: float
    residual: bool
    normalize: str
    backend: str


def implementation(settings: Settings) -> ModuleType:
    """The module that computes a call."""
    if settings.normalize == "queries":
        return query_normalized
    return torch_backend if settings.backend == "torch" else _triton_backend()


@functools.cache
def _triton_backend() -> ModuleType:
    """Triton is imported when it is first needed."""
    from . import triton_backend

    return triton_backend


def compute_forward(x: Tensor, weights: Weights, settings: Settings, save: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """`(out, y, lse)` of the chosen backend; y and lse are what backward wants, None where it does not. Not under autocast."""
    return implementation(settings).forward(x, weights, settings.scale, settings.residual, save)


def compute_backward(
    d_out: Tensor, x: Tensor, weights: Weights, y: Tensor | None, lse: Tensor | None, settings: Settings, need_x: bool, need_weights: bool
) -> tuple[Tensor | None, Gradients]:
    """The gradients of x and of every weight, None where not needed."""
    with without_autocast(x):
        return implementation(settings).backward(x, d_out, weights, y, lse, settings.scale, settings.residual, need_x, need_weights)


def differentiable(x: Tensor, weights: Weights, settings: Settings) -> Tensor:
    """The output, with a graph behind it."""
    if transforms_are_active():
        return TransformedSelfAttention.apply(x, *weights, settings)[0]
    return SelfAttention.apply(x, *weights, settings)


def follows_values() -> bool:
    """Whether something may go forward with the values, beside them, that would be lost in the kernels."""
    return transforms_are_active() or forward_ad._current_level >= 0


def transforms_are_active() -> bool:
    """Whether `torch.func` looks at the call; PyTorch asks itself the same before it applies a function."""
    return torch._C._are_functorch_transforms_active()


def is_recorded(backend: str, *tensors: Tensor | None) -> bool:
    """Whether attention has to be one op: a compiler or `torch.jit.trace` looks, or kernels would find no numbers where tensors say."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing() or (backend == "triton" and _hold_no_numbers(tensors))


def is_looked_at(backend: str, *tensors: Tensor | None) -> bool:
    """The same, or whether `torch.func` looks at the call, which then takes steps that all of these know."""
    return is_recorded(backend, *tensors) or transforms_are_active()


def _hold_no_numbers(tensors: Sequence[Tensor | None]) -> bool:
    """Whether tensors are fake, or wrapped by a class that computes in its own way, or `make_fx` follows what is done with them."""
    if torch._C._len_torch_dispatch_stack() and any(torch._C._get_dispatch_mode(mode) is not None for mode in _STANDING_FOR_NUMBERS):
        return True
    return not _PLAIN.issuperset(map(type, tensors)) and any(
        t is not None and torch._C._dispatch_keys(t).has(torch._C.DispatchKey.Python) for t in tensors
    )


def gradients_of_steps(
    steps: Callable[[list[Any]], Tensor | tuple[Tensor, ...]],
    d_out: Tensor | tuple[Tensor, ...],
    inputs: Sequence[Tensor | None],
    needed: Sequence[bool],
) -> list[Tensor | None]:
    """The gradients of `steps(inputs)` with a graph behind them, None where not needed.

    The steps start from views of the inputs, or hooks of the inputs would run here and again where the gradients arrive.
    """
    views = [t if t is None or not need else t.view_as(t) for t, need in zip(inputs, needed, strict=True)]
    wanted = [t for t, need in zip(views, needed, strict=True) if t is not None and need]
    found = iter(torch.autograd.grad(steps(views), wanted, d_out, create_graph=True))
    return [next(found) if need else None for need in needed]


class SelfAttention(torch.autograd.Function):
    """(x, *weights, settings) → out."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *rest: Any) -> Tensor:
        *weights, settings = rest
        out, y, lse = compute_forward(x, Weights(*weights), settings, save=True)
        _keep(ctx, x, weights, y, lse, settings)
        return out

    @staticmethod
    def backward(ctx: Any, d_out: Tensor | None, *_: Any) -> tuple:
        if d_out is None:
            return (None,) * len(ctx.needs_input_grad)
        x, *weights, y, lse = ctx.saved_tensors
        need_x, *need_weights, _ = ctx.needs_input_grad
        arguments = (d_out, x, *weights, y, lse, ctx.settings, need_x, any(need_weights))
        if torch.is_grad_enabled() or transforms_are_active():
            d_x, *d_weights = SelfAttentionBackward.apply(*arguments)
        else:
            d_x, *d_weights = SelfAttentionBackward.forward(*arguments)  # nobody will differentiate it: no graph
        return d_x, *d_weights, None


class TransformedSelfAttention(torch.autograd.Function):
    """(x, *weights, settings) → (out, y, lse), in the form that `torch.func` asks for.

    For that form PyTorch binds the arguments to their signature in every call, which takes as long as the rest of the forward pass.
    """

    @staticmethod
    def forward(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor | None, Tensor | None]:
        *weights, settings = rest
        return compute_forward(x, Weights(*weights), settings, save=True)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        x, *weights, settings = inputs
        _, y, lse = output
        ctx.mark_non_differentiable(*(t for t in (y, lse) if t is not None))
        _keep(ctx, x, weights, y, lse, settings)

    backward = SelfAttention.backward


def _keep(ctx: Any, x: Tensor, weights: list, y: Tensor | None, lse: Tensor | None, settings: Settings) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, *weights, y, lse)
    ctx.settings = settings


class SelfAttentionBackward(torch.autograd.Function):
    """(d_out, x, *weights, y, lse, settings, need_x, need_weights) → (d_x, *d_weights), itself differentiable once."""

    @staticmethod
    def forward(d_out: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor | None, ...]:
        *weights, y, lse, settings, need_x, need_weights = rest
        d_x, d_weights = compute_backward(d_out, x, Weights(*weights), y, lse, settings, need_x, need_weights)
        return d_x, *d_weights

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        d_out, x, *weights, _y, _lse, settings, _need_x, _need_weights = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(d_out, x, *weights)
        ctx.settings = settings

    @staticmethod
    def backward(ctx: Any, v_x: Tensor | None, *v_weights: Tensor | None) -> tuple:
        d_out, x, *weights = ctx.saved_tensors
        second = functools.partial(compute_backward_of_backward, *ctx.settings[:3])
        gradients = LastDerivative.apply(second, d_out, x, *weights, v_x, *v_weights)
        # y and lse are functions of x and the weights, and φ's derivative by those already holds their part.
        return *gradients, None, None, None, None, None

    vmap = staticmethod(refuse_vmap)


def compute_backward_of_backward(scale: float, residual: bool, normalize: str, d_out: Tensor, x: Tensor, *rest: Any) -> tuple:
    """The gradients of φ by d_out, x and each weight, given the weights, v_x and the weights' v: see second_order.py."""
    *weights, v_x = rest[: len(Weights._fields) + 1]
    v_weights = rest[len(Weights._fields) + 1 :]
    with without_autocast(x):
        phi_d_out, phi_x, phi_weights = backward_of_backward(d_out, x, Weights(*weights), v_x, v_weights, scale, residual, normalize)
    return phi_d_out, phi_x, *phi_weights
