"""Products of two weights on the kernels: `W_o W_v` of one head with an output projection, and the kernel by itself."""

import itertools
from unittest import mock

import pytest
import torch

from visattn import block, functional, reference, use_backend
from visattn.device import kernel_target
from visattn.folded_values import FoldedValues

from .conftest import HAS_GPU
from .general_problems import Block, make_problem, run, run_on_kernels, truth_of
from .oracle import complaints, stacked

kernels = pytest.importorskip("visattn.kernels", reason="needs Triton")
pytestmark = pytest.mark.kernels

PLACE = torch.device("cuda", 0) if HAS_GPU else torch.device("cpu")
BLOCKS = {
    "thin values": Block(36, 36, 40, gamma=True),
    "no bias": Block(20, 20, 24, bias=False),
    "normalised": Block(16, 16, 16, groups=4, settings={"res_scale": 0.5}),
}


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def product_on_kernels(*operands, **options):
    return kernels.weight_product(*operands, config=kernels.weight_product_config(kernel_target(PLACE)), **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sizes", [(3, 1, 5), (70, 130, 40), (64, 64, 32)], ids=str)
def test_product_vector_and_outer_product(sizes, dtype):
    rows, inner, columns = sizes
    a, b, vector, addend = (normal(*shape).to(PLACE, dtype) for shape in ((inner, rows), (inner, columns), (inner,), (rows,)))
    column, row = normal(rows, seed=1).to(PLACE, dtype), normal(columns, seed=2).to(PLACE, dtype)
    product, image = product_on_kernels(a.mT, b, vector, addend, (column, row), factor=0.3)
    expected = 0.3 * (a.double().mT @ b.double() + torch.outer(column.double(), row.double()))
    tolerance = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 2e-6 * inner}
    torch.testing.assert_close(product, expected.to(dtype), **tolerance)
    torch.testing.assert_close(image, (0.3 * (a.double().mT @ vector.double() + addend.double())).to(dtype), **tolerance)
    plain, nothing = product_on_kernels(a.mT, b)
    torch.testing.assert_close(plain, (a.double().mT @ b.double()).to(dtype), **tolerance)
    assert nothing is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", BLOCKS)
def test_blocks(name, dtype):
    residual = {} if "residual" in BLOCKS[name].settings else {"residual": False}
    problems = [make_problem(BLOCKS[name], dtype, maps=1, size=(5, 7), seed=s, **residual) for s in range(3)]
    truth, eager = (stacked([f(reference.self_attention_2d, p) for p in problems]) for f in (truth_of, lambda a, p: run(a, p)))
    with mock.patch.object(block, "folded_values") as steps:
        ours = stacked([run_on_kernels(p, PLACE) for p in problems])
    assert not steps.called
    assert not complaints(ours, truth, eager)


BIASES = [(b_v, b_o) for b_v, b_o in itertools.product((False, True), repeat=2)]


def weights_of(dtype: torch.dtype, with_b_v: bool, with_b_o: bool) -> dict[str, torch.Tensor]:
    """w_o as the weight of a convolution, w_v with gaps between its numbers."""
    weights = {"w_o": normal(12, 20).view(12, 20, 1, 1), "w_v": normal(20, 24, seed=1)[:, ::2]}
    weights |= {"b_v": normal(40, seed=2)[::2]} if with_b_v else {}
    weights |= {"b_o": normal(12, seed=3)} if with_b_o else {}
    return {name: w.to(PLACE, dtype).requires_grad_() for name, w in weights.items()}


def folded(weights: dict[str, torch.Tensor], x: torch.Tensor, backend: str) -> torch.Tensor:
    """A block on the map x (N, 12, H, W), with other weights that are constants."""
    w_q, w_k = (normal(12, 12, seed=s).to(x) for s in (4, 5))
    return functional.self_attention_2d(x, w_q, w_k, **weights, scale=0.1, backend=backend)


@pytest.mark.parametrize("biases", BIASES, ids=str)
def test_gradients_for_every_choice_of_biases_and_inputs(biases):
    x = normal(2, 12, 3, 3).to(PLACE, torch.float32)
    names = list(weights_of(torch.float64, *biases))
    exact = weights_of(torch.float64, *biases)
    expected = dict(zip(names, torch.autograd.grad(folded(exact, x.double(), "torch").square().sum(), list(exact.values())), strict=True))
    for chosen in (names, ["w_o"], ["w_v"], names[-1:]):
        weights = weights_of(torch.float32, *biases)
        weights = {name: w if name in chosen else w.detach() for name, w in weights.items()}
        found = torch.autograd.grad(folded(weights, x, "triton").square().sum(), [weights[name] for name in chosen])
        for name, gradient in zip(chosen, found, strict=True):
            assert gradient.shape == weights[name].shape
            torch.testing.assert_close(gradient.double(), expected[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("biases", BIASES, ids=str)
def test_second_derivatives(biases):
    """Of the function alone: a penalty on the gradients of its results by its weights."""

    def penalty(function, weights):
        ordered = [weights.get(name) for name in ("w_o", "w_v", "b_v", "b_o")]
        results = [t for t in function(*ordered) if t is not None]
        inputs = [t for t in ordered if t is not None]
        gradients = torch.autograd.grad(sum(t.pow(3).sum() for t in results), inputs, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in gradients), inputs)

    with_b_v, _ = biases
    if not with_b_v:
        biases = False, False  # b_o alone does not go through the function
    small = {
        dtype: {n: (0.1 * w).detach().requires_grad_() for n, w in weights_of(dtype, *biases).items()}
        for dtype in (torch.float32, torch.float64)
    }
    found = penalty(FoldedValues.apply, small[torch.float32])
    expected = penalty(block.folded_values, small[torch.float64])
    for ours, truth in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.double(), truth, rtol=1e-4, atol=1e-4)


def test_under_a_transform_steps_are_taken():
    x = normal(1, 12, 3, 3).to(PLACE, torch.float32)
    weights = {name: w.detach() for name, w in weights_of(torch.float32, True, True).items()}
    with use_backend("triton"), mock.patch.object(FoldedValues, "apply") as refused:
        torch.func.grad(lambda w_o: folded(weights | {"w_o": w_o}, x, "triton").sum())(weights["w_o"])
    assert not refused.called
