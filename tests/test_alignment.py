"""Maps whose rows begin anywhere: which of them kernels read from a copy, and that nothing of the copy's gaps is seen."""

from dataclasses import replace

import pytest
import torch

from visattn import Attention, reference, use_backend

from .conftest import HAS_GPU
from .general_problems import Block, run_on_kernels, truth_of
from .general_problems import make_problem as make_block_problem
from .general_problems import run as run_block
from .oracle import assert_correct, complaints, make_problem

kernels = pytest.importorskip("visattn.kernels", reason="needs Triton")

PLACE = torch.device("cuda", 0) if HAS_GPU else torch.device("cpu")


def tokens(channels, length, **options):
    return torch.randn(2, channels, length, **options)


class TestRule:
    @pytest.mark.parametrize(
        "aligned",
        [tokens(96, 64), tokens(64, 49), tokens(49, 96).mT, tokens(96, 64, dtype=torch.float16)[:, :, :50], tokens(96, 64)[:, :, 4:54]],
        ids=["NCHW", "few channels", "channels_last", "gaps", "from four numbers on"],
    )
    def test_what_can_be_read_is_read_where_it_is(self, aligned):
        assert kernels.readable(aligned) is aligned
        assert kernels.writable(aligned) is aligned

    @pytest.mark.parametrize(
        "stray",
        [tokens(96, 49), tokens(64, 100).mT, tokens(96, 64)[:, :, ::2], tokens(96, 64)[:, :, 1:], torch.zeros(()).expand(2, 96, 64)],
        ids=["NCHW", "channels_last", "every second", "from the second number on", "stride 0"],
    )
    def test_others_are_copied_to_aligned_rows(self, stray):
        copy, empty = kernels.readable(stray), kernels.writable(stray)
        torch.testing.assert_close(copy, stray, rtol=0, atol=0)
        for made in (copy, empty):
            assert made.shape == stray.shape
            assert made.stride()[1] % 16 == made.stride()[0] % 16 == 0
            assert made.stride()[2] == 1
            assert kernels.readable(made) is made

    def test_memory_with_strides_of(self):
        rows = kernels.empty_aligned(torch.empty(0, dtype=torch.float16), (2, 3, 49))
        assert rows.stride() == kernels.empty_with_strides_of(rows).stride() == (192, 64, 1)


@pytest.mark.kernels
@pytest.mark.parametrize("channels_last", [False, True], ids=["NCHW", "channels_last"])
@pytest.mark.parametrize(
    ("shape", "qk_channels"), [((2, 68, 5, 5), None), ((2, 68, 9, 15), 8), ((1, 260, 3, 5), 16)], ids=["folded", "thin queries", "wide"]
)
def test_branch_and_gradients(shape, qk_channels, channels_last):
    problem = make_problem(shape, torch.float16, qk_channels=qk_channels)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    assert_correct(replace(problem, x=problem.x.contiguous(memory_format=memory_format)), "triton", PLACE)


@pytest.mark.kernels
@pytest.mark.parametrize("pool", [1, 2])
def test_heads_of_odd_maps(pool):
    """Queries, keys and values lie in aligned rows; pooled ones have other gaps than those that they were chosen from."""
    problem = make_block_problem(Block(70, 12, 10, settings={"num_heads": 2, "pool": pool}), torch.float32, size=(5, 7))
    truth, eager = truth_of(reference.self_attention_2d, problem), run_block(reference.self_attention_2d, problem)
    assert not complaints(run_on_kernels(problem, PLACE), truth, eager)


@pytest.mark.kernels
def test_results_lie_as_they_always_do():
    x = torch.randn(1, 68, 5, 5, device=PLACE, requires_grad=True)
    layer = Attention(68, device=PLACE)
    with use_backend("triton"):
        out = layer(x)
    (gradient,) = torch.autograd.grad(out.sum(), x)
    assert out.is_contiguous()
    assert gradient.is_contiguous()
