"""The models once more, each as a function of a dict of weights, and the shape of every weight: what visattn.models is held to.

Derived from the descriptions of the models, by elementary operations; nothing of visattn is used here.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod, sqrt

import torch
from torch import Tensor
from torch.nn.functional import conv2d, max_pool2d

Shapes = dict[str, tuple[int, ...]]

# ---- the shapes of weights, by key ----


def conv(key: str, inputs: int, outputs: int, size: int) -> Shapes:
    return {f"{key}.weight": (outputs, inputs, size, size), f"{key}.bias": (outputs,)}


def linear(key: str, inputs: int, outputs: int) -> Shapes:
    return {f"{key}.weight": (outputs, inputs), f"{key}.bias": (outputs,)}


def norm(key: str, width: int) -> Shapes:
    return {f"{key}.weight": (width,), f"{key}.bias": (width,)}


def batchnorm(key: str, channels: int) -> Shapes:
    statistics = {f"{key}.running_mean": (channels,), f"{key}.running_var": (channels,), f"{key}.num_batches_tracked": ()}
    return norm(key, channels) | statistics


def attention(key: str, channels: int) -> Shapes:
    return {k: s for part in ("query", "key", "value") for k, s in conv(f"{key}.conv_{part}", channels, channels, 1).items()}


CNN_KEYS = {  # first convolution, early attention, second convolution, late attention, linear layer
    "cnn_vanilla": ("0", None, "2", None, "5"),
    "cnn_early_attention": ("0", "2", "4", None, "7"),
    "cnn_late_attention": ("0", None, "2", "4", "7"),
    "cnn_double_attention": ("0", "2", "4", "6", "9"),
}


def cnn_shapes(name: str, classes: int) -> Shapes:
    first, early, second, late, last = CNN_KEYS[name]
    shapes = conv(first, 3, 64, 3) | conv(second, 64, 32, 3) | linear(last, 32 * 32 * 32, classes)
    return shapes | (attention(early, 64) if early else {}) | (attention(late, 32) if late else {})


STAGES = {"layer1": (64, 64, 1), "layer2": (64, 128, 1), "layer3": (128, 256, 1), "layer4": (256, 512, 2)}


def resnet_shapes(name: str, classes: int) -> Shapes:
    shapes = conv("conv1", 3, 64, 7) | batchnorm("bn1", 64) | linear("fc", 512, classes)
    for stage, (inputs, outputs, _) in STAGES.items():
        block = f"{stage}.0"
        shapes |= conv(f"{block}.conv1", inputs, outputs, 3) | batchnorm(f"{block}.bn1", outputs)
        shapes |= conv(f"{block}.conv2", outputs, outputs, 3) | batchnorm(f"{block}.bn2", outputs)
        if inputs != outputs:
            shapes |= conv(f"{block}.downsampler.0", inputs, outputs, 1) | batchnorm(f"{block}.downsampler.1", outputs)
    return shapes | (attention("attention", 128) if name == "resnet10_attention" else {})


def sagan_shapes(name: str, classes: int) -> Shapes:
    shapes = conv("convolution5", 256, classes, 3)
    for i, (inputs, outputs) in enumerate(((3, 32), (32, 64), (64, 128), (128, 256)), 1):
        shapes |= conv(f"convolution{i}", inputs, outputs, 3) | {f"sa{i}.gamma_parameter": (1,)}
        shapes |= conv(f"sa{i}.query_convolution", outputs, outputs // 8, 1) | conv(f"sa{i}.key_convolution", outputs, outputs // 8, 1)
        shapes |= conv(f"sa{i}.value_convolution", outputs, outputs, 1)
    return shapes


def vit_shapes(name: str, classes: int) -> Shapes:
    shapes = conv("patch_embedding", 3, 128, 16) | linear("fc", 128, classes)
    shapes |= {"positional_embedding": (1, 5, 128), "class_token": (1, 1, 128)}
    for i in range(3):
        block = f"transformer_encoder_blocks.{i}"
        for layer in ("query", "key", "value", "fc_out"):
            shapes |= linear(f"{block}.self_attention.{layer}", 128, 128)
        shapes |= linear(f"{block}.feed_forward.0", 128, 256) | linear(f"{block}.feed_forward.2", 256, 128)
        shapes |= norm(f"{block}.norm1", 128) | norm(f"{block}.norm2", 128)
    return shapes


@dataclass(frozen=True)
class Flat:
    """The sizes of a vit_flat; by default the published ones."""

    image_size: int = 64
    patch_size: int = 16
    width: int = 128
    heads: int = 2
    blocks: int = 2

    @property
    def tokens(self) -> int:
        return (self.image_size // self.patch_size) ** 2 + 1


PUBLISHED = Flat()


def vit_flat_shapes(name: str, classes: int, sizes: Flat = PUBLISHED) -> Shapes:
    flat, head = sizes.tokens * sizes.width, sizes.tokens * sizes.width // sizes.heads
    shapes = conv("0.sequential.0", 3, sizes.width, sizes.patch_size) | linear("2.1", sizes.width, classes)
    shapes |= {"0.class_token": (1, 1, sizes.width), "0.positions": (sizes.tokens, sizes.width)}
    for i in range(sizes.blocks):
        block = f"1.basic_encoder_arr.{i}"
        for h in range(sizes.heads):
            for layer in ("WQ", "WK", "WV"):
                shapes |= linear(f"{block}.self_attention_layer.attention_heads_arr.{h}.{layer}", head, head)
        shapes |= linear(f"{block}.W1", flat, 2 * flat) | linear(f"{block}.W2", 2 * flat, flat)
        shapes |= norm(f"{block}.norm1", sizes.width) | norm(f"{block}.norm2", sizes.width)
    return shapes


def mlp_mnist_shapes(name: str, classes: int) -> Shapes:
    return linear("1", 784, 100) | linear("3", 100, 100) | linear("6", 100, classes)


def cnn_mnist_shapes(name: str, classes: int) -> Shapes:
    return conv("0", 1, 12, 3) | conv("3", 12, 24, 3) | linear("7", 1176, 32) | linear("10", 32, classes)


def vit_mnist_shapes(name: str, classes: int) -> Shapes:
    shapes = conv("patch_embedding", 1, 64, 7) | {"class_token": (1, 1, 64), "positions": (1, 17, 64)} | linear("fc", 64, classes)
    for i in range(3):
        for h in range(4):
            shapes |= {f"layers.{i}.attn.0.heads.{h}.{layer}.weight": (16, 64) for layer in ("w_q", "w_k", "w_v")}
        shapes |= linear(f"layers.{i}.attn.1", 64, 64) | norm(f"layers.{i}.attn.3", 64)
        shapes |= linear(f"layers.{i}.feedforward.0", 64, 128) | linear(f"layers.{i}.feedforward.3", 128, 64)
        shapes |= norm(f"layers.{i}.feedforward.5", 64)
    return shapes


# ---- the models as functions ----


def random_weights(shapes: Shapes, seed: int = 0) -> dict[str, Tensor]:
    """Weights in float64 that keep activations near one, so that no softmax is uniform and no ReLU dead."""
    generator = torch.Generator().manual_seed(seed)

    def draw(key: str, shape: tuple[int, ...]) -> Tensor:
        if key.endswith("num_batches_tracked"):
            return torch.tensor(3)
        noise = torch.randn(shape, generator=generator, dtype=torch.float64)
        if key.endswith("running_var"):
            return 0.5 + noise.abs()
        if len(shape) == 1:
            return 0.2 * noise + (1 if key.endswith("weight") or key.endswith("gamma_parameter") else 0)
        return noise * (1.4 / sqrt(prod(shape[1:])) if key.endswith("weight") else 1)

    return {key: draw(key, shape) for key, shape in shapes.items()}


@dataclass(frozen=True)
class Net:
    """Weights, and what differs between training and evaluation; `drop(x, p)` stands for dropout."""

    weights: dict[str, Tensor]
    training: bool
    drop: Callable[[Tensor, float], Tensor]
    batchnorm: bool = False

    def conv(self, key: str, x: Tensor, **options: int) -> Tensor:
        return conv2d(x, self.weights[f"{key}.weight"], self.weights[f"{key}.bias"], **options)

    def linear(self, key: str, x: Tensor) -> Tensor:
        return torch.einsum("...i,oi->...o", x, self.weights[f"{key}.weight"]) + self.weights.get(f"{key}.bias", 0)

    def layernorm(self, key: str, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return (
            centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * self.weights[f"{key}.weight"] + self.weights[f"{key}.bias"]
        )

    def batchnormed(self, key: str, x: Tensor) -> Tensor:
        mean, variance = self.weights[f"{key}.running_mean"], self.weights[f"{key}.running_var"]
        if self.training:
            mean, variance = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
        column = (slice(None), None, None)
        normal = (x - mean[column]) / (variance[column] + 1e-5).sqrt()
        return normal * self.weights[f"{key}.weight"][column] + self.weights[f"{key}.bias"][column]

    def pointwise(self, key: str, x: Tensor) -> Tensor:
        """A 1×1 convolution of (N, C, L)."""
        return torch.einsum("oc,ncl->nol", self.weights[f"{key}.weight"][:, :, 0, 0], x) + self.weights[f"{key}.bias"][:, None]


def exp_normalized(logits: Tensor, dim: int) -> Tensor:
    powers = (logits - logits.amax(dim, keepdim=True)).exp()
    return powers / powers.sum(dim, keepdim=True)


def attention_branch(net: Net, key: str, x: Tensor, kind: str) -> Tensor:
    """What the layer adds to its input: the formula, or one of the two published departures from it."""
    q, k, v = (net.pointwise(f"{key}.conv_{part}", x.flatten(2)) for part in ("query", "key", "value"))
    if kind == "channel":  # channels attend to channels
        weights = exp_normalized(torch.einsum("ncl,ndl->ncd", q, k) / sqrt(x.shape[1]), 2)
        return torch.einsum("ncd,ndl->ncl", weights, v).reshape(x.shape)
    logits = torch.einsum("nci,ncj->nij", q, k) / sqrt(x.shape[1])  # query i, key j
    weights = exp_normalized(logits, 1 if kind == "queries" else 2)
    return torch.einsum("nij,ncj->nci", weights, v).reshape(x.shape)


def sagan_branch(net: Net, key: str, x: Tensor, kind: str) -> Tensor:
    q, k, v = (net.pointwise(f"{key}.{part}_convolution", x.flatten(2)) for part in ("query", "key", "value"))
    weights = exp_normalized(torch.einsum("ndi,ndj->nij", q, k), 2)
    return net.weights[f"{key}.gamma_parameter"][0] * torch.einsum("nij,ncj->nci", weights, v).reshape(x.shape)


def cnn(net: Net, name: str, x: Tensor, kind: str) -> Tensor:
    first, early, second, late, last = CNN_KEYS[name]
    for convolution, key in ((first, early), (second, late)):
        x = net.conv(convolution, x, padding=1).relu()
        if key:
            x = (x + attention_branch(net, key, x, kind)).relu()
    return net.linear(last, x.reshape(len(x), -1))


def resnet(net: Net, name: str, x: Tensor, kind: str) -> Tensor:
    def normed(key: str, x: Tensor) -> Tensor:
        return net.batchnormed(key, x) if net.batchnorm else x

    x = normed("bn1", net.conv("conv1", x, stride=2, padding=3)).relu()
    x = max_pool2d(x, 3, stride=2, padding=1)
    for stage, (inputs, outputs, stride) in STAGES.items():
        block = f"{stage}.0"
        h = normed(f"{block}.bn1", net.conv(f"{block}.conv1", x, padding=2)).relu()
        h = normed(f"{block}.bn2", net.conv(f"{block}.conv2", h, stride=stride)).relu()
        if inputs != outputs:
            x = net.batchnormed(f"{block}.downsampler.1", net.conv(f"{block}.downsampler.0", x, stride=stride))
        x = (h + x).relu()
        if stage == "layer2" and name == "resnet10_attention":
            x = x + attention_branch(net, "attention", x, kind)
    return net.linear("fc", x.mean((2, 3)))


def sagan(net: Net, name: str, x: Tensor, kind: str) -> Tensor:
    for i in range(1, 5):
        x = net.conv(f"convolution{i}", x, padding=1).relu()
        x = x + sagan_branch(net, f"sa{i}", x, kind)
    return log_probabilities(net.conv("convolution5", x, padding=1).relu().mean((2, 3)))


def log_probabilities(scores: Tensor) -> Tensor:
    return scores - scores.logsumexp(1, keepdim=True)


def patches(net: Net, key: str, x: Tensor) -> Tensor:
    """The vectors (N, L, E) of square patches, row by row: a linear layer on the pixels of each."""
    weight = net.weights[f"{key}.weight"]
    size = weight.shape[-1]
    squares = x.unflatten(3, (-1, size)).unflatten(2, (-1, size))  # (N, C, row, y, column, x)
    return torch.einsum("ncaybx,ocyx->nabo", squares, weight).flatten(1, 2) + net.weights[f"{key}.bias"]


def with_class_token(net: Net, token: str, positions: str, x: Tensor) -> Tensor:
    first = net.weights[token].reshape(1, 1, -1).repeat(len(x), 1, 1)
    return torch.cat((first, x), 1) + net.weights[positions].reshape(1, x.shape[1] + 1, -1)


def vit(net: Net, name: str, x: Tensor, kind: str) -> Tensor:
    x = net.drop(with_class_token(net, "class_token", "positional_embedding", patches(net, "patch_embedding", x)), 0.1)
    for i in range(3):
        block = f"transformer_encoder_blocks.{i}"
        q, k, v = (net.linear(f"{block}.self_attention.{part}", x) for part in ("query", "key", "value"))
        heads = []
        for part in torch.arange(128).split(16):
            weights = exp_normalized(torch.einsum("nid,njd->nij", q[..., part], k[..., part]) / 16, 2)
            heads.append(torch.einsum("nij,njd->nid", weights, v[..., part]))
        x = net.layernorm(f"{block}.norm1", x + net.drop(net.linear(f"{block}.self_attention.fc_out", torch.cat(heads, 2)), 0.1))
        hidden = net.linear(f"{block}.feed_forward.0", x).relu()
        x = net.layernorm(f"{block}.norm2", x + net.drop(net.linear(f"{block}.feed_forward.2", hidden), 0.1))
    return log_probabilities(net.linear("fc", x[:, 0]))


def vit_flat(net: Net, name: str, x: Tensor, kind: str, sizes: Flat = PUBLISHED) -> Tensor:
    x = with_class_token(net, "0.class_token", "0.positions", patches(net, "0.sequential.0", x))
    width = sizes.width // sizes.heads
    for i in range(sizes.blocks):
        block = f"1.basic_encoder_arr.{i}"
        heads = []
        for h in range(sizes.heads):
            portion = x[:, :, h * width : (h + 1) * width].reshape(len(x), -1)
            head = f"{block}.self_attention_layer.attention_heads_arr.{h}"
            q, k, v = (net.linear(f"{head}.{layer}", portion).reshape(len(x), -1, width) for layer in ("WQ", "WK", "WV"))
            weights = exp_normalized(torch.einsum("nid,njd->nij", q, k), 1)  # over the queries i
            heads.append(torch.einsum("nij,njd->nid", weights, v) * (1 / sqrt(width)))
        x = net.layernorm(f"{block}.norm1", x + torch.cat(heads, 2))
        hidden = net.linear(f"{block}.W1", x.reshape(len(x), -1)).relu()
        x = net.layernorm(f"{block}.norm2", x + net.linear(f"{block}.W2", hidden).reshape(x.shape))
    return net.linear("2.1", x.mean(1))


def mlp_mnist(net: Net, name: str, x: Tensor, kind: str) -> Tensor:
    hidden = net.linear("3", net.linear("1", x.reshape(len(x), -1)).relu()).relu()
    return net.linear("6", hidden)


def cnn_mnist(net: Net, name: str, x: Tensor, kind: str) -> Tensor:
    x = max_pool2d(net.conv("0", x, padding=1).relu(), 2)
    x = max_pool2d(net.conv("3", x, padding=1).relu(), 2)
    return net.linear("10", net.drop(net.linear("7", x.reshape(len(x), -1)).relu(), 0.2))


def vit_mnist(net: Net, name: str, x: Tensor, kind: str, dropout: float = 0.0) -> Tensor:
    x = with_class_token(net, "class_token", "positions", patches(net, "patch_embedding", x))
    for i in range(3):
        heads = []
        for h in range(4):
            q, k, v = (net.linear(f"layers.{i}.attn.0.heads.{h}.{layer}", x) for layer in ("w_q", "w_k", "w_v"))
            weights = net.drop(exp_normalized(torch.einsum("nid,njd->nij", q, k) / 4, 2), dropout)
            heads.append(torch.einsum("nij,njd->nid", weights, v))
        attended = net.drop(net.linear(f"layers.{i}.attn.1", torch.cat(heads, 2)), dropout)
        x = net.layernorm(f"layers.{i}.attn.3", attended) + x
        hidden = net.drop(net.linear(f"layers.{i}.feedforward.0", x).relu(), dropout)
        fed = net.drop(net.linear(f"layers.{i}.feedforward.3", hidden), dropout)
        x = net.layernorm(f"layers.{i}.feedforward.5", fed) + x
    return net.linear("fc", x[:, 0])


SHAPES: dict[str, Callable[..., Shapes]] = {
    **dict.fromkeys(CNN_KEYS, cnn_shapes),
    "resnet10": resnet_shapes,
    "resnet10_attention": resnet_shapes,
    "sagan_cnn": sagan_shapes,
    "vit": vit_shapes,
    "vit_flat": vit_flat_shapes,
    "mlp_mnist": mlp_mnist_shapes,
    "cnn_mnist": cnn_mnist_shapes,
    "vit_mnist": vit_mnist_shapes,
}
SCORES: dict[str, Callable[..., Tensor]] = {
    **dict.fromkeys(CNN_KEYS, cnn),
    "resnet10": resnet,
    "resnet10_attention": resnet,
    "sagan_cnn": sagan,
    "vit": vit,
    "vit_flat": vit_flat,
    "mlp_mnist": mlp_mnist,
    "cnn_mnist": cnn_mnist,
    "vit_mnist": vit_mnist,
}
