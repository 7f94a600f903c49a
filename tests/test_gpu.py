"""What only a real device can show: bf16, sizes beyond int32, other streams and devices, and sanitised memory."""

from dataclasses import replace

import pytest
import torch

import visattn
from visattn import functional, use_backend

from . import oracle
from .oracle import make_problem, run_layer

pytestmark = pytest.mark.gpu


def first_and_last_of(problem: oracle.Problem, maps: int, place: torch.device) -> oracle.Results:
    """What the kernels compute for the problem's two maps as the first and the last of many.

    The others are random, and nothing comes back to them, so that the gradients of the weights are those of the two.
    """

    def among_many(two: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
        others[:1], others[-1:] = two.to(place)
        return others

    shape = (maps, *problem.x.shape[1:])
    x, d_out = (make(shape, device=place, dtype=problem.x.dtype) for make in (torch.randn, torch.zeros))
    moved = replace(problem.to(place), x=among_many(problem.x, x), d_out=among_many(problem.d_out, d_out))
    with use_backend("triton" if place.type == "cuda" else "torch"):
        results = oracle.run(functional.self_attention_2d, moved)
    return {name: (t[[0, -1]] if t.shape == shape else t).cpu() for name, t in results.items()}


def test_more_elements_than_int32():
    """Forward and backward with more than 2³¹ elements: the first and the last of the maps, and all gradients (sglang#20389).

    One dtype after another, since no two fit beside each other: map, output, both gradients, and four more of their size.
    """
    channels, side = 64, 32
    maps = 2**31 // (channels * side**2) + 2
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        if torch.cuda.get_device_properties(0).total_memory < 9.5 * maps * channels * side**2 * dtype.itemsize:
            pytest.skip(f"needs more memory than this device has in {dtype}")
        problem = make_problem((2, channels, side, side), dtype)
        ours = first_and_last_of(problem, maps, torch.device("cuda"))
        torch.cuda.empty_cache()  # others may run beside this process
        found = oracle.complaints(ours, oracle.truth_of(problem), oracle.eager_of(problem))
        assert not found, (dtype, found)


def test_runs_on_the_current_stream():
    module, x = visattn.Attention(32).cuda(), torch.randn(8, 32, 32, 32, device="cuda")
    stream = torch.cuda.Stream()
    with use_backend("triton"), torch.no_grad():
        expected = module(x)
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(100_000_000)
            late = x * 2
            out = module(late / 2)
        stream.synchronize()
    torch.testing.assert_close(out, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
def test_runs_on_the_device_of_its_input():
    """A kernel starts on the current device, whatever its pointers say (triton#2441)."""
    module, x = visattn.Attention(32).to("cuda:1"), torch.randn(2, 32, 8, 8, device="cuda:1")
    with torch.cuda.device(0), use_backend("triton"):
        out = module(x)
    assert out.device == x.device
    with use_backend("torch"):
        torch.testing.assert_close(out, module(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_repeats_are_bitwise_equal_under_load(dtype):
    problem = make_problem((64, 64, 32, 32), dtype)
    first = run_layer(problem, "triton", torch.device("cuda"))
    for _ in range(20):
        again = run_layer(problem, "triton", torch.device("cuda"))
        for name in first:
            assert torch.equal(first[name], again[name]), name


def test_the_fp32_switch_of_pytorch_is_followed():
    """ "highest" has an fp32-class error, "high" a tf32-class one, and both are what they say."""
    problem = replace(make_problem((2, 64, 16, 16), regime="peaked"), gamma=None)
    truth = functional.self_attention_2d(
        *(getattr(problem, n).double() for n in ("x", "w_q", "w_k", "w_v", "b_q", "b_k", "b_v")), residual=False, backend="torch"
    )
    errors = {}
    previous = torch.get_float32_matmul_precision()
    try:
        for precision in ("highest", "high"):
            torch.set_float32_matmul_precision(precision)
            out = run_layer(problem, "triton", torch.device("cuda"))["out"].double()
            errors[precision] = float((out - truth).norm() / truth.norm())
    finally:
        torch.set_float32_matmul_precision(previous)
    assert errors["highest"] < 1e-5
    assert errors["highest"] < errors["high"] < 5e-3
