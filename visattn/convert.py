"""Weights of other people's attention blocks, loaded into this package's layers."""

from collections.abc import Container, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from . import validation
from .patching.families import BY_NAME, QKV_ORDERS, Family
from .patching.running import split

OLD_DIFFUSERS = Family("diffusers, old names", "query", "key", "value", out="proj_attn", norm="group_norm")
FAMILIES = {**BY_NAME, OLD_DIFFUSERS.name: OLD_DIFFUSERS}

BATCH_NORM_EPS = 1e-5
"""A state dict does not hold it; this is what everybody leaves it at."""

MANY = 30
"""So many keys are named; a whole model has hundreds."""

OF_PROJECTIONS = {
    "weight", "bias", "W", "b", "weight_orig", "weight_mask", "bias_orig", "bias_mask", "weight_u", "weight_v", "weight_g", "weight_bar",
    "u0", "parametrizations.weight.original", "parametrizations.weight.original0", "parametrizations.weight.original1",
    "parametrizations.weight.0._u", "parametrizations.weight.0._v",
}  # fmt: skip
OF_BATCH_NORM = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}
OF_ESTIMATES = {"weight_sv", "sv0"}  # of norms, which follow from what else there is

State = dict[str, Tensor]


def load(
    layer: nn.Module,
    state_dict: Mapping[str, Tensor] | str | Path,
    prefix: str = "",
    *,
    family: str | None = None,
    qkv_order: str | None = None,
) -> str:
    """Loads the weights of a foreign block into a layer: `conv_query`, `conv_key`, `conv_value`, perhaps `norm`, `conv_out`, `gamma`.

    Weights may be (O, C), (O, C, 1) or (O, C, 1, 1), or transposed where the family has them so. Spectral and weight norm are
    applied, as in evaluation; batch norm behind the output projection is folded into it. A bias that the block does not have is zero.
    What is no weight (scale, heads, pooling, residual, softmax over keys or queries) is the layer's own: SAGAN's block
    needs `scale=1.0`, CCNet's has the same keys and is other mathematics.

    Args:
        layer: a SelfAttention2d or Attention of the right shape.
        state_dict: the block's tensors, or those of a whole model, or the path of a .safetensors file with them.
        prefix: what the block's keys begin with, such as "decoder.mid.attn_1.".
        family: one of `convert.FAMILIES`; None recognises it by the keys.
        qkv_order: how one projection to queries, keys and values counts its channels: "3hd", "h3d" or "hd3", the last letter changing
            first. Where that is a flag of the block and not in its weights (guided-diffusion: "h3d", with
            `use_new_attention_order` "3hd"; timm Attention2d: "3hd", with `head_first` "h3d") it has to be told, unless there is one head.

    Returns:
        The name of the family.

    Raises:
        TypeError: the arguments are not as above, or a weight is no tensor of floating numbers. Nothing has been loaded.
        ValueError: the keys are no known block's, or do not fit the layer; the message names each. Or the file is damaged, or of another
            kind. Nothing has been loaded.
        OSError: the file cannot be read.
        ModuleNotFoundError: the package safetensors is not installed, and a file is to be read.
    """
    validation.check_module("layer", layer)
    tensors = _tensors(state_dict)
    validation.check_state_dict(tensors, prefix)
    state = _widened(_below(tensors, prefix))
    known = _recognised(state, family, prefix)
    num_heads = getattr(layer, "num_heads", 1)
    found = _converted(state, known, _order(known, qkv_order, num_heads), num_heads)
    validation.check_weights(found)
    own = layer.state_dict()
    for name, tensor in own.items():
        if name.endswith(".bias") and name not in found and f"{name.removesuffix('bias')}weight" in found:
            found[name] = torch.zeros_like(tensor)
    problems = [f"the layer has {name}, the block does not" for name in own if name not in found]
    problems += [f"the block has {name}, the layer does not" for name in found if name not in own]
    problems += [
        f"{name} is {tuple(found[name].shape)} in the block and {tuple(tensor.shape)} in the layer"
        for name, tensor in own.items()
        if name in found and _extents(found[name]) != _extents(tensor)
    ]
    if problems:
        raise ValueError(f"the block ({known.name}) does not fit {type(layer).__name__}: {'; '.join(problems)}")
    layer.load_state_dict({name: found[name].reshape(tensor.shape) for name, tensor in own.items()})
    return known.name


def _extents(tensor: Tensor) -> tuple[int, ...]:
    """The shape without ones, in which (O, C, 1, 1) and (O, C) are the same."""
    return tuple(size for size in tensor.shape if size != 1)


def _tensors(state_dict: Mapping[str, Tensor] | str | Path) -> Mapping[str, Tensor]:
    if not isinstance(state_dict, str | Path):
        return state_dict
    path = Path(state_dict)
    if path.suffix != ".safetensors" or path.is_dir():
        raise ValueError(f"state_dict must be a mapping or a .safetensors file, got {state_dict}; load other files yourself")
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{path.name} is read by the package safetensors: pip install safetensors", name=error.name) from error
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{state_dict} is no whole .safetensors file: {error}") from error


def _widened(state: State) -> State:
    """What is in half precision as fp32, so that norms are applied in it and the result rounded once."""
    return {name: t.float() if t.dtype in (torch.float16, torch.bfloat16) else t for name, t in state.items()}


def _below(tensors: Mapping[str, Tensor], prefix: str) -> State:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _recognised(state: State, family: str | None, prefix: str) -> Family:
    """The family with these keys, and as few others as possible."""
    if family is not None and family not in FAMILIES:
        raise ValueError(f"family must be one of {', '.join(map(repr, FAMILIES))}, got {family!r}")
    candidates = [FAMILIES[family]] if family is not None else list(FAMILIES.values())
    missing = {c.name: [name for name in _names(c) if not _holds(state, name)] for c in candidates}
    complete = [c for c in candidates if not missing[c.name]]
    if not complete:
        beginning = f" beginning with {prefix!r}" if prefix else ""
        expected = f"{', '.join(missing[family])} of {family} are missing" if family else "they are no known block's"
        found = [f"{prefix}{inner}" for inner in _prefixes(state) if any(_is_of(_below(state, inner), c) for c in candidates)]
        hint = f"; blocks begin with {', '.join(map(repr, found))}" if found else ""
        raise ValueError(f"{expected}; the keys{beginning} are {_few(sorted(state)) or 'none'}{hint}")
    best = min(complete, key=lambda c: len(_unexpected(state, c)))
    unexpected = _unexpected(state, best)
    if unexpected and not best.ahead:
        raise ValueError(f"the keys of {best.name} are there, and unexpected ones: {', '.join(unexpected)}; check the prefix {prefix!r}")
    return best


def _prefixes(state: State) -> list[str]:
    """What keys begin with, up to one of their dots."""
    return sorted({name[: i + 1] for name in state for i, letter in enumerate(name) if letter == "."})


def _is_of(state: State, family: Family) -> bool:
    return all(_holds(state, name) for name in _names(family)) and (bool(family.ahead) or not _unexpected(state, family))


def _few(names: list[str]) -> str:
    return ", ".join(names[:MANY]) + (f" and {len(names) - MANY} more" if len(names) > MANY else "")


def _names(family: Family) -> list[str]:
    return [name for name in (*family.projections, family.out, family.norm, family.gamma) if name]


def _unexpected(state: State, family: Family) -> list[str]:
    known = (*_names(family), *family.afterwards)
    return [name for name in state if not any(name == k or name.startswith(f"{k}.") for k in known)]


def _holds(state: State, name: str) -> bool:
    return any(key == name or key.startswith(f"{name}.") for key in state)


def _order(family: Family, qkv_order: str | None, num_heads: int) -> str:
    if not family.packed:
        return ""
    if qkv_order is not None and qkv_order not in QKV_ORDERS:
        raise ValueError(f"qkv_order must be one of {', '.join(map(repr, QKV_ORDERS))}, got {qkv_order!r}")
    if qkv_order is None and len(family.orders) > 1 and num_heads > 1:
        raise ValueError(
            f"qkv_order must be told for {family.name} with {num_heads} heads: {', '.join(map(repr, family.orders))}; see load"
        )
    return qkv_order or family.orders[0]


def _converted(state: State, family: Family, order: str, num_heads: int) -> State:
    """The block's tensors under the names of the layer."""
    found: State = {}

    def add(name: str, weight: Tensor, bias: Tensor | None) -> None:
        found[f"{name}.weight"] = weight
        if bias is not None:
            found[f"{name}.bias"] = bias

    names = ("conv_query", "conv_key", "conv_value")
    if family.packed:
        weight, bias = _projection(_below(state, f"{family.packed}."), family.packed)
        if len(weight) % (3 * num_heads):
            raise ValueError(f"{family.packed} must give queries, keys and values of {num_heads} heads, its weight has {len(weight)} rows")
        biases = (None,) * 3 if bias is None else split(bias, order, num_heads)
        for name, w, b in zip(names, split(weight, order, num_heads), biases, strict=True):
            add(name, w, b)
    else:
        sources = (family.key, family.query, family.value) if family.exchanged[0] else family.projections
        for name, source in zip(names, sources, strict=True):
            add(name, *_projection(_below(state, f"{source}."), source))
    if family.out:
        out = _below(state, f"{family.out}.")
        weight, bias = _projection(out, family.out, OF_BATCH_NORM)
        for batch_norm in (out, *(_below(state, f"{name}.") for name in family.afterwards)):
            weight, bias = _folded(weight, bias, batch_norm)
        add("conv_out", weight, bias)
    if family.norm:
        norm = _below(state, f"{family.norm}.")
        if missing := [name for name in ("weight", "bias") if name not in norm]:
            raise ValueError(f"{' and '.join(missing)} of {family.norm} are missing")
        add("norm", norm["weight"], norm["bias"])
    if family.gamma:
        found["gamma"] = state[family.gamma]
    return found


def _projection(state: State, name: str, behind: Container[str] = ()) -> tuple[Tensor, Tensor | None]:
    """Weight (O, C) and bias of one projection, or of a small stack that begins with one; `behind` it may be tensors of these names.

    Raises:
        ValueError: there are others.
    """
    for inner in ("0.", "conv.", "module."):
        if any(key.startswith(inner) for key in state):
            others = [key for key in state if not key.startswith(inner) and key.rpartition(".")[2] not in behind]
            if others:
                raise ValueError(f"{name} holds {_few(sorted(others))} beside a projection, which would be lost")
            return _projection(_below(state, inner), name)
    if unknown := sorted(set(state) - OF_PROJECTIONS - OF_ESTIMATES):
        raise ValueError(f"{name} holds {_few(unknown)}, which would be lost; merge or remove them before")
    if "W" in state:
        return state["W"].mT, state.get("b")
    bias = state.get("bias", state.get("bias_orig"))
    return _weight(state, name), bias * state["bias_mask"] if bias is not None and "bias_mask" in state else bias


def _weight(state: State, name: str) -> Tensor:
    """The weight (O, C) as a forward pass in evaluation would use it.

    Raises:
        ValueError: there is none, or it is no matrix.
    """
    made = _below(state, "parametrizations.weight.")
    if "weight_g" in state or "original0" in made:
        size, direction = (made["original0"], made["original1"]) if made else (state["weight_g"], state["weight_v"])
        return (direction * (size / direction.flatten(1).norm(dim=1).view_as(size))).flatten(1)
    original = made.get("original", state.get("weight_orig", state.get("weight_bar", state.get("weight"))))
    if original is None:
        raise ValueError(f"no weight among {', '.join(sorted(state))} of {name}")
    if original.ndim < 2:
        raise ValueError(f"{name} must have a weight (O, C) or (O, C, 1, 1), its shape is {tuple(original.shape)}")
    if "weight_mask" in state:
        original = original * state["weight_mask"]
    matrix = original.flatten(1)
    left = made.get("0._u", state.get("weight_u", state.get("u0")))
    if left is None:
        return matrix
    left, right = left.flatten(), made.get("0._v", state.get("weight_v"))
    if right is None or "weight_bar" in state:  # these make a step of power iteration in evaluation, too
        right = nn.functional.normalize(left @ matrix, dim=0)
        left = nn.functional.normalize(matrix @ right, dim=0)
    return matrix / (left @ matrix @ right)


def _folded(weight: Tensor, bias: Tensor | None, state: State) -> tuple[Tensor, Tensor | None]:
    """Weight and bias with the batch norm behind them, if there is one in `state`."""
    end = next((key for key in state if key.endswith("running_var")), None)
    if end is None:
        return weight, bias
    norm = _below(state, end.removesuffix("running_var"))
    factor = norm.get("weight", 1.0) * torch.rsqrt(norm["running_var"] + BATCH_NORM_EPS)
    shift = -norm["running_mean"] if bias is None else bias - norm["running_mean"]
    return weight * factor[:, None], norm.get("bias", 0.0) + factor * shift
