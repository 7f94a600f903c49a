"""The same steps as autograd.py as torch.library ops, for torch.compile and torch.export, which cannot look into a launch.

`visattn::self_attention_2d_backward` is the derivative of `visattn::self_attention_2d`, and has one of its own; so is and has
`visattn::token_attention_backward`. An op returns tensors only: what is not needed is an empty tensor here where eager has None, or zeros
where only the number of pixels says so.
"""

import functools
from typing import Any

import torch
from torch import Tensor

from . import autograd, torch_backend
from . import token_attention as on_tokens
from .device import without_autocast
from .folding import Weights
from .layout import empty_map_like
from .second_order import LastDerivative


@torch.library.custom_op("visattn::self_attention_2d", mutates_args=())
def self_attention_2d(
    x: Tensor,
    w_q: Tensor,
    b_q: Tensor | None,
    w_k: Tensor,
    b_k: Tensor | None,
    w_v: Tensor,
    b_v: Tensor | None,
    gamma: Tensor | None,
    scale: float,
    residual: bool,
    normalize: str,
    backend: str,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`(out, y, lse)`; y (N, C, L) and lse (N, L) are empty without `save` and with "queries".

    lse is zero where the backend gives none. That depends on the number of pixels; shapes do not, or a graph would be of some only.
    """
    weights = Weights(w_q, b_q, w_k, b_k, w_v, b_v, gamma)
    with without_autocast(x):
        out, y, lse = autograd.compute_forward(x, weights, autograd.Settings(scale, residual, normalize, backend), save)
    if y is None:
        return out, _present(None, x), _present(None, x, _lse_dtype(x))
    return out, _in_layout_of(y, x), _no_lse(x, len(x), y.shape[2]) if lse is None else lse


@self_attention_2d.register_fake
def _(x, w_q, b_q, w_k, b_k, w_v, b_v, gamma, scale, residual, normalize, backend, save):  # type: ignore[no-untyped-def]
    if not save or normalize != "keys":
        return empty_map_like(x), _present(None, x), _present(None, x, _lse_dtype(x))
    return empty_map_like(x), empty_map_like(x).flatten(2), _no_lse(x, x.shape[0], x.shape[2] * x.shape[3])


@torch.library.custom_op("visattn::self_attention_2d_backward", mutates_args=())
def self_attention_2d_backward(
    d_out: Tensor,
    x: Tensor,
    w_q: Tensor,
    b_q: Tensor | None,
    w_k: Tensor,
    b_k: Tensor | None,
    w_v: Tensor,
    b_v: Tensor | None,
    gamma: Tensor | None,
    y: Tensor,
    lse: Tensor,
    scale: float,
    residual: bool,
    normalize: str,
    backend: str,
    need_x: bool,
    need_weights: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`(d_x, d_w_q, d_b_q, d_w_k, d_b_k, d_w_v, d_b_v, d_gamma)`, each empty where it is not needed or has no weight."""
    weights = Weights(w_q, b_q, w_k, b_k, w_v, b_v, gamma)
    settings = autograd.Settings(scale, residual, normalize, backend)
    saved_lse = lse if backend == "triton" or torch_backend.keeps_lse(x, weights) else None
    d_x, d_weights = autograd.compute_backward(d_out, x, weights, y, saved_lse, settings, need_x, need_weights)
    return _present(d_x, x), *(_present(d, x) for d in d_weights)  # type: ignore[return-value]


@self_attention_2d_backward.register_fake
def _(d_out, x, w_q, b_q, w_k, b_k, w_v, b_v, gamma, y, lse, scale, residual, normalize, backend, need_x, need_weights):  # type: ignore[no-untyped-def]
    weights = (w_q, b_q, w_k, b_k, w_v, b_v, gamma)
    return _present(empty_map_like(x) if need_x else None, x), *(
        _present(w.new_empty(w.shape) if need_weights and w is not None else None, x) for w in weights
    )


def _setup_forward(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, *weights, scale, residual, normalize, backend, _save = inputs
    _, y, lse = output
    ctx.mark_non_differentiable(y, lse)
    ctx.save_for_backward(x, *weights, y, lse)
    ctx.settings = (scale, residual, normalize, backend)


def _differentiate_forward(ctx: Any, d_out: Tensor, _d_y: Tensor, _d_lse: Tensor) -> tuple:
    x, *weights, y, lse = ctx.saved_tensors
    need_x, *need_weights = ctx.needs_input_grad[: 1 + len(weights)]
    d_x, *d_weights = self_attention_2d_backward(d_out, x, *weights, y, lse, *ctx.settings, need_x, any(need_weights))
    return (
        d_x if need_x else None,
        *(d if need else None for d, need in zip(d_weights, need_weights, strict=True)),
        *(None,) * 5,
    )


def _setup_backward(ctx: Any, inputs: tuple, output: tuple) -> None:
    d_out, x, *weights, _y, _lse, scale, residual, normalize, _backend, need_x, need_weights = inputs
    ctx.save_for_backward(d_out, x, *weights)
    ctx.settings = (scale, residual, normalize)
    ctx.need_x, ctx.need_weights = need_x, need_weights


def _differentiate_backward(ctx: Any, v_x: Tensor, *v_weights: Tensor) -> tuple:
    d_out, x, *weights = ctx.saved_tensors
    cotangents = tuple(v if ctx.need_weights and w is not None else None for v, w in zip(v_weights, weights, strict=True))
    second = functools.partial(autograd.compute_backward_of_backward, *ctx.settings)
    return *LastDerivative.apply(second, d_out, x, *weights, v_x if ctx.need_x else None, *cotangents), *(None,) * 8


self_attention_2d.register_autograd(_differentiate_forward, setup_context=_setup_forward)
self_attention_2d_backward.register_autograd(_differentiate_backward, setup_context=_setup_backward)


@torch.library.custom_op("visattn::token_attention", mutates_args=())
def token_attention(q: Tensor, k: Tensor, v: Tensor, b_k: Tensor | None, scale: float, backend: str) -> tuple[Tensor, Tensor]:
    """`(y, lse)`: y (B, V, L); lse (B, L) is zero where the backend gives none."""
    with without_autocast(q):
        y, lse = on_tokens.implementation(backend).forward(q, k, v, scale)
    return y.contiguous(), _no_lse(q, len(q), q.shape[2]) if lse is None else lse


@token_attention.register_fake
def _(q, k, v, b_k, scale, backend):  # type: ignore[no-untyped-def]
    return q.new_empty((q.shape[0], v.shape[1], q.shape[2])), _no_lse(q, q.shape[0], q.shape[2])


@torch.library.custom_op("visattn::token_attention_backward", mutates_args=())
def token_attention_backward(
    d_y: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor, scale: float, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """`(d_q, d_k, d_v)`."""
    saved_lse = lse if on_tokens.keeps_lse(q, v, backend) else None
    with without_autocast(q):
        d_q, d_k, d_v = on_tokens.implementation(backend).backward(d_y, q, k, v, y, saved_lse, scale)
    return d_q.contiguous(), d_k.contiguous(), d_v.contiguous()


@token_attention_backward.register_fake
def _(d_y, q, k, v, y, lse, scale, backend):  # type: ignore[no-untyped-def]
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_tokens(ctx: Any, inputs: tuple, output: tuple) -> None:
    *tensors, scale, backend = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, *output)
    ctx.scale, ctx.backend = scale, backend


def _differentiate_tokens(ctx: Any, d_y: Tensor, _d_lse: Tensor) -> tuple:
    q, k, v, b_k, y, lse = ctx.saved_tensors
    gradients = token_attention_backward(d_y, q, k, v, y, lse, ctx.scale, ctx.backend)
    return *gradients, torch.zeros_like(b_k) if ctx.needs_input_grad[3] else None, None, None


def _setup_tokens_backward(ctx: Any, inputs: tuple, output: tuple) -> None:
    d_y, q, k, v, _y, _lse, scale, _backend = inputs
    ctx.save_for_backward(d_y, q, k, v)
    ctx.scale = scale


def _differentiate_tokens_backward(ctx: Any, v_q: Tensor, v_k: Tensor, v_v: Tensor) -> tuple:
    second = functools.partial(on_tokens.backward_of_backward, ctx.scale)
    return *LastDerivative.apply(second, *ctx.saved_tensors, v_q, v_k, v_v), None, None, None, None


token_attention.register_autograd(_differentiate_tokens, setup_context=_setup_tokens)
token_attention_backward.register_autograd(_differentiate_tokens_backward, setup_context=_setup_tokens_backward)


def _present(tensor: Tensor | None, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """An op cannot return None: an empty tensor stands for it."""
    return x.new_empty((0,), dtype=dtype) if tensor is None else tensor


def _lse_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _no_lse(x: Tensor, rows: int, length: int) -> Tensor:
    """What stands for an lse (rows, length) that nobody needs."""
    return x.new_zeros((rows, length), dtype=_lse_dtype(x))


def _in_layout_of(y: Tensor, x: Tensor) -> Tensor:
    """y with the strides that the fake op promises."""
    promised = empty_map_like(x).flatten(2)
    return y if y.stride() == promised.stride() else promised.copy_(y)
