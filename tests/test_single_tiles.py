"""The backward pass of maps that are one tile, in one launch; and the kernel that makes the gradients of the weights of their sums."""

import importlib

import pytest
import torch

from visattn import folding, triton_backend, use_backend
from visattn.functional import self_attention_2d

from .conftest import HAS_GPU
from .oracle import assert_correct, make_problems

kernels = pytest.importorskip("visattn.kernels", reason="needs Triton")
launch_config = importlib.import_module("visattn.kernels.launch_config")

PLACE = torch.device("cuda", 0) if HAS_GPU else torch.device("cpu")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
HOPPER = kernels.Target("hopper", "bf16x6")
CONFIG = launch_config.weight_gradients_config(HOPPER)


class TestRule:
    @pytest.mark.parametrize(
        ("maps", "channels", "tokens", "single"),
        [
            (64, 128, 64, True),
            (1, 1, 1, True),
            (256, 128, 64, True),
            (257, 128, 64, False),
            (128, 128, 128, True),
            (129, 128, 128, False),
            (1, 128, 129, False),
            (1, 129, 64, False),
        ],
    )
    def test_maps_of_one_tile_that_are_not_too_many(self, maps, channels, tokens, single):
        config = launch_config.single_tile_config(maps, channels, tokens, torch.bfloat16, HOPPER)
        assert (config is not None) == single
        assert config is None or config.block_m == (64 if tokens <= 64 else 128)

    def test_in_full_precision_a_tile_is_smaller(self):
        assert launch_config.single_tile_config(1, 16, 64, torch.float32, HOPPER) is not None
        assert launch_config.single_tile_config(1, 16, 65, torch.float32, HOPPER) is None

    def test_classes_of_devices_without_sizes_keep_the_other_kernels(self):
        assert launch_config.single_tile_config(1, 64, 64, torch.float32, kernels.Target("cdna", "ieee")) is None

    @pytest.mark.parametrize(("fp32", "precision"), [("bf16x6", "tf32x3"), ("tf32", "tf32"), ("ieee", "ieee")])
    def test_sums_are_multiplied_in_fp32_whatever_the_map_is_in(self, fp32, precision):
        assert launch_config.weight_gradients_config(kernels.Target("ampere", fp32)).input_precision == precision


@pytest.mark.kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "qk_channels", "regime"),
    [
        ((3, 16, 8, 8), 16, "peaked"), ((2, 40, 7, 7), 40, "peaked"), ((1, 96, 5, 9), 96, "peaked"), ((2, 24, 1, 1), 24, "uniform"),
        ((2, 64, 8, 8), 8, "peaked"), ((2, 33, 7, 7), 3, "uniform"),
    ],
    ids=str,
)  # fmt: skip
def test_branch_and_gradients(shape, qk_channels, regime, dtype, ran):
    """Against float64; more steps than one for the keys, and queries, of a tile where rows say so. Narrow queries are folded as well."""
    assert_correct(make_problems(shape, dtype, qk_channels=qk_channels, regime=regime), "triton", PLACE)
    assert ran["single"]
    assert not ran["other"]


@pytest.mark.kernels
@pytest.mark.parametrize(
    ("shape", "qk_channels", "mean"),
    [((2, 24, 8, 16), 24, 0.0), ((1, 100, 9, 11), 100, 0.0), ((2, 33, 5, 13), 3, 0.0), ((1, 24, 9, 11), 24, 10.0)],
)
def test_tiles_of_twice_as_many_tokens(shape, qk_channels, mean, ran):
    assert_correct(make_problems(shape, torch.float16, qk_channels=qk_channels, mean=mean), "triton", PLACE)
    assert ran["single"]
    assert not ran["other"]


@pytest.fixture
def ran(monkeypatch):
    """How often either backward pass has run."""
    counts = {"single": 0, "other": 0}

    def counted(name, function):
        def call(*args, **kwargs):
            counts[name] += 1
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(kernels, "single_tile_backward", counted("single", kernels.single_tile_backward))
    monkeypatch.setattr(kernels, "prepare_backward", counted("other", kernels.prepare_backward))
    return counts


@pytest.mark.kernels
@pytest.mark.parametrize(
    ("shape", "dtype", "single"),
    [
        ((2, 16, 8, 8), torch.float32, True), ((2, 16, 5, 13), torch.float32, False),
        ((2, 16, 8, 16), torch.float16, True), ((2, 16, 3, 43), torch.float16, False),
    ],
    ids=str,
)  # fmt: skip
def test_which_one_runs(shape, dtype, single, ran):
    x = torch.randn(shape, device=PLACE, dtype=dtype, requires_grad=True)
    with use_backend("triton"):
        self_attention_2d(x, *torch.randn(3, 16, 16, device=PLACE, dtype=dtype)).sum().backward()
    assert ran == {"single": int(single), "other": int(not single)}


@pytest.mark.kernels
@pytest.mark.parametrize("need_x", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
def test_what_nobody_wants_is_not_computed(need_x, need_weights):
    generator = torch.Generator().manual_seed(0)
    x, d_out = torch.randn(2, 2, 20, 3, 5, generator=generator).to(PLACE)
    shapes = folding.Weights((16, 20), (16,), (16, 20), (16,), (20, 20), (20,), (1,))
    weights = folding.Weights._make([torch.randn(shape, generator=generator).to(PLACE) for shape in shapes])
    _, y, lse = triton_backend.forward(x, weights, 0.2, True, True)
    results = []
    for wanted in ((True, True), (need_x, need_weights)):
        d_x, gradients = triton_backend.backward(x, d_out, weights, y, lse, 0.2, True, *wanted)
        results.append((d_x, *gradients))
    for everything, some, wanted in zip(*results, (need_x, *(need_weights,) * 7), strict=True):
        assert (some is not None) == wanted
        assert some is None or torch.equal(some, everything)


@pytest.mark.kernels
def test_repeats_are_bitwise_equal_and_maps_independent():
    x = torch.randn(3, 16, 4, 5, device=PLACE, requires_grad=True)
    weights = [w.requires_grad_() for w in torch.randn(3, 16, 16, device=PLACE)]
    d_out = torch.randn_like(x)

    def gradients(first):
        with use_backend("triton"):
            return torch.autograd.grad(self_attention_2d(x[:first], *weights), (x, *weights), d_out[:first])

    once, again, alone = gradients(3), gradients(3), gradients(1)
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
    assert torch.equal(once[0][:1], alone[0][:1])


@pytest.mark.kernels
class TestWeightGradients:
    """Against folding.weight_gradients, which the other backends take, in float64."""

    @pytest.mark.parametrize(
        ("channels", "qk_channels", "splits"),
        [(16, 16, 1), (20, 5, 3), (64, 64, 40), (40, 150, 33), (17, 1, 2), (200, 8, 2)],
        ids=str,
    )
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_all_of_them(self, channels, qk_channels, splits, dtype):
        for biased, scaled in ((True, True), (False, True), (True, False)):
            sums = self.moments(splits, 2, channels, channels)
            weights = self.weights(channels, qk_channels, dtype, biased, scaled)
            got = kernels.weight_gradients(sums, *weights, scale=0.3, config=CONFIG)
            product, total = (t.double().sum(0) for t in sums[:2])
            self.compare(got, weights, folding.Moments(product[1], total[1], product[0], total[0]), dtype)

    @pytest.mark.parametrize(
        ("channels", "qk_channels", "splits", "value_splits"),
        [(20, 5, 3, 1), (64, 8, 128, 40), (96, 40, 33, 2), (40, 70, 2, 17)],
        ids=str,
    )
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_projected(self, channels, qk_channels, splits, value_splits, dtype):
        """The keys' gradient meets the map less its mean."""
        for biased, scaled in ((True, True), (False, True), (True, False)):
            sums, values = self.moments(splits, 2, qk_channels, channels), self.moments(value_splits, 1, channels, channels)
            weights = self.weights(channels, qk_channels, dtype, biased, scaled)
            got = kernels.projection_gradients(sums, values, *weights, num_tokens=70, scale=0.3, config=CONFIG)
            product, total, map_total = (t.double().sum(0) for t in sums[:3])
            key = product[1] - torch.outer(total[1], map_total[0]) / 70
            moments = folding.Moments(product[0], total[0], values.product.double().sum(0)[0], values.total.double().sum(0)[0], key)
            self.compare(got, weights, moments, dtype)

    @pytest.mark.parametrize("projected", [False, True])
    def test_every_number_is_written(self, projected, monkeypatch):
        """The zeros of the keys' bias too, which memory may hold by chance."""
        monkeypatch.setattr(torch, "empty_like", lambda like: torch.full_like(like, torch.nan))
        weights, sums, of_values = self.weights(40, 150, torch.float32, True, False), self.moments(3, 2, 40, 40), self.moments(3, 1, 40, 40)
        if projected:
            moments = self.moments(3, 2, 150, 40)
            found = kernels.projection_gradients(moments, of_values, *weights, num_tokens=70, scale=0.3, config=CONFIG)
        else:
            found = kernels.weight_gradients(sums, *weights, scale=0.3, config=CONFIG)
        gradients = folding.Weights(*found)
        assert not any(gradient.isnan().any() for gradient in gradients[:-1])
        assert torch.equal(gradients.b_k, torch.zeros(150, device=PLACE))

    def compare(self, got, weights, moments, dtype):
        expected = folding.weight_gradients(weights.map(torch.Tensor.double), moments, 0.3)
        for name, gradient, truth, weight in zip(weights._fields, got, expected, weights, strict=True):
            assert (gradient is None) == (truth is None) == (weight is None)
            if gradient is not None:
                assert gradient.dtype == dtype
                assert gradient.shape == weight.shape
                largest = truth.abs().max() if name != "gamma" else self.largest_of_gamma(weights, moments)
                assert (gradient.double() - truth).abs().max() <= 4 * torch.finfo(dtype).eps * largest, name

    @staticmethod
    def moments(splits, pairs, left, right):
        generator = torch.Generator().manual_seed(left)
        shapes = ((splits, pairs, left, right), (splits, pairs, left), (splits, 1, right))
        product, total, right_total = (torch.randn(shape, generator=generator).to(PLACE) for shape in shapes)
        arrived = torch.zeros(1, dtype=torch.int32, device=PLACE)
        return kernels.PartialMoments(product, total, right_total.expand(-1, pairs, -1).contiguous(), arrived)

    @staticmethod
    def weights(channels, qk_channels, dtype, biased, scaled):
        generator = torch.Generator().manual_seed(channels + 1)

        def normal(*shape):
            return torch.randn(shape, generator=generator).to(PLACE, dtype)

        w_q, w_k, w_v = normal(qk_channels, channels, 1, 1), normal(qk_channels, channels), normal(channels, channels)
        b_q, b_k, b_v = (normal(qk_channels), normal(qk_channels), normal(channels)) if biased else (None, None, None)
        return folding.Weights(w_q, b_q, w_k, b_k, w_v, b_v, normal(1) if scaled else None)

    @staticmethod
    def largest_of_gamma(weights, moments):
        """What its terms amount to: they may cancel."""
        return (weights.w_v.double() * moments.value).norm() + (0 if weights.b_v is None else (weights.b_v * moments.value_total).norm())
