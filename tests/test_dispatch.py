"""Which backend runs, how it is asked for, and what is said when it cannot."""

import logging
import re

import pytest
import torch

import visattn
from visattn import device, dispatch, functional, use_backend

from .conftest import HAS_GPU, INTERPRETING
from .oracle import make_problem, recorded_backends, run_layer

on_plain_cpu = pytest.mark.skipif(HAS_GPU or INTERPRETING, reason="about a machine where the kernels cannot run")


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(1, 8, 3, 3)


@on_plain_cpu
def test_auto_takes_the_pytorch_path_and_logs_the_reason_once(x, caplog):
    dispatch._log_once.cache_clear()
    module = visattn.Attention(8)
    with caplog.at_level(logging.INFO, logger="visattn"), recorded_backends() as ran:
        for _ in range(3):
            module(x)
    assert set(ran) == {"torch"}
    assert [r.getMessage() for r in caplog.records] == ["running on the PyTorch path: the kernels need a CUDA or ROCm device, x is on cpu"]


@on_plain_cpu
def test_an_explicit_backend_raises_with_every_reason():
    module = visattn.Attention(600).double()
    with use_backend("triton"), pytest.raises(RuntimeError) as raised:
        module(torch.randn(1, 600, 2, 2, dtype=torch.float64))
    message = str(raised.value)
    for part in ("float64", "at most 512 channels", "x is on cpu", "Use backend 'torch' or 'auto'"):
        assert part in message


def test_an_explicit_backend_runs(backend, place):
    run_layer(make_problem((1, 8, 3, 3)), backend, place)


@pytest.mark.kernels
@pytest.mark.skipif(not INTERPRETING, reason="about Triton's interpreter")
def test_bfloat16_is_refused_in_the_interpreter(x):
    """It computes their products wrongly and says nothing."""
    module = visattn.Attention(8).bfloat16()
    with recorded_backends() as ran:
        module(x.bfloat16())
    assert ran == ["torch"]
    with use_backend("triton"), pytest.raises(RuntimeError, match="Triton's interpreter computes bfloat16 dots wrongly"):
        module(x.bfloat16())


def test_argument_beats_context_beats_environment(x, monkeypatch):
    monkeypatch.setenv("VISATTN_BACKEND", "triton")
    assert dispatch.requested_backend(None) == "triton"
    with use_backend("auto"):
        assert dispatch.requested_backend(None) == "auto"
        assert dispatch.requested_backend("torch") == "torch"
    assert dispatch.requested_backend(None) == "triton"
    monkeypatch.delenv("VISATTN_BACKEND")
    assert dispatch.requested_backend(None) == "auto"


def test_contexts_nest_and_are_left_on_errors():
    with use_backend("torch"):
        with pytest.raises(KeyError), use_backend("auto"):
            raise KeyError
        assert dispatch.requested_backend(None) == "torch"
    assert dispatch.requested_backend(None) == "auto"


@pytest.mark.parametrize("where", ["context", "argument", "environment"])
def test_unknown_names_are_refused(where, x, monkeypatch):
    weights = [torch.randn(8, 8)] * 3
    expected = re.escape("must be one of 'auto', 'triton', 'torch', got 'cuda'")
    if where == "context":
        with pytest.raises(ValueError, match="use_backend " + expected), use_backend("cuda"):
            pass
    elif where == "argument":
        with pytest.raises(ValueError, match="backend " + expected):
            functional.self_attention_2d(x, *weights, backend="cuda")
    else:
        monkeypatch.setenv("VISATTN_BACKEND", "cuda")
        with pytest.raises(ValueError, match="VISATTN_BACKEND " + expected):
            functional.self_attention_2d(x, *weights)


class TestExplain:
    @on_plain_cpu
    def test_says_what_runs_and_why_not_the_other(self, x):
        assert visattn.explain(visattn.Attention(8), x) == (
            "x (1, 8, 3, 3) float32 on cpu: runs on the PyTorch path; the Triton kernels cannot run: "
            "the kernels need a CUDA or ROCm device, x is on cpu."
        )

    @on_plain_cpu
    def test_says_what_would_raise(self, x):
        with use_backend("triton"):
            assert "would raise" in visattn.explain(visattn.Attention(8), x)

    def test_says_that_it_was_asked_for(self, x):
        with use_backend("torch"):
            assert "because backend 'torch' was asked for" in visattn.explain(visattn.Attention(8), x)

    def test_refuses_other_modules(self, x):
        with pytest.raises(TypeError, match="layer must be a visattn layer, got Conv2d"):
            visattn.explain(torch.nn.Conv2d(8, 8, 1), x)


class TestReasons:
    """unsupported_reasons on devices that are not here: only what device.py reports is replaced."""

    def reasons(self, monkeypatch, *, shape=(1, 8, 3, 3), dtype=torch.float32, capability=(9, 0), installed=True, place="cuda"):
        monkeypatch.setattr(device, "TRITON_IS_INSTALLED", installed)
        monkeypatch.setattr(device, "triton_is_interpreting", lambda: False)
        monkeypatch.setattr(device, "compute_capability", lambda index: capability)

        class Map:
            pass

        x = Map()
        x.shape, x.dtype, x.device = shape, dtype, torch.device(place, 0)
        x.is_cuda, x.is_cpu = place == "cuda", place == "cpu"
        return dispatch.unsupported_reasons(x, shape[1])

    def test_none_on_a_recent_gpu(self, monkeypatch):
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            assert self.reasons(monkeypatch, dtype=dtype) == []

    def test_old_gpu(self, monkeypatch):
        assert "has 7.5" in self.reasons(monkeypatch, capability=(7, 5))[0]

    def test_float64(self, monkeypatch):
        assert "x is float64" in self.reasons(monkeypatch, dtype=torch.float64)[0]

    def test_too_many_channels(self, monkeypatch):
        assert self.reasons(monkeypatch, shape=(1, 512, 3, 3)) == []
        assert "at most 512 channels" in self.reasons(monkeypatch, shape=(1, 513, 3, 3))[0]

    def test_the_limit_is_that_of_the_launch_configurations(self):
        block_sizes = pytest.importorskip("visattn.kernels").block_sizes
        for table in (block_sizes.WIDE_TABLE, block_sizes.WIDE_HEADS_TABLE):
            assert {width for rows in table.values() for width in rows} == {dispatch.MAX_CHANNELS}
            assert table.keys() == block_sizes.FOLDED_TABLE.keys()

    def test_without_triton(self, monkeypatch):
        assert "not installed" in self.reasons(monkeypatch, installed=False)[0]

    def test_another_kind_of_device(self, monkeypatch):
        assert "x is on mps:0" in self.reasons(monkeypatch, place="mps")[0]


def test_explain_is_about_the_dtype_that_is_computed_in():
    layer, x = visattn.Attention(4), torch.zeros(1, 4, 2, 2)
    assert "float32" in visattn.explain(layer, x)
    with torch.autocast("cpu", torch.bfloat16):
        assert "bfloat16" in visattn.explain(layer, x)
