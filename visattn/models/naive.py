"""The attention layer as it is usually written: what the fused layer is measured against."""

import torch
from torch import Tensor, nn


class NaiveAttention(nn.Module):
    """`x + softmax(q kᵀ / √C) v` by matrix products, with the whole (N, H·W, H·W) matrix in memory.

    Interface, initialisation and state_dict are those of `visattn.Attention`.
    """

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        self.conv_query = nn.Conv2d(in_channels, in_channels, 1)
        self.conv_key = nn.Conv2d(in_channels, in_channels, 1)
        self.conv_value = nn.Conv2d(in_channels, in_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, C, H, W)."""
        q = self.conv_query(x).flatten(2).transpose(1, 2)
        k = self.conv_key(x).flatten(2)
        v = self.conv_value(x).flatten(2).transpose(1, 2)
        weights = torch.softmax(q @ k / x.shape[1] ** 0.5, dim=-1)
        return x + (weights @ v).transpose(1, 2).reshape(x.shape)
