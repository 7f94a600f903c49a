"""The attention blocks of other people's code: where each keeps its weights, and in what they may differ.

All of them compute `res_scale · (x + γ (W_o softmax(scale · q kᵀ) v + b_o))` with q, k, v as projections of x or of GroupNorm(x). What
their parameters do not tell (which of two projections is the query, the scale, the order in which one convolution gives queries, keys
and values) is listed as choices; `probing.py` finds out which one a block makes.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product
from numbers import Integral
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..projections import Unsuitable, check_pointwise, check_projection, kind_of, unwrapped
from .parts import check_unobserved, parts_of

QKV_ORDERS = ("3hd", "h3d", "hd3")
"""How a projection to queries, keys and values at once counts its 3·h·d channels: what changes last comes last; h heads of d."""


@dataclass(frozen=True)
class Family:
    """A kind of block: names of its sub-modules ("" where it has none), then the choices, the usual one first."""

    name: str
    query: str = ""
    key: str = ""
    value: str = ""
    packed: str = ""  # one projection to queries, keys and values, instead of three
    out: str = ""
    norm: str = ""
    gamma: str = ""
    afterwards: tuple[str, ...] = ()  # what the branch passes through after the output projection
    heads: tuple[str, ...] = ()  # attributes that may hold the number of heads
    exchanged: tuple[bool, ...] = (False, True)  # whether what is called key is the query
    normalize: tuple[str, ...] = ("keys",)
    scales: tuple[str, ...] = ("one", "head", "input")  # 1, 1/√(channels of a head's query), 1/√C
    pools: tuple[int, ...] = (1,)
    orders: tuple[str, ...] = ("",)
    residuals: tuple[bool, ...] = (True,)
    res_scales: tuple[float, ...] = (1.0,)
    takes_tokens: bool = False  # whether maps of any number of dimensions are flattened
    ahead: tuple[str, ...] = ()  # sub-modules that come before, where attention is the last part of a larger block
    lookalike: str = ""  # what else has these parameters

    @property
    def projections(self) -> tuple[str, ...]:
        """The sub-modules that queries, keys and values come from."""
        return (self.packed,) if self.packed else (self.query, self.key, self.value)


class Recipe(NamedTuple):
    """How one block computes: its family, and the choice made wherever there is one. Plain values, so that it can be pickled."""

    family: str
    num_heads: int
    exchanged: bool
    normalize: str
    scale: float
    pool: int
    order: str
    residual: bool
    res_scale: float
    returns_pair: bool = False  # whether the block returns its attention matrix as well


CRISS_CROSS = "criss-cross attention has the same parameters"
EITHER = ("keys", "queries")
AS_NAMED = (False,)
DOT_PRODUCT = "the dot-product form has the same parameters and no softmax"

FAMILIES = (
    Family("CIFAR-10 assignment", "conv_query", "conv_key", "conv_value",
           normalize=EITHER, scales=("input", "one"), lookalike="attention between channels has the same parameters"),
    Family("SAGAN / DANet / CCNet", "query_conv", "key_conv", "value_conv", gamma="gamma", normalize=EITHER, lookalike=CRISS_CROSS),
    Family("SAGAN, long names", "query_convolution", "key_convolution", "value_convolution", gamma="gamma_parameter", normalize=EITHER),
    Family("fastai / DeOldify", "query", "key", "value", gamma="gamma", exchanged=(True, False), normalize=EITHER, takes_tokens=True),
    Family("BigGAN", "theta", "phi", "g", out="o", gamma="gamma", pools=(2, 1)),
    Family("StudioGAN", "conv1x1_theta", "conv1x1_phi", "conv1x1_g", out="conv1x1_attn", gamma="sigma", pools=(2, 1)),
    Family("Non-local block", "theta", "phi", "g", out="W", lookalike=DOT_PRODUCT),
    Family("mmcv NonLocal2d", "theta", "phi", "g", out="conv_out", scales=("head", "one", "input"), lookalike=DOT_PRODUCT),
    Family("timm NonLocalAttn", "t", "p", "g", out="z", afterwards=("norm",), scales=("input", "one", "head")),
    Family("VQGAN / LDM", "q", "k", "v", out="proj_out", norm="norm", scales=("head", "one")),
    Family("DDPM", "proj_q", "proj_k", "proj_v", out="proj", norm="group_norm", scales=("head", "one")),
    Family("score_sde", "NIN_0", "NIN_1", "NIN_2", out="NIN_3", norm="GroupNorm_0", scales=("head",), res_scales=(1.0, 2**-0.5)),
    Family("guided-diffusion", packed="qkv", out="proj_out", norm="norm", heads=("num_heads",), exchanged=AS_NAMED, scales=("head",),
           orders=QKV_ORDERS, takes_tokens=True),
    Family("timm Attention2d", packed="qkv", out="proj", afterwards=("proj_drop",), heads=("num_heads",), exchanged=AS_NAMED,
           scales=("head",), orders=QKV_ORDERS, residuals=(False,), lookalike="a position bias handed in from outside is no parameter"),
    Family("lucidrains Attention", packed="to_qkv", out="to_out", heads=("heads",), exchanged=AS_NAMED, scales=("head",), orders=("3hd",),
           residuals=(False,), lookalike="linear attention has the same parameters"),
)  # fmt: skip

EDM = Family(
    "EDM", packed="qkv", out="proj", norm="norm2", heads=("num_heads",), exchanged=AS_NAMED, scales=("head",), orders=("hd3",),
    ahead=("conv0", "affine"),
)  # fmt: skip

DIFFUSERS = Family(
    "diffusers", "to_q", "to_k", "to_v", out="to_out.0", norm="group_norm", afterwards=("to_out.1",), heads=("heads",),
    exchanged=AS_NAMED, scales=("head", "one"), residuals=(True, False),
)  # fmt: skip

BY_NAME = {family.name: family for family in (*FAMILIES, EDM, DIFFUSERS)}


def family_of(block: nn.Module) -> Family | None:
    """The family whose sub-modules the block has, None where it is no attention block of a map."""
    for family in (*FAMILIES, EDM):
        names = [*family.projections, *filter(None, (family.out, family.norm)), *family.afterwards, *family.ahead]
        if not all(isinstance(block._modules.get(name), nn.Module) for name in names):
            continue
        if family.gamma and not isinstance(getattr(block, family.gamma, None), Tensor):
            continue
        if not isinstance(_first_layer(block.get_submodule(family.projections[0])), nn.Linear):  # those take tokens, not maps
            return family
    return None


def called_of(block: nn.Module, family: Family, afterwards: Iterable[nn.Module]) -> set[nn.Module]:
    """The sub-modules that are still called: those behind the output projection, and those of the block that it is a part of."""
    called = {*afterwards, *(block._modules[name] for name in family.afterwards if name in block._modules)}
    if family.ahead:
        called.update(module for name, module in block._modules.items() if name not in (*family.projections, family.out, family.norm))
    return {module for module in called if module is not None}


def input_channels(block: nn.Module, family: Family) -> int:
    """How many channels its maps have."""
    return _widths(_first_layer(block.get_submodule(family.projections[0])))[0]


def recipes_of(block: nn.Module, family: Family) -> list[Recipe]:
    """Every way in which a block of this family may compute, the usual one first.

    Raises:
        Unsuitable: it cannot be computed here in any way.
    """
    parts = {name: parts_of(block.get_submodule(name), name) for name in (*family.projections, family.out) if name}
    for name, part in parts.items():
        check_projection(part.layer, name)
        check_pointwise(part.layer, name)
    for name in family.projections:
        if parts[name].afterwards:
            raise Unsuitable(f"{name} holds a {kind_of(parts[name].afterwards[0])}")
    if not family.ahead:
        _check_nothing_else(block, family)
    check_unobserved(block, called_of(block, family, parts[family.out].afterwards if family.out else ()))
    pools = [parts[name].pool for name in family.projections]
    if pools[0] != 1 or len(set(pools[1:])) > 1:
        raise Unsuitable(f"queries, keys and values are pooled by {pools}, where only keys and values alike may be")
    if family.norm:
        _check_norm(block.get_submodule(family.norm), family.norm)
    channels, queries = _widths(unwrapped(parts[family.projections[0]].layer))
    num_heads = _num_heads(block, family, queries)
    per_head = queries // (3 * num_heads if family.packed else num_heads)
    scales = {"one": 1.0, "head": per_head**-0.5, "input": channels**-0.5}
    choices = product(
        family.normalize, family.residuals, family.res_scales, family.pools, family.orders, family.exchanged,
        dict.fromkeys(scales[name] for name in family.scales),
    )  # fmt: skip
    return [
        Recipe(family.name, num_heads, exchanged, normalize, scale, pool * pools[-1], order, residual, res_scale)
        for normalize, residual, res_scale, pool, order, exchanged, scale in choices
    ]


def _first_layer(module: nn.Module) -> nn.Module:
    """The projection that a small stack begins with."""
    inner = module._modules.get("conv")
    if inner is not None:
        return _first_layer(inner)
    if isinstance(module, nn.Sequential) and len(module):
        return _first_layer(module[0])
    return unwrapped(module)


def _widths(layer: Any) -> tuple[int, int]:
    """Channels in and out."""
    if hasattr(layer, "in_channels"):
        return layer.in_channels, layer.out_channels
    return (layer.in_features, layer.out_features) if hasattr(layer, "in_features") else tuple(layer.W.shape)


def number_of(block: nn.Module, name: str, kind: type = Integral) -> Any:
    """An attribute that is a number.

    Raises:
        Unsuitable: there is none, or it is something else.
    """
    value = getattr(block, name, None)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise Unsuitable(f"its {name} is {value!r}, where a number is expected")
    return value


def _num_heads(block: nn.Module, family: Family, queries: int) -> int:
    name = next((name for name in family.heads if hasattr(block, name)), None)
    if name is None:
        return 1
    num_heads = int(number_of(block, name))
    if num_heads < 1 or queries % (3 * num_heads if family.packed else num_heads):
        raise Unsuitable(f"its {name} is {num_heads}, into which the {queries} channels of {family.projections[0]} cannot be split")
    return num_heads


def _check_norm(norm: nn.Module, name: str) -> None:
    """Raises Unsuitable unless it has what a group norm computes with; whether it computes that, a probe finds out."""
    tensors = [getattr(norm, parameter, norm) for parameter in ("weight", "bias")]
    is_group_norm = isinstance(getattr(norm, "num_groups", None), int) and isinstance(getattr(norm, "eps", None), float)
    if not is_group_norm or not all(tensor is None or isinstance(tensor, Tensor) for tensor in tensors):
        raise Unsuitable(f"its {name} is a {kind_of(norm)}, where a GroupNorm is expected")


def _check_nothing_else(block: nn.Module, family: Family) -> None:
    """Raises Unsuitable if the block has parameters that the family does not know, or drops attention weights at random."""
    known = (*family.projections, family.out, family.norm, family.gamma, *family.afterwards)
    prefixes = tuple(f"{name}." for name in known if name)
    further = [name for name, _ in block.named_parameters() if name not in known and not name.startswith(prefixes)]
    if further:
        raise Unsuitable(f"it has further parameters: {', '.join(further)}")
    for name, module in block.named_modules():
        if isinstance(module, nn.Dropout) and module.p > 0 and not f"{name}.".startswith(prefixes):
            raise Unsuitable(f"{name} drops attention weights at random, with probability {module.p}")
