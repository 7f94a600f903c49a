"""The kernels that take maxima of windows, beside PyTorch's own: the same numbers, and to the bit the same gradients."""

import pytest
import torch
from torch.nn.functional import max_pool2d

import visattn

from .conftest import HAS_GPU

kernels = pytest.importorskip("visattn.kernels", reason="needs Triton")
pytestmark = pytest.mark.kernels

PLACE = "cuda" if HAS_GPU else "cpu"
SIZES = {
    "even": (4, 6, 2),
    "rows and columns over the edge": (5, 7, 2),
    "windows of three": (9, 11, 3),
    "one window, larger than half the map": (3, 5, 3),
    "one line": (1, 9, 1),
    "several tiles": (66, 67, 2),
}


def rows(numbers: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """(N, D, L) as the projections write it."""
    return kernels.empty_aligned(torch.empty(0, dtype=dtype, device=PLACE), numbers.shape).copy_(numbers)


def pooled_by_pytorch(t: torch.Tensor, d_pooled: torch.Tensor, height: int, width: int, pool: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Maxima and the gradient of t, computed in fp32, in which 16-bit numbers are exact."""
    t = t.detach().float().unflatten(2, (height, width)).requires_grad_()
    out = max_pool2d(t, pool)
    (gradient,) = torch.autograd.grad(out, t, d_pooled.float().view_as(out))
    return out.detach().flatten(2), gradient.flatten(2)


def assert_as_pytorch(k, v, height, width, pool):
    """Two tensors (N, D, L), D of their own. The maxima are less their mean, which for values is told."""
    shift = torch.arange(v.shape[0] * v.shape[1], dtype=torch.float32, device=PLACE).view(v.shape[:2])
    *pooled, c = kernels.max_pool(k, v, shift, height, width, pool)
    generator = torch.Generator().manual_seed(1)
    d_pooled = [rows(torch.randn(t.shape, generator=generator), t.dtype) for t in pooled]
    gradients = kernels.max_pool_backward(k, v, *d_pooled, height, width, pool)
    means = []
    for t, out, d_out, gradient in zip((k, v), pooled, d_pooled, gradients, strict=True):
        maxima, expected_gradient = pooled_by_pytorch(t, d_out, height, width, pool)
        means.append(maxima.mean(2))
        assert out.dtype == gradient.dtype == t.dtype
        torch.testing.assert_close(out.float(), maxima - means[-1][:, :, None], equal_nan=True, rtol=torch.finfo(t.dtype).eps, atol=1e-5)
        assert torch.equal(gradient.float(), expected_gradient)
    torch.testing.assert_close(c, shift + means[1], equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("height", "width", "pool"), SIZES.values(), ids=SIZES)
def test_maxima_and_gradients_are_pytorchs(height, width, pool, dtype):
    """Whole numbers of a small range, so that most windows have their maximum more than once: the first one counts."""
    generator = torch.Generator().manual_seed(0)
    k, v = (rows(torch.randint(-3, 3, (2, d, height * width), generator=generator), dtype) for d in (3, 5))
    assert_as_pytorch(k, v, height, width, pool)


def test_numbers_that_are_none_and_infinities():
    generator = torch.Generator().manual_seed(0)
    t = torch.randn(1, 4, 64, generator=generator)
    t[0, 0, torch.randint(64, (12,), generator=generator)] = float("nan")
    t[0, 1, torch.randint(64, (12,), generator=generator)] = float("inf")
    t[0, 2] = float("-inf")
    t[0, 3, ::2], t[0, 3, 1::2] = float("nan"), float("-inf")
    assert_as_pytorch(rows(t, torch.float32), rows(-t, torch.float32), 8, 8, 2)


@pytest.mark.gpu
def test_a_graph_holds_both_passes_under_deterministic_algorithms():
    """PyTorch's own scatter, which hands gradients of maxima back, may ask the host then."""
    layer = visattn.SelfAttention2d(32, qk_channels=4, value_channels=16, pool=2, out_proj=True).cuda()
    x = torch.randn(2, 32, 9, 8, device="cuda", requires_grad=True)

    def step():
        return torch.autograd.grad(layer(x).square().sum(), [x, *layer.parameters()])

    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        with visattn.use_backend("triton"):
            for _ in range(3):
                expected = step()
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                got = step()
            graph.replay()
    finally:
        torch.use_deterministic_algorithms(before)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
