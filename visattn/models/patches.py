"""What the vision transformers share: an image as a class token and embedded patches, with learned positions."""

import torch
from torch import Tensor, nn


def token_count(image_size: int, patch_size: int) -> int:
    """Tokens of a square image: its patches and the class token.

    Raises:
        ValueError: the patches do not tile the image.
    """
    if image_size % patch_size:
        raise ValueError(f"image_size must be a multiple of patch_size, got {image_size} for patches of {patch_size}")
    return (image_size // patch_size) ** 2 + 1


def embed(images: Tensor, image_size: int, embedding: nn.Module, class_token: Tensor, positions: Tensor) -> Tensor:
    """The tokens (N, L, E) of images (N, C, image_size, image_size).

    Args:
        images, image_size: the images, and the size they must have.
        embedding: from images to one vector a patch, (N, E, rows, columns).
        class_token: (1, 1, E), the first token.
        positions: (L, E) or (1, L, E), added to the tokens.

    Raises:
        ValueError: the images have another size.
    """
    if images.ndim != 4 or images.shape[2:] != (image_size, image_size):
        raise ValueError(f"images must have shape (N, C, {image_size}, {image_size}), got {tuple(images.shape)}; resize them")
    patches = embedding(images).flatten(2).mT
    return torch.cat([class_token.expand(len(images), -1, -1), patches], dim=1) + positions
