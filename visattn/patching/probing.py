"""Whether a block computes what a recipe says: both are run on a small random map, with random parameters.

The block's own parameters would not do: a γ of zero, or a last projection of zeros, hides everything. The block itself is left as it was,
to the bit: parameters, running statistics, vectors of spectral norm, training mode and the state of the random generator.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..projections import MAKERS_OF_WEIGHTS, Unsuitable
from .families import Recipe
from .running import run

SHAPE = (2, 12, 10)
"""Maps, height and width: not square; even, because some that pool can only halve; and no multiple of a usual window."""

TOLERANCE = 1e-3
"""Relative, in float32. A different formula differs by about 1."""

WARM_UP = 4
"""Passes in training mode before anything is compared, in which estimates of spectral norms find the random weights."""

State = dict[str, Tensor]
Inputs = tuple[Tensor, ...]
Before = Callable[..., Tensor]


class _Method(nn.Module):
    """A block's forward method without the hooks on the block, or the recipe in its place, on what `before` makes of the inputs."""

    def __init__(self, block: nn.Module, recipe: Recipe | None = None, before: Before | None = None) -> None:
        super().__init__()
        self.block = block
        self.recipe = recipe
        self.before = before

    def forward(self, *inputs: Tensor) -> Any:
        if self.recipe is None:
            return self.block.forward(*inputs)
        return run(self.block, self.recipe, self.before(self.block, *inputs) if self.before else inputs[0], backend="torch")


def matching_recipe(
    block: nn.Module, recipes: Iterable[Recipe], channels: int, vector: int | None = None, before: Before | None = None
) -> Recipe:
    """The first recipe by which the block computes what it does, in training and in evaluation.

    Args:
        block: takes a map of so many channels, and a vector of so many numbers for each map if there is one.
        recipes: in the order in which they are tried.
        before: what the recipe's map is made of the inputs with, where it is not the first of them.

    Raises:
        Unsuitable: none.
    """
    closest = float("inf")
    with _left_as_it_was(block), torch.no_grad(), torch.autocast("cpu", enabled=False), torch.random.fork_rng(devices=[]):
        generator = torch.Generator("cpu").manual_seed(0)
        state = _random_state(block, generator)
        shapes = [(SHAPE[0], channels, *SHAPE[1:])] + ([] if vector is None else [(SHAPE[0], vector)])
        inputs = tuple(_normal(shape, generator) for shape in shapes)
        try:
            for _ in range(WARM_UP):
                _call(_Method(block), state, inputs, training=True)
            expected = {training: _called_on_a_copy(_Method(block), state, inputs, training) for training in (True, False)}
        except Exception as error:
            raise Unsuitable(f"its forward method does not take a map alone: {type(error).__name__}: {error}") from error
        returns_pair = _is_pair(expected[True][0])
        if returns_pair != _is_pair(expected[False][0]):
            raise Unsuitable("it returns an attention matrix in one of training and evaluation only")
        for recipe in recipes:
            method = _Method(block, recipe, before)
            found = max(_difference(method, state, inputs, *expected[training], training) for training in (True, False))
            if found <= TOLERANCE:
                return recipe._replace(returns_pair=returns_pair)
            closest = min(closest, found)
    by = f"by {closest:.0%} of the branch" if closest < float("inf") else "in its shape or type"
    raise Unsuitable(f"it computes something else: on a random map it differs from the nearest known form {by}")


@contextmanager
def _left_as_it_was(block: nn.Module) -> Iterator[None]:
    """Attributes of the block and its sub-modules are what they were, such as weights that hooks leave behind.

    Within, only hooks that make weights are called.
    """
    before = {module: dict(module.__dict__) for module in block.modules()}
    for module in before:
        makers = {key: hook for key, hook in module._forward_pre_hooks.items() if isinstance(hook, MAKERS_OF_WEIGHTS)}
        module.__dict__.update(_forward_hooks=OrderedDict(), _forward_pre_hooks=OrderedDict(makers))
    try:
        yield
    finally:
        for module, attributes in before.items():
            module.__dict__.clear()
            module.__dict__.update(attributes)


def _random_state(block: nn.Module, generator: torch.Generator) -> State:
    """Parameters that let every part of the block be seen, and copies of its buffers; in float32 on the CPU."""
    state = {}
    for name, parameter in block.named_parameters():
        if not parameter.is_floating_point() or isinstance(parameter, nn.UninitializedParameter):
            raise Unsuitable(f"its parameter {name} is {parameter.dtype} and made later or quantised, not a floating tensor")
        noise = _normal(parameter.shape, generator)
        wide = parameter.ndim >= 2
        state[f"block.{name}"] = noise / parameter[0].numel() ** 0.5 if wide else 0.5 + 0.25 * noise
    for name, buffer in block.named_buffers():
        copy = torch.ones(buffer.shape, device="cpu") if buffer.is_meta else buffer.detach().cpu().clone()
        state[f"block.{name}"] = copy.float() if copy.is_floating_point() else copy
    return state


def _normal(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")


def _call(method: _Method, state: State, inputs: Inputs, training: bool) -> Any:
    """What the method returns with `state` for parameters and buffers, which it may change."""
    torch.default_generator.manual_seed(0)
    method.block.train(training)
    return functional_call(method, state, tuple(tensor.clone() for tensor in inputs))


def _called_on_a_copy(method: _Method, state: State, inputs: Inputs, training: bool) -> tuple[Any, State]:
    """What the method returns, and what it leaves of a copy of `state`."""
    left = {name: tensor.clone() for name, tensor in state.items()}
    return _call(method, left, inputs, training), left


def _difference(method: _Method, state: State, inputs: Inputs, expected: Any, left: State, training: bool) -> float:
    """How far the method is from the expected result, relative to its branch; infinite where that cannot be said."""
    try:
        out, found_left = _called_on_a_copy(method, state, inputs, training)
    except (ValueError, TypeError, RuntimeError):
        return float("inf")  # this recipe and these weights do not fit together
    wanted = expected[0] if _is_pair(expected) else expected
    if not isinstance(wanted, Tensor) or wanted.shape != out.shape or not wanted.isfinite().all():
        return float("inf")
    x, recipe = inputs[0], method.recipe
    shows_its_branch = method.before is None and recipe is not None and recipe.residual and recipe.res_scale == 1
    pairs = [(out, wanted, wanted - x if shows_its_branch else wanted)]
    pairs += [(found_left[name], tensor, tensor) for name, tensor in left.items() if tensor.is_floating_point()]
    return max(float((found - right).norm() / size.norm().clamp(min=1e-3)) for found, right, size in pairs)


def _is_pair(result: Any) -> bool:
    """Whether a map came with an attention matrix, (N, queries, keys)."""
    if not (isinstance(result, tuple) and len(result) == 2 and all(isinstance(t, Tensor) for t in result)):
        return False
    return SHAPE[1] * SHAPE[2] in result[1].shape[-2:]
