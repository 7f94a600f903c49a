"""The checks of the public boundary, and every error text of them: what was expected, what came, what to do."""

import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import NoReturn

import torch
from torch import Tensor, nn
from torch._C._functorch import TransformType, get_unwrapped, is_batchedtensor, is_functorch_wrapped_tensor, maybe_get_level
from torch._functorch.pyfunctorch import retrieve_all_functorch_interpreters
from torch.autograd import forward_ad

from .device import autocast_is_enabled, constant_for_compilers
from .normalization import GroupNorm

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_DTYPES_IN_WORDS = "float16, bfloat16, float32 or float64"
_DENSE = torch.strided
_MATRICES = ("w_q", "w_k", "w_v")
_PARAMETERS = (*_MATRICES, "b_q", "b_k", "b_v", "gamma")
_PIXELS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def check_backend(backend: str, known: Sequence[str], source: str) -> None:
    if backend not in known:
        raise ValueError(f"{source} must be one of {', '.join(map(repr, known))}, got {backend!r}")


def check_normalize(normalize: str) -> None:
    if normalize not in ("keys", "queries"):
        raise ValueError(f"normalize must be 'keys' (each query's weights sum to one) or 'queries' (each key's do), got {normalize!r}")


def check_module(name: str, module: torch.nn.Module) -> None:
    if not isinstance(module, torch.nn.Module):
        raise TypeError(f"{name} must be a torch.nn.Module, got {type(module).__name__}")


def check_patching(model: torch.nn.Module, attention_maps: str) -> None:
    check_module("model", model)
    if attention_maps not in ("keep", "skip"):
        raise ValueError(f"attention_maps must be 'keep' (such blocks stay) or 'skip' (they return None instead), got {attention_maps!r}")


def check_in_channels(in_channels: int) -> None:
    _check_count("in_channels", in_channels)


def check_dtype(dtype: torch.dtype | None) -> None:
    """That of a layer's parameters; None is PyTorch's default."""
    if dtype is not None and dtype not in DTYPES:
        raise TypeError(f"dtype must be torch's {_DTYPES_IN_WORDS}, or None, got {dtype!r}")


def check_layer(
    in_channels: int,
    qk_channels: int,
    value_channels: int,
    num_heads: int,
    scale: float | None,
    norm_groups: int | None,
    norm_eps: float,
    out_proj: bool,
    gamma: float | None,
    pool: int,
    bias: bool,
    residual: bool,
    res_scale: float,
) -> None:
    """The contract of `SelfAttention2d`, before it makes parameters."""
    counts = {"in_channels": in_channels, "qk_channels": qk_channels, "value_channels": value_channels, "pool": pool}
    for name, count in counts.items():
        _check_count(name, count)
    check_heads(num_heads, qk_channels, value_channels)
    if norm_groups is not None:
        _check_groups("norm_groups", norm_groups, in_channels)
    _check_eps("norm_eps", norm_eps)
    _check_number("res_scale", res_scale)
    for name, flag in (("out_proj", out_proj), ("bias", bias), ("residual", residual)):
        _check_flag(name, flag)
    for name, optional in (("scale", scale), ("gamma", gamma)):
        if optional is not None:
            _check_number(name, optional)
    if not out_proj and value_channels != in_channels:
        raise ValueError(
            f"value_channels must equal in_channels ({in_channels}) without an output projection, got {value_channels}; pass out_proj=True"
        )


def check_map(x: Tensor) -> None:
    """x must be a floating map (N, C, H, W) with at least one channel and one pixel; N may be 0."""
    if not isinstance(x, Tensor):
        hint = "; torch.fx cannot look into the layer, name it to the tracer as a leaf module" if isinstance(x, torch.fx.Proxy) else ""
        raise TypeError(f"x must be a torch.Tensor, got {type(x).__name__}{hint}")
    if x.is_nested:
        raise TypeError("x must be a dense tensor, got a nested one; pass maps of different sizes one by one")
    shape = x.shape
    if len(shape) != 4:
        hint = "; add a batch dimension with x.unsqueeze(0), or make a map of tokens (N, H·W, C)" if len(shape) == 3 else ""
        raise ValueError(f"x must have shape (N, C, H, W), got {tuple(shape)}{hint}")
    if x.dtype not in DTYPES:
        raise TypeError(f"x must be {_DTYPES_IN_WORDS}, got {x.dtype}; convert it with x.float()")
    if x.layout is not _DENSE:
        raise TypeError(f"x must be a dense tensor, got layout {x.layout}; convert it with x.to_dense()")
    if shape[1] == 0 or shape[2] == 0 or shape[3] == 0:
        raise ValueError(f"x must have at least one channel and one pixel, got shape {tuple(shape)}; only N may be 0")


def check_self_attention_2d(
    x: Tensor,
    w_q: Tensor,
    w_k: Tensor,
    w_v: Tensor,
    b_q: Tensor | None,
    b_k: Tensor | None,
    b_v: Tensor | None,
    gamma: Tensor | None,
    scale: float | None,
    residual: bool,
    normalize: str,
    has_output_projection: bool = False,
) -> None:
    """The contract of `functional.self_attention_2d` on its plain arguments, before anything is computed.

    Values are as wide as the map, unless an output projection makes them so.
    """
    check_map(x)
    if normalize != "keys":
        check_normalize(normalize)
    channels, device, dtype = x.shape[1], x.device, x.dtype
    for name, tensor in zip(_PARAMETERS, (w_q, w_k, w_v, b_q, b_k, b_v, gamma), strict=True):
        if tensor is None:
            if name in _MATRICES:
                _check_tensor(name, tensor, x)
        elif getattr(tensor, "dtype", None) is not dtype or getattr(tensor, "layout", None) is not _DENSE or tensor.device != device:
            _check_tensor(name, tensor, x)
    qk_channels = _check_weight("w_q", w_q, None, channels)
    _check_weight("w_k", w_k, qk_channels, channels)
    value_channels = _check_weight("w_v", w_v, None if has_output_projection else channels, channels)
    for name, bias, size in (("b_q", b_q, qk_channels), ("b_k", b_k, qk_channels), ("b_v", b_v, value_channels)):
        if bias is not None and bias.shape != (size,):
            raise ValueError(f"{name} must have shape ({size},) to match its weight, got {tuple(bias.shape)}")
    if gamma is not None and gamma.numel() != 1:
        raise ValueError(f"gamma must have exactly one element, got shape {tuple(gamma.shape)}")
    if scale is not None:
        if isinstance(scale, bool) or not isinstance(scale, int | float):
            raise TypeError(f"scale must be a float or None (1/√qk_channels), got {type(scale).__name__}; a tensor would need scale.item()")
        _check_number("scale", scale)
    if residual is not True and residual is not False:
        _check_flag("residual", residual)


def check_queries_and_keys(
    x: Tensor, w_q: Tensor, w_k: Tensor, b_q: Tensor | None, b_k: Tensor | None, scale: float | None, normalize: str
) -> None:
    """What `check_self_attention_2d` has to say on them, where nobody asks about values."""
    check_self_attention_2d(x, w_q, w_k, w_k, b_q, b_k, None, None, scale, True, normalize, has_output_projection=True)


def check_block(
    x: Tensor,
    w_q: Tensor,
    w_v: Tensor,
    w_o: Tensor | None,
    b_o: Tensor | None,
    num_heads: int,
    norm: GroupNorm | None,
    pool: int,
    res_scale: float,
    normalize: str,
) -> None:
    """What else the contract of `functional.self_attention_2d` says, once `check_self_attention_2d` has passed."""
    channels, qk_channels, value_channels = x.shape[1], w_q.shape[0], w_v.shape[0]
    check_heads(num_heads, qk_channels, value_channels)
    check_norm(x, norm)
    check_pool(x, pool)
    _check_number("res_scale", res_scale)
    if w_o is None:
        if b_o is not None:
            raise ValueError("b_o is the bias of the output projection and must come with its weight, got w_o=None; pass w_o as well")
    else:
        _check_tensor("w_o", w_o, x)
        _check_weight("w_o", w_o, channels, value_channels, "w_v's")
        if b_o is not None:
            _check_vector("b_o", b_o, x, channels)
    if normalize == "queries" and (num_heads > 1 or norm is not None or pool > 1 or w_o is not None):
        raise ValueError(
            "normalize='queries' must come with one head and without norm, pool and w_o, "
            f"got num_heads={num_heads}, norm={'None' if norm is None else 'GroupNorm'}, pool={pool}, "
            f"w_o={'None' if w_o is None else tuple(w_o.shape)}; use normalize='keys'"
        )


def check_heads(num_heads: int, qk_channels: int, value_channels: int | None = None) -> None:
    _check_count("num_heads", num_heads)
    for name, width in (("query", qk_channels), ("value", value_channels)):
        if width is not None and width % num_heads:
            raise ValueError(f"num_heads must divide the {name} channels, got {num_heads} heads for {width}; all heads are as wide")


def check_norm(x: Tensor, norm: GroupNorm | None) -> None:
    """norm must be a GroupNorm of x's channels, or None."""
    if norm is None:
        return
    if not isinstance(norm, GroupNorm):
        hint = "; of a torch.nn.GroupNorm m take GroupNorm(m.num_groups, m.weight, m.bias, m.eps)" if isinstance(norm, nn.GroupNorm) else ""
        raise TypeError(f"norm must be a visattn.functional.GroupNorm or None, got {type(norm).__module__}.{type(norm).__qualname__}{hint}")
    channels = x.shape[1]
    _check_groups("norm.num_groups", norm.num_groups, channels)
    _check_eps("norm.eps", norm.eps)
    for name, vector in (("norm.weight", norm.weight), ("norm.bias", norm.bias)):
        if vector is not None:
            _check_vector(name, vector, x, channels)


def check_pool(x: Tensor, pool: int) -> None:
    """pool must be the side of a window that fits into x at least once."""
    _check_count("pool", pool)
    if pool > min(x.shape[2:]):
        raise ValueError(f"pool must leave at least one key, got {pool} for a map of {x.shape[2]}×{x.shape[3]}; use a smaller pool")


def check_channel_attention(
    x: Tensor,
    w_q: Tensor,
    w_k: Tensor,
    w_v: Tensor,
    b_q: Tensor | None,
    b_k: Tensor | None,
    b_v: Tensor | None,
    scale: float | None,
    residual: bool,
) -> None:
    """The whole contract of `functional.channel_attention`: that of `self_attention_2d`, and w_q keeps the channels."""
    check_self_attention_2d(x, w_q, w_k, w_v, b_q, b_k, b_v, None, scale, residual, "keys")
    _check_weight("w_q", w_q, x.shape[1], x.shape[1])


def check_state_dict(tensors: Mapping[str, Tensor], prefix: str) -> None:
    """tensors must be tensors by name, prefix what some names begin with."""
    if not isinstance(prefix, str):
        raise TypeError(f"prefix must be a str, got {prefix!r}")
    if not isinstance(tensors, Mapping):
        raise TypeError(f"state_dict must be a mapping or the path of a .safetensors file, got {type(tensors).__name__}")
    for name, tensor in tensors.items():
        if not isinstance(name, str) or (name.startswith(prefix) and not isinstance(tensor, Tensor)):
            raise TypeError(f"state_dict must hold tensors by their names, got {type(tensor).__name__} as {name!r}")


def check_weights(weights: Mapping[str, Tensor]) -> None:
    """Numbers that parameters can be set to."""
    for name, weight in weights.items():
        if not weight.is_floating_point():
            raise TypeError(f"{name} must have a floating dtype in the block, got {weight.dtype}")
        if weight.is_meta:
            raise ValueError(f"{name} must hold numbers in the block, got a meta tensor; load the block's weights before")


def check_transforms(tensors: Iterable[Tensor | None]) -> None:
    """No tensor may be one of `torch.vmap` or carry a forward-mode derivative."""
    forward_levels = {i.level() for i in retrieve_all_functorch_interpreters() if i.key() == TransformType.Jvp}
    for tensor in tensors:
        while tensor is not None and is_functorch_wrapped_tensor(tensor):  # by one transform after the other, from within
            if is_batchedtensor(tensor):
                refuse_vmap()
            if maybe_get_level(tensor) in forward_levels:
                _refuse_forward_mode()
            tensor = get_unwrapped(tensor)
        if tensor is not None and forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None:
            _refuse_forward_mode()


def refuse_vmap(*_: object) -> NoReturn:
    """For what PyTorch asks of a function under `torch.vmap`, of which `torch.func.jacrev` makes use too."""
    raise NotImplementedError(
        "torch.vmap must not go over the layer, got one of its tensors; make its dimension part of N, call the layer once for each set of "
        "weights, or of derivatives (torch.func.jacrev with chunk_size=1, torch.autograd.functional.jacobian)"
    )


def check_no_forward_mode() -> None:
    """The same for a call that a compiler looks at, which sees no tangents: an op there would lose them without a word."""
    if _forward_mode_is_active():
        _refuse_forward_mode()


@constant_for_compilers
def _forward_mode_is_active() -> bool:
    return forward_ad._current_level >= 0 or any(i.key() == TransformType.Jvp for i in retrieve_all_functorch_interpreters())


def _refuse_forward_mode() -> NoReturn:
    raise NotImplementedError(
        "forward-mode derivatives (torch.func.jvp, torch.autograd.forward_ad) must not go through the layer, got a tensor with a tangent; "
        "take reverse-mode ones (torch.func.vjp, torch.func.grad), or those of visattn.reference"
    )


def check_pixels(pixels: Tensor, x: Tensor) -> None:
    """pixels must be integer pairs (row, column) inside the map x (N, C, H, W)."""
    height, width = x.shape[2:]
    if not isinstance(pixels, Tensor) or pixels.dtype not in _PIXELS or pixels.is_nested or pixels.layout != torch.strided:
        raise TypeError(f"pixels must be an integer torch.Tensor of pairs (row, column), got {pixels!r}")
    if pixels.ndim != 2 or pixels.shape[1] != 2:
        raise ValueError(f"pixels must have shape (P, 2), pairs (row, column), got {tuple(pixels.shape)}")
    if pixels.device.type not in ("cpu", x.device.type):
        raise ValueError(f"pixels must be on the CPU or on x's device {x.device}, got {pixels.device}; move them with .to()")
    if pixels.is_meta:
        return
    outside = (pixels < 0).any(1) | (pixels[:, 0] >= height) | (pixels[:, 1] >= width)
    if outside.any():
        raise ValueError(f"pixels must lie inside the {height}×{width} map, got {pixels[outside][0].tolist()}")


def _check_like_x(name: str, tensor: Tensor, x: Tensor) -> None:
    if tensor.device != x.device:
        raise ValueError(f"{name} must be on x's device {x.device}, got {tensor.device}; move the layer or x with .to()")
    if tensor.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got layout {tensor.layout}; convert it with .to_dense()")
    autocast = autocast_is_enabled(x)
    if tensor.dtype != x.dtype and not (autocast and tensor.dtype in DTYPES):
        raise TypeError(f"{name} must have x's dtype {x.dtype}, got {tensor.dtype}; convert one of them with .to(), or use torch.autocast")


def _check_tensor(name: str, tensor: object, x: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    _check_like_x(name, tensor, x)


def _check_vector(name: str, vector: Tensor, x: Tensor, size: int) -> None:
    _check_tensor(name, vector, x)
    if vector.shape != (size,):
        raise ValueError(f"{name} must have shape ({size},), got {tuple(vector.shape)}")


def _check_count(name: str, count: int) -> None:
    if isinstance(count, bool) or not isinstance(count, int):
        raise TypeError(f"{name} must be an int, got {count!r}")
    if count < 1:
        raise ValueError(f"{name} must be at least 1, got {count}")


def _check_groups(name: str, groups: int, channels: int) -> None:
    _check_count(name, groups)
    if channels % groups:
        raise ValueError(f"{name} must divide the {channels} channels of the map, got {groups}")


def _check_number(name: str, number: float) -> None:
    if isinstance(number, bool) or not isinstance(number, int | float):
        raise TypeError(f"{name} must be a float, got {type(number).__name__}")
    if not -sys.float_info.max <= number <= sys.float_info.max:
        raise ValueError(f"{name} must be finite, got {number}")


def _check_eps(name: str, eps: float) -> None:
    _check_number(name, eps)
    if eps < 0:
        raise ValueError(f"{name} must not be negative, got {eps}; it is added to a variance")


def _check_flag(name: str, flag: bool) -> None:
    if not isinstance(flag, bool):
        raise TypeError(f"{name} must be True or False, got {flag!r}")


def _check_weight(name: str, weight: Tensor, rows: int | None, columns: int, whose: str = "x's") -> int:
    """The number of rows, which is `rows` unless that is None."""
    shape = weight.shape
    if len(shape) != 2 and (len(shape) != 4 or shape[2] != 1 or shape[3] != 1):
        raise ValueError(f"{name} must have shape (out, in) or (out, in, 1, 1), got {tuple(shape)}")
    if shape[1] != columns:
        raise ValueError(f"{name} must take {whose} {columns} channels, its shape {tuple(shape)} takes {shape[1]}")
    if rows is None:
        if shape[0] == 0:
            raise ValueError(f"{name} must have at least one row, got {tuple(shape)}")
    elif shape[0] != rows:
        raise ValueError(f"{name} must give {rows} channels, its shape {tuple(shape)} gives {shape[0]}")
    return shape[0]
