"""Softmax over the queries: the option that reproduces one published answer to the assignment."""

import copy
import functools
from dataclasses import replace

import pytest
import torch
from torch import nn

import visattn
from visattn import functional as F
from visattn import reference, second_order, torch_attention, use_backend

from .conftest import HAS_GPU
from .oracle import (
    Problem,
    Results,
    assert_correct,
    complaints,
    eager_of,
    make_problem,
    make_problems,
    recorded_backends,
    run,
    run_layer,
    stacked,
    truth_of,
)  # fmt: skip
from .test_layouts import LAYOUTS
from .wrong_attentions import FORWARD_FAULTS, attention, with_fault

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
SHAPES = [(2, 3, 1, 1), (1, 8, 1, 2), (2, 16, 3, 5), (1, 33, 14, 14), (1, 48, 9, 7), (1, 64, 5, 13), (1, 128, 8, 8), (1, 300, 3, 11)]
NAMES = ("x", "w_q", "w_k", "w_v", "b_q", "b_k", "b_v", "gamma")


# Left out: what does not matter here, and what needs rows that sum to one.
FAULTS = [f for f in FORWARD_FAULTS if f not in ("bias of the query ignored", "last tile unmasked", "row sum without the last tile")]


@pytest.fixture
def place() -> torch.device:
    return torch.device("cuda" if HAS_GPU else "cpu")


def problems(shape, dtype=torch.float32, **options) -> list[Problem]:
    return make_problems(shape, dtype, normalize="queries", **options)


def leaves_of(problem: Problem, names=NAMES) -> dict[str, torch.Tensor]:
    return {name: getattr(problem, name).detach().requires_grad_() for name in names}


def double_leaves() -> dict[str, torch.Tensor]:
    return leaves_of(make_problem((2, 3, 3, 2), torch.float64, qk_channels=4, regime="peaked"))


def layer(**tensors) -> torch.Tensor:
    return F.self_attention_2d(**tensors, normalize="queries")


@pytest.mark.parametrize("regime", ["uniform", "peaked"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_branch_and_gradients(shape, dtype, regime, place):
    assert_correct(problems(shape, dtype, regime=regime), "torch", place)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("gamma", [True, False])
@pytest.mark.parametrize("qk_channels", [4, 20, 50])
def test_optional_parameters_and_queries_of_any_width(qk_channels, bias, gamma, place):
    assert_correct(problems((2, 20, 6, 5), bias=bias, gamma=gamma, qk_channels=qk_channels, regime="peaked"), "torch", place)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_common_mean(dtype, place):
    assert_correct(problems((1, 64, 16, 16), dtype, mean=3.0, gain=2.0), "torch", place)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scores_at_once", [1, 100, 35 * 35 * 2])
def test_chunks_of_keys_are_added_up(scores_at_once, dtype, place, monkeypatch):
    """Every chunk contributes to every query; bfloat16 must not be rounded once a chunk."""
    monkeypatch.setattr(torch_attention, "SCORES_AT_ONCE", scores_at_once)
    assert_correct(problems((3, 8, 5, 7), dtype, regime="peaked"), "torch", place)


def test_many_chunks_in_bfloat16(place, monkeypatch):
    """A chunk for each of 256 keys: sums that are rounded every time lose what a single rounding keeps."""
    monkeypatch.setattr(torch_attention, "SCORES_AT_ONCE", 256)
    assert_correct(problems((1, 8, 16, 16), torch.bfloat16), "torch", place)


@pytest.mark.parametrize(("layout", "gradient_layout"), list(zip(LAYOUTS, LAYOUTS[3:] + LAYOUTS[:3], strict=True)))
def test_layouts(layout, gradient_layout, place):
    several = [p.to(place) for p in problems((3, 16, 5, 7), regime="peaked")]
    moved = [replace(p, x=layout(p.x), d_out=gradient_layout(p.d_out)) for p in several]
    assert_correct(moved, "torch")


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_memory_format_is_kept(memory_format):
    leaves = leaves_of(make_problem((2, 24, 6, 8)))
    leaves["x"] = leaves["x"].detach().contiguous(memory_format=memory_format).requires_grad_()
    out = layer(**leaves)
    (d_x,) = torch.autograd.grad(out.square().sum(), leaves["x"])
    for result in (out, d_x):
        assert result.stride() == leaves["x"].stride()


def test_residual_adds_the_map_once(place):
    problem = make_problem((2, 24, 6, 7), normalize="queries")
    without, with_ = run_layer(problem, "torch", place), run_layer(replace(problem, residual=True), "torch", place)
    torch.testing.assert_close(with_["out"] - problem.x, without["out"], rtol=0, atol=2e-6)
    torch.testing.assert_close(with_["x"] - problem.d_out, without["x"], rtol=0, atol=3e-6)


def test_querys_bias_has_no_effect_and_no_gradient(place):
    results = run_layer(make_problem((2, 16, 5, 5), regime="peaked", normalize="queries"), "torch", place)
    assert torch.equal(results["b_q"], torch.zeros(16))
    assert results["b_k"].abs().max() > 0


def test_empty_batch_gives_an_empty_map_and_zero_gradients(place):
    results = run_layer(make_problem((0, 16, 5, 5), normalize="queries"), "torch", place)
    assert results["out"].shape == results["x"].shape == (0, 16, 5, 5)
    for name in NAMES[1:]:
        assert torch.equal(results[name], torch.zeros_like(results[name])), name


def test_logits_beyond_the_range_of_half(place):
    problem = make_problem((1, 64, 4, 8), torch.float16, gain=1e4, normalize="queries")
    problem = replace(problem, w_v=problem.w_v / 64)  # a query can win many keys, whose values add up
    ours, truth = run_layer(problem, "torch", place)["out"], truth_of(problem)["out"]
    assert ours.isfinite().all()
    assert float((ours.double() - truth).norm() / truth.norm()) < 2e-3


class TestGates:
    """The gates accept the right formula and reject each that is wrong on purpose."""

    @staticmethod
    @functools.cache
    def gate_problems() -> list[tuple[list[Problem], Results, Results]]:
        kinds = [problems((2, 20, 7, 9), regime=regime) for regime in ("uniform", "peaked")]
        kinds.append([replace(p, residual=True) for p in kinds[1]])
        return [(several, stacked([truth_of(p) for p in several]), stacked([eager_of(p) for p in several])) for several in kinds]

    def rejections(self, candidate) -> list[str]:
        found = []
        for several, truth, eager in self.gate_problems():
            found += complaints(stacked([run(candidate, p) for p in several]), truth, eager, "b_q")
        return [complaint for complaint in found if not complaint.startswith("b_q: gradient")]

    def test_the_right_formula_is_accepted(self):
        assert self.rejections(attention) == []

    @pytest.mark.parametrize("fault", [*FAULTS, "bias of the key ignored", "bias of the value without the sum of the weights"])
    def test_wrong_forward_is_rejected(self, fault):
        assert self.rejections(with_fault(fault)), f"no gate noticed: {fault}"


class TestDerivatives:
    @pytest.mark.parametrize("residual", [True, False])
    def test_gradcheck_and_gradgradcheck(self, residual):
        leaves = double_leaves()

        def of(*tensors):
            return layer(**dict(zip(leaves, tensors, strict=True)), residual=residual)

        assert torch.autograd.gradcheck(of, tuple(leaves.values()))
        assert torch.autograd.gradgradcheck(of, tuple(leaves.values()))

    def test_gradgradcheck_without_optional_parameters(self):
        tensors = tuple(double_leaves().values())[:4]
        assert torch.autograd.gradgradcheck(lambda x, q, k, v: layer(x=x, w_q=q, w_k=k, w_v=v), tensors)

    @pytest.mark.parametrize("scores_at_once", [1 << 20, 100])
    def test_gradient_penalty_in_chunks(self, scores_at_once, monkeypatch):
        monkeypatch.setattr(second_order, "SCORES_AT_ONCE", scores_at_once)
        problem = make_problem((3, 4, 5, 7), torch.float64, regime="peaked")

        def penalty(function):
            leaves = leaves_of(problem)
            (d_x,) = torch.autograd.grad(function(**leaves, normalize="queries").square().sum(), leaves["x"], create_graph=True)
            return torch.autograd.grad((d_x.flatten(1).norm(dim=1) - 1).square().mean(), list(leaves.values()), allow_unused=True)

        for name, got, expected in zip(NAMES, penalty(F.self_attention_2d), penalty(reference.self_attention_2d), strict=True):
            if name != "b_q":
                torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)

    @pytest.mark.parametrize("wanted", NAMES)
    def test_any_input_may_ask_for_a_gradient_alone(self, wanted):
        problem = make_problem((1, 8, 3, 3))
        leaves = leaves_of(problem)
        expected = torch.autograd.grad(layer(**leaves), leaves[wanted], problem.d_out)
        alone = {name: t.detach().requires_grad_(name == wanted) for name, t in leaves.items()}
        assert torch.equal(torch.autograd.grad(layer(**alone), alone[wanted], problem.d_out)[0], expected[0])


class TestBackend:
    def test_an_explicit_kernel_is_refused_with_the_reason(self):
        with use_backend("triton"), pytest.raises(RuntimeError, match="softmax over the queries has no kernel: its rows"):
            visattn.Attention(8, normalize="queries")(torch.randn(1, 8, 3, 3))

    def test_auto_takes_the_pytorch_path(self, place):
        module = visattn.Attention(8, normalize="queries").to(place)
        with recorded_backends() as ran:
            module(torch.randn(1, 8, 3, 3, device=place)).sum().backward()
        assert ran == ["torch", "torch"]

    def test_explain_says_so(self):
        text = visattn.explain(visattn.Attention(8, normalize="queries"), torch.randn(1, 8, 3, 3))
        assert "runs on the PyTorch path; the Triton kernels cannot run: softmax over the queries has no kernel" in text

    @pytest.mark.parametrize("normalize", ["query", "rows", None, 1])
    def test_other_names_are_refused(self, normalize):
        x, w = torch.randn(1, 8, 3, 3), torch.randn(8, 8)
        text = "normalize must be 'keys' .* or 'queries' .*, got "
        with pytest.raises(ValueError, match=text):
            visattn.Attention(8, normalize=normalize)
        with pytest.raises(ValueError, match=text):
            F.self_attention_2d(x, w, w, w, normalize=normalize)
        with pytest.raises(ValueError, match=text):
            F.attention_rows(x, w, w, torch.zeros(1, 2, dtype=torch.long), normalize=normalize)


class PublishedAttention(nn.Module):
    """Three convolutions, and the softmax over the first axis of (queries, keys)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv_query, self.conv_key, self.conv_value = (nn.Conv2d(channels, channels, 1) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (conv(x).flatten(2).mT for conv in (self.conv_query, self.conv_key, self.conv_value))
        weights = torch.softmax(q @ k.mT / x.shape[1] ** 0.5, dim=1)
        return x + (weights @ v).mT.reshape(x.shape)


class TestModule:
    def test_state_dicts_interchange_with_a_plain_module(self):
        plain, ours = PublishedAttention(12).double(), visattn.Attention(12, normalize="queries").double()
        x = torch.randn(2, 12, 5, 6, dtype=torch.float64)
        assert list(plain.state_dict()) == list(ours.state_dict())
        ours.load_state_dict(plain.state_dict())
        torch.testing.assert_close(ours(x), plain(x), rtol=0, atol=1e-12)
        assert (visattn.Attention(12).double()(x) - plain(x)).abs().max() > 1e-3

    def test_repr_and_copies(self):
        module, x = visattn.Attention(8, normalize="queries"), torch.randn(2, 8, 3, 4)
        assert "8, normalize='queries'" in repr(module)
        assert torch.equal(copy.deepcopy(module)(x), module(x))
        assert torch.equal(torch.func.functional_call(module, dict(module.named_parameters()), (x,)), module(x))

    def test_autocast_is_that_of_the_naive_layer(self):
        module, x = visattn.Attention(16, normalize="queries"), torch.randn(2, 16, 5, 6)
        for t, dtype in ((x, torch.float32), (x.bfloat16(), torch.bfloat16)):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                assert module(t).dtype == dtype


class TestAttentionRows:
    pixels = torch.tensor([[0, 0], [2, 5], [4, 1]])

    @pytest.mark.parametrize("scores_at_once", [1 << 22, 100])
    def test_rows_are_those_of_the_full_matrix(self, scores_at_once, monkeypatch):
        monkeypatch.setattr(torch_attention, "SCORES_AT_ONCE", scores_at_once)
        layer, x = visattn.Attention(10, normalize="queries").double(), torch.randn(2, 10, 5, 6, dtype=torch.float64)
        q, k = layer.conv_query, layer.conv_key
        expected = reference.attention_rows(x, q.weight, k.weight, self.pixels, q.bias, k.bias, normalize="queries")
        got = visattn.attention_rows(layer, x, self.pixels)
        assert got.shape == (2, 3, 5, 6)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-13)
        d = torch.randn_like(got)
        wanted = [q.weight, k.weight, k.bias]
        for a, b in zip(torch.autograd.grad(got, wanted, d), torch.autograd.grad(expected, wanted, d), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    def test_columns_sum_to_one(self, dtype):
        layer, x = visattn.Attention(10, normalize="queries").to(dtype), torch.randn(2, 10, 5, 6, dtype=dtype)
        everywhere = torch.cartesian_prod(torch.arange(5), torch.arange(6))
        rows = visattn.attention_rows(layer, x, everywhere)
        assert rows.dtype == dtype
        torch.testing.assert_close(rows.float().sum(1), torch.ones(2, 5, 6), rtol=0, atol=2e-2)
