"""How tensors lie in memory: the one rule for the layout of what the layer returns, and what kernels ask of what they read."""

import torch

from .folding import Weights


def memory_format_of(x: torch.Tensor) -> torch.memory_format:
    """The format of what is returned for a map (N, C, H, W): channels_last where x is, contiguous otherwise."""
    channels_last = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if channels_last else torch.contiguous_format


def empty_map_like(x: torch.Tensor) -> torch.Tensor:
    """An uninitialised map of x's shape (N, C, H, W) in the format that is to be returned for x.

    Either way its pixels merge into tokens without a copy, so that `flatten(2)` is a view (N, C, H·W).
    """
    return torch.empty_like(x, memory_format=memory_format_of(x))


def deliver(written: torch.Tensor, out: torch.Tensor) -> None:
    """Copies tokens (N, C, L) to the map out (N, C, H, W), if they were not written there."""
    if written.data_ptr() != out.data_ptr():
        out.flatten(2).copy_(written)


def in_memory(tensor: torch.Tensor) -> torch.Tensor:
    """With its numbers in memory, where kernels read them: the imaginary part of a conjugate is negated by whoever reads it."""
    return tensor.resolve_neg() if tensor.is_neg() else tensor


def contiguous(weight: torch.Tensor) -> torch.Tensor:
    """The same, and one row after the other."""
    return in_memory(weight).contiguous()


def contiguous_weights(weights: Weights) -> Weights:
    """The same of every weight, of which mostly all are so already."""
    for weight in weights:
        if weight is not None and (weight.is_neg() or not weight.is_contiguous()):
            return weights.map(contiguous)
    return weights
