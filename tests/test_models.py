"""Every model in every kind: its weights by name and shape, its scores and gradients, and what it refuses."""

import copy
from functools import partial
from math import prod
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import visattn
from visattn import functional, models, use_backend

from . import model_oracle, oracle
from .model_oracle import SCORES, SHAPES, Flat, Net

NAMES = [
    "cnn_vanilla", "cnn_early_attention", "cnn_late_attention", "cnn_double_attention", "resnet10", "resnet10_attention", "sagan_cnn",
    "vit", "vit_flat", "mlp_mnist", "cnn_mnist", "vit_mnist",
]  # fmt: skip
ON_MAPS = ("fused", "naive", "queries", "channel")
KINDS = {
    "cnn_early_attention": ON_MAPS,
    "cnn_late_attention": ON_MAPS,
    "cnn_double_attention": ON_MAPS,
    "resnet10_attention": ON_MAPS,
    "sagan_cnn": ("fused", "naive"),
    "vit": ("sdpa", "naive"),
    "vit_flat": ("matmul", "einsum"),
    "vit_mnist": ("sdpa", "naive"),
}
PARAMETERS = {"sagan_cnn": 520_870, "vit": 497_930, "cnn_mnist": 40_730}
SMALL_FLAT = Flat(image_size=12, patch_size=4, width=6, heads=2, blocks=2)


def marked(name: str, kind: str | None) -> object:
    """A pair as a parameter of a test."""
    return pytest.param(name, kind, id=f"{name}-{kind}" if kind else name)


ALL = [marked(name, kind) for name in NAMES for kind in KINDS.get(name, (None,))]
WITHOUT_FLAT = [pair for pair in ALL if pair.values[0] != "vit_flat"]


def create(name: str, kind: str | None) -> nn.Module:
    """The model, vit_flat with few weights; seeded."""
    torch.manual_seed(0)
    if name == "vit_flat":
        layer = {"matmul": models.AttentionHead, "einsum": models.EinsumAttentionHead}[kind]
        sizes = SMALL_FLAT
        return models.FlatVisionTransformer(
            10, layer, image_size=sizes.image_size, patch_size=sizes.patch_size, embedding_size=sizes.width, num_heads=sizes.heads,
            num_encoders=sizes.blocks,
        )  # fmt: skip
    return models.create_model(name, attention=kind)


def random_images(name: str, count: int = 2, dtype: torch.dtype = torch.float64) -> Tensor:
    """Images of the model's size; smaller and not square where it takes any size, since the full size would take long."""
    small = {"sagan_cnn": (3, 8, 7), "resnet10": (3, 20, 16), "resnet10_attention": (3, 20, 16), "vit_flat": (3, 12, 12)}
    shape = small.get(name, models.input_shape(name))
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def score_function(name: str):
    return partial(SCORES[name], sizes=SMALL_FLAT) if name == "vit_flat" else SCORES[name]


def shapes_of(name: str) -> model_oracle.Shapes:
    return model_oracle.vit_flat_shapes(name, 10, SMALL_FLAT) if name == "vit_flat" else SHAPES[name](name, 10)


def stand_in_dropout(x: Tensor, p: float) -> Tensor:
    """What no other operation does, once for every dropout, and the same each time."""
    return (1 + p) * x + p


def assert_same_scores_and_gradients(model: nn.Module, scores, weights: dict[str, Tensor], images: Tensor, training: bool, **net) -> None:
    """With `weights` loaded, in float64: for one gradient of the scores, the gradients of all weights and of the images."""
    model.double().load_state_dict(weights, strict=True)
    model.train(training)
    learned = {key: weights[key].clone().requires_grad_() for key, _ in model.named_parameters()}
    drop = stand_in_dropout if training else (lambda x, p: x)
    ours_in, expected_in = images.clone().requires_grad_(), images.clone().requires_grad_()
    with mock.patch("torch.nn.functional.dropout", lambda x, p=0.5, training=True, inplace=False: drop(x, p) if training else x):
        ours = model(ours_in)
    expected = scores(Net(weights | learned, training, drop, **net), expected_in)
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)

    d_scores = torch.randn(ours.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    wanted = torch.autograd.grad(expected, [expected_in, *learned.values()], d_scores, allow_unused=True)
    found = torch.autograd.grad(ours, [ours_in, *model.parameters()], d_scores, allow_unused=True)
    largest = max(g.abs().max().item() for g in wanted if g is not None)
    for key, a, b in zip(["images", *learned], found, wanted, strict=True):
        assert (a is None) == (b is None), key
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11 * largest, msg=lambda m, key=key: f"gradient of {key}: {m}")


class TestTable:
    def test_names(self):
        assert models.names() == NAMES

    @pytest.mark.parametrize("name", NAMES)
    def test_kinds(self, name):
        assert models.attentions(name) == KINDS.get(name, ())

    @pytest.mark.parametrize("name", NAMES)
    def test_input_shape(self, name):
        expected = (1, 28, 28) if name.endswith("mnist") else (3, 64, 64) if name == "vit_flat" else (3, 32, 32)
        assert models.input_shape(name) == expected

    @pytest.mark.parametrize(("name", "kind"), WITHOUT_FLAT)
    def test_scores_of_its_images(self, name, kind):
        model = models.create_model(name, 7, attention=kind).eval()
        with torch.no_grad():
            assert model(torch.randn(1, *models.input_shape(name))).shape == (1, 7)

    @pytest.mark.parametrize("name", [n for n in KINDS if n != "vit_flat"])
    def test_the_default_is_the_first_kind(self, name):
        default, first = (models.create_model(name, attention=kind) for kind in (None, KINDS[name][0]))
        assert [type(m) for m in default.modules()] == [type(m) for m in first.modules()]

    @pytest.mark.parametrize(("name", "kind"), WITHOUT_FLAT)
    def test_one_seed_one_model(self, name, kind):
        """All kinds of a model start from the same weights."""
        weights = create(name, kind).state_dict()
        first = create(name, KINDS[name][0] if kind else None).state_dict()
        assert all(torch.equal(weights[key], first[key]) for key in first)

    @pytest.mark.parametrize("call", [models.create_model, models.attentions, models.input_shape])
    def test_unknown_model(self, call):
        with pytest.raises(ValueError, match=r"unknown model 'alexnet', expected one of cnn_vanilla, .*, vit_mnist"):
            call("alexnet")

    def test_unknown_kind(self):
        with pytest.raises(ValueError, match="unknown attention 'sdpa' for sagan_cnn, expected one of fused, naive"):
            models.create_model("sagan_cnn", attention="sdpa")
        with pytest.raises(ValueError, match="unknown attention 'fused' for resnet10, it has no attention; leave the argument out"):
            models.create_model("resnet10", attention="fused")

    def test_no_classes(self):
        with pytest.raises(ValueError, match="num_classes must be at least 1, got 0"):
            models.create_model("vit", 0)


class TestWeights:
    @pytest.mark.parametrize(("name", "kind"), ALL)
    def test_keys_and_shapes(self, name, kind):
        classes = 5 if name == "vit_flat" else 10
        with torch.device("meta"):
            model = models.create_model(name, classes, attention=kind)
        assert {key: tuple(t.shape) for key, t in model.state_dict().items()} == SHAPES[name](name, classes)

    @pytest.mark.parametrize("name", PARAMETERS)
    def test_published_counts(self, name):
        with torch.device("meta"):
            assert sum(p.numel() for p in models.create_model(name).parameters()) == PARAMETERS[name]
        assert sum(map(prod, SHAPES[name](name, 10).values())) == PARAMETERS[name]

    def test_published_count_of_vit_flat(self):
        with torch.device("meta"):
            model = models.create_model("vit_flat", 5)
        assert sum(p.numel() for p in model.parameters()) == 52_213_253
        assert [sum(p.numel() for p in block.parameters()) for block in model[1].basic_encoder_arr] == [26_055_936] * 2
        assert len(list(model.parameters())) == 46

    def test_limits(self):
        """cnn_mnist had to stay under 50,000; vit_mnist is meant to be small too."""
        assert sum(p.numel() for p in models.create_model("vit_mnist").parameters()) < 200_000

    def test_gamma_starts_at_zero(self):
        model = models.create_model("sagan_cnn")
        for layer in (model.sa1, model.sa2, model.sa3, model.sa4):
            assert layer.gamma_parameter.tolist() == [0.0]

    def test_resnet10_has_a_hundred_classes_by_default(self):
        assert models.ResNet10().fc.out_features == 100


class TestScores:
    @pytest.mark.parametrize(("name", "kind"), ALL)
    def test_scores_and_gradients(self, name, kind):
        self.check(name, kind, training=False)

    @pytest.mark.parametrize(("name", "kind"), [pair for pair in ALL if pair.values[0] in ("resnet10", "vit", "cnn_mnist")])
    def test_scores_and_gradients_in_training(self, name, kind):
        """The models that differ in training, by dropout or by batch statistics."""
        self.check(name, kind, training=True)

    @staticmethod
    def check(name: str, kind: str | None, training: bool) -> None:
        scores = partial(score_function(name), name=name, kind=kind)
        assert_same_scores_and_gradients(
            create(name, kind), lambda net, x: scores(net, x=x), model_oracle.random_weights(shapes_of(name)), random_images(name), training
        )

    @pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
    def test_resnet10_with_batchnorm(self, training):
        name = "resnet10_attention"
        assert_same_scores_and_gradients(
            models.ResNet10(10, models.NaiveAttention, batchnorm=True), lambda net, x: model_oracle.resnet(net, name, x, "naive"),
            model_oracle.random_weights(shapes_of(name)), random_images(name), training, batchnorm=True,
        )  # fmt: skip

    def test_vit_mnist_with_dropout(self):
        assert_same_scores_and_gradients(
            models.DigitTransformer(attention=models.NaiveSingleHeadAttention, dropout=0.1),
            lambda net, x: model_oracle.vit_mnist(net, "vit_mnist", x, "naive", dropout=0.1),
            model_oracle.random_weights(shapes_of("vit_mnist")), random_images("vit_mnist"), training=True,
        )  # fmt: skip

    def test_both_single_heads_drop_the_same_weights(self):
        outs = []
        for layer in (models.SingleHeadAttention, models.NaiveSingleHeadAttention):
            torch.manual_seed(0)
            head = layer(12, 5, 0.4).double()
            outs.append(head(torch.ones(2, 7, 12, dtype=torch.float64)))
            torch.testing.assert_close(head.eval()(torch.ones(1, 2, 12, dtype=torch.float64))[0, 0], head.w_v.weight.sum(1))
        torch.testing.assert_close(*outs, rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize(("name", "count"), [("cnn_late_attention", 1), ("resnet10_attention", 1), ("sagan_cnn", 4)])
    def test_fused_is_the_dispatched_layer(self, name, count):
        with use_backend("torch"), oracle.recorded_backends() as ran:
            create(name, "fused")(random_images(name, 1, torch.float32)).sum().backward()
        assert ran == ["torch"] * 2 * count
        with oracle.recorded_backends() as ran:
            create(name, "naive")(random_images(name, 1, torch.float32)).sum().backward()
        assert ran == []

    def test_vit_flat_at_its_size(self):
        """Both ways of writing the products, from the same seed, in fp32."""
        results = []
        for kind in ("matmul", "einsum"):
            torch.manual_seed(0)
            model = models.create_model("vit_flat", 5, attention=kind)
            images = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(1), requires_grad=True)
            scores = model(images)
            assert scores.shape == (1, 5)
            results.append((scores, *torch.autograd.grad(scores.sum(), [images, model[0].positions])))
        torch.testing.assert_close(results[0], results[1])


class TestUse:
    @pytest.mark.parametrize(("name", "kind"), ALL)
    def test_evaluation_is_deterministic(self, name, kind):
        model, images = create(name, kind).eval(), random_images(name, 1, torch.float32)
        assert torch.equal(model(images), model(images))

    @pytest.mark.parametrize("name", ["vit", "cnn_mnist"])
    def test_training_is_not(self, name):
        model, images = create(name, None).train(), random_images(name, dtype=torch.float32)
        assert not torch.equal(model(images), model(images))

    @pytest.mark.parametrize(("name", "kind"), ALL)
    def test_deepcopy(self, name, kind):
        model, images = create(name, kind).eval(), random_images(name, 1, torch.float32)
        twin, before = copy.deepcopy(model), model(images)
        assert torch.equal(twin(images), before)
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.zero_()
        assert torch.equal(model(images), before)

    @pytest.mark.parametrize(("name", "kind"), [pair for pair in ALL if pair.values[0][:3] in ("cnn", "res", "sag")])
    def test_channels_last(self, name, kind):
        model, images = create(name, kind).double().eval(), random_images(name, 1)
        expected = model(images)
        model.to(memory_format=torch.channels_last)
        torch.testing.assert_close(model(images.to(memory_format=torch.channels_last)), expected, rtol=1e-10, atol=1e-12)

    @pytest.mark.parametrize(("name", "size"), [("vit", (64, 64)), ("vit", (33, 33)), ("vit_flat", (65, 65)), ("vit_mnist", (32, 28))])
    def test_images_of_another_size(self, name, size):
        expected = models.input_shape(name)[1:]
        with torch.device("meta"):
            model = models.create_model(name)
            images = torch.randn(2, models.input_shape(name)[0], *size)
        with pytest.raises(ValueError, match=rf"images must have shape \(N, C, {expected[0]}, {expected[1]}\), got \(2, ., {size[0]}, "):
            model(images)

    def test_sizes_that_do_not_divide(self):
        with pytest.raises(ValueError, match="image_size must be a multiple of patch_size, got 32 for patches of 5"):
            models.VisionTransformer(patch_size=5)
        with pytest.raises(ValueError, match="image_size must be a multiple of patch_size, got 64 for patches of 7"):
            models.FlatVisionTransformer(patch_size=7)
        with pytest.raises(ValueError, match="embedding_size must be a multiple of num_heads, got 128 for 3 heads"):
            models.FlatVisionTransformer(num_heads=3)
        with pytest.raises(ValueError, match="input_dim must be a multiple of num_heads, got 128 for 3 heads"):
            models.VisionTransformer(num_heads=3)
        with pytest.raises(ValueError, match="in_channels must be at least 8, of which queries and keys have an eighth, got 4"):
            models.SaganAttention(4)


class TestTraining:
    """Two kinds of a model, from the same seed and on the same images, learn the same."""

    @staticmethod
    def losses(name: str, kind: str, steps: int, dtype: torch.dtype, learning_rate: float) -> list[float]:
        model, images = create(name, kind).to(dtype), random_images(name, 1 if name.startswith("cnn") else 2, dtype)
        optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate)
        found = []
        for _ in range(steps):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(images), torch.tensor([3, 7])[: len(images)])
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        return found

    @pytest.mark.parametrize("name", [name for name in KINDS if name not in ("cnn_early_attention", "cnn_late_attention")])
    def test_in_float64(self, name):
        first, second = (self.losses(name, kind, 10, torch.float64, 1e-3) for kind in KINDS[name][:2])
        assert first == pytest.approx(second, rel=1e-9)
        assert first[-1] < 0.9 * first[0]

    @pytest.mark.parametrize("name", KINDS)
    def test_in_fp32(self, name):
        first, second = (self.losses(name, kind, 5, torch.float32, 5e-5) for kind in KINDS[name][:2])
        assert first == pytest.approx(second, rel=1e-5)


LAYERS = [("attention", channels) for channels in (32, 64, 128)] + [("sagan", channels) for channels in (32, 64, 128, 256)]


@pytest.mark.parametrize(("form", "channels"), LAYERS)
def test_layers_of_the_models_on_both_backends(form, channels, backend, place):
    """Every fused layer at every width that a model has, on an 8×8 map: the branch with its gradients, through the module itself."""
    problems = [
        oracle.make_problem(
            (1, channels, 8, 8), qk_channels=channels // 8 if form == "sagan" else channels, gamma=form == "sagan", seed=seed
        )
        for seed in range(3 if channels < 256 else 1)  # one is enough of a wide map, and the interpreter is slow
    ]  # fmt: skip
    results = [
        oracle.stacked([compute(form, problem, *arguments) for problem in problems])
        for compute, *arguments in ((run_module, backend, place), (run_function, torch.float64), (run_function, torch.float32))
    ]
    found = oracle.complaints(*results)
    assert not found, "\n".join(found)


KEYS = {
    "attention": {"q": "conv_query", "k": "conv_key", "v": "conv_value"},
    "sagan": {"q": "query_convolution", "k": "key_convolution", "v": "value_convolution"},
}


def state_dict_of(form: str, problem: oracle.Problem, dtype: torch.dtype) -> dict[str, Tensor]:
    state = {}
    for letter, key in KEYS[form].items():
        state[f"{key}.weight"] = getattr(problem, f"w_{letter}").to(dtype)[:, :, None, None]
        state[f"{key}.bias"] = getattr(problem, f"b_{letter}").to(dtype)
    if form == "sagan":
        state["gamma_parameter"] = problem.gamma.to(dtype)
    return state


def named_as_by_oracle(form: str, out: Tensor, x: Tensor, parameters: dict[str, Tensor], problem: oracle.Problem) -> oracle.Results:
    gradients = dict(zip(["x", *parameters], torch.autograd.grad(out, [x, *parameters.values()], problem.d_out.to(out)), strict=True))
    results = {"out": out.detach(), "x": gradients["x"]}
    for letter, key in KEYS[form].items():
        results |= {f"w_{letter}": gradients[f"{key}.weight"].flatten(1), f"b_{letter}": gradients[f"{key}.bias"]}
    if form == "sagan":
        results |= {"gamma": gradients["gamma_parameter"], "w_v / gamma": (problem.w_v / problem.gamma).double()}
    return {name: t.cpu() for name, t in results.items()}


def run_module(form: str, problem: oracle.Problem, backend: str, place: torch.device) -> oracle.Results:
    """Without the residual, which the layers always add: beside it the errors of the branch would vanish."""
    channels = problem.x.shape[1]
    layer = models.SaganAttention(channels) if form == "sagan" else visattn.Attention(channels)
    layer.load_state_dict(state_dict_of(form, problem, torch.float32), strict=True)
    layer.to(place)
    x = problem.x.to(place).requires_grad_()
    branch_only = mock.patch.object(functional, "self_attention_2d", partial(functional.self_attention_2d, residual=False))
    with branch_only, use_backend(backend), oracle.recorded_backends() as ran:
        results = named_as_by_oracle(form, layer(x), x, dict(layer.named_parameters()), problem)
    assert ran == [backend, backend], f"expected forward and backward on {backend}, ran {ran}"
    return results


def run_function(form: str, problem: oracle.Problem, dtype: torch.dtype) -> oracle.Results:
    branch = {"attention": model_oracle.attention_branch, "sagan": model_oracle.sagan_branch}[form]
    parameters = {f"layer.{key}": t.requires_grad_() for key, t in state_dict_of(form, problem, dtype).items()}
    x = problem.x.to(dtype).requires_grad_()
    out = branch(Net(parameters, True, stand_in_dropout), "layer", x, "fused")
    return named_as_by_oracle(form, out, x, {key.removeprefix("layer."): t for key, t in parameters.items()}, problem)
