"""kernels/launching.py against Triton's own way to start a kernel: the same compiled kernel, the same arguments, on every problem.

The driver is a stub, so that kernels are compiled, but nothing is started; what would be is compared.
"""

import itertools

import pytest
import torch

from .conftest import INTERPRETING

pytest.importorskip("triton", reason="launches are Triton's")
if INTERPRETING:
    pytest.skip("the interpreter replaces launches", allow_module_level=True)

import triton
import triton.language as tl

from bench import host_parts
from bench.stub_driver import Start, stubbed_driver
from visattn import SelfAttention2d, device, kernels, triton_backend, use_backend

launching = kernels.launching


@triton.jit(do_not_specialize=["count"])
def some_kernel(x_ptr, stride, y_ptr, scale, count, length, FACTOR: tl.constexpr, SQUARED: tl.constexpr):
    offsets = tl.program_id(0) * length + tl.arange(0, 16)
    x = tl.load(x_ptr + offsets * stride) * scale * FACTOR + count
    tl.store(x_ptr + offsets * stride, x * x if SQUARED else x)
    if y_ptr is not None:
        tl.store(y_ptr + offsets, x)


@triton.jit
def other_kernel(x_ptr, stride, y_ptr, scale, count, length, FACTOR: tl.constexpr, SQUARED: tl.constexpr):
    tl.store(x_ptr + tl.arange(0, 16) * stride, scale * FACTOR + count + length)


@pytest.fixture
def started():
    """Every start, in a list."""
    starts: list[Start] = []
    with stubbed_driver(starts.append):
        yield starts


def start_both_ways(started, kernel, programs, *args, **constants) -> Start:
    """Triton's own start, with which ours agrees, cold and warm."""
    del started[:]
    kernel[(programs,)](*args, **constants)
    for _ in range(2):
        launching.launch(kernel, programs, *args, **constants)
    triton_s, *ours = started
    assert len(ours) == 2
    for start in ours:
        assert start.launcher is triton_s.launcher
        assert start.grid == triton_s.grid == (programs, 1, 1)
        assert len(start.args) == len(triton_s.args)
        assert all(a is b for a, b in zip(start.args, triton_s.args, strict=True))
    return triton_s


def aligned(dtype, offset=0):
    """A tensor that begins `offset` elements after a multiple of 16 bytes."""
    return torch.empty(80, dtype=dtype)[offset:]


OPTIONS = {"num_warps": 1, "num_stages": 1}


class TestOneKernel:
    def test_the_same_kernel_as_triton_for_every_kind_of_argument(self, started):
        """A key that forgot what a kernel was compiled for would start one that was compiled for something else."""
        found = {}
        for dtype, offset, stride, y, length in itertools.product(
            (torch.float32, torch.float16), (0, 1), (1, 3, 16), (None, 0, 1), (48, 49, 2**40)
        ):
            x, y_tensor = aligned(dtype, offset), None if y is None else aligned(torch.float32, y)
            start = start_both_ways(started, some_kernel, 2, x, stride, y_tensor, 0.5, 3, length, FACTOR=2, SQUARED=True, **OPTIONS)
            found[dtype, offset, stride, y, length] = start.launcher
        assert len(set(found.values())) == len(found)  # each of these was compiled by itself

    def test_numbers_that_are_of_one_kind_share_a_kernel(self, started):
        x = aligned(torch.float32)
        one, *others = (
            start_both_ways(started, some_kernel, programs, x, stride, None, scale, count, length, FACTOR=2, SQUARED=False, **OPTIONS)
            for programs, stride, scale, count, length in ((1, 3, 0.5, 1, 48), (7, 5, 1.0, 16, 64), (2, 9, 2.0, 5, 32))
        )
        assert all(other.launcher is one.launcher for other in others)

    def test_constants_and_options(self, started):
        x = aligned(torch.float32)
        launchers = {
            start_both_ways(
                started, kernel, 1, x, 3, None, 0.5, 2, 5, FACTOR=factor, SQUARED=squared, num_warps=warps, num_stages=1
            ).launcher
            for kernel, factor, squared, warps in itertools.product((some_kernel, other_kernel), (1, 2), (False, True), (1, 2))
        }
        assert len(launchers) == 16

    def test_the_order_of_constants_does_not_matter(self, started):
        """Two that stand the other way round are not taken for one another."""
        x = aligned(torch.float32)
        one = start_both_ways(started, some_kernel, 1, x, 3, None, 0.5, 2, 5, FACTOR=1, SQUARED=0, **OPTIONS)
        other = start_both_ways(started, some_kernel, 1, x, 3, None, 0.5, 2, 5, SQUARED=1, FACTOR=0, **OPTIONS)
        same = start_both_ways(started, some_kernel, 1, x, 3, None, 0.5, 2, 5, SQUARED=0, FACTOR=1, **OPTIONS)
        assert one.launcher is same.launcher
        assert one.launcher is not other.launcher

    def test_devices_are_told_apart(self, started, monkeypatch):
        x = aligned(torch.float32)
        arguments = (some_kernel, 1, x, 3, None, 0.5, 2, 5)
        launching.launch(*arguments, FACTOR=1, SQUARED=False, **OPTIONS)
        before = len(launching._remembered)
        monkeypatch.setattr(torch.Tensor, "get_device", lambda _: 1)
        launching.launch(*arguments, FACTOR=1, SQUARED=False, **OPTIONS)
        assert len(launching._remembered) == before + 1

    def test_memory_of_problems_is_bounded(self, started, monkeypatch):
        monkeypatch.setattr(launching, "MAX_REMEMBERED", 3)
        for length in range(33, 48):
            launching.launch(some_kernel, 1, aligned(torch.float32), 3, None, 0.5, 2, length, FACTOR=1, SQUARED=False, **OPTIONS)
            assert len(launching._remembered) <= 3
        assert [start.args[5] for start in started] == list(range(33, 48))

    def test_a_warm_start_asks_triton_nothing(self, started, monkeypatch):
        arguments = (some_kernel, 1, aligned(torch.float32), 3, None, 0.5, 2, 5)
        launching.launch(*arguments, FACTOR=1, SQUARED=False, **OPTIONS)
        monkeypatch.setattr(triton.JITFunction, "run", lambda *_, **__: pytest.fail("Triton was asked again"))
        launching.launch(*arguments, FACTOR=1, SQUARED=False, **OPTIONS)
        assert len(started) == 2

    def test_nothing_is_left_behind(self):
        with stubbed_driver(lambda _: None):
            launching.launch(some_kernel, 1, aligned(torch.float32), 3, None, 0.5, 2, 5, FACTOR=1, SQUARED=False, **OPTIONS)
            assert launching._remembered
        assert not launching._remembered
        assert not some_kernel.device_caches


class TestLayer:
    """Every kernel of the layer, as the layer starts it."""

    @pytest.fixture
    def on_kernels(self, monkeypatch):
        """Tensors on the CPU take the kernels' path on a Hopper GPU."""
        monkeypatch.setattr(device, "triton_is_interpreting", lambda: True)
        for module in (triton_backend, device):
            monkeypatch.setattr(module, "kernel_target", host_parts._hopper)
        with use_backend("auto"):
            yield

    def test_warm_starts_are_those_of_triton(self, started, on_kernels, monkeypatch):
        """Folded and projected, aligned and not, in turn: by Triton alone, then cold, then warm."""
        folded, projected = SelfAttention2d(16, gamma=0.5), SelfAttention2d(32, qk_channels=4)

        def steps() -> list[tuple[object, tuple[int, int, int]]]:
            del started[:]
            for layer, channels, side, offset in ((folded, 16, 8, 0), (projected, 32, 12, 0), (folded, 16, 8, 1)):
                x = torch.zeros(2 * channels * side**2 + offset)[offset:].view(2, channels, side, side).requires_grad_()
                layer(x).sum().backward()
            return [(start.launcher, start.grid) for start in started]

        with monkeypatch.context() as patch:
            patch.setattr(launching, "_remembered", Forgetful())
            own = steps()
        names = [launcher.kernel.__name__ for launcher, _ in own]
        assert len(names) == 3 + 9 + 3
        assert names[:3] == names[-3:]
        assert own[0] != own[-3]  # compiled for another alignment of x
        assert own[1] != own[-2]
        assert own[2] == own[-1]  # takes sums, not x
        assert steps() == own
        monkeypatch.setattr(triton.JITFunction, "run", lambda *_, **__: pytest.fail("Triton was asked again"))
        assert steps() == own


class Forgetful(dict):
    """Remembers nothing."""

    def __setitem__(self, key, value):
        pass
