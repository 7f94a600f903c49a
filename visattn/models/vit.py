"""A vision transformer for 32×32 images in four patches: post-norm blocks, class token, learned positions."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from . import patches


class MultiHeadSelfAttention(nn.Module):
    """`softmax(q kᵀ / D) v` in each head of width D, the heads side by side through a linear layer.

    The logits are divided by D, not by √D as in Vaswani et al. 2017: so has it the assignment that the model comes from.

    Args:
        input_dim: width of the tokens, a multiple of num_heads.
        num_heads: number of heads, each of width D = input_dim / num_heads.
    """

    def __init__(self, input_dim: int, num_heads: int) -> None:
        super().__init__()
        if input_dim % num_heads:
            raise ValueError(f"input_dim must be a multiple of num_heads, got {input_dim} for {num_heads} heads")
        self.num_heads = num_heads
        self.head_dim = input_dim // num_heads
        self.query = nn.Linear(input_dim, input_dim)
        self.key = nn.Linear(input_dim, input_dim)
        self.value = nn.Linear(input_dim, input_dim)
        self.fc_out = nn.Linear(input_dim, input_dim)

    def forward(self, x: Tensor) -> Tensor:
        """(N, L, input_dim) to (N, L, input_dim)."""
        q, k, v = (project(x).unflatten(2, (self.num_heads, -1)).transpose(1, 2) for project in (self.query, self.key, self.value))
        return self.fc_out(self.attend(q, k, v).transpose(1, 2).flatten(2))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k, v (N, num_heads, L, head_dim) to (N, num_heads, L, head_dim)."""
        return nn.functional.scaled_dot_product_attention(q, k, v, scale=1 / self.head_dim)


class NaiveMultiHeadSelfAttention(MultiHeadSelfAttention):
    """The same layer by matrix products, with the matrices (N, num_heads, L, L) in memory."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k, v (N, num_heads, L, head_dim) to (N, num_heads, L, head_dim)."""
        return torch.softmax(q @ k.mT / self.head_dim, dim=-1) @ v


class TransformerEncoderBlock(nn.Module):
    """Attention and a feed-forward layer, each added to its input and then normalised.

    Args:
        self_attention: from (N, L, embed_dim) to (N, L, embed_dim).
        embed_dim: width of the tokens.
        mlp_dim: width between the two linear layers of the feed-forward part.
        dropout: probability, at the end of both parts.
    """

    def __init__(self, self_attention: nn.Module, embed_dim: int, mlp_dim: int, dropout: float) -> None:
        super().__init__()
        self.self_attention = self_attention
        self.feed_forward = nn.Sequential(nn.Linear(embed_dim, mlp_dim), nn.ReLU(), nn.Linear(mlp_dim, embed_dim))
        self.norm1 = nn.LayerNorm(embed_dim)
        self.norm2 = nn.LayerNorm(embed_dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(N, L, embed_dim) to (N, L, embed_dim)."""
        x = self.norm1(x + self.dropout(self.self_attention(x)))
        return self.norm2(x + self.dropout(self.feed_forward(x)))


class VisionTransformer(nn.Module):
    """Patches, a class token and learned positions through encoder blocks; the class token is classified.

    Args:
        num_classes: number of classes.
        attention: makes the attention of a block from (embed_dim, num_heads).
        image_size, patch_size: of square images and patches, in pixels; patch_size divides image_size.
        embed_dim, num_heads, mlp_dim, num_layers, dropout: of the blocks.
    """

    def __init__(
        self,
        num_classes: int = 10,
        attention: Callable[[int, int], nn.Module] = MultiHeadSelfAttention,
        *,
        image_size: int = 32,
        patch_size: int = 16,
        embed_dim: int = 128,
        num_heads: int = 8,
        mlp_dim: int = 256,
        num_layers: int = 3,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.image_size = image_size
        self.patch_embedding = nn.Conv2d(3, embed_dim, patch_size, stride=patch_size)
        self.positional_embedding = nn.Parameter(torch.randn(1, patches.token_count(image_size, patch_size), embed_dim))
        self.dropout = nn.Dropout(dropout)
        self.transformer_encoder_blocks = nn.ModuleList(
            TransformerEncoderBlock(attention(embed_dim, num_heads), embed_dim, mlp_dim, dropout) for _ in range(num_layers)
        )
        self.class_token = nn.Parameter(torch.randn(1, 1, embed_dim))
        self.fc = nn.Linear(embed_dim, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """(N, 3, image_size, image_size) to logarithms of probabilities (N, num_classes)."""
        tokens = self.dropout(patches.embed(images, self.image_size, self.patch_embedding, self.class_token, self.positional_embedding))
        for block in self.transformer_encoder_blocks:
            tokens = block(tokens)
        return torch.log_softmax(self.fc(tokens[:, 0]), dim=-1)
