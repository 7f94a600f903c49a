"""A vision transformer whose heads and feed-forward layers see the whole sequence as one flattened vector.

Names are those of the assignment's helper module, so that its weights load. L is the number of tokens, E their width, D the
width of a head.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from . import patches


class AttentionHead(nn.Module):
    """`softmax(Q Kᵀ) V / √D`, the softmax over the queries; Q, K, V are linear in the flattened sequence.

    As the assignment has it: the usual head (Vaswani et al. 2017) divides the logits by √D and normalises over the keys.

    Args:
        max_seq_length: L.
        qkv_size: D.
    """

    def __init__(self, max_seq_length: int, qkv_size: int) -> None:
        super().__init__()
        self.max_seq_length = max_seq_length
        self.qkv_size = qkv_size
        self.WQ = nn.Linear(max_seq_length * qkv_size, max_seq_length * qkv_size)
        self.WK = nn.Linear(max_seq_length * qkv_size, max_seq_length * qkv_size)
        self.WV = nn.Linear(max_seq_length * qkv_size, max_seq_length * qkv_size)

    def forward(self, x: Tensor) -> Tensor:
        """(N, L, D) to (N, L, D)."""
        flat = x.flatten(1)
        q, k, v = (project(flat).unflatten(1, (self.max_seq_length, self.qkv_size)) for project in (self.WQ, self.WK, self.WV))
        return self.attend(q, k, v) / self.qkv_size**0.5

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k, v (N, L, D) to (N, L, D), not yet scaled."""
        return torch.softmax(q @ k.mT, dim=1) @ v


class EinsumAttentionHead(AttentionHead):
    """The same head with its two products as `torch.einsum`."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k, v (N, L, D) to (N, L, D), not yet scaled."""
        logits = torch.einsum("nqd,nkd->nqk", q, k)
        return torch.einsum("nqk,nkd->nqd", torch.softmax(logits, dim=1), v)


class SelfAttention(nn.Module):
    """Slices of the tokens' width, each through a head of its own, side by side; nothing follows the heads."""

    def __init__(self, heads: list[nn.Module]) -> None:
        super().__init__()
        self.attention_heads_arr = nn.ModuleList(heads)

    def forward(self, x: Tensor) -> Tensor:
        """(N, L, E) to (N, L, E)."""
        slices = x.chunk(len(self.attention_heads_arr), dim=2)
        return torch.cat([head(part) for head, part in zip(self.attention_heads_arr, slices, strict=True)], dim=2)


class BasicEncoder(nn.Module):
    """Attention and two linear layers on the flattened sequence, each added to its input and then normalised."""

    def __init__(self, self_attention: nn.Module, max_seq_length: int, embedding_size: int) -> None:
        super().__init__()
        flat = max_seq_length * embedding_size
        self.self_attention_layer = self_attention
        self.norm1 = nn.LayerNorm(embedding_size)
        self.W1 = nn.Linear(flat, 2 * flat)
        self.W2 = nn.Linear(2 * flat, flat)
        self.norm2 = nn.LayerNorm(embedding_size)

    def forward(self, x: Tensor) -> Tensor:
        """(N, L, E) to (N, L, E)."""
        x = self.norm1(x + self.self_attention_layer(x))
        return self.norm2(x + self.W2(torch.relu(self.W1(x.flatten(1)))).view_as(x))


class MasterEncoder(nn.Module):
    """Encoders one after the other."""

    def __init__(self, encoders: list[nn.Module]) -> None:
        super().__init__()
        self.basic_encoder_arr = nn.ModuleList(encoders)

    def forward(self, x: Tensor) -> Tensor:
        """(N, L, E) to (N, L, E)."""
        for encoder in self.basic_encoder_arr:
            x = encoder(x)
        return x


class PatchEmbedding(nn.Module):
    """An image in patches, each embedded, behind a class token, with learned positions added."""

    def __init__(self, image_size: int, patch_size: int, embedding_size: int) -> None:
        super().__init__()
        self.image_size = image_size
        self.sequential = nn.Sequential(nn.Conv2d(3, embedding_size, patch_size, stride=patch_size))
        self.class_token = nn.Parameter(torch.rand(1, 1, embedding_size))
        self.positions = nn.Parameter(torch.randn(patches.token_count(image_size, patch_size), embedding_size))

    def forward(self, images: Tensor) -> Tensor:
        """(N, 3, image_size, image_size) to (N, L, E)."""
        return patches.embed(images, self.image_size, self.sequential, self.class_token, self.positions)


class MeanOverTokens(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        """(N, L, E) to (N, E)."""
        return x.mean(1)


class FlatVisionTransformer(nn.Sequential):
    """Patches through encoders that see flattened sequences, the mean over the tokens, a linear layer.

    From images (N, 3, image_size, image_size) to logits (N, num_classes).

    Args:
        num_classes: number of classes.
        attention: makes a head from its (L, D).
        image_size, patch_size: of square images and patches, in pixels; patch_size divides image_size.
        embedding_size: E, a multiple of num_heads.
        num_heads, num_encoders: heads an encoder, and encoders.
    """

    def __init__(
        self,
        num_classes: int = 5,
        attention: Callable[[int, int], nn.Module] = AttentionHead,
        *,
        image_size: int = 64,
        patch_size: int = 16,
        embedding_size: int = 128,
        num_heads: int = 2,
        num_encoders: int = 2,
    ) -> None:
        if embedding_size % num_heads:
            raise ValueError(f"embedding_size must be a multiple of num_heads, got {embedding_size} for {num_heads} heads")
        length = patches.token_count(image_size, patch_size)

        def encoder() -> nn.Module:
            heads = [attention(length, embedding_size // num_heads) for _ in range(num_heads)]
            return BasicEncoder(SelfAttention(heads), length, embedding_size)

        super().__init__(
            PatchEmbedding(image_size, patch_size, embedding_size),
            MasterEncoder([encoder() for _ in range(num_encoders)]),
            nn.Sequential(MeanOverTokens(), nn.Linear(embedding_size, num_classes)),
        )
