"""Attention between channels: the layer that reproduces the other published answer to the assignment."""

import copy
import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import visattn
from visattn import functional as F
from visattn import reference, use_backend

from .conftest import HAS_GPU
from .oracle import Problem, Results, complaints, eager_of, make_problem, make_problems, run, stacked, truth_of
from .test_layouts import LAYOUTS

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
# (N, C, H, W): fewer pixels than channels, as many, and more.
SHAPES = [
    (2, 3, 1, 1),
    (1, 8, 1, 2),
    (2, 1, 1, 17),
    (2, 16, 4, 4),
    (2, 16, 3, 5),
    (1, 33, 14, 14),
    (1, 20, 9, 7),
    (2, 64, 8, 9),
    (1, 64, 16, 17),
]
NAMES = ("x", "w_q", "w_k", "w_v", "b_q", "b_k", "b_v")
PLACE = torch.device("cuda" if HAS_GPU else "cpu")


def problems(shape, dtype=torch.float32, **options) -> list[Problem]:
    return make_problems(shape, dtype, gamma=False, **options)


def of_channels(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """With the arguments that the oracle hands to every attention."""

    def attention(normalize: str, **arguments: Any) -> Tensor:
        return function(**arguments)

    return attention


OURS, REFERENCE = of_channels(F.channel_attention), of_channels(reference.channel_attention)


def expected_of(several: list[Problem]) -> tuple[Results, Results]:
    return stacked([truth_of(p, REFERENCE) for p in several]), stacked([eager_of(p, REFERENCE) for p in several])


def assert_correct(several: list[Problem]) -> None:
    ours = stacked([{name: t.cpu() for name, t in run(OURS, p.to(PLACE)).items()} for p in several])
    found = complaints(ours, *expected_of(several), without_effect=None)
    assert not found, "\n".join(found)


@pytest.mark.parametrize("regime", ["uniform", "peaked"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_branch_and_gradients(shape, dtype, regime):
    assert_correct(problems(shape, dtype, regime=regime))


@pytest.mark.parametrize("present", ["", "b_q", "b_k", "b_v", "b_q b_k"])
def test_any_bias_may_be_missing(present):
    absent = {name: None for name in ("b_q", "b_k", "b_v") if name not in present.split()}
    for shape in ((2, 6, 6, 5), (2, 20, 3, 5)):
        assert_correct([replace(p, **absent) for p in problems(shape)])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_common_mean(dtype):
    assert_correct(problems((1, 64, 16, 16), dtype, mean=3.0, gain=2.0))


@pytest.mark.parametrize(("layout", "gradient_layout"), list(zip(LAYOUTS, LAYOUTS[3:] + LAYOUTS[:3], strict=True)))
def test_layouts(layout, gradient_layout):
    assert_correct([replace(p, x=layout(p.x), d_out=gradient_layout(p.d_out)) for p in problems((3, 8, 5, 7))])


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("shape", [(2, 8, 6, 8), (2, 24, 2, 3)], ids=["many pixels", "few pixels"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_memory_format_is_kept(memory_format, shape, residual):
    p = make_problem(shape)
    x = p.x.contiguous(memory_format=memory_format)
    assert F.channel_attention(x, p.w_q, p.w_k, p.w_v, p.b_q, p.b_k, p.b_v, residual=residual).stride() == x.stride()


def test_residual_and_scale():
    p = make_problem((2, 6, 5, 6), torch.float64)
    for options in ({"residual": False}, {"scale": 0.01}, {"scale": 0, "residual": False}):
        tensors = {name: getattr(p, name) for name in NAMES}
        torch.testing.assert_close(F.channel_attention(**tensors, **options), reference.channel_attention(**tensors, **options))


def test_weights_of_convolutions():
    p = make_problem((2, 12, 5, 6))
    weights = (p.w_q, p.w_k, p.w_v)
    assert torch.equal(F.channel_attention(p.x, *(w[..., None, None] for w in weights)), F.channel_attention(p.x, *weights))


def test_empty_batch():
    results = run(OURS, replace(make_problem((0, 4, 5, 5)), gamma=None))
    assert results["out"].shape == results["x"].shape == (0, 4, 5, 5)
    for name in NAMES[1:]:
        assert torch.equal(results[name], torch.zeros_like(results[name])), name


def wrong(x, w_q, w_k, w_v, b_q, b_k, b_v, residual, fault):
    """The formula with one fault."""
    t = x.flatten(2)
    q, k, v = (w @ t + b[:, None] for w, b in ((w_q, b_q), (w_k, b_k), (w_v, b_v)))
    if fault == "values not projected":
        v = t
    if fault == "bias of the value ignored":
        v = w_v @ t
    if fault == "query and key swapped":
        q, k = k, q
    products = q @ k.mT
    length = t.shape[2]
    if fault == "the biases' product missing":
        products = products - length * b_q[:, None] * b_k
    if fault == "the biases' product once, not once a pixel":
        products = products - (length - 1) * b_q[:, None] * b_k
    if fault == "key's bias missing":
        products = q @ (w_k @ t).mT
    if fault == "query's bias missing":
        products = (w_q @ t) @ k.mT
    scales = {"scale 1/√L": length**-0.5, "scale dropped": 1.0, "scale 1/C": 1 / t.shape[1]}
    weights = torch.softmax(products * scales.get(fault, t.shape[1] ** -0.5), 1 if fault == "softmax over the first axis" else 2)
    if fault == "matrix of weights transposed":
        weights = weights.mT
    branch = (weights @ v).unflatten(2, x.shape[2:])
    return branch + x if residual != (fault == "residual missing") else branch


FAULTS = [
    "values not projected", "bias of the value ignored", "query and key swapped", "the biases' product missing",
    "the biases' product once, not once a pixel", "key's bias missing", "query's bias missing", "scale 1/√L", "scale dropped", "scale 1/C",
    "softmax over the first axis", "matrix of weights transposed", "residual missing",
]  # fmt: skip


class TestGates:
    """The gates accept the right formula and reject each that is wrong on purpose."""

    @staticmethod
    @functools.cache
    def gate_problems() -> list[tuple[list[Problem], Results, Results]]:
        kinds = [problems((2, 20, 7, 9)), [replace(p, residual=True) for p in problems((2, 20, 7, 9))]]
        return [(several, *expected_of(several)) for several in kinds]

    def rejections(self, fault: str) -> list[str]:
        found = []
        for several, truth, eager in self.gate_problems():
            candidate = of_channels(functools.partial(wrong, fault=fault))
            found += complaints(stacked([run(candidate, p) for p in several]), truth, eager, without_effect=None)
        return found

    def test_the_right_formula_is_accepted(self):
        assert self.rejections("") == []

    @pytest.mark.parametrize("fault", FAULTS)
    def test_wrong_formula_is_rejected(self, fault):
        assert self.rejections(fault), f"no gate noticed: {fault}"


@pytest.mark.parametrize("shape", [(2, 2, 2, 4), (2, 4, 1, 3)], ids=["many pixels", "few pixels"])
def test_gradcheck_and_gradgradcheck(shape):
    p = make_problem(shape, torch.float64)
    leaves = tuple(getattr(p, name).requires_grad_() for name in NAMES)
    assert torch.autograd.gradcheck(F.channel_attention, leaves)
    assert torch.autograd.gradgradcheck(F.channel_attention, leaves)


class TestSelection:
    def test_an_explicit_kernel_is_refused_with_the_reason(self):
        with use_backend("triton"), pytest.raises(RuntimeError, match="attention over the channels has no kernel"):
            visattn.ChannelAttention(8)(torch.randn(1, 8, 3, 3))

    def test_explain_says_how_it_runs(self):
        text = visattn.explain(visattn.ChannelAttention(8), torch.randn(1, 8, 3, 3))
        assert "runs on the PyTorch path; the Triton kernels cannot run: attention over the channels has no kernel" in text
        assert "Gram matrix" in text

    def test_there_is_no_map_over_the_pixels(self):
        with pytest.raises(TypeError, match="ChannelAttention weighs channels"):
            visattn.attention_rows(visattn.ChannelAttention(8), torch.randn(1, 8, 3, 3), torch.tensor([[0, 0]]))


class PublishedAttention(nn.Module):
    """Three convolutions, and a product of (C, L) with its like without a transposition of pixels and channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv_query, self.conv_key, self.conv_value = (nn.Conv2d(channels, channels, 1) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (conv(x).flatten(2) for conv in (self.conv_query, self.conv_key, self.conv_value))
        return x + (torch.softmax(q @ k.mT / x.shape[1] ** 0.5, dim=-1) @ v).view_as(x)


class TestModule:
    def test_state_dicts_interchange_with_a_plain_module(self):
        plain, ours = PublishedAttention(12).double(), visattn.ChannelAttention(12).double()
        x = torch.randn(2, 12, 5, 6, dtype=torch.float64)
        assert list(plain.state_dict()) == list(ours.state_dict()) == list(visattn.Attention(12).state_dict())
        ours.load_state_dict(plain.state_dict())
        torch.testing.assert_close(ours(x), plain(x), rtol=0, atol=1e-12)

    def test_repr_and_copies(self):
        module, x = visattn.ChannelAttention(8), torch.randn(2, 8, 3, 4)
        assert repr(module).startswith("ChannelAttention(\n  8\n")
        assert torch.equal(copy.deepcopy(module)(x), module(x))
        assert torch.equal(torch.func.functional_call(module, dict(module.named_parameters()), (x,)), module(x))

    def test_function_transforms(self):
        module, x = visattn.ChannelAttention(4).double(), torch.randn(2, 4, 3, 3, dtype=torch.float64)
        parameters = dict(module.named_parameters())

        def loss(parameters):
            return torch.func.functional_call(module, parameters, (x,)).square().sum()

        expected = torch.autograd.grad(loss(parameters), list(parameters.values()))
        for got, want in zip(torch.func.grad(loss)(parameters).values(), expected, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_autocast_is_that_of_the_other_layer(self, dtype):
        module, x = visattn.ChannelAttention(6), torch.randn(2, 6, 5, 6)
        with torch.autocast("cpu", dtype=dtype):
            out, inner = module(x), module(x.to(dtype))
            compiled = torch.compile(module, fullgraph=True, backend="aot_eager")(x)
        assert (out.dtype, inner.dtype, compiled.dtype) == (torch.float32, dtype, torch.float32)
        torch.testing.assert_close(compiled, out, rtol=1e-2, atol=1e-2)
        torch.testing.assert_close(out, module(x), rtol=3e-2, atol=3e-2)
        nn.init.zeros_(module.conv_value.weight)
        nn.init.zeros_(module.conv_value.bias)
        with torch.autocast("cpu", dtype=dtype):
            assert torch.equal(module(x), x), "the map that is only passed through was rounded"

    @pytest.mark.parametrize("in_channels", [0, 8.0, None])
    def test_bad_layers(self, in_channels):
        with pytest.raises((TypeError, ValueError), match="in_channels must be"):
            visattn.ChannelAttention(in_channels)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"x": torch.randn(8, 3, 4)}, ValueError, "add a batch dimension"),
        ({"w_q": torch.randn(4, 8), "w_k": torch.randn(4, 8)}, ValueError, "w_q must give 8 channels"),
        ({"w_k": torch.randn(4, 8)}, ValueError, "w_k must give 8 channels"),
        ({"w_v": torch.randn(8, 8).double()}, TypeError, "w_v must have x's dtype"),
        ({"b_k": torch.randn(4)}, ValueError, r"b_k must have shape \(8,\)"),
        ({"scale": "1"}, TypeError, "scale must be a float or None"),
    ],
)
def test_bad_calls(change, error, text):
    arguments = {"x": torch.randn(2, 8, 3, 4), "w_q": torch.randn(8, 8), "w_k": torch.randn(8, 8), "w_v": torch.randn(8, 8)} | change
    with pytest.raises(error, match=text):
        F.channel_attention(**arguments)
