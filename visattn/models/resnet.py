"""A residual network of ten layers, with or without attention after its second stage."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


class ResidualBlock(nn.Module):
    """`relu(residual + shortcut)`, the residual being two 3×3 convolutions, each followed by ReLU.

    The first convolution pads by 2 and the second not at all, so that the pair keeps the size of the map before its stride.
    The shortcut is the input, or a 1×1 convolution with BatchNorm where stride or channels change, whatever `batchnorm` says.

    Args:
        in_channels, out_channels: channels of the map (N, C, H, W) taken and given.
        stride: of the second convolution and of the shortcut.
        batchnorm: whether the two BatchNorms of the residual are used; they exist, and are in the state_dict, in any case.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1, batchnorm: bool = False) -> None:
        super().__init__()
        self.batchnorm = batchnorm
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=2)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, stride=stride)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.downsampler: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.downsampler = nn.Sequential(nn.Conv2d(in_channels, out_channels, 1, stride=stride), nn.BatchNorm2d(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) to (N, out_channels, ⌈H/stride⌉, ⌈W/stride⌉)."""
        residual = self.conv1(x)
        if self.batchnorm:
            residual = self.bn1(residual)
        residual = self.conv2(torch.relu(residual))
        if self.batchnorm:
            residual = self.bn2(residual)
        return torch.relu(torch.relu(residual) + self.downsampler(x))


class ResNet10(nn.Module):
    """A 7×7 convolution, max-pooling, four stages of one block each, the mean over the map and a linear layer.

    Args:
        num_classes: number of logits; the published networks had the default 100, of which ten were trained.
        attention: makes the layer between the second and the third stage from its 128 channels; None for a network without it.
        batchnorm: whether to normalise, in every block and after the first convolution.
    """

    def __init__(self, num_classes: int = 100, attention: Callable[[int], nn.Module] | None = None, batchnorm: bool = False) -> None:
        super().__init__()
        self.batchnorm = batchnorm
        self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3)
        self.bn1 = nn.BatchNorm2d(64)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.layer1 = nn.Sequential(ResidualBlock(64, 64, 1, batchnorm))
        self.layer2 = nn.Sequential(ResidualBlock(64, 128, 1, batchnorm))
        self.attention = attention(128) if attention else nn.Identity()
        self.layer3 = nn.Sequential(ResidualBlock(128, 256, 1, batchnorm))
        self.layer4 = nn.Sequential(ResidualBlock(256, 512, 2, batchnorm))
        self.fc = nn.Linear(512, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) to logits (N, num_classes); of 32×32 images the attention sees (N, 128, 8, 8)."""
        x = self.conv1(images)
        if self.batchnorm:
            x = self.bn1(x)
        x = self.maxpool(torch.relu(x))
        x = self.attention(self.layer2(self.layer1(x)))
        x = self.layer4(self.layer3(x))
        return self.fc(x.mean((2, 3)))
