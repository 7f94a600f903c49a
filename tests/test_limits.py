"""The ends of what fits, and what went wrong there in other projects."""

import importlib
import pkgutil
from unittest import mock

import pytest
import torch
import triton
import triton.language as tl
import visattn.kernels

from visattn import device, functional, reference, use_backend

from .conftest import INTERPRETING
from .oracle import make_problem, run_layer
from .reliability.limits import ARRANGEMENTS, BUGS, TRIED, complaints, missing


@triton.jit
def narrow_offsets(offs_c, offs_l, stride_c, stride_l):
    """`tile_offsets`, as it must not be."""
    return (offs_c.to(tl.int32)[:, None] * stride_c + offs_l.to(tl.int32)[None, :] * stride_l).to(tl.int64)


not_interpreting = pytest.mark.skipif(INTERPRETING, reason="about compiled kernels, without running them")


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_bugs_of_others_have_tests(bug):
    assert missing(bug) == []


SHORT = [("folded", arrangement) for arrangement in ARRANGEMENTS] + [
    ("projected keys", "all together"),
    ("on tokens", "all together"),
    ("wide", "channels"),
]


@pytest.mark.parametrize(
    ("form", "arrangement"),
    [pytest.param(*tried, marks=() if tried in SHORT else pytest.mark.full) for tried in TRIED],
)
def test_offsets_beyond_int32(form, arrangement, backend):
    """An index times a stride leaves int32 on large maps (sglang#20389)."""
    assert complaints(form, arrangement, backend) == []


@pytest.mark.kernels
@pytest.mark.skipif(not INTERPRETING, reason="replaces a function of the kernels, which the interpreter looks up as it runs")
@pytest.mark.parametrize("arrangement", ["channels", "tokens"])
def test_an_offset_in_int32_is_noticed(arrangement, monkeypatch):
    """The test before is tested: with offsets as they would be in int32 it fails."""
    for name in ("attention_forward", "attention_backward"):
        monkeypatch.setattr(importlib.import_module(f"visattn.kernels.{name}"), "tile_offsets", narrow_offsets)
    assert complaints("folded", arrangement, "triton")


@not_interpreting
@pytest.mark.parametrize("batch", [65_536, 100_000])
@pytest.mark.parametrize("options", [{}, {"qk_channels": 1}, {"num_heads": 2}], ids=str)
def test_large_batches(batch, options):
    """A map out of 100,000 is what it is alone, forward and backward."""
    torch.manual_seed(0)
    layer = visattn.SelfAttention2d(2, **options).double()
    x = torch.randn(batch, 2, 1, 2, dtype=torch.float64, requires_grad=True)
    d_out = torch.randn_like(x)
    out = layer(x)
    (d_x,) = torch.autograd.grad(out, x, d_out)
    for n in (0, 65_535, batch - 1):
        alone = x[n : n + 1].detach().requires_grad_()
        expected = layer(alone)
        torch.testing.assert_close(out[n : n + 1], expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(d_x[n : n + 1], torch.autograd.grad(expected, alone, d_out[n : n + 1])[0], rtol=0, atol=1e-12)


@not_interpreting
@pytest.mark.parametrize("options", [{}, {"in_channels": 32, "qk_channels": 4}, {"num_heads": 2}], ids=str)
def test_grids_have_one_dimension(options):
    """CUDA's second and third dimension end at 65,535, silently where nobody asks (flashinfer#3125)."""
    from bench.host_parts import stubbed_launches

    grids = []
    layer = visattn.SelfAttention2d(**{"in_channels": 8} | options)
    x = torch.randn(100_000, layer.conv_query.in_channels, 1, 1).requires_grad_()
    with stubbed_launches(lambda *_, grid, **__: grids.append(grid)):
        layer(x).sum().backward()
    assert len(grids) >= 3
    assert all(len(grid) == 1 and grid[0] < 2**31 for grid in grids)
    assert max(grid[0] for grid in grids) >= 100_000


@pytest.mark.parametrize(("qk_channels", "length"), [(5, 1), (5, 65), (5, 79), (1, 17), (1, 63), (1, 130)])
def test_every_element_is_written(qk_channels, length, backend, place):
    """Memory is filled with NaN before; a tail that nobody writes would stay so (lightning-attention#28)."""
    results = run_layer(make_problem((1, 17, 1, length), qk_channels=qk_channels), backend, place)
    assert all(t.isfinite().all() for t in results.values())


@pytest.mark.parametrize("num_heads", [1, 2])
def test_every_pixel_reaches_every_pixel(num_heads, backend, place):
    """A gradient at the first pixel moves the last one, and the reverse: nothing is causal (triton#4541)."""
    torch.manual_seed(0)
    x, *weights = (torch.randn(shape) for shape in ((1, 4, 3, 6), (4, 4), (4, 4), (4, 4)))
    for pixel, other in ((0, 17), (17, 0)):
        d_out = torch.zeros(1, 4, 18)
        d_out[:, :, pixel] = 1

        def gradient(function, where, dtype, d_out=d_out):
            leaf = (0.5 * x).to(where, dtype).requires_grad_()
            out = function(leaf, *((0.5 * w).to(where, dtype) for w in weights), num_heads=num_heads, residual=False)
            return torch.autograd.grad(out, leaf, d_out.view(x.shape).to(where, dtype))[0].flatten(2).cpu().double()

        with use_backend(backend):
            got = gradient(functional.self_attention_2d, place, torch.float32)
        truth = gradient(reference.self_attention_2d, "cpu", torch.float64)
        assert truth[:, :, other].abs().max() > 0.01
        torch.testing.assert_close(got, truth, rtol=0, atol=1e-5)


def test_kernels_start_on_the_device_of_their_input(monkeypatch):
    """A kernel starts on the current device, whatever its pointers say (triton#2441); on two GPUs test_gpu.py shows it."""
    entered = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", lambda place: entered.append(place) or mock.MagicMock())
    for index in (0, 1):
        x = mock.Mock(is_cuda=True, device=torch.device("cuda", index))
        with device.on_device_of(x):
            pass
    assert entered == [torch.device("cuda", 1)]


def test_full_precision_is_the_default(monkeypatch):
    """TF32 in gradients of fp32 is for those who ask for it (triton_docs_tutorials#6)."""
    from visattn.kernels import Target, backward_configs

    assert device.float32_precision_is_highest()
    for architecture in ("hopper", "blackwell", "ampere"):
        configs = vars(backward_configs(64, torch.float32, Target(architecture, "bf16x6"))).values()
        assert {config.input_precision for config in configs} <= {"bf16x6", "tf32x3"}


def test_nothing_is_tuned_at_call_time():
    """Autotuning would let processes disagree and race (pytorch#92664): configurations are a pure function."""
    for path in pkgutil.iter_modules(visattn.kernels.__path__):
        module = importlib.import_module(f"visattn.kernels.{path.name}")
        assert not any(isinstance(value, triton.runtime.Autotuner) for value in vars(module).values()), path.name
