"""The kernels with a GPU's block sizes and dots as its tensor cores compute them: bf16, and fp32 in parts. And that emulation itself."""

import pytest
import torch

from .conftest import INTERPRETING

if not INTERPRETING:
    pytest.skip("about Triton's interpreter", allow_module_level=True)

import numpy as np
import triton
import triton.language as tl

from visattn import reference

from . import general_problems
from .oracle import assert_correct, complaints, make_problem, make_problems, relative_rms, run_layer, stacked, truth_of
from .tensor_cores import tensor_cores

pytestmark = pytest.mark.kernels

CPU = torch.device("cpu")
SHAPES = {
    "odd": ((2, 16, 13, 13), {}),
    "queries as wide as the map": ((1, 64, 6, 11), {}),
    "no power of two": ((1, 48, 15, 11), {}),
    "one tile": ((2, 128, 8, 8), {}),
    "narrow queries": ((1, 64, 15, 15), {"qk_channels": 8}),
    "narrow queries, wider": ((2, 96, 12, 12), {"qk_channels": 12}),
    "a large mean": ((1, 128, 12, 12), {"qk_channels": 16, "mean": 3.0, "gain": 2.0}),
}


@pytest.fixture(params=["hopper", pytest.param("ampere", marks=pytest.mark.full)])
def on_tensor_cores(request):
    with tensor_cores(request.param):
        yield


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_branch_and_gradients(name, dtype, on_tensor_cores):
    shape, options = SHAPES[name]
    regimes = ["uniform"] if dtype == torch.float32 or "mean" in options else ["uniform", "peaked"]
    for regime in regimes:
        assert_correct(make_problems(shape, dtype, regime=regime, **options), "triton", CPU)


@pytest.mark.parametrize(
    ("shape", "options"), [((1, 256, 5, 15), {}), ((1, 256, 5, 15), {"qk_channels": 32}), ((1, 272, 3, 5), {})], ids=str
)
def test_many_channels_in_bf16(shape, options):
    with tensor_cores("hopper"):
        assert_correct(make_problem(shape, torch.bfloat16, **options), "triton", CPU)


@pytest.mark.parametrize("name", ["guided-diffusion", "timm NonLocal", "VQGAN", "everything that folds", "everything"])
def test_blocks_in_bf16(name, on_tensor_cores):
    """Those with a norm that fold attend to raw keys, which no other dtype does. Of pooled maps only the output is judged."""
    block = general_problems.BLOCKS[name]
    problems = [general_problems.make_problem(block, torch.bfloat16, maps=1, regime="peaked", seed=s, residual=False) for s in range(3)]
    ours = stacked([general_problems.run_on_kernels(p, CPU) for p in problems])
    if block.settings.get("pool", 1) > 1:
        ours = {"out": ours["out"]}
    truth = stacked([general_problems.truth_of(reference.self_attention_2d, p) for p in problems])
    found = complaints(ours, truth, stacked([general_problems.run(reference.self_attention_2d, p) for p in problems]))
    assert not found, "\n".join(found)


def test_tf32_is_of_its_class(on_tensor_cores, monkeypatch):
    """A switch of PyTorch's away; its errors are a thousand times those of fp32, and no more."""
    torch.set_float32_matmul_precision("high")
    try:
        problem = make_problem((1, 64, 15, 15), regime="peaked")
        ours, truth = run_layer(problem, "triton", CPU), truth_of(problem)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert 1e-4 < relative_rms(ours["out"], truth["out"]) < 5e-3
    assert all(1e-4 < relative_rms(ours[name], truth[name]) < 2e-2 for name in ("x", "w_q", "w_k", "w_v"))


@triton.jit
def product_kernel(
    a_ptr, b_ptr, out_ptr, ROWS: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr, ROUNDED: tl.constexpr = False,
):  # fmt: skip
    rows, ks = tl.arange(0, ROWS), tl.arange(0, K)
    a = tl.load(a_ptr + rows[:, None] * K + ks[None, :])
    b = tl.load(b_ptr + ks[:, None] * ROWS + rows[None, :])
    if ROUNDED:
        a = a + a
    tl.store(out_ptr + rows[:, None] * ROWS + rows[None, :], tl.dot(a, b, input_precision=PRECISION).to(out_ptr.dtype.element_ty))


def product(a, b, precision="ieee", dtype=torch.float32, **options):
    out = torch.empty(a.shape[0], a.shape[0], dtype=dtype)
    with tensor_cores("hopper"):
        product_kernel[(1,)](a, b, out, *a.shape, precision, **options)
    return out


class TestEmulation:
    a, b = torch.rand(2, 16, 256, generator=torch.Generator().manual_seed(0)).unbind()
    b = b.reshape(256, 16)

    def test_bf16_is_multiplied_exactly_and_cut_off(self):
        """All terms are positive: sums that are cut off are too small, by less than one part in 2²³ for each instruction."""
        a, b = self.a.bfloat16(), self.b.bfloat16()
        truth = a.double() @ b.double()
        error = (truth - product(a, b)) / truth
        assert (error >= 0).all()
        assert 2**-24 < error.max() < 16 * 2**-23

    def test_results_are_rounded_to_nearest_in_bf16(self):
        a, b = torch.eye(16), torch.randn(16, 16, generator=torch.Generator().manual_seed(1))
        assert torch.equal(product(a, b, "bf16x6", torch.bfloat16), b.bfloat16())

    @pytest.mark.parametrize(("precision", "least", "most"), [("tf32", 1e-5, 1e-3), ("tf32x3", 1e-7, 4e-6), ("bf16x6", 1e-8, 2e-6)])
    def test_fp32_in_parts(self, precision, least, most):
        truth = self.a.double() @ self.b.double()
        error = ((truth - product(self.a, self.b, precision)) / truth).abs().max()
        assert least < error < most

    def test_arithmetic_on_bf16_itself_is_refused(self):
        with pytest.raises(Exception, match="arithmetic on bf16 itself"):
            product(self.a.bfloat16(), self.b.bfloat16(), ROUNDED=True)

    def test_the_interpreter_is_as_before(self):
        a, b = self.a.bfloat16(), self.b.bfloat16()
        product(a, b)
        out = torch.empty(16, 16)
        product_kernel[(1,)](self.a, self.b, out, 16, 256, "ieee")
        np.testing.assert_allclose(out, self.a @ self.b, rtol=1e-5)
