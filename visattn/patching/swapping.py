"""A block that keeps everything but its forward method.

The method is replaced by giving the block a subclass of its own class. An attribute `forward` on the block would stay bound to
the original when `nn.DataParallel` replicates it; a class does not, and copies, pickles and compiles like any other.
"""

import copyreg
import functools
import inspect
import types
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ..modules import AttentionLayer, QueriesAndKeys
from .families import BY_NAME, Recipe
from .running import queries_and_keys, run


class PatchedBlock(AttentionLayer):
    """What a block of another class becomes, by a subclass of both: its own modules, parameters and hooks, this forward pass."""

    _visattn_original: type[nn.Module]
    _visattn_argument: str
    _visattn_recipe: Recipe

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """(N, C, H, W), which may go by the name that it had, to what the block returned before, None in the place of an attention matrix.

        Raises:
            TypeError: it was given anything else, such as a mask or a request for the attention matrix.
        """
        x, *further = inputs or (named.pop(self._visattn_argument, None),)
        if x is None or any(argument is not None and argument is not False for argument in (*further, *named.values())):
            raise TypeError(
                f"{type(self).__name__} runs on visattn and takes a map alone, got {len(inputs)} positional arguments and "
                f"{sorted(named)}; call visattn.unpatch_model first"
            )
        out = run(self, self._visattn_recipe, x)
        return (out, None) if self._visattn_recipe.returns_pair else out

    def queries_and_keys(self) -> QueriesAndKeys:
        return queries_and_keys(self, self._visattn_recipe)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        reduced: Any = super().__reduce_ex__(protocol)
        make, arguments, *state = reduced
        if make is copyreg.__newobj__:  # type: ignore[attr-defined]
            return _new, (self._visattn_recipe, self._visattn_original, *arguments[1:]), *state
        return _made_and_swapped, (self._visattn_recipe, make, arguments), *state


class PatchedTail(PatchedBlock):
    """A PatchedBlock whose attention is the last part, and is left out by the original where there are no heads."""

    @property
    def num_heads(self) -> int:
        """None for the original's forward method, whatever the block was told."""
        return 0

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """What the original forward method takes, to what it gives."""
        return run(self, self._visattn_recipe, self._visattn_original.forward(self, *inputs, **named))


def swap(block: nn.Module, recipe: Recipe) -> None:
    """Makes the block a PatchedBlock."""
    block.__dict__["_visattn_recipe"] = recipe
    block.__class__ = _patched(type(block), _kind(recipe))  # type: ignore[arg-type]


def swap_back(block: PatchedBlock) -> None:
    """Makes it what it was.

    Raises:
        RuntimeError: its class has been changed again since.
    """
    if type(block) is not _patched(block._visattn_original, _kind(block._visattn_recipe)):  # type: ignore[arg-type]
        raise RuntimeError(f"{type(block).__name__} was patched and then changed its class (parametrised, sharded); undo that first")
    block.__class__ = block._visattn_original  # type: ignore[assignment]
    del block.__dict__["_visattn_recipe"]


def before_attention(block: Any, *inputs: Tensor) -> Tensor:
    """What a block of which attention is the last part makes of its inputs before; for a probe, which nobody else sees."""
    block.num_heads, num_heads = 0, block.num_heads
    try:
        return block.forward(*inputs)
    finally:
        block.num_heads = num_heads


def _kind(recipe: Recipe) -> type[PatchedBlock]:
    return PatchedTail if BY_NAME[recipe.family].ahead else PatchedBlock


@functools.cache
def _patched(original: type[nn.Module], kind: type[PatchedBlock]) -> type[nn.Module]:
    """The subclass; it goes by the name of the original, which some code looks at."""
    names = {"__module__": original.__module__, "__qualname__": original.__qualname__, "__doc__": original.__doc__}
    own = {"_visattn_original": original, "_visattn_argument": _name_of_the_map(original)}
    return types.new_class(original.__name__, (kind, original), exec_body=lambda body: body.update(names, **own))


def _name_of_the_map(original: type[nn.Module]) -> str:
    """What its forward method calls its first argument, "" where that has no name."""
    parameters = inspect.signature(original.forward).parameters.values()
    names = [parameter.name for parameter in parameters if parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    return names[1] if len(names) > 1 else ""


def _new(recipe: Recipe, original: type[nn.Module], *arguments: Any) -> nn.Module:
    """An empty patched block, for what copies and unpickles."""
    patched = _patched(original, _kind(recipe))  # type: ignore[arg-type]
    return patched.__new__(patched, *arguments)


def _made_and_swapped(recipe: Recipe, make: Callable[..., nn.Module], arguments: tuple) -> nn.Module:
    """The same where the original is copied and unpickled in a way of its own."""
    block = make(*arguments)
    swap(block, recipe)
    return block
