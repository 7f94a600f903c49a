"""How maps lie in memory: the one rule for the layout of what the layer returns."""

import torch


def empty_map_like(x: torch.Tensor) -> torch.Tensor:
    """An uninitialised map of x's shape (N, C, H, W): channels_last where x is, contiguous otherwise.

    Either way its pixels merge into tokens without a copy, so that `flatten(2)` is a view (N, C, H·W).
    """
    channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.empty_like(x, memory_format=torch.channels_last if channels_last else torch.contiguous_format)
