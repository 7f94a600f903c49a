"""Whether a block computes what a recipe says: both are run on small random maps, with random parameters.

The block's own parameters would not do: a γ of zero, or a last projection of zeros, hides everything. The block itself is left as it was,
to the bit: parameters, running statistics, vectors of spectral norm, training mode, whatever its attributes hold, and the state of the
random generator.
"""

from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..projections import MAKERS_OF_WEIGHTS, Unsuitable
from .families import Recipe
from .running import run

SHAPE = (2, 12, 10)
"""Maps, height and width: not square; even, because some that pool can only halve; and no multiple of a usual window."""

LARGE_SHAPE = (1, 36, 30)
"""The same for a map of more than 32×32 pixels, since some blocks treat those otherwise; hardly more, for the sake of time."""

TOLERANCE = 1e-3
"""Relative, in float32. A different formula differs by about 1."""

WARM_UP = 4
"""Passes in training mode before anything is compared, in which estimates of spectral norms find the random weights."""

CONTAINERS = (dict, OrderedDict, defaultdict, list, set, deque)
"""What may hold more after a forward pass than before; classes that inherit from these may not let themselves be filled again."""

State = dict[str, Tensor]
Inputs = tuple[Tensor, ...]
Before = Callable[..., Tensor]


class _Pass(NamedTuple):
    """Inputs, parameters and buffers, mode; and whether it is differentiated, which takes most of the time."""

    inputs: Inputs
    state: State
    training: bool
    differentiated: bool = True


class _Outcome(NamedTuple):
    """What comes of a pass.

    Attributes:
        out: the map, or whatever else is returned; is_pair: whether an attention matrix came with it.
        left: parameters and buffers afterwards.
        gradients: of the sum of the map, each number with a weight of its own, by inputs and parameters.
        attributes: names of those that the pass has set.
    """

    out: Any
    is_pair: bool
    left: State
    gradients: list[Tensor]
    attributes: set[str]


class _Method(nn.Module):
    """A block's forward method without the hooks on the block, or the recipe in its place, on what `before` makes of the inputs."""

    def __init__(self, block: nn.Module, recipe: Recipe | None = None, before: Before | None = None) -> None:
        super().__init__()
        self.block = block
        self.recipe = recipe
        self.before = before

    def forward(self, *inputs: Tensor) -> tuple[Any, bool, set[str]]:
        """The map, or whatever else the method returns; whether a matrix came with it; and the names of the attributes that it sets.

        The map is differentiated here, where the parameters are in their places: checkpoints compute with them once more.
        """
        before = _attributes(self.block)
        if self.recipe is None:
            result = self.block.forward(*inputs)
        else:
            result = run(self.block, self.recipe, self.before(self.block, *inputs) if self.before else inputs[0], backend="torch")
        after = _attributes(self.block)
        attributes = {name for name, held in after.items() if name not in before or not _are_same(held, before[name])}
        is_pair = _is_pair(result, inputs[0].shape[2:].numel())
        out = result[0] if is_pair else result
        if isinstance(out, Tensor) and out.requires_grad:
            out.backward(_normal(out.shape, torch.Generator("cpu").manual_seed(1)))
        return out, is_pair, attributes


def matching_recipe(
    block: nn.Module, recipes: Iterable[Recipe], channels: int, vector: int | None = None, before: Before | None = None
) -> Recipe:
    """The first recipe by which the block computes what it does, forward and back, in training and in evaluation.

    Args:
        block: takes a map of so many channels, and a vector of so many numbers for each map if there is one.
        recipes: in the order in which they are tried.
        before: what the recipe's map is made of the inputs with, where it is not the first of them.

    Raises:
        Unsuitable: none.
    """
    closest = float("inf")
    with (
        _left_as_it_was(block), torch.inference_mode(False), torch.enable_grad(), torch.autocast("cpu", enabled=False),
        torch.random.fork_rng(devices=[]),
    ):  # fmt: skip
        generator = torch.Generator("cpu").manual_seed(0)
        state = _random_state(block, generator)
        small, large = (_random_inputs(shape, channels, vector, generator) for shape in (SHAPE, LARGE_SHAPE))
        original = _Method(block)
        try:
            with torch.no_grad():
                for _ in range(WARM_UP):
                    _call(original, state, small, training=True)
            negative = state | {name: -state[name] for name, _ in original.named_parameters()}
            passes = [_Pass(small, state, True), _Pass(small, negative, False), _Pass(large, state, False, differentiated=False)]
            expected = [_outcome(original, one) for one in passes]
        except Exception as error:
            raise Unsuitable(f"it does not run on a map alone, forward and back: {type(error).__name__}: {error}") from error
        if len({outcome.is_pair for outcome in expected}) > 1:
            raise Unsuitable("it returns an attention matrix in some passes only")
        if isinstance(expected[0].out, Tensor) and torch.equal(expected[0].out, small[0]):
            raise Unsuitable("it returns its map as it is, whatever its parameters are, so that no attention shows")
        for recipe in recipes:
            method = _Method(block, recipe, before)
            differences = (_difference(method, one, outcome) for one, outcome in zip(passes, expected, strict=True))
            found = next((difference for difference in differences if not difference <= TOLERANCE), None)
            if found is None:
                return recipe._replace(returns_pair=expected[0].is_pair)
            closest = min(closest, found)
    by = f"by {closest:.0%} of the branch" if closest < float("inf") else "in its shape or type"
    raise Unsuitable(f"it computes something else: on a random map it differs from the nearest known form {by}")


@contextmanager
def _left_as_it_was(block: nn.Module) -> Iterator[None]:
    """Attributes of the block and its sub-modules are what they were, and so is what they contain, such as weights that hooks leave behind.

    Within, only hooks that make weights are called, and tensors that are plain attributes are copies.
    """
    containers = {id(held): held for module in block.modules() for held in _within(module.__dict__) if type(held) in CONTAINERS}
    before = [(container, list(container.items() if isinstance(container, dict) else container)) for container in containers.values()]
    try:
        for module in block.modules():
            makers = {key: hook for key, hook in module._forward_pre_hooks.items() if isinstance(hook, MAKERS_OF_WEIGHTS)}
            copies = {name: _copied(held) for name, held in module.__dict__.items() if isinstance(held, Tensor)}
            none: dict[str, Any] = {name: OrderedDict() for name in ("_forward_hooks", "_backward_hooks", "_backward_pre_hooks")}
            module.__dict__.update(copies, **none, _forward_pre_hooks=OrderedDict(makers))
        yield
    finally:
        for container, contents in before:
            container.clear()
            if isinstance(container, dict | set):
                container.update(contents)
            else:
                container.extend(contents)


def _attributes(block: nn.Module) -> dict[str, list[Any]]:
    """What every attribute of the block and its sub-modules holds, by name: itself, and what it contains."""
    held: dict[str, list[Any]] = {}
    for prefix, module in block.named_modules():
        named = module.__dict__ | module._parameters | module._buffers
        del named["_parameters"], named["_buffers"]
        held |= {f"{prefix}.{name}".lstrip("."): _within(value) for name, value in named.items()}
    return held


def _within(value: Any) -> list[Any]:
    """The value, and what it contains if it is a container, and so on; of what contains itself, once."""
    found, entered = [value], set()
    for held in found:  # which grows
        if isinstance(held, (*CONTAINERS, tuple)) and id(held) not in entered:
            entered.add(id(held))
            found.extend(held.values() if isinstance(held, dict) else held)
    return found


def _are_same(values: list[Any], others: list[Any]) -> bool:
    """Whether they are the same objects, or equal where they are numbers or text."""
    return len(values) == len(others) and all(
        value is other or (isinstance(value, int | float | str) and type(value) is type(other) and value == other)
        for value, other in zip(values, others, strict=True)
    )


def _random_state(block: nn.Module, generator: torch.Generator) -> State:
    """Parameters that let every part of the block be seen, and copies of its buffers; in float32 on the CPU."""
    state = {}
    for name, parameter in block.named_parameters():
        if not parameter.is_floating_point() or isinstance(parameter, nn.UninitializedParameter):
            raise Unsuitable(f"its parameter {name} is {parameter.dtype} and made later or quantised, not a floating tensor")
        noise = _normal(parameter.shape, generator)
        wide = parameter.ndim >= 2
        state[f"block.{name}"] = noise / max(1, parameter.shape[1:].numel()) ** 0.5 if wide else noise.sign() * (0.5 + 0.25 * noise.abs())
    return state | {f"block.{name}": _copied(buffer) for name, buffer in block.named_buffers()}


def _copied(tensor: Tensor) -> Tensor:
    """On the CPU, in float32 if it is a floating tensor."""
    copy = torch.ones(tensor.shape, dtype=tensor.dtype, device="cpu") if tensor.is_meta else tensor.detach().cpu().clone()
    return copy.float() if copy.is_floating_point() else copy


def _random_inputs(shape: Sequence[int], channels: int, vector: int | None, generator: torch.Generator) -> Inputs:
    maps, *extents = shape
    x = _normal((maps, channels, *extents), generator)
    return (x,) if vector is None else (x, _normal((maps, vector), generator))


def _normal(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")


def _call(method: _Method, state: State, inputs: Inputs, training: bool) -> tuple[Any, bool, set[str]]:
    """What the method returns with `state` for parameters and buffers, which it may change."""
    torch.default_generator.manual_seed(0)
    method.block.train(training)
    return functional_call(method, state, tuple(tensor.clone() for tensor in inputs))


def _outcome(method: _Method, one: _Pass) -> _Outcome:
    """What comes of the pass, on copies of everything, so that a block may write into its parameters."""
    inputs = [tensor.clone().requires_grad_() for tensor in one.inputs]
    parameters = {name: one.state[name].detach().clone().requires_grad_() for name, _ in method.named_parameters()}
    left = {name: tensor.clone() for name, tensor in (one.state | parameters).items()}
    with torch.set_grad_enabled(one.differentiated):
        out, is_pair, attributes = _call(method, left, tuple(inputs), one.training)
    gradients = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in (*inputs, *parameters.values())]
    return _Outcome(out, is_pair, left, gradients, attributes)


def _difference(method: _Method, one: _Pass, expected: _Outcome) -> float:
    """How far the method is from the expected outcome, relative to its branch; infinite where that cannot be said.

    Raises:
        Unsuitable: the result is the expected one, and what else comes of the pass is not.
    """
    try:
        found = _outcome(method, one)
    except (ValueError, TypeError, RuntimeError):
        return float("inf")  # this recipe and these weights do not fit together
    wanted = expected.out
    if not isinstance(wanted, Tensor) or wanted.shape != found.out.shape or not wanted.isfinite().all():
        return float("inf")
    x, recipe = one.inputs[0], method.recipe
    shows_its_branch = method.before is None and recipe is not None and recipe.residual and recipe.res_scale == 1
    triples = [(found.out, wanted, wanted - x if shows_its_branch else wanted)]
    triples += [(found.left[name], tensor, tensor) for name, tensor in expected.left.items() if tensor.is_floating_point()]
    difference = max(_relative(*triple) for triple in triples)
    if difference <= TOLERANCE:
        _check_what_else(found, expected)
    return difference


def _check_what_else(found: _Outcome, expected: _Outcome) -> None:
    """Raises Unsuitable if the block sets attributes that would not be set any more, or has another gradient.

    Gradients that are zero but for rounding, such as that of the keys' bias, are judged by the largest.
    """
    forgotten = expected.attributes - found.attributes
    if forgotten:
        raise Unsuitable(f"its forward method sets {', '.join(sorted(forgotten))}, which would not be set any more")
    largest = max(float(gradient.norm()) for gradient in expected.gradients)
    pairs = zip(found.gradients, expected.gradients, strict=True)
    if not all(_relative(mine, wanted, wanted, 0.01 * largest) <= TOLERANCE for mine, wanted in pairs):
        raise Unsuitable(
            "it has another gradient: forward it computes what is known here, backward it does not, as where a part is detached"
        )


def _relative(found: Tensor, right: Tensor, size: Tensor, least: float = 0.0) -> float:
    return float((found - right).detach().norm() / size.detach().norm().clamp(min=max(least, 1e-3)))


def _is_pair(result: Any, pixels: int) -> bool:
    """Whether a map came with an attention matrix, (N, queries, keys)."""
    if not (isinstance(result, tuple) and len(result) == 2 and all(isinstance(t, Tensor) for t in result)):
        return False
    return pixels in result[1].shape[-2:]
