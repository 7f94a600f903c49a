"""A foreign block's forward pass on this layer: its sub-modules' present weights into one call."""

from typing import Any

import torch
from torch import Tensor, nn

from .. import functional
from ..modules import QueriesAndKeys
from ..projections import read, run_pre_hooks, without_steps
from .families import BY_NAME, Family, Recipe, called_of
from .parts import check_unobserved, parts_of


def run(block: nn.Module, recipe: Recipe, x: Tensor, backend: str | None = None) -> Tensor:
    """What the block makes of the map x (N, C, H, W), by the recipe; of x (N, C, …) where the block takes tokens of any kind."""
    family = BY_NAME[recipe.family]
    if x.ndim != 4 and family.takes_tokens:
        return run(block, recipe, x.flatten(2).unsqueeze(3), backend).reshape(x.shape)
    w_o, b_o, afterwards = _output(block, family)
    check_unobserved(block, called_of(block, family, afterwards))
    operands: list[Any] = [*_queries_keys_values(block, family, recipe), w_o, b_o]
    if family.ahead:  # such blocks convert their weights to the dtype of the map
        operands = [None if w is None else w.to(x.dtype) for w in operands]
    w_q, w_k, w_v, b_q, b_k, b_v, w_o, b_o = operands
    gamma = getattr(block, family.gamma) if family.gamma else None
    simple = not afterwards
    out = functional.self_attention_2d(
        x,
        w_q,
        w_k,
        w_v,
        b_q,
        b_k,
        b_v,
        w_o=w_o,
        b_o=b_o,
        gamma=gamma,
        scale=recipe.scale,
        num_heads=recipe.num_heads,
        norm=_norm(block, family, w_q.dtype),
        pool=recipe.pool,
        residual=recipe.residual and simple,
        res_scale=recipe.res_scale if simple else 1.0,
        normalize=recipe.normalize,
        backend=backend,
    )
    if simple:
        return out
    for module in afterwards:
        out = module(out)
    return recipe.res_scale * (x + out if recipe.residual else out)


def queries_and_keys(block: nn.Module, recipe: Recipe) -> QueriesAndKeys:
    """What decides where the block looks. Asking changes nothing: spectral norm makes no step."""
    family = BY_NAME[recipe.family]
    with without_steps(block):
        w_q, w_k, w_v, b_q, b_k, _ = _queries_keys_values(block, family, recipe)
    value_channels = w_v.shape[0] if family.out else None
    norm = _norm(block, family, w_q.dtype)
    return QueriesAndKeys(w_q, w_k, b_q, b_k, recipe.scale, recipe.normalize, recipe.num_heads, norm, recipe.pool, value_channels)


def split(packed: Tensor, order: str, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries', keys' and values' rows of a weight or bias (3·h·d, …) that holds them in `order`, each (h·d, …)."""
    sizes = {"3": 3, "h": num_heads, "d": packed.shape[0] // (3 * num_heads)}
    q, k, v = packed.unflatten(0, [sizes[axis] for axis in order]).movedim(order.index("3"), 0).flatten(1, 2).unbind(0)
    return q, k, v


def _queries_keys_values(
    block: nn.Module, family: Family, recipe: Recipe
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """`(w_q, w_k, w_v, b_q, b_k, b_v)`."""
    if family.packed:
        weight, bias = _projection(block, family.packed)
        weights = split(weight, recipe.order, recipe.num_heads)
        return *weights, *((None, None, None) if bias is None else split(bias, recipe.order, recipe.num_heads))
    (w_q, b_q), (w_k, b_k), (w_v, b_v) = (_projection(block, name) for name in family.projections)
    if recipe.exchanged:
        w_q, b_q, w_k, b_k = w_k, b_k, w_q, b_q
    return w_q, w_k, w_v, b_q, b_k, b_v


def _projection(block: nn.Module, name: str) -> tuple[Tensor, Tensor | None]:
    return read(parts_of(_sub_module(block, name), name).layer, name)


def _sub_module(block: nn.Module, name: str) -> Any:
    return block._modules[name] if name in block._modules else block.get_submodule(name)


def _output(block: nn.Module, family: Family) -> tuple[Tensor | None, Tensor | None, list[nn.Module]]:
    """Weight and bias of the output projection, and the modules behind it that change anything."""
    if not family.out:
        return None, None, []
    parts = parts_of(_sub_module(block, family.out), family.out)
    behind = [*parts.afterwards, *(_sub_module(block, name) for name in family.afterwards)]
    behind = [m for m in behind if not (isinstance(m, nn.Identity) or (isinstance(m, nn.Dropout | nn.Dropout2d) and m.p == 0))]
    return *read(parts.layer, family.out), behind


def _norm(block: nn.Module, family: Family, dtype: torch.dtype) -> functional.GroupNorm | None:
    """The normalisation as an argument; some keep its weights in fp32 and the rest in half precision."""
    if not family.norm:
        return None
    norm = _sub_module(block, family.norm)
    run_pre_hooks(norm, family.norm)
    weight, bias = (None if t is None else t.to(dtype) for t in (norm.weight, norm.bias))
    return functional.GroupNorm(norm.num_groups, weight, bias, norm.eps)
