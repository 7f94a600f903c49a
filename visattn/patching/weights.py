"""What a foreign block's sub-modules hold: live weights, whichever way they are made, and what stands around a projection."""

from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

PLAIN_FORWARDS = (nn.Conv1d.forward, nn.Conv2d.forward, nn.Linear.forward)
"""Of layers that are their weight and their bias; parametrised layers inherit theirs."""

MAKERS_OF_WEIGHTS = (SpectralNorm, WeightNorm, BasePruningMethod)
"""Hooks that set the weight before a forward pass and ask for nothing but the layer."""

AFTERWARDS = (nn.modules.batchnorm._BatchNorm, nn.Dropout, nn.Dropout2d)


class Unsuitable(RuntimeError):
    """Why a block stays as it is, in words that a report can show; raised by a patched block that somebody has made so since."""


class Parts(NamedTuple):
    """A 1×1 projection, the size of the max pooling behind it, and what else its result passes through."""

    layer: nn.Module
    pool: int
    afterwards: tuple[nn.Module, ...]


def parts_of(module: nn.Module, name: str) -> Parts:
    """What `module`, a projection or a small stack that begins with one, is made of.

    Raises:
        Unsuitable: there is something in it that is not known here.
    """
    if isinstance(module, nn.Sequential):
        children = list(module.children())
    elif isinstance(getattr(module, "conv", None), nn.Module):
        children = list(module.children())  # a convolution and its norm, as libraries bundle them
    else:
        return Parts(module, 1, ())
    if not children:
        raise Unsuitable(f"{name} is empty")
    layer, pool, afterwards = *parts_of(children[0], name)[:2], list(parts_of(children[0], name).afterwards)
    for child in children[1:]:
        if isinstance(child, nn.MaxPool2d) and not afterwards:
            pool *= _pool_size(child, name)
        elif isinstance(child, AFTERWARDS):
            afterwards.append(child)
        elif not isinstance(child, nn.Identity):
            raise Unsuitable(f"{name} holds a {type(child).__name__}")
    return Parts(layer, pool, tuple(afterwards))


def _pool_size(pool: nn.MaxPool2d, name: str) -> int:
    sizes = {*_pair(pool.kernel_size), *_pair(pool.stride)}
    if len(sizes) != 1 or any(_pair(pool.padding)) or pool.ceil_mode or set(_pair(pool.dilation)) != {1}:
        raise Unsuitable(f"{name} pools with {pool}, where only square windows side by side are known")
    return sizes.pop()


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)


def unwrapped(layer: Any) -> Any:
    """The layer that a spectral norm has been put around as a module, or else the layer."""
    return layer.module if _is_wrapper(layer) else layer


def check_projection(layer: nn.Module, name: str) -> None:
    """Raises Unsuitable unless the layer is a convolution or a linear map that nobody listens to."""
    kind = type(layer)
    if _is_wrapper(layer):
        check_projection(unwrapped(layer), name)
    elif kind.forward not in PLAIN_FORWARDS and not _makes_its_weight(layer) and not _is_transposed(layer):
        raise Unsuitable(f"{name} is a {kind.__name__}, which computes in a way of its own")
    if "forward" in layer.__dict__:
        raise Unsuitable(f"the forward method of {name} has been replaced")
    if layer._forward_hooks or layer._backward_hooks or layer._backward_pre_hooks:
        raise Unsuitable(f"{name} has hooks that look at its result, which would not be computed")
    if layer._forward_pre_hooks and not all(isinstance(hook, MAKERS_OF_WEIGHTS) for hook in layer._forward_pre_hooks.values()):
        raise Unsuitable(f"{name} has hooks that look at its input")


def check_pointwise(layer: nn.Module, name: str) -> None:
    """Raises Unsuitable if the layer is a convolution of anything but single pixels, all channels together."""
    layer = unwrapped(layer)
    if not isinstance(layer, nn.Conv1d | nn.Conv2d):
        return
    settings = ((layer.kernel_size, 1), (layer.stride, 1), (layer.padding, 0))
    if layer.groups != 1 or any(isinstance(values, str) or set(values) != {usual} for values, usual in settings):
        raise Unsuitable(f"{name} is not a 1×1 convolution but {layer}")


def read(layer: Any, name: str) -> tuple[Tensor, Tensor | None]:
    """Weight (O, C) or (O, C, 1, 1) and bias (O) or None, as the layer's next forward pass would use them.

    Spectral norm makes its step of power iteration here, as it would there.
    """
    check_projection(layer, name)
    for hook in layer._forward_pre_hooks.values():
        hook(layer, ())
    if _is_wrapper(layer):
        layer._update_u_v()
        return read(layer.module, name)
    if _is_transposed(layer):
        return layer.W.mT, layer.b
    weight = layer.W_() if _makes_its_weight(layer) else layer.weight
    return weight.flatten(1) if weight.ndim == 3 else weight, layer.bias


def _makes_its_weight(layer: nn.Module) -> bool:
    """Whether it is a convolution whose method `W_` gives its weight divided by a running estimate of its norm."""
    return isinstance(layer, nn.Conv2d | nn.Conv1d) and callable(getattr(layer, "W_", None))


def _is_wrapper(layer: nn.Module) -> bool:
    """Whether it is a module around a layer whose weight it sets before it calls it, after a step of power iteration."""
    return callable(getattr(layer, "_update_u_v", None)) and list(layer._modules) == ["module"]


def _is_transposed(layer: nn.Module) -> bool:
    """Whether it is a projection whose parameters are W (C, O) and b."""
    return set(layer._parameters) == {"W", "b"} and not layer._modules
