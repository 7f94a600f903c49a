"""Every way a map can lie in memory, as functions from a map to the same values (or some of them, repeated) in that layout."""

import torch
from torch import Tensor


def contiguous(t: Tensor) -> Tensor:
    return t.contiguous()


def channels_last(t: Tensor) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last)


def transposed(t: Tensor) -> Tensor:
    return t.transpose(2, 3).contiguous().transpose(2, 3)


def sliced(t: Tensor) -> Tensor:
    n, c, h, w = t.shape
    big = t.new_full((n + 1, c + 3, h + 2, w), float("nan"))
    big[1:, 2:-1, 1:-1] = t
    return big[1:, 2:-1, 1:-1]


def strided(t: Tensor) -> Tensor:
    big = t.new_full((*t.shape[:3], 2 * t.shape[3]), float("nan"))
    big[..., ::2] = t
    return big[..., ::2]


def batch_innermost(t: Tensor) -> Tensor:
    return t.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)


def one_map_for_all(t: Tensor) -> Tensor:
    return t[:1].expand(t.shape)


def one_column_for_all(t: Tensor) -> Tensor:
    return t[..., :1].expand(t.shape)


LAYOUTS = [contiguous, channels_last, transposed, sliced, strided, batch_innermost, one_map_for_all, one_column_for_all]


def lazily_negated(t: Tensor) -> Tensor:
    """What the imaginary part of a conjugate is: memory that holds the negative, and a flag that says so."""
    return torch._neg_view(-t.contiguous())
