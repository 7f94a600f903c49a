"""Output projection, γ, residual and factor in one function on the kernels, beside the steps that it stands for.

The published blocks go through it in test_token_attention.py.
"""

from unittest import mock

import pytest
import torch

from visattn import block, functional, reference, use_backend

from .conftest import HAS_GPU
from .general_problems import Block, make_problem, run, run_on_kernels, truth_of
from .oracle import complaints, stacked

kernels = pytest.importorskip("visattn.kernels", reason="needs Triton")
pytestmark = pytest.mark.kernels

PLACE = torch.device("cuda", 0) if HAS_GPU else torch.device("cpu")
BLOCKS = {
    "all of it": Block(24, 8, 40, gamma=True, settings={"num_heads": 2, "res_scale": 0.7}),
    "no bias": Block(20, 4, 6, bias=False, settings={"num_heads": 2}),
    "branch alone": Block(12, 8, 12, gamma=True, settings={"num_heads": 4, "residual": False, "res_scale": 2.0}),
    "pooled": Block(16, 2, 8, gamma=True, settings={"pool": 2}),
    "normalised": Block(16, 8, 16, groups=4, settings={"num_heads": 2, "res_scale": 0.5}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", BLOCKS)
def test_blocks(name, dtype):
    if dtype == torch.float16 and name == "pooled":
        pytest.skip("the maximum of a window is rounded")
    residual = {} if "residual" in BLOCKS[name].settings else {"residual": True}
    problems = [make_problem(BLOCKS[name], dtype, size=(5, 14), seed=s, **residual) for s in range(3)]
    truth, eager = (stacked([f(reference.self_attention_2d, p) for p in problems]) for f in (truth_of, lambda a, p: run(a, p)))
    assert not complaints(stacked([run_on_kernels(p, PLACE) for p in problems]), truth, eager)


@pytest.mark.parametrize("channels_last", [False, True])
def test_results_lie_as_the_map_does(channels_last):
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    problem = make_problem(BLOCKS["all of it"], torch.float32, size=(3, 5)).to(PLACE)
    problem.tensors["x"] = problem.tensors["x"].contiguous(memory_format=memory_format)
    with use_backend("triton"):
        assert problem.call(functional.self_attention_2d, problem.tensors).is_contiguous(memory_format=memory_format)


def test_one_kernel_ends_the_block():
    problem = make_problem(BLOCKS["all of it"], torch.float32, size=(3, 5)).to(PLACE)
    with use_backend("triton"), mock.patch.object(kernels, "output_projection", wraps=kernels.output_projection) as ended:
        with mock.patch.object(block, "projected_branch") as step:
            problem.call(functional.self_attention_2d, problem.leaves()).sum().backward()
        assert ended.call_count == 1
        assert not step.called


def test_wider_maps_take_steps():
    problem = make_problem(Block(260, 16, 16, settings={"num_heads": 2}), torch.float32, maps=1, size=(2, 3)).to(PLACE)
    with use_backend("triton"), mock.patch.object(kernels, "output_projection") as refused:
        problem.call(functional.self_attention_2d, problem.tensors)
    assert not refused.called


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("names", [("x",), ("w_o",), ("gamma", "b_o"), ("b_v",)], ids=str)
def test_any_subset_of_inputs_may_ask_for_a_gradient(names, create_graph):
    problem = make_problem(BLOCKS["all of it"], torch.float32, size=(4, 5)).to(PLACE)
    expected = truth_of(reference.self_attention_2d, problem)
    leaves = {name: t.detach().clone().requires_grad_(name in names) for name, t in problem.tensors.items()}
    with use_backend("triton"):
        out = problem.call(functional.self_attention_2d, leaves)
    found = torch.autograd.grad(out, [leaves[name] for name in names], problem.d_out, create_graph=create_graph)
    for name, gradient in zip(names, found, strict=True):
        torch.testing.assert_close(gradient.double(), expected[name], rtol=1e-4, atol=1e-4)


def test_no_maps():
    problem = make_problem(BLOCKS["all of it"], torch.float32, maps=0, size=(3, 3)).to(PLACE)
    gradients = run_on_kernels(problem, PLACE)
    assert gradients["out"].shape == (0, 24, 3, 3)
    assert not gradients["w_o"].any()
