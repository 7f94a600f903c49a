"""An index times a stride leaves 32 bits on large maps; the kernels' offsets do not (sglang#20389, fla#1080)."""

import pytest
import torch

from .conftest import HAS_GPU

triton = pytest.importorskip("triton", reason="needs Triton")
tl = pytest.importorskip("triton.language", reason="needs Triton")
primitives = pytest.importorskip("visattn.kernels.primitives", reason="needs Triton")

pytestmark = pytest.mark.kernels


@triton.jit
def offsets_kernel(out_ptr, stride_n, stride_c, stride_l, BLOCK: tl.constexpr):
    """Map n's program writes the offsets of its first tile to out_ptr (N, BLOCK, BLOCK)."""
    n, _ = primitives.locate(1)
    index = tl.arange(0, BLOCK)
    offsets = n * stride_n + primitives.tile_offsets(index, index, stride_c, stride_l)
    where = tl.program_id(0) * BLOCK * BLOCK + index[:, None] * BLOCK + index[None, :]
    tl.store(out_ptr + where, offsets)


@pytest.mark.parametrize("strides", [(2**30, 1, 4), (1, 2**30, 4), (1, 4, 2**30), (2**33, 2**31, 2**32)], ids=str)
def test_are_those_of_python(strides):
    out = torch.zeros(5, 4, 4, dtype=torch.int64, device="cuda" if HAS_GPU else "cpu")
    offsets_kernel[(5,)](out, *strides, BLOCK=4)
    n, c, token = strides
    assert out.tolist() == [[[i * n + j * c + k * token for k in range(4)] for j in range(4)] for i in range(5)]
