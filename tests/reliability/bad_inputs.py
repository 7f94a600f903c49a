"""Whatever is handed in by mistake ends in the documented error before anything has run, and what is only unusual is right.

Every kind of input is tried on both backends. An error is of the type that is documented and its text says what was expected, what
came and, where that is not plain, what to do; no kernel and no implementation has been started, and no tensor has been changed.
"""

import contextlib
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch import Tensor
from torch.autograd import forward_ad

import visattn
from visattn import device, functional, reference, report, use_backend
from visattn.functional import GroupNorm
from visattn.models import create_model

from ..layouts import LAYOUTS, lazily_negated
from ..oracle import recorded_backends
from .figures import Figure

BACKENDS = ("torch", "triton")


def _normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


X, W, B = _normal(2, 8, 3, 4), _normal(8, 8, seed=1), _normal(8, seed=2)
CALL = {"x": X, "w_q": W, "w_k": W.mT.contiguous(), "w_v": W}
OUT, HALF, GROUPS = _normal(8, 4), _normal(4, 8), GroupNorm(2, B, B)
PIXELS = torch.tensor([[0, 1], [2, 3]])
TENSORS = (X, W, B, CALL["w_k"], OUT, HALF, PIXELS)
"""What no call may change."""


class Subclass(torch.Tensor):
    """As users have them: to carry a name, say."""


@dataclass(frozen=True)
class Kind:
    """Something that a user does. Wanted is an error with `text` in it, a regular expression; or, without one, what `right` gives."""

    name: str
    act: Callable[[], Any]
    error: type[Exception] | None = None
    text: str = ""
    right: Callable[[], Any] | None = None
    started: bool = False
    """Whether PyTorch can only tell afterwards, as on an input that is changed before the backward pass."""

    @property
    def wanted(self) -> str:
        if self.error is None:
            return "a right result"
        said = re.sub(r"\\(.)", r"\1", self.text.replace(".*", "…"))
        return f"{self.error.__name__}: {said}"


def calls(
    function: Callable[..., Any], defaults: dict[str, Any], rows: list[tuple[str, dict[str, Any], type[Exception], str]]
) -> list[Kind]:
    """Kinds that change something in the arguments of one function."""
    return [Kind(name, lambda c=change: function(**defaults | c), error, text) for name, change, error, text in rows]  # type: ignore[misc]


def right(name: str, function: Callable[..., Any] = functional.self_attention_2d, **change: Any) -> Kind:
    """Unusual arguments with which the layer computes what the reference computes of the same numbers."""
    arguments = CALL | change

    def expected() -> Tensor:
        resolved = {name: t.as_subclass(Tensor).resolve_neg() if isinstance(t, Tensor) else t for name, t in arguments.items()}
        return getattr(reference, function.__name__)(**resolved)

    return Kind(name, lambda: function(**arguments), right=expected)


NESTED = torch.nested.nested_tensor([X[0], X[1]])
DTYPE, LIST = "x must be float16, bfloat16, float32 or float64, got", torch.nested.nested_tensor([X[0], X[1][:4]], layout=torch.jagged)

BAD_CALLS = calls(functional.self_attention_2d, CALL, [
    ("one map without N", {"x": X[0]}, ValueError, r"shape \(N, C, H, W\), got \(8, 3, 4\); add a batch dimension"),
    ("five dimensions", {"x": X[None]}, ValueError, r"got \(1, 2, 8, 3, 4\)"),
    ("tokens", {"x": X.flatten(2)}, ValueError, r"got \(2, 8, 12\)"),
    ("no dimension", {"x": torch.tensor(1.0)}, ValueError, r"got \(\)"),
    ("integers", {"x": X.long()}, TypeError, rf"{DTYPE} torch.int64; convert it with x.float\(\)"),
    ("complex numbers", {"x": X.to(torch.complex64)}, TypeError, f"{DTYPE} torch.complex64"),
    ("booleans", {"x": X.bool()}, TypeError, f"{DTYPE} torch.bool"),
    ("float8, e4m3", {"x": X.to(torch.float8_e4m3fn)}, TypeError, f"{DTYPE} torch.float8_e4m3fn"),
    ("float8, e5m2", {"x": X.to(torch.float8_e5m2)}, TypeError, f"{DTYPE} torch.float8_e5m2"),
    ("sparse map", {"x": X.to_sparse()}, TypeError, "dense tensor, got layout torch.sparse_coo"),
    ("map of oneDNN", {"x": X.to_mkldnn()}, TypeError, "dense tensor, got layout torch._mkldnn"),
    ("nested map", {"x": NESTED}, TypeError, "dense tensor, got a nested one; pass maps of different sizes one by one"),
    ("jagged map", {"x": LIST}, TypeError, "dense tensor, got a nested one"),
    ("numpy array", {"x": X.numpy()}, TypeError, "x must be a torch.Tensor, got ndarray"),
    ("None as map", {"x": None}, TypeError, "x must be a torch.Tensor, got NoneType"),
    ("list as map", {"x": X.tolist()}, TypeError, "x must be a torch.Tensor, got list"),
    ("no channels", {"x": X[:, :0]}, ValueError, "at least one channel"),
    ("no rows", {"x": X[:, :, :0]}, ValueError, "at least one channel and one pixel"),
    ("no columns", {"x": X[:, :, :, :0]}, ValueError, "only N may be 0"),
    ("another number of channels", {"x": X[:, :7]}, ValueError, r"w_q must take x's 7 channels, its shape \(8, 8\) takes 8"),
    ("channels last as NHWC", {"x": X.permute(0, 2, 3, 1)}, ValueError, "w_q must take x's 3 channels"),
    ("float64 map, float32 weights", {"x": X.double()}, TypeError, "w_q must have x's dtype torch.float64, got torch.float32; convert one"),
    ("float16 map, float32 weights", {"x": X.half()}, TypeError, "or use torch.autocast"),
    ("map on another device", {"x": X.to("meta")}, ValueError, "w_q must be on x's device meta, got cpu; move the layer or x"),
    ("no weight", {"w_q": None}, TypeError, "w_q must be a torch.Tensor"),
    ("weight on another device", {"w_q": W.to("meta")}, ValueError, "w_q must be on x's device cpu, got meta; move the layer or x"),
    ("sparse weight", {"w_q": W.to_sparse()}, TypeError, "w_q must be a dense tensor, got layout torch.sparse_coo; convert it with"),
    ("weight in sparse rows", {"w_v": W.to_sparse_csr()}, TypeError, "w_v must be a dense tensor, got layout torch.sparse_csr"),
    ("sparse bias", {"b_q": B.to_sparse()}, TypeError, "b_q must be a dense tensor"),
    ("sparse gamma", {"gamma": torch.ones(1).to_sparse()}, TypeError, "gamma must be a dense tensor"),
    ("weight of three dimensions", {"w_q": W[None]}, ValueError, r"w_q must have shape \(out, in\) or \(out, in, 1, 1\), got \(1, 8, 8\)"),
    ("weight of a 1d convolution", {"w_q": W[..., None]}, ValueError, r"got \(8, 8, 1\)"),
    ("weight of a 3×3 convolution", {"w_q": _normal(8, 8, 3, 3)}, ValueError, r"got \(8, 8, 3, 3\)"),
    ("weight of fewer inputs", {"w_q": OUT}, ValueError, "w_q must take x's 8 channels"),
    ("weight without rows", {"w_q": W[:0]}, ValueError, "w_q must have at least one row"),
    ("keys narrower than queries", {"w_k": HALF}, ValueError, r"w_k must give 8 channels, its shape \(4, 8\) gives 4"),
    ("keys of fewer inputs", {"w_k": OUT}, ValueError, "w_k must take x's 8 channels"),
    ("thin values without projection", {"w_v": HALF}, ValueError, "w_v must give 8 channels"),
    ("float64 weight", {"w_v": W.double()}, TypeError, "w_v must have x's dtype"),
    ("integer weight", {"w_k": W.long()}, TypeError, "w_k must have x's dtype torch.float32, got torch.int64"),
    ("boolean weight", {"w_k": W > 0}, TypeError, "w_k must have x's dtype torch.float32, got torch.bool"),
    ("complex weight", {"w_q": W.to(torch.complex64)}, TypeError, "w_q must have x's dtype torch.float32, got torch.complex64"),
    ("bias of another width", {"b_q": B[:4]}, ValueError, r"b_q must have shape \(8,\) to match its weight, got \(4,\)"),
    ("bias of two dimensions", {"b_k": B[None]}, ValueError, "b_k must have shape"),
    ("values' bias of another width", {"b_v": B[:4]}, ValueError, "b_v must have shape"),
    ("number as bias", {"b_q": 1.0}, TypeError, "b_q must be a torch.Tensor, got float"),
    ("float64 bias", {"b_v": B.double()}, TypeError, "b_v must have x's dtype"),
    ("gamma for each channel", {"gamma": B}, ValueError, r"gamma must have exactly one element, got shape \(8,\)"),
    ("empty gamma", {"gamma": B[:0]}, ValueError, r"gamma must have exactly one element, got shape \(0,\)"),
    ("number as gamma", {"gamma": 0.5}, TypeError, "gamma must be a torch.Tensor, got float"),
    ("gamma on another device", {"gamma": torch.ones(1, device="meta")}, ValueError, "gamma must be on x's device cpu, got meta"),
    ("tensor as scale", {"scale": torch.tensor(0.1)}, TypeError, r"scale must be a float or None .*; a tensor would need scale.item\(\)"),
    ("text as scale", {"scale": "0.1"}, TypeError, "scale must be a float or None"),
    ("complex scale", {"scale": 1j}, TypeError, "scale must be a float or None .* got complex"),
    ("True as scale", {"scale": True}, TypeError, "scale must be a float or None .* got bool"),
    ("NaN as scale", {"scale": float("nan")}, ValueError, "scale must be finite, got nan"),
    ("infinite scale", {"scale": float("inf")}, ValueError, "scale must be finite, got inf"),
    ("scale beyond floats", {"scale": 10**400}, ValueError, "scale must be finite, got 1000"),
    ("number as residual", {"residual": 1}, TypeError, "residual must be True or False, got 1"),
    ("text as residual", {"residual": "no"}, TypeError, "residual must be True or False, got 'no'"),
    ("the map as residual", {"residual": X[0, 0, 0, :2]}, TypeError, "residual must be True or False, got tensor"),
    ("unknown normalize", {"normalize": "rows"}, ValueError, "normalize must be 'keys' .* or 'queries' .* got 'rows'"),
    ("None as normalize", {"normalize": None}, ValueError, "normalize must be 'keys' .* got None"),
    ("unknown backend", {"backend": "gpu"}, ValueError, "backend must be one of 'auto', 'triton', 'torch', got 'gpu'"),
    ("number as backend", {"backend": 1}, ValueError, "backend must be one of 'auto', 'triton', 'torch', got 1"),
    ("unknown argument", {"num_head": 2}, TypeError, "unexpected keyword argument 'num_head'"),
])  # fmt: skip

BAD_BLOCKS = calls(functional.self_attention_2d, CALL, [
    ("projection of other values", {"w_v": HALF, "w_o": W}, ValueError, r"must take w_v's 4 channels, its shape \(8, 8\) takes 8"),
    ("projection to other channels", {"w_v": HALF, "w_o": HALF[:, :4]}, ValueError, r"must give 8 channels, its shape \(4, 4\) gives 4"),
    ("projection of three dimensions", {"w_v": HALF, "w_o": OUT[None]}, ValueError, r"w_o must have shape \(out, in\)"),
    ("float64 projection", {"w_v": HALF, "w_o": OUT.double()}, TypeError, "w_o must have x's dtype"),
    ("sparse projection", {"w_v": HALF, "w_o": OUT.to_sparse()}, TypeError, "w_o must be a dense tensor"),
    ("bias as wide as the map", {"w_v": HALF, "w_o": OUT, "b_v": B}, ValueError, r"b_v must have shape \(4,\)"),
    ("bias of another projection", {"w_v": HALF, "w_o": OUT, "b_o": B[:4]}, ValueError, r"b_o must have shape \(8,\), got \(4,\)"),
    ("thin values in heads", {"w_v": HALF, "num_heads": 2}, ValueError, "w_v must give 8 channels"),
    ("text as projection", {"w_o": "W"}, TypeError, "w_o must be a torch.Tensor, got str"),
    ("bias without projection", {"b_o": B}, ValueError, "b_o is the bias of the output projection .* got w_o=None; pass w_o as well"),
    ("heads that do not divide", {"num_heads": 3}, ValueError, "num_heads must divide the query channels, got 3 heads for 8"),
    ("heads that do not divide values", {"w_v": W[:6], "w_o": W[:, :6], "num_heads": 4}, ValueError, "value channels, got 4 heads for 6"),
    ("no heads", {"num_heads": 0}, ValueError, "num_heads must be at least 1, got 0"),
    ("float as heads", {"num_heads": 2.0}, TypeError, "num_heads must be an int, got 2.0"),
    ("numpy's integer as heads", {"num_heads": numpy.int64(2)}, TypeError, r"num_heads must be an int, got np.int64\(2\)"),
    ("no pool", {"pool": 0}, ValueError, "pool must be at least 1"),
    ("negative pool", {"pool": -2}, ValueError, "pool must be at least 1, got -2"),
    ("pool of two sides", {"pool": (2, 2)}, TypeError, r"pool must be an int, got \(2, 2\)"),
    ("pool larger than the map", {"pool": 4}, ValueError, "pool must leave at least one key, got 4 for a map of 3×4; use a smaller pool"),
    ("number as norm", {"norm": 2}, TypeError, "norm must be a visattn.functional.GroupNorm or None, got builtins.int"),
    ("module as norm", {"norm": torch.nn.GroupNorm(2, 8)}, TypeError, r"got torch\.nn.*; of a torch.nn.GroupNorm m take GroupNorm\(m.num"),
    ("groups that do not divide", {"norm": GROUPS._replace(num_groups=3)}, ValueError, "must divide the 8 channels of the map, got 3"),
    ("no number of groups", {"norm": GROUPS._replace(num_groups=None)}, TypeError, "norm.num_groups must be an int"),
    ("norm of other channels", {"norm": GROUPS._replace(weight=B[:4])}, ValueError, r"norm.weight must have shape \(8,\), got \(4,\)"),
    ("float64 norm", {"norm": GROUPS._replace(bias=B.double())}, TypeError, "norm.bias must have x's dtype"),
    ("sparse norm", {"norm": GROUPS._replace(weight=B.to_sparse())}, TypeError, "norm.weight must be a dense tensor"),
    ("text as eps", {"norm": GROUPS._replace(eps="0")}, TypeError, "norm.eps must be a float, got str"),
    ("negative eps", {"norm": GROUPS._replace(eps=-1.0)}, ValueError, "norm.eps must not be negative, got -1.0"),
    ("NaN as eps", {"norm": GROUPS._replace(eps=float("nan"))}, ValueError, "norm.eps must be finite, got nan"),
    ("text as res_scale", {"res_scale": "1"}, TypeError, "res_scale must be a float, got str"),
    ("NaN as res_scale", {"res_scale": float("nan")}, ValueError, "res_scale must be finite, got nan"),
    ("number as residual of heads", {"num_heads": 2, "residual": 0}, TypeError, "residual must be True or False, got 0"),
    ("gamma for each channel of heads", {"num_heads": 2, "gamma": B}, ValueError, "gamma must have exactly one element"),
    ("over the queries with heads", {"normalize": "queries", "num_heads": 2}, ValueError, "got num_heads=2.*use normalize='keys'"),
    ("over the queries with a norm", {"normalize": "queries", "norm": GROUPS}, ValueError, "norm=GroupNorm"),
    ("over the queries with a pool", {"normalize": "queries", "pool": 2}, ValueError, "pool=2"),
    ("over the queries with a projection", {"normalize": "queries", "w_o": W}, ValueError, r"w_o=\(8, 8\)"),
])  # fmt: skip

BAD_LAYERS = calls(visattn.Attention, {"in_channels": 8}, [
    ("layer without channels", {"in_channels": 0}, ValueError, "in_channels must be at least 1"),
    ("layer of negative channels", {"in_channels": -1}, ValueError, "in_channels must be at least 1"),
    ("layer of a float", {"in_channels": 8.0}, TypeError, "in_channels must be an int"),
    ("layer of text", {"in_channels": "8"}, TypeError, "in_channels must be an int"),
    ("layer of True", {"in_channels": True}, TypeError, "in_channels must be an int"),
    ("layer of None", {"in_channels": None}, TypeError, "in_channels must be an int"),
    ("layer of integers", {"dtype": torch.int32}, TypeError, "dtype must be torch's float16, bfloat16, .* got torch.int32"),
    ("layer of float8", {"dtype": torch.float8_e4m3fn}, TypeError, "dtype must be torch's .* got torch.float8_e4m3fn"),
    ("layer of a dtype's name", {"dtype": "float32"}, TypeError, "dtype must be torch's .* got 'float32'"),
    ("layer of unknown normalize", {"normalize": "channels"}, ValueError, "normalize must be 'keys'"),
    ("layer on an unknown device", {"device": "gpu"}, RuntimeError, "Expected one of cpu, .* device string: gpu"),
]) + calls(visattn.SelfAttention2d, {"in_channels": 8}, [
    ("block of None", {"in_channels": None}, TypeError, "in_channels must be an int"),
    ("block of thin values", {"value_channels": 4}, ValueError, "without an output projection, got 4; pass out_proj"),
    ("block of heads that do not divide", {"qk_channels": 6, "num_heads": 4}, ValueError, "query channels, got 4 heads for 6"),
    ("block without queries", {"qk_channels": 0}, ValueError, "qk_channels must be at least 1"),
    ("block of groups that do not divide", {"norm_groups": 3}, ValueError, "norm_groups must divide the 8 channels"),
    ("block without eps", {"norm_eps": None, "norm_groups": 2}, TypeError, "norm_eps must be a float"),
    ("block of negative eps", {"norm_eps": -1e-6}, ValueError, "norm_eps must not be negative"),
    ("block with True as gamma", {"gamma": True}, TypeError, "gamma must be a float, got bool"),
    ("block of infinite gamma", {"gamma": float("inf")}, ValueError, "gamma must be finite, got inf"),
    ("block with text as scale", {"scale": "1"}, TypeError, "scale must be a float"),
    ("block with NaN as scale", {"scale": float("nan")}, ValueError, "scale must be finite, got nan"),
    ("block without res_scale", {"res_scale": None}, TypeError, "res_scale must be a float"),
    ("block with a float as pool", {"pool": 1.0}, TypeError, "pool must be an int"),
    ("block with a number as residual", {"residual": 0}, TypeError, "residual must be True or False, got 0"),
    ("block with text as bias", {"bias": "no"}, TypeError, "bias must be True or False, got 'no'"),
    ("block with a number as out_proj", {"out_proj": 1}, TypeError, "out_proj must be True or False, got 1"),
    ("block of integers", {"dtype": torch.int64}, TypeError, "dtype must be torch's"),
])  # fmt: skip


def _rows(layer: Any, x: Any, pixels: Any) -> Tensor:
    return visattn.attention_rows(visattn.Attention(8) if layer is None else layer, x, pixels)


BAD_QUESTIONS = calls(_rows, {"layer": None, "x": X, "pixels": PIXELS}, [
    ("list as pixels", {"pixels": [[0, 0]]}, TypeError, "integer torch.Tensor"),
    ("floats as pixels", {"pixels": PIXELS.float()}, TypeError, "integer torch.Tensor"),
    ("booleans as pixels", {"pixels": PIXELS > 0}, TypeError, "integer torch.Tensor"),
    ("complex numbers as pixels", {"pixels": PIXELS.to(torch.complex32)}, TypeError, "integer torch.Tensor"),
    ("one pixel without P", {"pixels": PIXELS[0]}, ValueError, r"shape \(P, 2\)"),
    ("pixels of three numbers", {"pixels": torch.tensor([[0, 0, 0]])}, ValueError, r"shape \(P, 2\)"),
    ("pixel beyond the columns", {"pixels": torch.tensor([[0, 4]])}, ValueError, r"inside the 3×4 map, got \[0, 4\]"),
    ("pixel beyond the rows", {"pixels": torch.tensor([[3, 0]])}, ValueError, r"inside the 3×4 map, got \[3, 0\]"),
    ("negative pixel", {"pixels": torch.tensor([[0, 0], [-1, 0]])}, ValueError, r"inside the 3×4 map, got \[-1, 0\]"),
    ("pixels on another device", {"pixels": PIXELS.to("meta")}, ValueError, "pixels must be on the CPU or on x's device cpu, got meta"),
    ("rows of other channels", {"x": X[:, :7]}, ValueError, r"w_q must take x's 7 channels"),
    ("rows of a float64 map", {"x": X.double()}, TypeError, "w_q must have x's dtype torch.float64"),
    ("rows of no map", {"x": None}, TypeError, "x must be a torch.Tensor"),
    ("rows of a convolution", {"layer": torch.nn.Conv2d(8, 8, 1)}, TypeError, "layer must be a visattn layer, got Conv2d"),
    ("rows of channel attention", {"layer": visattn.ChannelAttention(8)}, TypeError, "attention_rows needs a layer that attends to pixels"),
]) + calls(functional.attention_rows, {"x": X, "w_q": W, "w_k": W, "pixels": PIXELS}, [
    ("rows without a weight", {"w_q": None}, TypeError, "w_q must be a torch.Tensor"),
    ("rows of keys narrower than queries", {"w_k": HALF}, ValueError, "w_k must give 8 channels"),
    ("rows with a bias of another width", {"b_q": B[:4]}, ValueError, "b_q must have shape"),
    ("rows with text as scale", {"scale": "1"}, TypeError, "scale must be a float"),
    ("rows of heads that do not divide", {"num_heads": 3}, ValueError, "num_heads must divide"),
    ("rows over the queries with heads", {"num_heads": 2, "normalize": "queries"}, ValueError, "'queries' must come with one head"),
]) + calls(visattn.explain, {"layer": visattn.Attention(8), "x": X}, [
    ("explain another number of channels", {"x": X[:, :7]}, ValueError, "w_q must take x's 7 channels"),
    ("explain a float64 map", {"x": X.double()}, TypeError, "w_q must have x's dtype torch.float64"),
    ("explain text", {"layer": "Attention"}, TypeError, "layer must be a visattn layer, got str"),
]) + calls(functional.channel_attention, CALL, [
    ("channel attention of thin queries", {"w_q": HALF, "w_k": HALF}, ValueError, "w_q must give 8 channels"),
    ("channel attention of a sparse weight", {"w_v": W.to_sparse()}, TypeError, "w_v must be a dense tensor"),
    ("channel attention with text as residual", {"residual": "no"}, TypeError, "residual must be True or False"),
    ("channel attention with NaN as scale", {"scale": float("nan")}, ValueError, "scale must be finite"),
])  # fmt: skip


def _load(state: Any, layer: Any = None, **options: Any) -> None:
    """Into a layer that has to stay as it is."""
    layer = visattn.Attention(8) if layer is None else layer
    before = {name: t.clone() for name, t in layer.state_dict().items()} if isinstance(layer, torch.nn.Module) else {}
    try:
        visattn.convert.load(layer, state, **options)
    finally:
        assert all(torch.equal(t, before[name]) for name, t in (layer.state_dict().items() if before else ())), "something has been loaded"


def _use_backend(name: Any) -> None:
    with use_backend(name):
        pass


def _environment(name: str) -> Tensor:
    """Asked for nowhere but in the environment."""
    with use_backend("auto"), _without_request():
        previous = os.environ.get("VISATTN_BACKEND")
        os.environ["VISATTN_BACKEND"] = name
        try:
            return functional.self_attention_2d(**CALL)
        finally:
            os.environ.pop("VISATTN_BACKEND") if previous is None else os.environ.update(VISATTN_BACKEND=previous)


@contextlib.contextmanager
def _without_request() -> Iterator[None]:
    request = visattn.dispatch._request
    outer, request.backend = request.backend, None
    try:
        yield
    finally:
        request.backend = outer


STATE = visattn.Attention(8).state_dict()
BAD_MODELS = calls(_load, {"state": STATE}, [
    ("load into text", {"layer": "Attention"}, TypeError, "layer must be a torch.nn.Module, got str"),
    ("load nothing", {"state": {}}, ValueError, "no known block's; the keys are none"),
    ("load None", {"state": None}, TypeError, "state_dict must be a mapping or the path of a .safetensors file, got NoneType"),
    ("load a list", {"state": list(STATE)}, TypeError, "state_dict must be a mapping .* got list"),
    ("load another kind of file", {"state": "weights.pt"}, ValueError, "mapping or a .safetensors file, got weights.pt; load other files"),
    ("load a file that is not there", {"state": "missing.safetensors"}, FileNotFoundError, "missing.safetensors"),
    ("load numbers as keys", {"state": {1: W}}, TypeError, "state_dict must hold tensors by their names, got Tensor as 1"),
    ("load lists as weights", {"state": {k: t.tolist() for k, t in STATE.items()}}, TypeError, "tensors by their names, got list"),
    ("load complex weights", {"state": {k: t.to(torch.complex64) for k, t in STATE.items()}}, TypeError, "got torch.complex64"),
    ("load integer weights", {"state": {k: t.long() for k, t in STATE.items()}}, TypeError, "floating dtype in the block, got torch.int64"),
    ("load meta weights", {"state": {k: t.to("meta") for k, t in STATE.items()}}, ValueError, "must hold numbers .* got a meta tensor"),
    ("load other channels", {"state": visattn.Attention(4).state_dict()}, ValueError, r"weight is \(4, 4\) in the block and \(8, 8,"),
    ("load with one key more", {"state": STATE | {"x": W}}, ValueError, "unexpected ones: x; check the prefix ''"),
    ("load with one key less", {"state": {k: t for k, t in STATE.items() if "query" not in k}}, ValueError, "no known block's"),
    ("load by a wrong prefix", {"prefix": "layer."}, ValueError, "the keys beginning with 'layer.' are none"),
    ("load by a number as prefix", {"prefix": 1}, TypeError, "prefix must be a str, got 1"),
    ("load an unknown family", {"family": "GPT"}, ValueError, "family must be one of .* got 'GPT'"),
]) + calls(visattn.patch_model, {"model": torch.nn.Conv2d(8, 8, 1)}, [
    ("patch None", {"model": None}, TypeError, "model must be a torch.nn.Module, got NoneType"),
    ("patch a function", {"model": torch.relu}, TypeError, "model must be a torch.nn.Module, got builtin"),
    ("patch with unknown maps", {"attention_maps": "drop"}, ValueError, "attention_maps must be 'keep' .* or 'skip' .* got 'drop'"),
]) + calls(visattn.unpatch_model, {}, [
    ("unpatch None", {"model": None}, TypeError, "model must be a torch.nn.Module, got NoneType"),
]) + calls(create_model, {"name": "cnn_vanilla"}, [
    ("unknown model", {"name": "resnet"}, ValueError, "unknown model 'resnet', expected one of cnn_vanilla"),
    ("list as model", {"name": ["vit"]}, ValueError, r"unknown model \['vit'\], expected one of"),
    ("no classes", {"num_classes": 0}, ValueError, "num_classes must be at least 1, got 0"),
    ("text as classes", {"num_classes": "10"}, TypeError, "num_classes must be an int, got '10'"),
    ("attention of a model without", {"attention": "fused"}, ValueError, "unknown attention 'fused' for cnn_vanilla, it has no attention"),
]) + calls(_use_backend, {}, [
    ("use an unknown backend", {"name": "cuda"}, ValueError, "use_backend must be one of 'auto', 'triton', 'torch', got 'cuda'"),
    ("use None as backend", {"name": None}, ValueError, "use_backend must be one of .* got None"),
]) + calls(_environment, {}, [
    ("unknown backend in the environment", {"name": "cuda"}, ValueError, "VISATTN_BACKEND must be one of .* got 'cuda'"),
])  # fmt: skip


def _layer(x: Tensor, **change: Any) -> Tensor:
    return functional.self_attention_2d(**CALL | change | {"x": x})


def _by_a_weight(w_q: Tensor) -> Tensor:
    return functional.self_attention_2d(**CALL | {"w_q": w_q}, num_heads=2)


def _channel_attention(x: Tensor) -> Tensor:
    with use_backend("torch"):
        return functional.channel_attention(x, W, W, W)


def _forward_mode(**change: Any) -> Tensor:
    with forward_ad.dual_level():
        return _layer(forward_ad.make_dual(X, X), **change)


def _after(change: Callable[[dict[str, Tensor]], Any], **settings: Any) -> None:
    """Something happens to the inputs between the forward and the backward pass."""
    leaves = {name: t.clone().requires_grad_() for name, t in CALL.items()}
    out = functional.self_attention_2d(**leaves, **settings)
    with torch.no_grad():
        change(leaves)
    out.sum().backward()


def _batch_of_gradients() -> Tensor:
    x = X.clone().requires_grad_()
    return torch.autograd.grad(_layer(x), x, X[None], is_grads_batched=True)[0]


def _made_in_inference_mode() -> Tensor:
    with torch.inference_mode():
        return X.clone()


VMAP = "torch.vmap must not go over the layer.*make its dimension part of N"
FORWARD = "forward-mode derivatives .* must not go through the layer.*take reverse-mode ones"
CHANGED = "modified by an inplace operation"
BAD_STATES = [
    Kind("vmap over maps", lambda: torch.vmap(_layer)(X[None]), NotImplementedError, VMAP),
    Kind("vmap over heads", lambda: torch.vmap(lambda x: _layer(x, num_heads=2))(X[None]), NotImplementedError, VMAP),
    Kind("vmap over weights", lambda: torch.vmap(lambda w: _layer(X, w_q=w))(W[None]), NotImplementedError, VMAP),
    Kind("gradients of each sample", lambda: torch.vmap(torch.func.grad(lambda x: _layer(x).sum()))(X[None]), NotImplementedError, VMAP),
    Kind("vmap of channel attention", lambda: torch.vmap(_channel_attention)(X[None]), NotImplementedError, VMAP),
    Kind("jvp", lambda: torch.func.jvp(_layer, (X,), (X,)), NotImplementedError, FORWARD),
    Kind("jvp of channel attention", lambda: torch.func.jvp(_channel_attention, (X,), (X,)), NotImplementedError, FORWARD),
    Kind("jvp of heads by a weight", lambda: torch.func.jvp(_by_a_weight, (W,), (W,)), NotImplementedError, FORWARD),
    Kind("hessian", lambda: torch.func.hessian(lambda x: _layer(x).sum())(X), NotImplementedError, FORWARD),
    Kind("torch.fx", lambda: torch.fx.symbolic_trace(visattn.Attention(4)), TypeError, "got Proxy.*as a leaf module"),
    Kind("jacobian", lambda: torch.func.jacrev(_layer)(X), NotImplementedError, VMAP, started=True),
    Kind("jacobian of heads", lambda: torch.func.jacrev(lambda x: _layer(x, num_heads=2))(X), NotImplementedError, VMAP, started=True),
    Kind("a batch of gradients", _batch_of_gradients, RuntimeError, "Batching rule not implemented", started=True),
    Kind("forward-mode derivative", _forward_mode, NotImplementedError, FORWARD),
    Kind("forward-mode derivative of heads", lambda: _forward_mode(num_heads=2), NotImplementedError, FORWARD),
    Kind("forward-mode over the queries", lambda: _forward_mode(normalize="queries", backend="torch"), NotImplementedError, FORWARD),
    Kind("map changed before the backward pass", lambda: _after(lambda t: t["x"].add_(1)), RuntimeError, CHANGED, started=True),
    Kind("weight changed before the backward pass", lambda: _after(lambda t: t["w_v"].zero_()), RuntimeError, CHANGED, started=True),
    Kind("weight of heads changed", lambda: _after(lambda t: t["w_q"].zero_(), num_heads=2), RuntimeError, CHANGED, started=True),
    Kind(
        "map made in inference mode, in training", lambda: _layer(_made_in_inference_mode(), w_q=W.clone().requires_grad_()),
        RuntimeError, "Inference tensors cannot be saved for backward.*make a clone", started=True,
    ),
]  # fmt: skip


def _gradient(d_out: Tensor, function: Callable[..., Tensor] = functional.self_attention_2d, **change: Any) -> Tensor:
    x = X.clone().requires_grad_()
    return torch.autograd.grad(function(**CALL | change | {"x": x}), x, d_out)[0]


def _right_gradient(name: str, d_out: Tensor, **change: Any) -> Kind:
    return Kind(
        name, lambda: _gradient(d_out, **change), right=lambda: _gradient(d_out.resolve_neg(), reference.self_attention_2d, **change)
    )


def _of_pixels(dtype: torch.dtype) -> Kind:
    """Of a map so wide that narrow integers could not count its pixels."""
    x, pixels = _normal(1, 8, 6, 60), torch.tensor([[5, 59], [0, 1], [4, 30]])
    return Kind(
        f"pixels in {str(dtype).removeprefix('torch.')}", lambda: functional.attention_rows(x, W, W, pixels.to(dtype)),
        right=lambda: reference.attention_rows(x, W, W, pixels),
    )  # fmt: skip


def _on_meta(**change: Any) -> Tensor:
    on_meta = {name: t.to("meta") for name, t in CALL.items()}
    out = functional.self_attention_2d(**on_meta, **change, backend="torch")
    return torch.zeros(out.shape, dtype=out.dtype)


def _not_aligned(t: Tensor) -> Tensor:
    """One number off every boundary that memory could be read along."""
    return torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape)


def _gradient_of_gamma(function: Callable[..., Tensor], *shape: int) -> Tensor:
    gamma = torch.full(shape, 0.7, requires_grad=True)
    return torch.autograd.grad(function(**CALL, gamma=gamma, residual=False).square().sum(), gamma)[0]


def _right_gradient_of_gamma(name: str, *shape: int) -> Kind:
    return Kind(
        name, lambda: _gradient_of_gamma(functional.self_attention_2d, *shape),
        right=lambda: _gradient_of_gamma(reference.self_attention_2d, *shape),
    )  # fmt: skip


def _by_default(switch: Callable[[Any], None], value: Any, usual: Any) -> Tensor:
    """With another default of PyTorch's, which is nothing to tensors that exist."""
    switch(value)
    try:
        return _gradient(X, num_heads=2, scale=0.1) + _gradient(X, scale=0.1)
    finally:
        switch(usual)


def _sum_of_gradients() -> Tensor:
    return sum(_gradient(X, reference.self_attention_2d, num_heads=n, scale=0.1) for n in (2, 1))  # type: ignore[return-value]


def _wide_and_negated() -> dict[str, Tensor]:
    w = _normal(257, 257) / 16
    return {"x": lazily_negated(_normal(1, 257, 1, 3)), "w_q": w, "w_k": w, "w_v": torch._neg_view(w)}


NEGATED = lazily_negated(X)
UNUSUAL = [
    right("no maps", x=X[:0]), right("no maps of heads", x=X[:0], num_heads=2),
    right("one pixel", x=X[:, :, :1, :1]), right("one column", x=X[..., :1]),
    right("one channel", x=X[:, :1], w_q=W[:1, :1], w_k=W[:1, :1], w_v=W[:1, :1]),
    right("one query channel", w_q=W[:1], w_k=W[1:2]),
    right("gamma without dimensions", gamma=torch.tensor(0.7)), right("gamma of four dimensions", gamma=torch.full((1, 1, 1, 1), 0.7)),
    right("gamma of zero", gamma=torch.zeros(1)),
    right("scale of zero", scale=0), right("negative scale", scale=-0.5), right("integer scale", scale=1),
    right("numpy's float as scale", scale=numpy.float64(0.3)), right("scale of 1e30", scale=1e30),
    right("numpy's floats in a block", num_heads=2, w_o=W, res_scale=numpy.float64(0.5), norm=GroupNorm(2, eps=numpy.float64(1e-6))),
    right("res_scale of zero", res_scale=0), right("eps of zero", norm=GroupNorm(2, eps=0)),
    right("window as large as the map", x=X[..., :3], pool=3), right("windows that leave a rest", pool=2),
    right("subclass of a tensor", x=X.as_subclass(Subclass)), right("subclass as weight", w_v=W.as_subclass(Subclass)),
    right("parameter as map", x=torch.nn.Parameter(X)), right("map made in inference mode", x=_made_in_inference_mode()),
    *(right(f"map {layout.__name__}", x=layout(X)) for layout in LAYOUTS),
    right("imaginary part of a conjugate", x=NEGATED), right("the same in heads", x=NEGATED, num_heads=2),
    right("the same of 257 channels", **_wide_and_negated()),
    right("negated weights", w_q=torch._neg_view(W), w_k=torch._neg_view(W), w_v=torch._neg_view(W)),
    right("negated biases", b_q=torch._neg_view(B), b_v=torch._neg_view(B)),
    right("negated thin keys", w_q=W[:2], w_k=torch._neg_view(W[:2])),
    right("weight of equal rows", w_q=W[:1].expand(8, 8)), right("weight transposed", w_v=W.mT),
    right("weights of convolutions", **{name: t[..., None, None] for name, t in CALL.items() if name != "x"}),
    right("memory that is not aligned", x=_not_aligned(X), w_q=_not_aligned(W), w_v=_not_aligned(W), b_v=_not_aligned(B)),
    right("one tensor as all weights", w_q=W, w_k=W, w_v=W),
    right("NaN in one pixel", x=torch.where(torch.arange(4) == 2, float("nan"), X)),
    right("numbers near the end of float32", x=X * 1e18, scale=1e-36), right("numbers near zero", x=X * 1e-20),
    _right_gradient("gradient without strides", torch.ones(()).expand(X.shape)),
    _right_gradient("gradient channels_last", X.contiguous(memory_format=torch.channels_last)),
    _right_gradient("gradient negated", NEGATED), _right_gradient("gradient negated, heads", NEGATED, num_heads=2),
    _right_gradient("gradient negated, thin keys", NEGATED, w_q=W[:2], w_k=W[:2]),
    _right_gradient("gradient that is not aligned", _not_aligned(X)),
    *(_of_pixels(dtype) for dtype in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)),
    _right_gradient_of_gamma("gradient of gamma without dimensions"),
    _right_gradient_of_gamma("gradient of gamma of four dimensions", 1, 1, 1, 1),
    right("slices of one weight", **dict(zip(("w_q", "w_k", "w_v"), _normal(24, 8).chunk(3), strict=True))),
    right("columns of one weight", **dict(zip(("w_q", "w_k", "w_v"), _normal(8, 24).chunk(3, 1), strict=True))),
    right("weight of a convolution in channels_last", w_v=W[..., None, None].contiguous(memory_format=torch.channels_last)),
    Kind("float64 by default", lambda: _by_default(torch.set_default_dtype, torch.float64, torch.float32), right=_sum_of_gradients),
    Kind("tensors on meta by default", lambda: _by_default(torch.set_default_device, "meta", None), right=_sum_of_gradients),
    Kind("no pixels", lambda: functional.attention_rows(X, W, W, PIXELS[:0]), right=lambda: torch.empty(2, 0, 3, 4)),
    Kind("shapes on meta", _on_meta, right=lambda: torch.zeros_like(X)),
    Kind("shapes of heads on meta", lambda: _on_meta(num_heads=2), right=lambda: torch.zeros_like(X)),
    Kind("shapes over the queries on meta", lambda: _on_meta(normalize="queries"), right=lambda: torch.zeros_like(X)),
]  # fmt: skip

GROUPS_OF_KINDS = {
    "calls of the layer": BAD_CALLS,
    "heads, pooling, norm, projection": BAD_BLOCKS,
    "layers": BAD_LAYERS,
    "attention maps, `explain`, channel attention": BAD_QUESTIONS,
    "`convert.load`, `patch_model`, `create_model`, `use_backend`": BAD_MODELS,
    "transforms, derivatives, states": BAD_STATES,
    "unusual, and right": UNUSUAL,
}
KINDS = [kind for kinds in GROUPS_OF_KINDS.values() for kind in kinds]


def outcome(kind: Kind, backend: str) -> str:
    """What is wrong when it is done on a backend; nothing if it ends as wanted.

    Where the kernels cannot run, what is only unusual ends in the error that says so.
    """
    before = [(t._version, t.clone()) for t in TENSORS]
    error, text, result = kind.error, kind.text, None
    raised: Exception | None = None
    expected = None if kind.right is None else kind.right()
    with use_backend(backend), recorded_backends() as ran:
        try:
            result = kind.act()
        except Exception as caught:  # whatever it is, it is judged
            raised = caught
    may_reach_it = backend == "triton" and not device.triton_is_interpreting() and (kind in UNUSUAL or kind in BAD_STATES)
    if may_reach_it and type(raised) is RuntimeError:
        error, text = RuntimeError, "backend 'triton' cannot run"
    if any(t._version != version or not torch.equal(t, value) for t, (version, value) in zip(TENSORS, before, strict=True)):
        return "an input has been changed"
    if error is None:
        return f"raised {raised!r}" if raised is not None else _difference(result, expected)
    if type(raised) is not error:
        return f"gave {type(result).__name__}" if raised is None else f"raised {type(raised).__name__}: {raised}"
    if not re.search(text, str(raised), re.DOTALL):
        return f"says: {raised}"
    return f"ran on {ran} before it raised" if ran and not kind.started else ""


def _difference(result: Tensor, expected: Tensor) -> str:
    """Small numbers are sums of large ones, with the rounding of these."""
    finite = expected.abs()[expected.isfinite()]
    atol = 1e-5 * max(1.0, finite.max().item()) if finite.numel() else 1e-5
    try:
        torch.testing.assert_close(result.as_subclass(Tensor), expected, rtol=1e-4, atol=atol, equal_nan=True)
    except AssertionError as error:
        return str(error)
    return ""


def markdown(off: dict[tuple[str, str], str]) -> str:
    """The table: each kind, what is wanted, and what came of it on either backend; `off` as `outcome` has it, by name and backend."""

    def verdict(name: str, backend: str) -> str:
        return off.get((name, backend)) or "as wanted"

    rows = [[kind.name, kind.wanted.replace("|", "\\|"), *(verdict(kind.name, backend) for backend in BACKENDS)] for kind in KINDS]
    return report.markdown_table(["kind", "wanted", "PyTorch path", "Triton kernels"], rows)


def summary(off: dict[tuple[str, str], str]) -> str:
    """The same, counted: a line for each group of kinds."""
    rows = []
    for group, kinds in GROUPS_OF_KINDS.items():
        wrong = [sum(bool(off.get((kind.name, backend))) for kind in kinds) for backend in BACKENDS]
        errors = sum(kind.error is not None for kind in kinds)
        rows.append([group, str(errors), str(len(kinds) - errors), *(str(len(kinds) - n) + f" of {len(kinds)}" for n in wrong)])
    return report.markdown_table(["kinds of input", "to be refused", "to be right", "as wanted, PyTorch path", "as wanted, kernels"], rows)


def on_the_kernels() -> dict[str, str]:
    """`outcome` of every kind on the kernels in the interpreter, in a process of its own."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.reliability.bad_inputs", "triton"]
    done = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return dict(line.split("\t", 1) for line in done.stdout.splitlines() if "\t" in line)


def results() -> dict[tuple[str, str], str]:
    """`outcome` by kind and backend, all of them."""
    return {
        **{(kind.name, "torch"): outcome(kind, "torch") for kind in KINDS},
        **{(name, "triton"): said for name, said in on_the_kernels().items()},
    }


def figures() -> list[Figure]:
    found = results()
    off = sum(map(bool, found.values()))
    if off:
        print(*(f"{name} on {backend}: {said}" for (name, backend), said in found.items() if said), sep="\n", file=sys.stderr)
    errors = sum(kind.error is not None for kind in KINDS)
    counted = f"{errors} bad and {len(KINDS) - errors} unusual kinds × {len(BACKENDS)} backends, {off} off"
    wanted = "≥ 60 kinds; documented errors, right results"
    return [Figure("bad and unusual inputs", counted, wanted, off == 0 and len(KINDS) >= 60, markdown(found))]


if __name__ == "__main__":
    if sys.argv[1:] == ["triton"]:
        for kind_ in KINDS:
            print(kind_.name, " ".join(outcome(kind_, "triton").split()), sep="\t")
    else:
        found_ = results()
        print(summary(found_), markdown(found_), sep="\n\n")
