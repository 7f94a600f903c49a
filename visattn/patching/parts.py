"""What stands in a foreign block around its projections, and who looks at it."""

from collections.abc import Container
from typing import Any, NamedTuple

from torch import nn

from ..projections import MAKERS_OF_WEIGHTS, Unsuitable, kind_of

AFTERWARDS = (nn.modules.batchnorm._BatchNorm, nn.Dropout, nn.Dropout2d)


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
            raise Unsuitable(f"{name} holds a {kind_of(child)}")
    return Parts(layer, pool, tuple(afterwards))


def _pool_size(pool: nn.MaxPool2d, name: str) -> int:
    sizes = {*_pair(pool.kernel_size), *_pair(pool.stride)}
    if len(sizes) != 1 or any(_pair(pool.padding)) or pool.ceil_mode or set(_pair(pool.dilation)) != {1}:
        raise Unsuitable(f"{name} pools with {pool}, where only square windows side by side are known")
    return sizes.pop()


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)


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
