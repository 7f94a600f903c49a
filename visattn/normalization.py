"""What a map goes through before it is projected. The one place that knows how; it hands on a map like any other."""

from typing import NamedTuple

import torch
from torch import Tensor


class GroupNorm(NamedTuple):
    """Group normalisation (Wu and He 2018) of a map (N, C, H, W): mean 0 and variance 1 within each image and group of channels.

    num_groups divides C; weight and bias are (C) or None; eps is added to the variance. The fields of `torch.nn.GroupNorm`.
    """

    num_groups: int
    weight: Tensor | None = None
    bias: Tensor | None = None
    eps: float = 1e-6

    def to(self, dtype: torch.dtype) -> "GroupNorm":
        """The same with weight and bias in dtype."""
        weight, bias = (None if t is None else t.to(dtype) for t in (self.weight, self.bias))
        return self._replace(weight=weight, bias=bias)


def normalized(x: Tensor, norm: GroupNorm | None) -> Tensor:
    """The map (N, C, H, W) that is projected, in x's dtype; its statistics are summed in fp32 or wider.

    PyTorch normalises as `a x + b` with both factors in fp32 or wider. Where that is x's own precision, a common mean would leave
    rounding errors of its own size; it is taken off before, as a constant, since normalisation does not depend on it.
    """
    if norm is None:
        return x
    num_groups, weight, bias, eps = norm.to(x.dtype)
    if x.dtype not in (torch.float16, torch.bfloat16):
        groups = x.detach().unflatten(1, (num_groups, -1))
        x = (x.unflatten(1, (num_groups, -1)) - groups.mean((2, 3, 4), keepdim=True)).flatten(1, 2)
    return torch.group_norm(x, num_groups, weight, bias, eps)
