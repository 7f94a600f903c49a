"""Every way a map can lie in memory, for the input and for the gradient that comes back."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from visattn import functional, reference, use_backend

from .conftest import INTERPRETING
from .layouts import LAYOUTS, channels_last, contiguous, lazily_negated, one_column_for_all, one_map_for_all, sliced, transposed
from .oracle import Problem, assert_correct, make_problem, run_layer

SHAPE = (2, 24, 6, 8)
LARGER = (2, 24, 9, 16)  # than a tile, for which the backward pass has other kernels
FEW_PAIRS = [
    (channels_last, contiguous), (contiguous, channels_last), (sliced, one_map_for_all), (one_column_for_all, transposed),
    (lazily_negated, contiguous), (contiguous, lazily_negated),
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("gradient_layout", LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, gradient_layout, dtype, backend, place):
    if backend == "triton" and INTERPRETING:
        compare_bits_in_interpreter(layout, gradient_layout, dtype)
        return
    problems = [make_problem(SHAPE, dtype, regime="peaked", seed=seed).to(place) for seed in range(3)]
    assert_correct([replace(p, x=layout(p.x), d_out=gradient_layout(p.d_out)) for p in problems], backend)


@pytest.mark.parametrize(("shape", "qk_channels"), [(LARGER, 5), (LARGER, None)], ids=["narrow queries", "more than a tile"])
@pytest.mark.parametrize(("layout", "gradient_layout"), FEW_PAIRS)
def test_layouts_of_other_forms(layout, gradient_layout, shape, qk_channels, backend, place):
    if backend == "triton" and INTERPRETING:
        compare_bits_in_interpreter(layout, gradient_layout, torch.float16, shape, qk_channels)
        return
    problems = [make_problem(shape, torch.float16, qk_channels=qk_channels, regime="peaked", seed=seed).to(place) for seed in range(3)]
    assert_correct([replace(p, x=layout(p.x), d_out=gradient_layout(p.d_out)) for p in problems], backend)


def compare_bits_in_interpreter(layout, gradient_layout, dtype, shape=SHAPE, qk_channels=None):
    """The kernels read strides and compute nothing from them, so the same values must give the same bits."""
    problem = make_problem(shape, dtype, qk_channels=qk_channels, regime="peaked")
    moved = replace(problem, x=layout(problem.x), d_out=gradient_layout(problem.d_out))
    ours = run_layer(moved, "triton")
    x, d_out = (t.resolve_neg().contiguous() for t in (moved.x, moved.d_out))
    expected = run_layer(replace(moved, x=x, d_out=d_out), "triton")
    for name in expected:
        assert torch.equal(ours[name], expected[name]), name


def gradients(problem: Problem) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in (problem.x, problem.w_q, problem.w_k, problem.w_v)]
    out = functional.self_attention_2d(*leaves, problem.b_q, problem.b_k, problem.b_v, gamma=problem.gamma)
    return [out, *torch.autograd.grad(out, leaves, problem.d_out)]


@pytest.mark.parametrize("channels", [1, 24])
def test_memory_format_is_kept(channels, backend, place):
    problem = make_problem((2, channels, 6, 8)).to(place)
    for layout in (contiguous, channels_last):
        x = layout(problem.x)
        with use_backend(backend):
            out, d_x, *_ = gradients(replace(problem, x=x, d_out=layout(problem.d_out)))
        for result in (out, d_x):
            assert result.is_contiguous() == x.is_contiguous()
            assert result.is_contiguous(memory_format=torch.channels_last) == x.is_contiguous(memory_format=torch.channels_last)


def test_weights_of_convolutions_and_matrices_are_the_same(backend, place):
    problem = make_problem(SHAPE).to(place)
    four_d = replace(problem, w_q=problem.w_q[..., None, None], w_k=problem.w_k[..., None, None], w_v=problem.w_v[..., None, None])
    with use_backend(backend):
        flat = gradients(problem)
        convolutions = gradients(four_d)
    for a, b in zip(flat, convolutions, strict=True):
        assert torch.equal(a.flatten(), b.flatten())


def test_weights_that_are_not_contiguous(backend, place):
    problem = make_problem(SHAPE).to(place)
    moved = replace(problem, w_q=problem.w_q.mT.contiguous().mT, w_k=problem.w_k.mT.contiguous().mT, w_v=problem.w_v.mT.contiguous().mT)
    with use_backend(backend):
        expected = gradients(problem)
        got = gradients(moved)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_gradient_of_a_sum(backend, place):
    """`out.sum().backward()` hands back a gradient whose strides are all zero (fla#1139)."""
    problem = make_problem(SHAPE).to(place)
    x = problem.x.clone().requires_grad_()
    with use_backend(backend):
        functional.self_attention_2d(x, problem.w_q, problem.w_k, problem.w_v).sum().backward()
    truth = problem.x.double().requires_grad_()
    reference.self_attention_2d(truth, problem.w_q.double(), problem.w_k.double(), problem.w_v.double()).sum().backward()
    torch.testing.assert_close(x.grad.double(), truth.grad, rtol=0, atol=1e-5)
