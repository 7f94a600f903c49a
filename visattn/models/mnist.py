"""Small networks for 28×28 digits: linear layers, convolutions, and a transformer of single-head attentions."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from . import patches


def mlp_mnist(num_classes: int = 10) -> nn.Sequential:
    """Three linear layers; from images (N, 1, 28, 28) to logits (N, num_classes).

    The second ReLU stands there twice, which changes nothing but the position, and so the key, of the last layer.
    """
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(28 * 28, 100),
        nn.ReLU(),
        nn.Linear(100, 100),
        nn.ReLU(),
        nn.ReLU(),
        nn.Linear(100, num_classes),
    )


def cnn_mnist(num_classes: int = 10) -> nn.Sequential:
    """Two convolutions with max-pooling and two linear layers; from images (N, 1, 28, 28) to logits (N, num_classes)."""
    return nn.Sequential(
        nn.Conv2d(1, 12, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(12, 24, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(24 * 7 * 7, 32),
        nn.ReLU(),
        nn.Dropout(0.2),
        nn.Linear(32, num_classes),
    )


class SingleHeadAttention(nn.Module):
    """`softmax(q kᵀ / √D) v` over tokens, q, k, v being projections to width D without bias; dropout on the weights.

    Source of the formula: Vaswani et al. 2017, section 3.2.1.

    Args:
        input_dim: width of the tokens.
        inner_dim: D.
        dropout: probability with which a weight is dropped in training.
    """

    def __init__(self, input_dim: int, inner_dim: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = dropout
        self.w_q = nn.Linear(input_dim, inner_dim, bias=False)
        self.w_k = nn.Linear(input_dim, inner_dim, bias=False)
        self.w_v = nn.Linear(input_dim, inner_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(N, L, input_dim) to (N, L, inner_dim)."""
        return self.attend(self.w_q(x), self.w_k(x), self.w_v(x), self.dropout if self.training else 0.0)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
        """q, k, v (N, L, inner_dim) to (N, L, inner_dim)."""
        return nn.functional.scaled_dot_product_attention(q, k, v, dropout_p=dropout)


class NaiveSingleHeadAttention(SingleHeadAttention):
    """The same layer by matrix products, with the matrix (N, L, L) in memory."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
        """q, k, v (N, L, inner_dim) to (N, L, inner_dim)."""
        weights = torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, dim=-1)
        return nn.functional.dropout(weights, dropout) @ v


class Heads(nn.Module):
    """Several attentions of the same tokens, side by side."""

    def __init__(self, heads: list[nn.Module]) -> None:
        super().__init__()
        self.heads = nn.ModuleList(heads)

    def forward(self, x: Tensor) -> Tensor:
        """(N, L, input_dim) to (N, L, heads · inner_dim)."""
        return torch.cat([head(x) for head in self.heads], dim=-1)


class ViTLayer(nn.Module):
    """Attention and a feed-forward part, each ending in LayerNorm and then added to its input.

    Args:
        dim: width of the tokens.
        heads, dim_head: number of attention heads and width of each.
        mlp_dim: width between the two linear layers of the feed-forward part.
        dropout: probability, on the attention weights and behind the linear layers.
        attention: makes a head from (dim, dim_head, dropout).
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        dim_head: int,
        mlp_dim: int,
        dropout: float = 0.0,
        attention: Callable[[int, int, float], nn.Module] = SingleHeadAttention,
    ) -> None:
        super().__init__()
        self.attn = nn.Sequential(
            Heads([attention(dim, dim_head, dropout) for _ in range(heads)]),
            nn.Linear(heads * dim_head, dim),
            nn.Dropout(dropout),
            nn.LayerNorm(dim),
        )
        self.feedforward = nn.Sequential(
            nn.Linear(dim, mlp_dim),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(mlp_dim, dim),
            nn.Dropout(dropout),
            nn.LayerNorm(dim),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(N, L, dim) to (N, L, dim)."""
        x = self.attn(x) + x
        return self.feedforward(x) + x


class DigitTransformer(nn.Module):
    """A classifier around `ViTLayer`: sixteen 7×7 patches, a class token and learned positions; the class token is classified.

    The assignment gives the layer only; this classifier around it is visattn's own.

    Args:
        num_classes: number of logits.
        attention: makes a head of a layer from (dim, dim_head, dropout).
        dim, heads, dim_head, mlp_dim, dropout: of the layers.
        num_layers: number of layers.
    """

    def __init__(
        self,
        num_classes: int = 10,
        attention: Callable[[int, int, float], nn.Module] = SingleHeadAttention,
        *,
        dim: int = 64,
        heads: int = 4,
        dim_head: int = 16,
        mlp_dim: int = 128,
        dropout: float = 0.0,
        num_layers: int = 3,
    ) -> None:
        super().__init__()
        self.patch_embedding = nn.Conv2d(1, dim, 7, stride=7)
        self.class_token = nn.Parameter(torch.randn(1, 1, dim))
        self.positions = nn.Parameter(torch.randn(1, patches.token_count(28, 7), dim))
        self.layers = nn.Sequential(*(ViTLayer(dim, heads, dim_head, mlp_dim, dropout, attention) for _ in range(num_layers)))
        self.fc = nn.Linear(dim, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """(N, 1, 28, 28) to logits (N, num_classes)."""
        tokens = patches.embed(images, 28, self.patch_embedding, self.class_token, self.positions)
        return self.fc(self.layers(tokens)[:, 0])
