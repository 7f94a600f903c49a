"""bench/host.py: that the stub catches every launch, that the parts make up the whole; and what keeps the host's path short.

Nothing here looks at a clock.
"""

import argparse
import importlib
import itertools
import re
from pathlib import Path

import pytest
import torch

from .conftest import INTERPRETING

pytest.importorskip("triton", reason="launches are Triton's")
if INTERPRETING:
    pytest.skip("the interpreter replaces launches", allow_module_level=True)

from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.jit import JITFunction

from bench import host, host_parts
from visattn import (
    SelfAttention2d,
    autograd,
    device,
    folded_values,
    kernels,
    projected_output,
    triton_backend,
    triton_projected_tokens,
    wide_triton_backend,
)

launch_config = kernels.launch_config

FORWARD = ["attention_forward_kernel"]
BACKWARD = ["single_tile_backward_kernel", "weight_gradients_kernel"]
LONG_BACKWARD = ["prepare_backward_kernel", "query_gradient_kernel", "key_value_gradient_kernel", "token_moments_kernel", BACKWARD[1]]
NARROW_FORWARD = ["qkv_projection_kernel", "projected_attention_forward_kernel"]
NARROW_BACKWARD = [
    "qkv_projection_kernel",
    "prepare_projected_backward_kernel",
    "projected_query_gradient_kernel",
    "projected_key_value_gradient_kernel",
    *2 * ["token_moments_kernel"],
    "projection_gradients_kernel",
]


def is_one_tile(case: host_parts.Case) -> bool:
    return case.shape[2] * case.shape[3] <= 64


def is_folded(case: host_parts.Case) -> bool:
    return is_one_tile(case) or case.qk_channels == case.shape[1]


def expected_launches(case: host_parts.Case, mode: str) -> list[str]:
    forward = FORWARD if is_folded(case) else NARROW_FORWARD
    backward = BACKWARD if is_one_tile(case) else LONG_BACKWARD if is_folded(case) else NARROW_BACKWARD
    return forward + (backward if mode == "forward + backward" else [])


def run_step(case: host_parts.Case, mode: str) -> list[str]:
    """The kernels that one step starts."""
    started = []
    step = host_parts.Step(case, mode)
    with torch.set_grad_enabled(step.training), host_parts.stubbed_launches(lambda kernel, *_, **__: started.append(kernel.__name__)):
        step()
    return started


SMALL = [case for case in host_parts.CASES if case.shape[0] == 2 and (is_one_tile(case) or not is_folded(case))]


class Operations(TorchDispatchMode):
    """Lists PyTorch's operations, but for allocations and views."""

    def __init__(self) -> None:
        super().__init__()
        self.started: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if not function.is_view and "empty" not in name and name not in ("_unsafe_view", "unbind"):
            self.started.append(name)
        return result


small = pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
modes = pytest.mark.parametrize("mode", host_parts.MODES)


@modes
@small
def test_every_launch_is_caught(case, mode):
    assert run_step(case, mode) == expected_launches(case, mode)


@pytest.mark.parametrize("mode", ["forward", "forward + backward"])
@pytest.mark.parametrize("case", host_parts.CASES, ids=lambda case: case.name)
def test_every_case_runs_on_the_kernels(case, mode):
    """Backward that is two launches where a map is one tile of 64 tokens."""
    assert run_step(case, mode) == expected_launches(case, mode)


def test_the_stub_leaves_nothing_behind():
    before = JITFunction.run, device.triton_is_interpreting, autograd.compute_forward
    with host_parts.stubbed_launches():
        assert before[0] is not JITFunction.run
    host_parts.record(host_parts.Step(host_parts.CASES[0], "forward"))
    assert (JITFunction.run, device.triton_is_interpreting, autograd.compute_forward) == before
    assert not device.triton_is_interpreting()


@modes
@small
def test_every_part_is_found(case, mode):
    _, counts = host_parts.parts_of(host_parts.Step(case, mode))
    launches = expected_launches(case, mode)
    assert counts["launches, stubbed"] == len(launches)
    assert counts["validation"] == counts["dispatch"] == counts["module call"] == counts["parameters"] == 1
    # out; with a graph y and lse; projected queries and keys
    allocations = {"forward": 1, "forward, graph kept": 3}
    if mode in allocations:
        assert counts["allocation"] == allocations[mode] + (0 if is_folded(case) else 2)
    assert (host_parts.FUNCTION in counts) == (mode != "forward")
    assert (host_parts.ENGINE in counts) == (mode == "forward + backward")


@pytest.fixture(scope="module")
def figures() -> host.Figures:
    return host.measure(host_parts.CASES[:1], rounds=2)


def test_parts_make_up_the_whole(figures):
    for mode in host_parts.MODES:
        parts = {row.part: row for row in figures.rows if (row.case, row.mode) == (host_parts.CASES[0].name, mode)}
        whole = parts.pop(host.WHOLE)
        for percentile in ("p20", "p50", "p80"):
            total = sum(getattr(row, percentile) for row in parts.values())
            assert total == pytest.approx(getattr(whole, percentile))
        assert 0 < whole.p20 <= whole.p50 <= whole.p80


def test_the_table_shows_every_part(figures):
    table = host.markdown(figures)
    assert "| yardstick |" in table
    for row in figures.rows:
        assert row.case in table
        assert row.part in table or row.part == host.WHOLE


def test_starts_are_timed_both_ways(figures):
    rows = [row for row in figures.rows if row.case == host.STARTS]
    kernels_of_step = expected_launches(host_parts.CASES[0], "forward + backward")
    assert [(row.part, row.mode) for row in rows] == list(itertools.product(kernels_of_step, (host.TRITON_S_START, host.OUR_START)))
    assert all(0 < row.p20 <= row.p50 <= row.p80 for row in rows)


def test_command_line(figures, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(host, "measure", lambda: figures)
    parser = argparse.ArgumentParser()
    host.configure(parser)
    assert host.run(parser.parse_args(["--json", str(tmp_path / "host.json")])) == 0
    assert capsys.readouterr().out == host.markdown(figures) + "\n"
    assert host.read(tmp_path / "host.json") == figures
    (tmp_path / "other.json").write_text("[1]")
    with pytest.raises(ValueError, match="does not hold figures"):
        host.read(tmp_path / "other.json")


def test_measuring_the_interpreter_is_refused(monkeypatch):
    monkeypatch.setattr(device, "triton_is_interpreting", lambda: True)
    with pytest.raises(RuntimeError, match="unset TRITON_INTERPRET"):
        host.measure()


class TestShortPath:
    @modes
    @small
    def test_eager_calls_launch_without_wrapping(self, case, mode, monkeypatch):
        def refuse(*_):
            raise AssertionError("an eager call went through torch.library")

        monkeypatch.setattr(torch.library, "wrap_triton", refuse)
        monkeypatch.setattr(torch.library, "triton_op", refuse)
        assert run_step(case, mode) == expected_launches(case, mode)

    @pytest.mark.parametrize(
        ("channels", "options", "forward", "backward"),
        [
            (64, {"num_heads": 4, "norm_groups": 8, "out_proj": True, "res_scale": 0.5}, 5, 15),
            (64, {"qk_channels": 8, "value_channels": 32, "pool": 2, "out_proj": True, "gamma": 0.0, "bias": False}, 5, 14),
            (64, {"qk_channels": 8, "gamma": 0.5}, 2, 7),
            (64, {"norm_groups": 8, "out_proj": True}, 4, 10),
            (320, {"norm_groups": 8, "out_proj": True}, 7, 14),
        ],
        ids=["heads", "pooled", "thin queries", "one head", "one head, wide"],
    )
    def test_launches_and_operations(self, channels, options, forward, backward, monkeypatch):
        """On a map of several tiles in half precision, where each conversion would be a launch as well."""
        for module in (triton_backend, wide_triton_backend, triton_projected_tokens, projected_output, folded_values):
            monkeypatch.setattr(module, "kernel_target", host_parts._hopper)
        layer = SelfAttention2d(channels, **options).half()
        x = torch.zeros(2, channels, 16, 16, dtype=torch.half, requires_grad=True)
        with host_parts.stubbed_launches(lambda kernel, *_, **__: counts.started.append(kernel.__name__)), Operations() as counts:
            out = layer(x)
            assert len(counts.started) == forward, counts.started
            d_out, counts.started[:] = torch.zeros_like(out), []
            torch.autograd.grad(out, [x, *layer.parameters()], d_out)
            assert len(counts.started) == backward, counts.started

    @pytest.mark.parametrize(
        ("row", "options"),
        [
            ("four heads, norm, output projection", {"num_heads": 4, "norm_groups": 8, "out_proj": True}),
            (
                "BigGAN's: 8 query channels, 32 of values, pooled, output projection",
                {"qk_channels": 8, "value_channels": 32, "pool": 2, "out_proj": True},
            ),
        ],
        ids=["heads", "pooled"],
    )
    def test_the_kernels_readme_names_the_launches_of_blocks(self, row, options, monkeypatch):
        text = (Path(__file__).resolve().parent.parent / "kernels" / "README.md").read_text(encoding="utf-8")
        (cells,) = (line.split("|")[2:4] for line in text.splitlines() if line.startswith(f"| {row} |"))
        for module in (triton_projected_tokens, projected_output, triton_backend):
            monkeypatch.setattr(module, "kernel_target", host_parts._hopper)
        named = [[f"{name}_kernel" for name in re.findall(r"`(\w+)`", cell)] for cell in cells]
        layer, started = SelfAttention2d(64, **options), []
        x = torch.zeros(2, 64, 16, 16, requires_grad=True)
        with host_parts.stubbed_launches(lambda kernel, *_, **__: started.append(kernel.__name__)):
            out = layer(x)
            assert started == named[0]
            started.clear()
            out.sum().backward()
            assert started == named[1]

    @pytest.mark.parametrize("dtype", [torch.half, torch.float32], ids=str)
    def test_maps_of_one_tile_take_three_launches_and_nothing_else(self, dtype, monkeypatch):
        """SAGAN's form with γ: one launch forward, two backward."""
        monkeypatch.setattr(triton_backend, "kernel_target", host_parts._hopper)
        layer = SelfAttention2d(128, qk_channels=16, scale=1.0, gamma=0.5).to(dtype)
        x = torch.zeros(4, 128, 8, 8, dtype=dtype, requires_grad=True)
        with host_parts.stubbed_launches(lambda kernel, *_, **__: counts.started.append(kernel.__name__)), Operations() as counts:
            out = layer(x)
            assert counts.started == ["attention_forward_kernel"]
            d_out, counts.started[:] = torch.zeros_like(out), []
            torch.autograd.grad(out, [x, *layer.parameters()], d_out)
            assert counts.started == ["single_tile_backward_kernel", "weight_gradients_kernel"]

    def test_no_file_wraps_launches(self):
        root = Path(__file__).resolve().parent.parent
        for path in itertools.chain((root / "visattn").rglob("*.py"), (root / "kernels").rglob("*.py")):
            assert "wrap_triton" not in path.read_text(encoding="utf-8"), path.name

    def test_first_derivatives_have_no_graph_of_their_own(self, monkeypatch):
        monkeypatch.setattr(autograd.SelfAttentionBackward, "apply", lambda *_: pytest.fail("a node nobody asked for"))
        run_step(host_parts.CASES[0], "forward + backward")

    def test_configurations_are_looked_up_and_pure(self):
        targets = {kernels.Target(*key) for key in itertools.product(("hopper", "blackwell", "ampere"), ("tf32", "bf16x6"))}
        targets.add(kernels.Target("cdna", "ieee"))
        for target, dtype, channels in itertools.product(targets, (torch.float32, torch.float16, torch.bfloat16), (20, 32, 64, 100, 256)):
            for look_up in (launch_config.forward_config, launch_config.backward_configs, launch_config.projected_configs):
                found = look_up(channels, dtype, target)
                assert found is look_up(channels, dtype, kernels.Target(*target))
                assert found == look_up.__wrapped__(channels, dtype, target)

    def test_launches_do_not_change_the_constants_they_share(self):
        constants_of = importlib.import_module("visattn.kernels.attention_forward")._constants
        config = launch_config.forward_config(32, torch.float32, host_parts._hopper(torch.device("cpu")))
        problem = (32, 32, True, config)
        before = dict(constants_of(*problem))
        run_step(host_parts.CASES[0], "forward + backward")
        assert constants_of(*problem) is constants_of(*problem)
        assert constants_of(*problem) == before == constants_of.__wrapped__(*problem)

    @pytest.mark.parametrize("length", range(1, 70))
    def test_tiles_cover_the_length(self, length):
        for block in (16, 64):
            tiles = launch_config.num_tiles(length, block)
            assert (tiles - 1) * block < length <= tiles * block
