"""Networks for `python -m bench gallery`: attention blocks as other people write them, with as little around each as makes a network.

A block has the parameters and the mathematics of the original and writes the whole matrix, as the original does. Whatever stands
around attention takes the same time and memory before and after, which is why it is kept small.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import spectral_norm

Shape = tuple[int, ...]


class PositionAttention(nn.Module):
    """SAGAN's block, which returns its matrix as well, and DANet's position attention, which does not. γ is as after some training."""

    def __init__(self, channels: int, returns_matrix: bool) -> None:
        super().__init__()
        self.query_conv, self.key_conv = nn.Conv2d(channels, channels // 8, 1), nn.Conv2d(channels, channels // 8, 1)
        self.value_conv = nn.Conv2d(channels, channels, 1)
        self.gamma = nn.Parameter(torch.full((1,), 0.6))
        self.returns_matrix = returns_matrix

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        weights = torch.softmax(self.query_conv(x).flatten(2).mT @ self.key_conv(x).flatten(2), -1)
        out = self.gamma * (self.value_conv(x).flatten(2) @ weights.mT).view_as(x) + x
        return (out, weights) if self.returns_matrix else out


class NormedAttention(nn.Module):
    """VQGAN's and latent diffusion's block."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(32, channels, eps=1e-6)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        weights = torch.softmax(self.q(h).flatten(2).mT @ self.k(h).flatten(2) * x.shape[1] ** -0.5, -1)
        return x + self.proj_out((self.v(h).flatten(2) @ weights.mT).view_as(x))


class Discriminator(nn.Module):
    """(N, 3, 4H, 4W) to scores (N,) and the matrix of attention among H×W pixels; spectral norm on the convolutions around it."""

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Sequential(
            spectral_norm(nn.Conv2d(3, 32, 4, 2, 1)), nn.LeakyReLU(0.1), spectral_norm(nn.Conv2d(32, 64, 4, 2, 1)), nn.LeakyReLU(0.1)
        )
        self.attention = PositionAttention(64, returns_matrix=True)
        self.after = nn.Sequential(spectral_norm(nn.Conv2d(64, 128, 4, 2, 1)), nn.LeakyReLU(0.1), nn.Conv2d(128, 1, 4))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        x, weights = self.attention(self.before(images))
        return self.after(x).mean((1, 2, 3)), weights


class Decoder(nn.Sequential):
    """Latents (N, 4, H, W) to images (N, 3, 8H, 8W), attention among the latents."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(4, 512, 3, padding=1)
        self.attn_1 = NormedAttention(512)
        self.conv_out = nn.Conv2d(512, 3 * 64, 3, padding=1)
        self.shuffle = nn.PixelShuffle(8)


class SegmentationNet(nn.Sequential):
    """Images (N, 3, 8H, 8W) to scores of 19 classes (N, 19, H, W)."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 128, 7, 8, 3), nn.ReLU(), nn.Conv2d(128, 512, 1), nn.ReLU())
        self.position = PositionAttention(512, returns_matrix=False)
        self.head = nn.Conv2d(512, 19, 1)


@dataclass(frozen=True)
class Result:
    """What a step gives: an output, and the gradients of the parameters that have one."""

    output: Tensor
    gradients: dict[str, Tensor] = field(default_factory=dict)


def penalty_step(discriminator: nn.Module, images: Tensor) -> Result:
    """Scores, and the gradients of a discriminator's loss on real images with its gradient penalty."""
    images = images.clone().requires_grad_()
    scores = discriminator(images)[0]
    (gradient,) = torch.autograd.grad(scores.sum(), images, create_graph=True)
    penalty = ((gradient.flatten(1).norm(dim=1) - 1) ** 2).mean()
    return Result(scores.detach(), _gradients(10 * penalty - scores.mean(), discriminator))


def decoding(decoder: nn.Module, latents: Tensor) -> Result:
    with torch.no_grad():
        return Result(decoder(latents))


def training_step(network: nn.Module, images: Tensor) -> Result:
    """Scores, and the gradients of the cross-entropy, the classes being whether a pixel is red."""
    scores = network(images)
    labels = (images[:, 0, ::8, ::8] > 0).long()
    return Result(scores.detach(), _gradients(nn.functional.cross_entropy(scores, labels), network))


def autoencoder_decoding(vae: Any, latents: Tensor) -> Result:
    with torch.no_grad():
        return Result(vae.decode(latents).sample)


def _autoencoder() -> nn.Module:
    return importlib.import_module("diffusers").AutoencoderKL(block_out_channels=(512,), layers_per_block=1)


def _gradients(loss: Tensor, model: nn.Module) -> dict[str, Tensor]:
    parameters = dict(model.named_parameters())
    gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return {name: gradient for name, gradient in zip(parameters, gradients, strict=True) if gradient is not None}


@dataclass(frozen=True)
class Example:
    """A model, what is done with it, and how that is told.

    shapes: of the input, by size of the run ("full", "quick", "toy"). step: what is measured, of the model and its input. code: the
    same in the README, with the names `inputs`. no_effect: a parameter whose gradient is zero, but for rounding. needs: a package.
    """

    name: str
    title: str
    note: str
    code: str
    inputs: tuple[str, str]
    make: Callable[[], nn.Module]
    step: Callable[[nn.Module, Tensor], Result]
    shapes: dict[str, Shape]
    attention_maps: str = "keep"
    no_effect: str = ""
    needs: str = ""


EXAMPLES = {
    example.name: example
    for example in (
        Example(
            name="sagan",
            title="SAGAN's discriminator with a gradient penalty",
            note="attention at 64×64, C = 64, N = 2",
            code='visattn.patch_model(discriminator, attention_maps="skip")  # returns None in place of its (N, H·W, H·W) matrix\n'
            "scores, _ = discriminator(images.requires_grad_())\n"
            "(gradient,) = torch.autograd.grad(scores.sum(), images, create_graph=True)\n"
            "(10 * ((gradient.flatten(1).norm(dim=1) - 1) ** 2).mean() - scores.mean()).backward()  # second derivatives",
            inputs=("discriminator", "images"),
            make=Discriminator,
            step=penalty_step,
            shapes={"full": (2, 3, 256, 256), "quick": (2, 3, 128, 128), "toy": (2, 3, 32, 32)},
            attention_maps="skip",
            no_effect="attention.key_conv.bias",
        ),
        Example(
            name="vae",
            title="The decoder of a latent diffusion VAE",
            note="attention among 128×128 latents, C = 512, images of 1024×1024",
            code="visattn.patch_model(decoder)\nwith torch.no_grad():\n    image = decoder(latents)",
            inputs=("decoder", "latents"),
            make=Decoder,
            step=decoding,
            shapes={"full": (1, 4, 128, 128), "quick": (1, 4, 48, 48), "toy": (1, 4, 6, 6)},
        ),
        Example(
            name="segmentation",
            title="Segmentation with DANet's position attention, a training step",
            note="96×96 positions, C = 512",
            code="with visattn.patch_model(network):  # undone at the end of the block\n"
            "    loss = nn.functional.cross_entropy(network(images), labels)\n"
            "    loss.backward()",
            inputs=("network", "images"),
            make=SegmentationNet,
            step=training_step,
            shapes={"full": (1, 3, 768, 768), "quick": (1, 3, 320, 320), "toy": (1, 3, 48, 48)},
            no_effect="position.key_conv.bias",
        ),
        Example(
            name="diffusers",
            title="`AutoencoderKL` of diffusers, decoding",
            note="one stage of 512 channels, attention among 64×64 latents; diffusers calls PyTorch's `scaled_dot_product_attention`, "
            "which needs no matrix either, so there is little to gain",
            code="visattn.patch_model(vae)\nwith torch.no_grad():\n    image = vae.decode(latents).sample",
            inputs=("vae", "latents"),
            make=_autoencoder,
            step=autoencoder_decoding,
            shapes={"full": (1, 4, 64, 64), "quick": (1, 4, 24, 24), "toy": (1, 4, 4, 4)},
            needs="diffusers",
        ),
    )
}
