"""The small CIFAR-10 CNNs: two 3×3 convolutions and a linear layer. Plain `nn.Sequential`, so state_dict keys are positions."""

from collections.abc import Callable

from torch import nn


def cnn_early_attention(num_classes: int, attention: Callable[[int], nn.Module]) -> nn.Sequential:
    """Attention after the first convolution: it sees (N, 64, 32, 32)."""
    return nn.Sequential(
        nn.Conv2d(3, 64, 3, padding=1),
        nn.ReLU(),
        attention(64),
        nn.ReLU(),
        nn.Conv2d(64, 32, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 32 * 32, num_classes),
    )
