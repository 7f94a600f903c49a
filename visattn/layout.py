"""How maps lie in memory: the one rule for the layout of what the layer returns."""

import torch


def memory_format_of(x: torch.Tensor) -> torch.memory_format:
    """The format of what is returned for a map (N, C, H, W): channels_last where x is, contiguous otherwise."""
    channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if channels_last else torch.contiguous_format


def empty_map_like(x: torch.Tensor) -> torch.Tensor:
    """An uninitialised map of x's shape (N, C, H, W) in the format that is to be returned for x.

    Either way its pixels merge into tokens without a copy, so that `flatten(2)` is a view (N, C, H·W).
    """
    return torch.empty_like(x, memory_format=memory_format_of(x))
