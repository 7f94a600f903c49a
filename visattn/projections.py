"""The weight and the bias of a 1×1 projection as its own forward pass would use them, whichever way they are made."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

PLAIN_FORWARDS = (nn.Conv1d.forward, nn.Conv2d.forward, nn.Linear.forward)
"""Of layers that are their weight and their bias; parametrised layers inherit theirs."""

PLAIN_CONVOLUTIONS = (nn.Conv1d._conv_forward, nn.Conv2d._conv_forward)
"""What the first two call."""

MAKERS_OF_WEIGHTS = (SpectralNorm, WeightNorm, BasePruningMethod)
"""Hooks that set the weight before a forward pass and ask for nothing but the layer."""


class Unsuitable(RuntimeError):
    """Why something is no such projection, or a block not one that runs here, in words that a report can show."""


@contextmanager
def without_steps(module: nn.Module) -> Iterator[None]:
    """Within the block spectral norm makes no step: the module is in evaluation, and afterwards as it was."""
    training = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, was_training in training.items():
            part.training = was_training


def unwrapped(layer: Any) -> Any:
    """The layer that a spectral norm has been put around as a module, or else the layer."""
    return layer.module if _is_wrapper(layer) else layer


def kind_of(module: Any) -> str:
    """The name of its class, with that of its Python module where PyTorch has another class of this name."""
    kind = type(module)
    return kind.__name__ if getattr(nn, kind.__name__, kind) is kind else f"{kind.__module__}.{kind.__qualname__}"


def check_projection(layer: nn.Module, name: str) -> None:
    """Raises Unsuitable unless the layer is a convolution or a linear map."""
    for method in ("forward", "_conv_forward"):
        if method in layer.__dict__:
            raise Unsuitable(f"{name}.{method} has been replaced, and would not be called here; delete that attribute of {name}")
    if _is_plain(layer) or _makes_its_weight(layer) or _is_transposed(layer):
        return
    if not _is_wrapper(layer):
        raise Unsuitable(f"{name} is a {kind_of(layer)}, which computes in a way of its own")
    check_projection(unwrapped(layer), name)


def check_pointwise(layer: nn.Module | None, name: str) -> None:
    """Raises Unsuitable if there is no layer, or a convolution of anything but single pixels, all channels together."""
    if layer is None:
        raise Unsuitable(f"{name} is missing: a 1×1 convolution is expected in its place, got None; assign one")
    layer = unwrapped(layer)
    if not isinstance(layer, nn.Conv1d | nn.Conv2d):
        weight = getattr(layer, "weight", None)
        if isinstance(weight, Tensor) and weight.shape[2:].numel() != 1:
            raise Unsuitable(f"{name} is not a 1×1 convolution, its weight is {tuple(weight.shape)}")
        return
    settings = ((layer.kernel_size, 1), (layer.stride, 1), (layer.padding, 0))
    if layer.groups != 1 or any(isinstance(values, str) or set(values) != {usual} for values, usual in settings):
        raise Unsuitable(f"{name} is not a 1×1 convolution but {layer}")


def run_pre_hooks(layer: nn.Module, name: str) -> None:
    """Runs what would run before the layer's forward pass, such as what makes its weight, without an input, which nobody makes.

    Raises:
        Unsuitable: a hook asks for the input, or returns one.
    """
    for key, hook in list(layer._forward_pre_hooks.items()):
        try:
            inputs = hook(layer, (), {}) if key in layer._forward_pre_hooks_with_kwargs else hook(layer, ())
        except (IndexError, TypeError, ValueError) as error:  # as what looks for an input among none
            raise _refused(hook, name, f"failed ({type(error).__name__}: {error})") from error
        if inputs is not None:
            raise _refused(hook, name, "returns an input")


def _refused(hook: Any, name: str, what: str) -> Unsuitable:
    return Unsuitable(
        f"the forward pre-hook {getattr(hook, '__qualname__', kind_of(hook))} of {name} {what}: {name} is read and not called, there is "
        f"no input; remove the hook, or register it on the module around {name}"
    )


def read(layer: Any, name: str) -> tuple[Tensor, Tensor | None]:
    """Weight (O, C) or (O, C, 1, 1) and bias (O) or None, as the layer's next forward pass would use them.

    Spectral norm makes its step of power iteration here, as it would there.

    Raises:
        Unsuitable: it is no projection, or has a hook that asks for the input.
    """
    check_projection(layer, name)
    run_pre_hooks(layer, name)
    if _is_plain(layer):
        weight = layer.weight
        return weight.flatten(1) if weight.ndim == 3 else weight, layer.bias
    if _is_wrapper(layer):
        layer._update_u_v()
        return read(layer.module, name)
    return (layer.W.mT, layer.b) if _is_transposed(layer) else (layer.W_(), layer.bias)


def _is_plain(layer: nn.Module) -> bool:
    """Whether it is its weight and its bias: a layer of PyTorch's, or EDM's convolution where it does not resample."""
    kind = type(layer)
    if kind.forward in PLAIN_FORWARDS:
        return getattr(kind, "_conv_forward", PLAIN_CONVOLUTIONS[0]) in PLAIN_CONVOLUTIONS
    return [layer.__dict__.get(name) for name in ("up", "down")] == [False, False] and _has_only(layer, {"weight", "bias"})


def _makes_its_weight(layer: nn.Module) -> bool:
    """Whether it is a convolution whose method `W_` gives its weight divided by a running estimate of its norm."""
    return isinstance(layer, nn.Conv2d) and hasattr(type(layer), "W_")


def _is_wrapper(layer: nn.Module) -> bool:
    """Whether it is a module around a layer whose weight it sets before it calls it, after a step of power iteration."""
    return hasattr(type(layer), "_update_u_v") and list(layer._modules) == ["module"]


def _is_transposed(layer: Any) -> bool:
    """Whether it is a projection whose parameters are W (C, O) and b."""
    return _has_only(layer, {"W", "b"}) and layer.W.ndim == 2 and not layer._modules


def _has_only(layer: nn.Module, names: set[str]) -> bool:
    """Whether these are its parameters; in a replica, and where they are parts of something larger, they are plain attributes."""
    plain = {name for name, value in layer.__dict__.items() if isinstance(value, Tensor)}
    return plain.union(layer._parameters) == names
