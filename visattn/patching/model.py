"""Patching a whole model: find the blocks, ask each how it computes, replace what can be replaced, report the rest."""

from dataclasses import dataclass, field
from numbers import Real
from types import TracebackType
from typing import Any

import torch
from torch import nn

from .. import validation
from ..modules import AttentionLayer
from ..projections import Unsuitable, kind_of
from . import diffusers
from .families import DIFFUSERS, EDM, Family, Recipe, family_of, input_channels, number_of, recipes_of
from .probing import matching_recipe
from .swapping import PatchedBlock, before_attention, swap, swap_back


@dataclass
class PatchReport:
    """What `patch_model` did. As a context manager it undoes that at the end of the block.

    Attributes:
        replaced: names of the modules that run on visattn now, as `named_modules` gives them; "" is the model itself.
        skipped: pairs (name, reason) of the blocks that were left as they are.
        notes: for each replaced name, how its block computes.
    """

    replaced: list[str] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    notes: dict[str, str] = field(default_factory=dict)
    _modules: list[nn.Module] = field(default_factory=list, repr=False)

    def __enter__(self) -> "PatchReport":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for module in self._modules:
            _restore(module)

    def __str__(self) -> str:
        lines = [f"{len(self.replaced)} attention block{'s' * (len(self.replaced) != 1)} on visattn, {len(self.skipped)} left as before"]
        if not (self.replaced or self.skipped):
            lines.append(
                "  none was found: a block is known by the names of its parts, and the known ones are in visattn.convert.FAMILIES;"
            )
            lines.append("  visattn.SelfAttention2d can take the place of others")
        lines += [f"  {_shown(name)}: {self.notes[name]}" for name in self.replaced]
        lines += [f"  {_shown(name)} left: {reason}" for name, reason in self.skipped]
        return "\n".join(lines)


def patch_model(model: nn.Module, *, attention_maps: str = "keep") -> PatchReport:
    """Makes the self-attention blocks of a model, whoever wrote them, run on visattn, in place.

    Only their forward methods are replaced. Modules, parameters, state_dict, hooks, and with them optimisers, EMA copies and
    checkpoints stay what they are; deepcopy, pickle, `nn.DataParallel` and `torch.compile` work. Spectral norm, weight norm,
    parametrisations and batch norm behind the output projection stay live. Blocks are known by their parameters, and by what
    they compute: each is run forward and back on small random maps first, and left as it is unless the results are the same. A model is
    left as it was by that, to the bit, attributes that a forward pass fills included.

    A patched block takes a map alone; a mask, or a request for the attention matrix, raises TypeError. `visattn.explain` and
    `visattn.attention_rows` can be asked about it.

    Args:
        model: any module; searched with all that it contains.
        attention_maps: what becomes of blocks that return their attention matrix (N, H·W, H·W) beside the map, as SAGAN's. "keep":
            they are left as they are, since with the matrix there is nothing to save. "skip": they return None in its place.

    Returns:
        A report, which as a context manager (`with visattn.patch_model(model):`) undoes the replacement. `unpatch_model` does, too.

    Raises:
        TypeError, ValueError: the arguments are not as above; nothing has been replaced.
    """
    validation.check_patching(model, attention_maps)
    report = PatchReport()
    recipes: list[tuple[nn.Module, Recipe]] = []
    inside_of_block: set[nn.Module] = set()
    for name, module in model.named_modules():
        if module in inside_of_block:
            continue
        try:
            recipe = _recipe_of(module, attention_maps)
        except Unsuitable as reason:
            report.skipped.append((name, str(reason)))
        else:
            if recipe is None:
                continue
            recipes.append((module, recipe))
            report.replaced.append(name)
            report.notes[name] = _described(recipe)
        inside_of_block.update(module.modules())
    for module, recipe in recipes:
        _replace(module, recipe)
        report._modules.append(module)
    return report


def unpatch_model(model: nn.Module) -> list[str]:
    """Gives every patched block of the model its own forward method back, and returns their names.

    Raises:
        TypeError: model is no module.
    """
    validation.check_module("model", model)
    names = [name for name, module in model.named_modules() if _is_patched(module)]
    for name in names:
        _restore(model.get_submodule(name))
    return names


def _recipe_of(module: nn.Module, attention_maps: str) -> Recipe | None:
    """How the module computes, None if it is no attention block.

    Raises:
        Unsuitable: it is one, and has to stay as it is.
    """
    if _is_patched(module):
        raise Unsuitable("it runs on visattn already")
    if isinstance(module, AttentionLayer):
        return None
    if diffusers.is_attention(module):
        return diffusers.recipe_of(module)
    if _is_channel_attention(module):
        raise Unsuitable("it attends over channels: its matrix is C×C, and small")
    family = family_of(module)
    if family is None:
        return None
    if isinstance(module, torch.jit.ScriptModule):
        raise Unsuitable("it is a script module, whose forward method cannot be replaced")
    if "forward" in module.__dict__:
        raise Unsuitable("its forward method has been replaced already")
    try:
        recipe = _recipe_of_tail(module) if family.ahead else _recipe_of_block(module, family)
    except Unsuitable as reason:
        hint = f" ({family.lookalike})" if family.lookalike and "something else" in str(reason) else ""
        raise Unsuitable(f"{reason}{hint}") from reason
    if recipe.returns_pair and attention_maps == "keep":
        raise Unsuitable('it returns its attention matrix; attention_maps="skip" returns None in its place, and saves the memory')
    return recipe


def _recipe_of_block(block: nn.Module, family: Family) -> Recipe:
    return matching_recipe(block, recipes_of(block, family), input_channels(block, family))


def _recipe_of_tail(block: Any) -> Recipe:
    """For a block that takes a map and a vector, and scales the sum by an attribute of its own."""
    skip_scale, in_channels = float(number_of(block, "skip_scale", Real)), int(number_of(block, "in_channels"))
    vector = getattr(block.affine, "in_features", None)
    if vector is None:
        raise Unsuitable(f"its affine is a {kind_of(block.affine)}, where a linear map is expected")
    recipes = [recipe._replace(res_scale=skip_scale) for recipe in recipes_of(block, EDM)]
    return matching_recipe(block, recipes, in_channels, vector, before_attention)


def _replace(module: nn.Module, recipe: Recipe) -> None:
    if recipe.family == DIFFUSERS.name:
        diffusers.set_processor(module, recipe)
    else:
        swap(module, recipe)


def _is_patched(module: nn.Module) -> bool:
    return isinstance(module, PatchedBlock) or diffusers.is_patched(module)


def _restore(module: nn.Module) -> None:
    """Nothing where it has been restored before."""
    if isinstance(module, PatchedBlock):
        swap_back(module)
    elif diffusers.is_patched(module):
        diffusers.restore_processor(module)


def _is_channel_attention(module: nn.Module) -> bool:
    """Whether it is DANet's attention between channels, which has a γ, a softmax and no projection."""
    return list(module._parameters) == ["gamma"] and [type(child) for child in module.children()] == [nn.Softmax]


def _described(recipe: Recipe) -> str:
    """What the probe found out, in words."""
    found = [recipe.family, f"{recipe.num_heads} head{'s' * (recipe.num_heads > 1)}", f"scale {recipe.scale:.4g}"]
    if recipe.exchanged:
        found.append("query and key exchanged")
    if recipe.normalize == "queries":
        found.append("softmax over the queries")
    if recipe.pool > 1:
        found.append(f"keys and values pooled by {recipe.pool}")
    if recipe.returns_pair:
        found.append("returns None in place of the attention matrix")
    return ", ".join(found)


def _shown(name: str) -> str:
    return name or "the model itself"
