"""A CNN with self-attention as in SAGAN after each of its first four convolutions."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .. import functional
from ..modules import AttentionLayer, QueriesAndKeys


class SaganAttention(AttentionLayer):
    """`γ · softmax(q kᵀ) v + x` over the pixels of a map, γ a learned number that starts at 0, on the fused path.

    q, k, v are 1×1 convolutions with bias, q and k with an eighth of the channels. The logits are not scaled.
    Source: Zhang et al. 2018, Self-Attention Generative Adversarial Networks, with one convolution for v.

    Args:
        in_channels: C of the maps (N, C, H, W) it takes and returns, at least 8.
    """

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        if in_channels < 8:
            raise ValueError(f"in_channels must be at least 8, of which queries and keys have an eighth, got {in_channels}")
        self.query_convolution = nn.Conv2d(in_channels, in_channels // 8, 1)
        self.key_convolution = nn.Conv2d(in_channels, in_channels // 8, 1)
        self.value_convolution = nn.Conv2d(in_channels, in_channels, 1)
        self.gamma_parameter = nn.Parameter(torch.zeros(1))

    def queries_and_keys(self) -> QueriesAndKeys:
        query, key = self.query_convolution, self.key_convolution
        return QueriesAndKeys(query.weight, key.weight, query.bias, key.bias, 1.0, "keys")

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, C, H, W)."""
        q, k, v = self.query_convolution, self.key_convolution, self.value_convolution
        return functional.self_attention_2d(x, q.weight, k.weight, v.weight, q.bias, k.bias, v.bias, gamma=self.gamma_parameter, scale=1.0)


class NaiveSaganAttention(SaganAttention):
    """The same layer by matrix products, with the whole (N, H·W, H·W) matrix in memory."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, C, H, W)."""
        q, k, v = (project(x).flatten(2) for project in (self.query_convolution, self.key_convolution, self.value_convolution))
        weights = torch.softmax(q.mT @ k, dim=-1)
        return x + self.gamma_parameter * (v @ weights.mT).reshape(x.shape)


class SaganCNN(nn.Module):
    """Five 3×3 convolutions with ReLU, attention after the first four of them, then the mean over the map.

    Args:
        num_classes: channels of the last convolution.
        attention: makes an attention layer from its number of channels.
    """

    def __init__(self, num_classes: int = 10, attention: Callable[[int], nn.Module] = SaganAttention) -> None:
        super().__init__()
        self.convolution1 = nn.Conv2d(3, 32, 3, padding=1)
        self.sa1 = attention(32)
        self.convolution2 = nn.Conv2d(32, 64, 3, padding=1)
        self.sa2 = attention(64)
        self.convolution3 = nn.Conv2d(64, 128, 3, padding=1)
        self.sa3 = attention(128)
        self.convolution4 = nn.Conv2d(128, 256, 3, padding=1)
        self.sa4 = attention(256)
        self.convolution5 = nn.Conv2d(256, num_classes, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) to logarithms of probabilities (N, num_classes)."""
        x = self.sa1(torch.relu(self.convolution1(images)))
        x = self.sa2(torch.relu(self.convolution2(x)))
        x = self.sa3(torch.relu(self.convolution3(x)))
        x = self.sa4(torch.relu(self.convolution4(x)))
        x = torch.relu(self.convolution5(x))
        return torch.log_softmax(x.mean((2, 3)), dim=-1)
