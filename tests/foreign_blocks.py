"""Attention blocks with the parameters and the mathematics of other people's, each the shortest that has both.

Every block is written naively, with the whole attention matrix. `gain` is nowhere zero, as some are at initialisation, because
a block with γ = 0 shows nothing.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import max_pool2d
from torch.nn.utils import spectral_norm


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float = 1.0, heads: int = 1) -> tuple[Tensor, Tensor]:
    """Branch (N, V, L) and matrix of q (N, E, L), k (N, E, K), v (N, V, K), heads one after another."""
    q, k, v = (t.unflatten(1, (heads, -1)) for t in (q, k, v))
    weights = torch.softmax(scale * (q.mT @ k), -1)
    return (v @ weights.mT).flatten(1, 2), weights.squeeze(1)


def pointwise(channels: int, out: int, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(channels, out, 1, bias=bias)


class Sagan(nn.Module):
    """SAGAN's, which returns its matrix as well, and DANet's, which does not."""

    def __init__(self, channels: int, matrix: bool = False) -> None:
        super().__init__()
        self.query_conv = pointwise(channels, max(1, channels // 8))
        self.key_conv = pointwise(channels, max(1, channels // 8))
        self.value_conv = pointwise(channels, channels)
        self.gamma = nn.Parameter(torch.full((1,), 0.6))
        self.matrix = matrix

    def branch(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return attend(self.query_conv(x).flatten(2), self.key_conv(x).flatten(2), self.value_conv(x).flatten(2))

    def forward(self, x: Tensor):
        branch, weights = self.branch(x)
        out = self.gamma * branch.view_as(x) + x
        return (out, weights) if self.matrix else out


class CCNet(Sagan):
    """The same parameters, softmax over the queries."""

    def branch(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.query_conv(x).flatten(2).mT @ self.key_conv(x).flatten(2)
        weights = torch.softmax(logits, 1)
        return self.value_conv(x).flatten(2) @ weights.mT, weights


class CrissCross(Sagan):
    """The same parameters, each pixel attending to its row and column only."""

    def branch(self, x: Tensor) -> tuple[Tensor, Tensor]:
        height, width = x.shape[2:]
        row, column = torch.arange(height).repeat_interleave(width), torch.arange(width).repeat(height)
        crossing = (row[:, None] == row) | (column[:, None] == column)
        logits = self.query_conv(x).flatten(2).mT @ self.key_conv(x).flatten(2)
        weights = torch.softmax(logits.masked_fill(~crossing, -torch.inf), -1)
        return self.value_conv(x).flatten(2) @ weights.mT, weights


class ChannelGram(nn.Module):
    """DANet's attention over channels."""

    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((1,), 0.6))
        self.softmax = nn.Softmax(-1)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2)
        gram = tokens @ tokens.mT
        return x + self.gamma * (self.softmax(gram.amax(-1, keepdim=True) - gram) @ tokens).view_as(x)


class Fastai(nn.Module):
    """Convolutions of tokens without bias, spectral norm as a hook, and a softmax that makes a query of what is called key."""

    def __init__(self, channels: int, stacked: bool = False) -> None:
        super().__init__()
        widths = {"query": channels // 8, "key": channels // 8, "value": channels}
        for name, width in widths.items():
            layer = spectral_norm(nn.Conv1d(channels, width, 1, bias=False))
            self.add_module(name, nn.Sequential(layer) if stacked else layer)
        self.gamma = nn.Parameter(torch.tensor([0.6]))

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2)
        weights = torch.softmax(self.query(tokens).mT @ self.key(tokens), 1)
        return x + (self.gamma * (self.value(tokens) @ weights)).view_as(x)


class SpectralWrapper(nn.Module):
    """Spectral norm as a module around a layer, as SAGAN's authors' followers have it: a step of power iteration in every pass."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        weight = layer.weight.data
        del layer.weight
        layer.weight_bar = nn.Parameter(weight)
        for name, size in (("weight_u", weight.shape[0]), ("weight_v", weight.shape[1])):
            layer.register_parameter(name, nn.Parameter(nn.functional.normalize(torch.randn(size), dim=0), requires_grad=False))
        self.module = layer

    def _update_u_v(self) -> None:
        layer = self.module
        matrix = layer.weight_bar.flatten(1)
        with torch.no_grad():
            layer.weight_v.data = nn.functional.normalize(layer.weight_u @ matrix, dim=0)
            layer.weight_u.data = nn.functional.normalize(matrix @ layer.weight_v, dim=0)
        layer.weight = layer.weight_bar / (layer.weight_u @ matrix @ layer.weight_v)

    def forward(self, x: Tensor) -> Tensor:
        self._update_u_v()
        return self.module(x)


class BigGANConv(nn.Conv2d):
    """A convolution with a spectral norm of its own, which changes its vector in training."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__(channels, out, 1, bias=False)
        self.register_buffer("u0", torch.randn(1, out))
        self.register_buffer("sv0", torch.ones(1))

    def W_(self) -> Tensor:
        matrix = self.weight.flatten(1)
        with torch.no_grad():
            right = nn.functional.normalize(self.u0 @ matrix)
            left = nn.functional.normalize(right @ matrix.T)
            if self.training:
                self.u0.copy_(left)
        norm = (right @ matrix.T @ left.T).squeeze()
        if self.training:
            with torch.no_grad():
                self.sv0.fill_(norm)
        return self.weight / norm

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.conv2d(x, self.W_())


class BigGAN(nn.Module):
    NAMES = ("theta", "phi", "g", "o", "gamma")

    def __init__(self, channels: int, conv: Callable[[int, int], nn.Module] = BigGANConv) -> None:
        super().__init__()
        widths = ((channels, channels // 8), (channels, channels // 8), (channels, channels // 2), (channels // 2, channels))
        for name, (before, after) in zip(self.NAMES[:4], widths, strict=True):
            setattr(self, name, conv(before, after))
        setattr(self, self.NAMES[4], nn.Parameter(torch.tensor(0.6) if self.NAMES[4] == "gamma" else torch.tensor([0.6])))

    def forward(self, x: Tensor) -> Tensor:
        theta, phi, g, o, gamma = (getattr(self, name) for name in self.NAMES)
        branch = attend(theta(x).flatten(2), max_pool2d(phi(x), 2).flatten(2), max_pool2d(g(x), 2).flatten(2))[0]
        return x + gamma * o(branch.unflatten(2, x.shape[2:]))


class StudioGAN(BigGAN):
    NAMES = ("conv1x1_theta", "conv1x1_phi", "conv1x1_g", "conv1x1_attn", "sigma")

    def __init__(self, channels: int) -> None:
        super().__init__(channels, lambda before, after: spectral_norm(pointwise(before, after, bias=False), eps=1e-6))


class NonLocal(nn.Module):
    """Half as many channels inside, max pooling in modules, a batch norm after the output projection."""

    def __init__(self, channels: int, sub_sample: bool = True, batch_norm: bool = True) -> None:
        super().__init__()
        inner = channels // 2
        self.theta, phi, g, w = (pointwise(a, b) for a, b in ((channels, inner),) * 3 + ((inner, channels),))
        self.phi = nn.Sequential(phi, nn.MaxPool2d((2, 2))) if sub_sample else phi
        self.g = nn.Sequential(g, nn.MaxPool2d((2, 2))) if sub_sample else g
        self.W = nn.Sequential(w, nn.BatchNorm2d(channels)) if batch_norm else w

    def forward(self, x: Tensor, return_matrix: bool = False):
        branch, weights = attend(self.theta(x).flatten(2), self.phi(x).flatten(2), self.g(x).flatten(2))
        out = self.W(branch.unflatten(2, x.shape[2:])) + x
        return (out, weights) if return_matrix else out


class DotProduct(NonLocal):
    """The same parameters, logits divided by their number in the place of a softmax."""

    def forward(self, x: Tensor) -> Tensor:
        theta, phi, g = (t.flatten(2) for t in (self.theta(x), self.phi(x), self.g(x)))
        branch = g @ (theta.mT @ phi / phi.shape[2]).mT
        return x + self.W(branch.unflatten(2, x.shape[2:]))


class Bundle(nn.Module):
    """A convolution and the norm behind it, under the names of mmcv."""

    def __init__(self, channels: int, out: int, batch_norm: bool = False) -> None:
        super().__init__()
        self.conv = pointwise(channels, out, bias=not batch_norm)
        if batch_norm:
            self.bn = nn.BatchNorm2d(out)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)) if hasattr(self, "bn") else self.conv(x)


class Mmcv(nn.Module):
    def __init__(self, channels: int, use_scale: bool = True, batch_norm: bool = True) -> None:
        super().__init__()
        inner = channels // 2
        self.g, self.theta, self.phi = Bundle(channels, inner), Bundle(channels, inner), Bundle(channels, inner)
        self.conv_out = Bundle(inner, channels, batch_norm)
        self.scale = inner**-0.5 if use_scale else 1.0

    def forward(self, x: Tensor) -> Tensor:
        branch = attend(self.theta(x).flatten(2), self.phi(x).flatten(2), self.g(x).flatten(2), self.scale)[0]
        return x + self.conv_out(branch.unflatten(2, x.shape[2:]))


class TimmNonLocal(nn.Module):
    """The root of the input's channels divides the logits of narrow queries."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.t, self.p, self.g = (pointwise(channels, 8) for _ in range(3))
        self.z, self.norm = pointwise(8, channels), nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        branch = attend(self.t(x).flatten(2), self.p(x).flatten(2), self.g(x).flatten(2), x.shape[1] ** -0.5)[0]
        return self.norm(self.z(branch.unflatten(2, x.shape[2:]))) + x


class TimmAttention(nn.Module):
    """Several heads, no residual, one of two channel orders."""

    def __init__(self, channels: int, num_heads: int = 2, head_first: bool = True, dropout: float = 0.0) -> None:
        super().__init__()
        self.num_heads, self.head_first = num_heads, head_first
        self.qkv, self.proj = pointwise(channels, 3 * channels), pointwise(channels, channels)
        self.attn_drop, self.proj_drop = nn.Dropout(dropout), nn.Dropout(dropout)

    def forward(self, x: Tensor, shared_rel_pos: Tensor | None = None) -> Tensor:
        qkv = self.qkv(x).flatten(2)
        if self.head_first:
            q, k, v = (t.flatten(1, 2) for t in qkv.unflatten(1, (self.num_heads, -1)).chunk(3, 2))
        else:
            q, k, v = qkv.chunk(3, 1)
        branch = attend(q, k, v, (q.shape[1] // self.num_heads) ** -0.5, self.num_heads)[0]
        return self.proj_drop(self.proj(branch.unflatten(2, x.shape[2:])))


class Vqgan(nn.Module):
    """VQGAN's and latent diffusion's."""

    NAMES = ("norm", "q", "k", "v", "proj_out")

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.add_module(self.NAMES[0], nn.GroupNorm(4, channels, eps=1e-6))
        for name in self.NAMES[1:]:
            self.add_module(name, pointwise(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        norm, q, k, v, out = (self.get_submodule(name) for name in self.NAMES)
        h = norm(x)
        return x + out(attend(q(h).flatten(2), k(h).flatten(2), v(h).flatten(2), x.shape[1] ** -0.5)[0].view_as(x))


class Ddpm(Vqgan):
    NAMES = ("group_norm", "proj_q", "proj_k", "proj_v", "proj")


class GuidedDiffusion(nn.Module):
    """Tokens from beginning to end; the order of the packed channels is a flag."""

    def __init__(self, channels: int, num_heads: int = 2, legacy: bool = True) -> None:
        super().__init__()
        self.num_heads, self.legacy = num_heads, legacy
        self.norm = nn.GroupNorm(4, channels)
        self.qkv, self.proj_out = nn.Conv1d(channels, 3 * channels, 1), nn.Conv1d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2)
        qkv = self.qkv(self.norm(tokens))
        if self.legacy:
            q, k, v = (t.flatten(1, 2) for t in qkv.unflatten(1, (self.num_heads, -1)).chunk(3, 2))
        else:
            q, k, v = qkv.chunk(3, 1)
        branch = attend(q, k, v, (q.shape[1] // self.num_heads) ** -0.5, self.num_heads)[0]
        return (tokens + self.proj_out(branch)).view_as(x)


class Nin(nn.Module):
    """A projection by a transposed matrix."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.W = nn.Parameter(torch.randn(channels, channels) * channels**-0.5)
        self.b = nn.Parameter(torch.full((channels,), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("nchw,cd->ndhw", x, self.W) + self.b[:, None, None]


class ScoreSde(nn.Module):
    def __init__(self, channels: int, skip_rescale: bool = True) -> None:
        super().__init__()
        self.GroupNorm_0 = nn.GroupNorm(4, channels, eps=1e-6)
        self.NIN_0, self.NIN_1, self.NIN_2, self.NIN_3 = (Nin(channels) for _ in range(4))
        self.skip_rescale = skip_rescale

    def forward(self, x: Tensor) -> Tensor:
        h = self.GroupNorm_0(x)
        branch = attend(self.NIN_0(h).flatten(2), self.NIN_1(h).flatten(2), self.NIN_2(h).flatten(2), x.shape[1] ** -0.5)[0]
        out = x + self.NIN_3(branch.view_as(x))
        return out / 2**0.5 if self.skip_rescale else out


class Lucidrains(nn.Module):
    """No bias before, no residual; `memory` are keys and values that no pixel has."""

    def __init__(self, channels: int, heads: int = 2, width: int = 4, memory: bool = False) -> None:
        super().__init__()
        self.heads, self.scale = heads, width**-0.5
        self.to_qkv, self.to_out = pointwise(channels, 3 * heads * width, bias=False), pointwise(heads * width, channels)
        if memory:
            self.mem_kv = nn.Parameter(torch.randn(2, heads, 4, width))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.flatten(2) for t in self.to_qkv(x).chunk(3, 1))
        return self.to_out(attend(q * self.scale, k, v, heads=self.heads)[0].unflatten(2, x.shape[2:]))


class LinearAttention(Lucidrains):
    """The same parameters, softmax of queries and keys apart."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.flatten(2).unflatten(1, (self.heads, -1)) for t in self.to_qkv(x).chunk(3, 1))
        context = v @ torch.softmax(k, -1).mT
        return self.to_out((context @ (q.softmax(2) * self.scale)).flatten(1, 2).unflatten(2, x.shape[2:]))


class EdmConv(nn.Module):
    """A convolution that converts its weights to the dtype of the map, and might resample."""

    def __init__(self, channels: int, out: int, kernel: int) -> None:
        super().__init__()
        self.in_channels, self.out_channels, self.up, self.down = channels, out, False, False
        self.weight = nn.Parameter(torch.randn(out, channels, kernel, kernel) / (channels * kernel**2) ** 0.5)
        self.bias = nn.Parameter(torch.randn(out) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.conv2d(x, self.weight.to(x.dtype), self.bias.to(x.dtype), padding=self.weight.shape[-1] // 2)


class Edm(nn.Module):
    """A residual block with attention at its end, which takes a vector as well."""

    def __init__(self, channels: int, num_heads: int = 2) -> None:
        super().__init__()
        self.in_channels, self.num_heads, self.skip_scale = channels // 2, num_heads, 0.5**0.5
        self.conv0, self.affine = EdmConv(channels // 2, channels, 3), nn.Linear(5, channels)
        self.norm2 = nn.GroupNorm(4, channels)
        self.qkv, self.proj = EdmConv(channels, 3 * channels, 1), EdmConv(channels, channels, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        x = nn.functional.dropout(self.conv0(x), 0.2, self.training) + self.affine(emb)[:, :, None, None]
        if self.num_heads:
            q, k, v = (t.flatten(1, 2) for t in self.qkv(self.norm2(x)).flatten(2).unflatten(1, (self.num_heads, -1, 3)).unbind(3))
            branch = attend(q, k, v, (q.shape[1] // self.num_heads) ** -0.5, self.num_heads)[0]
            x = (x + self.proj(branch.view_as(x))) * self.skip_scale
        return x


def wrapped(block: Sagan) -> Sagan:
    """With spectral norm around each convolution."""
    block.query_conv, block.key_conv, block.value_conv = map(SpectralWrapper, (block.query_conv, block.key_conv, block.value_conv))
    return block


C = 16
BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "DANet": lambda: Sagan(C),
    "SAGAN, wrapped": lambda: wrapped(Sagan(C)),
    "CCNet": lambda: CCNet(C),
    "fastai": lambda: Fastai(C),
    "fastai, stacked": lambda: Fastai(C, stacked=True),
    "BigGAN": lambda: BigGAN(C),
    "StudioGAN": lambda: StudioGAN(C),
    "non-local": lambda: NonLocal(C),
    "non-local, plain": lambda: NonLocal(C, sub_sample=False, batch_norm=False),
    "mmcv": lambda: Mmcv(C),
    "mmcv, plain": lambda: Mmcv(C, use_scale=False, batch_norm=False),
    "timm NonLocalAttn": lambda: TimmNonLocal(C),
    "timm Attention2d": lambda: TimmAttention(C),
    "timm Attention2d, new order": lambda: TimmAttention(C, head_first=False),
    "VQGAN": lambda: Vqgan(C),
    "DDPM": lambda: Ddpm(C),
    "guided-diffusion": lambda: GuidedDiffusion(C),
    "guided-diffusion, new order": lambda: GuidedDiffusion(C, legacy=False),
    "score_sde": lambda: ScoreSde(C),
    "score_sde, plain": lambda: ScoreSde(C, skip_rescale=False),
    "lucidrains": lambda: Lucidrains(C),
}
"""What is recognised and computed here, by the name of where it comes from."""
