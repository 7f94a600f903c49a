"""The small CIFAR-10 CNNs: two 3×3 convolutions and a linear layer. Plain `nn.Sequential`, so state_dict keys are positions.

Each takes images (N, 3, 32, 32) and gives logits (N, num_classes); `attention` makes a layer from its number of channels.
"""

from collections.abc import Callable

from torch import nn

from ..modules import Attention

MakeLayer = Callable[[int], nn.Module]


def cnn_vanilla(num_classes: int = 10) -> nn.Sequential:
    """Convolutions only."""
    return _cnn(num_classes, None, None)


def cnn_early_attention(num_classes: int = 10, attention: MakeLayer = Attention) -> nn.Sequential:
    """Attention after the first convolution: it sees (N, 64, 32, 32)."""
    return _cnn(num_classes, attention, None)


def cnn_late_attention(num_classes: int = 10, attention: MakeLayer = Attention) -> nn.Sequential:
    """Attention after the second convolution: it sees (N, 32, 32, 32)."""
    return _cnn(num_classes, None, attention)


def cnn_double_attention(num_classes: int = 10, attention: MakeLayer = Attention) -> nn.Sequential:
    """Attention after both convolutions."""
    return _cnn(num_classes, attention, attention)


def _cnn(num_classes: int, early: MakeLayer | None, late: MakeLayer | None) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 64, 3, padding=1),
        nn.ReLU(),
        *((early(64), nn.ReLU()) if early else ()),
        nn.Conv2d(64, 32, 3, padding=1),
        nn.ReLU(),
        *((late(32), nn.ReLU()) if late else ()),
        nn.Flatten(),
        nn.Linear(32 * 32 * 32, num_classes),
    )
