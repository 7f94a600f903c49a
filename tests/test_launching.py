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


def start_both_ways(started, kernel, programs, constants, *args) -> Start:
    """Triton's own start, with which ours agrees, cold and warm."""
    del started[:]
    kernel[(programs,)](*args, **constants)
    for _ in range(2):
        launching.launch(kernel, programs, constants, *args)
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


CONSTANTS = {"FACTOR": 2, "SQUARED": False, "num_warps": 1, "num_stages": 1}


def test_large_tensors_on_amd_are_other_kernels_arguments(started, monkeypatch):
    """Triton compiles offsets of 32 bits there for small ones; of the stub's kernels only the key tells."""
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(launching, "FITS_INT32", 200)
    for length in (16, 20, 80, 160):
        launching.launch(some_kernel, 1, CONSTANTS, torch.empty(length), 1, None, 0.5, 3, 16)
    assert len(launching._remembered) == 2


class TestOneKernel:
    def test_the_same_kernel_as_triton_for_every_kind_of_argument(self, started):
        """A key that forgot what a kernel was compiled for would start one that was compiled for something else."""
        found = {}
        for dtype, offset, stride, y, length in itertools.product(
            (torch.float32, torch.float16), (0, 1), (1, 3, 16), (None, 0, 1), (48, 49, 2**40)
        ):
            x, y_tensor = aligned(dtype, offset), None if y is None else aligned(torch.float32, y)
            start = start_both_ways(started, some_kernel, 2, CONSTANTS, x, stride, y_tensor, 0.5, 3, length)
            found[dtype, offset, stride, y, length] = start.launcher
        assert len(set(found.values())) == len(found)  # each of these was compiled by itself

    def test_numbers_that_are_of_one_kind_share_a_kernel(self, started):
        x = aligned(torch.float32)
        one, *others = (
            start_both_ways(started, some_kernel, programs, CONSTANTS, x, stride, None, scale, count, length)
            for programs, stride, scale, count, length in ((1, 3, 0.5, 1, 48), (7, 5, 1.0, 16, 64), (2, 9, 2.0, 5, 32))
        )
        assert all(other.launcher is one.launcher for other in others)

    def test_constants_and_options(self, started):
        x = aligned(torch.float32)
        launchers = set()
        for factor, squared, warps in itertools.product((1, 2), (False, True), (1, 2)):
            constants = {"FACTOR": factor, "SQUARED": squared, "num_warps": warps, "num_stages": 1}
            for kernel in (some_kernel, other_kernel):
                launchers.add(start_both_ways(started, kernel, 1, constants, x, 3, None, 0.5, 2, 5).launcher)
        assert len(launchers) == 16

    def test_constants_live_as_long_as_they_are_remembered(self, started):
        """Dicts that are thrown away get one another's place in memory, by which they are known."""
        x = aligned(torch.float32)
        for factor in range(2, 12):
            start_both_ways(started, some_kernel, 1, {**CONSTANTS, "FACTOR": factor}, x, 3, None, 0.5, 2, 5)

    def test_devices_are_told_apart(self, started, monkeypatch):
        x = aligned(torch.float32)
        arguments = (some_kernel, 1, CONSTANTS, x, 3, None, 0.5, 2, 5)
        launching.launch(*arguments)
        before = len(launching._remembered)
        monkeypatch.setattr(torch.Tensor, "get_device", lambda _: 1)
        launching.launch(*arguments)
        assert len(launching._remembered) == before + 1

    def test_memory_of_problems_is_bounded(self, started, monkeypatch):
        monkeypatch.setattr(launching, "MAX_REMEMBERED", 3)
        for length in range(33, 48):
            launching.launch(some_kernel, 1, CONSTANTS, aligned(torch.float32), 3, None, 0.5, 2, length)
            assert len(launching._remembered) <= 3
        assert [start.args[5] for start in started] == list(range(33, 48))

    def test_a_warm_start_asks_triton_nothing(self, started, monkeypatch):
        arguments = (some_kernel, 1, CONSTANTS, aligned(torch.float32), 3, None, 0.5, 2, 5)
        launching.launch(*arguments)
        monkeypatch.setattr(triton.JITFunction, "run", lambda *_, **__: pytest.fail("Triton was asked again"))
        launching.launch(*arguments)
        assert len(started) == 2

    def test_nothing_is_left_behind(self):
        with stubbed_driver(lambda _: None):
            launching.launch(some_kernel, 1, CONSTANTS, aligned(torch.float32), 3, None, 0.5, 2, 5)
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
