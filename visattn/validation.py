"""The checks of the public boundary, and every error text of them: what was expected, what came, what to do."""

from collections.abc import Sequence

import torch
from torch import Tensor


def check_backend(backend: str, known: Sequence[str], source: str) -> None:
    if backend not in known:
        raise ValueError(f"{source} must be one of {', '.join(map(repr, known))}, got {backend!r}")


def check_normalize(normalize: str) -> None:
    if normalize not in ("keys", "queries"):
        raise ValueError(f"normalize must be 'keys' (each query's weights sum to one) or 'queries' (each key's do), got {normalize!r}")


def check_in_channels(in_channels: int) -> None:
    if isinstance(in_channels, bool) or not isinstance(in_channels, int):
        raise TypeError(f"in_channels must be an int, got {in_channels!r}")
    if in_channels < 1:
        raise ValueError(f"in_channels must be at least 1, got {in_channels}")


def check_map(x: Tensor) -> None:
    """x must be a floating map (N, C, H, W) with at least one channel and one pixel; N may be 0."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a torch.Tensor, got {type(x).__name__}")
    shape = x.shape
    if len(shape) != 4:
        hint = "; add a batch dimension with x.unsqueeze(0)" if len(shape) == 3 else ""
        raise ValueError(f"x must have shape (N, C, H, W), got {tuple(shape)}{hint}")
    if not x.is_floating_point():
        raise TypeError(f"x must have a floating dtype, got {x.dtype}; convert it with x.float()")
    if x.layout != torch.strided:
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
    normalize: str,
) -> None:
    """The whole contract of `functional.self_attention_2d`, before anything is computed."""
    check_map(x)
    check_normalize(normalize)
    channels, device, dtype = x.shape[1], x.device, x.dtype
    named = (("w_q", w_q), ("w_k", w_k), ("w_v", w_v), ("b_q", b_q), ("b_k", b_k), ("b_v", b_v), ("gamma", gamma))
    for name, tensor in named:
        if tensor is None and not name.startswith("w_"):
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
        if tensor.device != device or tensor.dtype != dtype:
            _check_like_x(name, tensor, x)
    qk_channels = _check_weight("w_q", w_q, None, channels)
    _check_weight("w_k", w_k, qk_channels, channels)
    _check_weight("w_v", w_v, channels, channels)
    for name, bias, size in (("b_q", b_q, qk_channels), ("b_k", b_k, qk_channels), ("b_v", b_v, channels)):
        if bias is not None and bias.shape != (size,):
            raise ValueError(f"{name} must have shape ({size},) to match its weight, got {tuple(bias.shape)}")
    if gamma is not None and gamma.numel() != 1:
        raise ValueError(f"gamma must have exactly one element, got shape {tuple(gamma.shape)}")
    if scale is not None and not isinstance(scale, int | float):
        raise TypeError(f"scale must be a float or None (1/√qk_channels), got {type(scale).__name__}; a tensor would need scale.item()")


def check_channel_attention(
    x: Tensor,
    w_q: Tensor,
    w_k: Tensor,
    w_v: Tensor,
    b_q: Tensor | None,
    b_k: Tensor | None,
    b_v: Tensor | None,
    scale: float | None,
) -> None:
    """The whole contract of `functional.channel_attention`: that of `self_attention_2d`, and w_q keeps the channels."""
    check_self_attention_2d(x, w_q, w_k, w_v, b_q, b_k, b_v, None, scale, "keys")
    _check_weight("w_q", w_q, x.shape[1], x.shape[1])


def check_pixels(pixels: Tensor, height: int, width: int) -> None:
    """pixels must be integer pairs (row, column) inside the map."""
    if not isinstance(pixels, Tensor) or pixels.is_floating_point() or pixels.dtype in (torch.bool, torch.complex64, torch.complex128):
        raise TypeError(f"pixels must be an integer torch.Tensor of pairs (row, column), got {pixels!r}")
    if pixels.ndim != 2 or pixels.shape[1] != 2:
        raise ValueError(f"pixels must have shape (P, 2), pairs (row, column), got {tuple(pixels.shape)}")
    outside = (pixels < 0).any(1) | (pixels[:, 0] >= height) | (pixels[:, 1] >= width)
    if outside.any():
        raise ValueError(f"pixels must lie inside the {height}×{width} map, got {pixels[outside][0].tolist()}")


def _check_like_x(name: str, tensor: Tensor, x: Tensor) -> None:
    if tensor.device != x.device:
        raise ValueError(f"{name} must be on x's device {x.device}, got {tensor.device}; move the layer or x with .to()")
    autocast = torch.is_autocast_enabled(x.device.type)
    if tensor.dtype != x.dtype and not (autocast and tensor.is_floating_point()):
        raise TypeError(f"{name} must have x's dtype {x.dtype}, got {tensor.dtype}; convert one of them with .to(), or use torch.autocast")


def _check_weight(name: str, weight: Tensor, rows: int | None, columns: int) -> int:
    """The number of rows, which is `rows` unless that is None."""
    shape = weight.shape
    if len(shape) != 2 and (len(shape) != 4 or shape[2] != 1 or shape[3] != 1):
        raise ValueError(f"{name} must have shape (out, in) or (out, in, 1, 1), got {tuple(shape)}")
    if shape[1] != columns:
        raise ValueError(f"{name} must take x's {columns} channels, its shape {tuple(shape)} takes {shape[1]}")
    if rows is None:
        if shape[0] == 0:
            raise ValueError(f"{name} must have at least one row, got {tuple(shape)}")
    elif shape[0] != rows:
        raise ValueError(f"{name} must give {rows} channels, its shape {tuple(shape)} gives {shape[0]}")
    return shape[0]
