"""What a foreign block's sub-modules hold: live weights, whichever way they are made, and what stands around a projection."""

from collections.abc import Container
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
    if not isinstance(module, nn.Sequential) and "conv" not in module._modules:  # as libraries bundle a convolution and its norm
        return Parts(module, 1, ())
    children = list(module.children())
    if not children:
        raise Unsuitable(f"{name} is empty")
    layer, pool, first = parts_of(children[0], name)
    afterwards = list(first)
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
    """Raises Unsuitable unless the layer is a convolution or a linear map."""
    if _is_plain(layer) or _makes_its_weight(layer) or _is_transposed(layer):
        return
    if not _is_wrapper(layer):
        raise Unsuitable(f"{name} is a {type(layer).__name__}, which computes in a way of its own")
    check_projection(unwrapped(layer), name)


def check_unobserved(block: nn.Module, called: Container[nn.Module], prefix: str = "") -> None:
    """Raises Unsuitable if somebody wants to see what goes into or comes out of a sub-module that is not among those called."""
    for name, module in block._modules.items():
        if module is None or module in called:
            continue
        held = module.__dict__  # nn.Module's own look-up takes longer, and this is done in every call
        if "forward" in held:
            raise Unsuitable(f"the forward method of {prefix}{name} has been replaced")
        if held["_forward_hooks"] or held["_backward_hooks"] or held["_backward_pre_hooks"]:
            raise Unsuitable(f"{prefix}{name} has hooks that look at its result, which is not computed on visattn")
        if held["_forward_pre_hooks"] and not all(isinstance(hook, MAKERS_OF_WEIGHTS) for hook in held["_forward_pre_hooks"].values()):
            raise Unsuitable(f"{prefix}{name} has hooks that look at its input")
        if held["_modules"]:
            check_unobserved(module, called, f"{prefix}{name}.")


def check_pointwise(layer: nn.Module, name: str) -> None:
    """Raises Unsuitable if the layer is a convolution of anything but single pixels, all channels together."""
    layer = unwrapped(layer)
    if not isinstance(layer, nn.Conv1d | nn.Conv2d):
        weight = getattr(layer, "weight", None)
        if isinstance(weight, Tensor) and weight.shape[2:].numel() != 1:
            raise Unsuitable(f"{name} is not a 1×1 convolution, its weight is {tuple(weight.shape)}")
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
    if _is_plain(layer):
        weight = layer.weight
        return weight.flatten(1) if weight.ndim == 3 else weight, layer.bias
    if _is_wrapper(layer):
        layer._update_u_v()
        return read(layer.module, name)
    return (layer.W.mT, layer.b) if _is_transposed(layer) else (layer.W_(), layer.bias)


def _is_plain(layer: nn.Module) -> bool:
    """Whether it is its weight and its bias: a layer of PyTorch's, or EDM's convolution where it does not resample."""
    if type(layer).forward in PLAIN_FORWARDS:
        return True
    return set(layer._parameters) == {"weight", "bias"} and [layer.__dict__.get(name) for name in ("up", "down")] == [False, False]


def _makes_its_weight(layer: nn.Module) -> bool:
    """Whether it is a convolution whose method `W_` gives its weight divided by a running estimate of its norm."""
    return isinstance(layer, nn.Conv2d) and hasattr(type(layer), "W_")


def _is_wrapper(layer: nn.Module) -> bool:
    """Whether it is a module around a layer whose weight it sets before it calls it, after a step of power iteration."""
    return hasattr(type(layer), "_update_u_v") and list(layer._modules) == ["module"]


def _is_transposed(layer: nn.Module) -> bool:
    """Whether it is a projection whose parameters are W (C, O) and b."""
    return set(layer._parameters) == {"W", "b"} and not layer._modules
