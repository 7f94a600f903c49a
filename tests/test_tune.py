"""`python -m bench tune`: what is tried, what wins, what is kept. A rehearsal stands in for the GPU, and stubs for its launches."""

import json
import math
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from .conftest import HAS_GPU, INTERPRETING

if INTERPRETING:
    pytest.skip("the interpreter replaces the compiler", allow_module_level=True)

from triton.runtime.jit import JITFunction
from visattn.kernels.block_sizes import ALL
from visattn.kernels.launch_config import block_channels

from bench import __main__, problems, timing, trial, tune
from bench.ahead_of_time import DEVICES
from bench.candidates import BY_WEIGHT, CHANNELS, DTYPES, KERNELS, Entry, entries, neighbours, sizes_text, table_row, winner
from bench.cases import Case
from bench.trial import Gpu, Rehearsal, compiled_for, in_place, launch_of
from visattn import dispatch, kernels, triton_backend

TARGET = kernels.Target("hopper", "bf16x6")
ENTRY = Entry("folded", "forward", "bf16", 64)
EVERY = list(entries(DTYPES, (16, *CHANNELS), BY_WEIGHT))
PRESENT = table_row(ENTRY, TARGET)["forward"]


def rehearsal():
    return Rehearsal(DEVICES["sm_90"], compiles=0)


def ticking(per_call=1.0):
    """A clock that goes on by `per_call` with each look at it."""
    now = 0.0

    def clock():
        nonlocal now
        now += per_call
        return now

    return clock


def differences(a, b):
    return {name for name in a._fields if getattr(a, name) != getattr(b, name)}


def test_the_most_important_entries_come_first():
    chosen = list(entries(["bf16", "fp32-high"], CHANNELS, BY_WEIGHT))
    assert chosen[0] == ENTRY
    assert [entry.channels for entry in chosen[:20]] == [64] * 5 + [128] * 5 + [32] * 5 + [256] * 5
    assert {(entry.form, entry.dtype) for entry in chosen[:20]} == {("folded", "bf16")}
    assert [entry.form for entry in chosen] == ["folded"] * 40 + ["narrow"] * 40
    assert len(set(chosen)) == len(chosen)
    assert {entry.channels for entry in EVERY if entry.form == "narrow"} == set(CHANNELS)  # 16 channels always fold
    assert list(entries(["fp16"], [64], ["qkv_projection"])) == [Entry("narrow", "qkv_projection", "fp16", 64)]


@pytest.mark.parametrize("form", KERNELS)
def test_kernels_are_in_the_order_of_the_table(form):
    for entry in EVERY:
        if entry.form == form:
            assert list(table_row(entry, TARGET)) == list(KERNELS[form])


@pytest.mark.parametrize("entry", EVERY, ids=lambda e: f"{e.form}-{e.kernel}-{e.dtype}-{e.channels}")
def test_neighbours_differ_in_what_the_kernel_reads_and_stay_in_range(entry):
    present = table_row(entry, TARGET)[entry.kernel]
    found = neighbours(entry, present)
    may_differ = {*KERNELS[entry.form][entry.kernel].blocks, "num_warps", "num_stages", "max_registers"}
    changed = [differences(present, config) for config in found]
    assert all(0 < len(names) <= 2 and names <= may_differ for names in changed)
    assert [len(names) for names in changed] == sorted(len(names) for names in changed)  # the nearest first
    effective = {c._replace(block_k=min(c.block_k, block_channels(entry.channels))) for c in [present, *found]}
    assert len(effective) == len(found) + 1  # nothing is measured twice
    for config in found:
        assert {config.block_m, config.block_n} <= {16, 32, 64, 128}
        assert config.block_k >= 16
        assert (config.num_warps, config.max_registers) in [(w, r) for w in (4, 8) for r in (None, 255)]
        assert config.num_stages in (1, 2, 3)
        if entry.kernel == "token_moments":
            assert config.block_m <= block_channels(entry.channels)


def test_neighbours_of_the_forward_kernel():
    texts = [sizes_text(config) for config in neighbours(ENTRY, PRESENT)]
    assert sizes_text(PRESENT) == "(64, 64, ALL, 32, 4, 2)"
    assert texts[:9] == [
        "(128, 64, ALL, 32, 4, 2)", "(32, 64, ALL, 32, 4, 2)", "(64, 128, ALL, 32, 4, 2)", "(64, 32, ALL, 32, 4, 2)",
        "(64, 64, 32, 32, 4, 2)", "(64, 64, ALL, 32, 8, 2)", "(64, 64, ALL, 32, 4, 1)", "(64, 64, ALL, 32, 4, 3)",
        "(64, 64, ALL, 32, 4, 2, 255)",
    ]  # fmt: skip
    assert "(128, 64, ALL, 32, 8, 2)" in texts[9:]


@pytest.mark.parametrize(
    ("other", "wins"),
    [
        ([9.6] * 10, True),  # 4 % quicker
        ([9.8] * 10, False),  # 2 %: not worth a change
        ([8.0, 10.0] * 5, False),  # quicker in every other round only
        ([8.0, 9.0] * 4 + [30.0, 30.0], True),  # one disturbance in each half
        ([12.0] * 10, False),
    ],
)
def test_a_winner_is_quicker_in_both_halves(other, wins):
    challenger = PRESENT._replace(num_warps=8)
    assert winner(PRESENT, {PRESENT: [10.0] * 10, challenger: other}) == (challenger if wins else PRESENT)


def test_the_quickest_of_several_wins_and_drift_that_meets_all_does_not_count():
    drift = [10.0 * 1.2**n for n in range(10)]
    quick, quicker = (PRESENT._replace(num_stages=n) for n in (1, 3))
    rounds = {PRESENT: drift, quick: [0.9 * t for t in drift], quicker: [0.8 * t for t in drift]}
    assert winner(PRESENT, rounds) == quicker


@pytest.mark.parametrize("entry", [entry for entry in EVERY if (entry.dtype, entry.channels) == ("bf16", 64)], ids=str)
def test_a_candidate_is_put_in_the_place_of_one_entry_only(entry):
    before, candidate = table_row(entry, TARGET), PRESENT._replace(block_m=32)
    with in_place(entry, candidate):
        assert table_row(entry, TARGET) == before | {entry.kernel: candidate}
    assert table_row(entry, TARGET) == before


def test_a_rehearsal_goes_on_where_it_was(tmp_path, monkeypatch, capsys):
    chosen = ["--dtypes", "bf16", "fp16", "--channels", "64", "--kernels", "forward"]
    monkeypatch.setattr(tune, "COMPILES", 0)
    monkeypatch.setattr(sys, "argv", ["bench", "tune", "--dry-run", "--out", str(tmp_path), *chosen])
    assert __main__.main() == 0
    first = capsys.readouterr().out
    lines = (tmp_path / "tune.jsonl").read_text().splitlines()
    row = json.loads(lines[0])
    assert len(lines) == 4  # two forms, two dtypes
    assert row["best"] == "(128, 64, ALL, 32, 8, 2)"
    assert row["complete"]
    assert row["environment"]["device"] == "rehearsal of sm_90"
    assert all(len(c["times"]) == len(row["cases"]) and len(c["rounds"]) == tune.ROUNDS for c in row["candidates"])
    assert '_TABLE["hopper", "half"], 64 channels' in first
    assert (tmp_path / "proposals.txt").read_text() in first

    monkeypatch.setattr(tune, "measure", lambda *_: pytest.fail("what is there was measured again"))
    assert __main__.main() == 0
    assert capsys.readouterr().out.endswith((tmp_path / "proposals.txt").read_text())


def test_proposals_can_be_pasted():
    machine = rehearsal()
    chosen = list(entries(["bf16"], [64], ["forward", "token_moments"]))
    rows = [tune.measure(entry, machine, "", 1e9, ticking()) for entry in chosen]
    text = tune.proposals(rows, machine)
    _, folded, narrow = text.split("TABLE[")
    for part, form in ((folded, "folded"), (narrow, "narrow")):
        pasted = part[part.index("        64: (") :].partition("\n\n")[0]
        (sizes,) = eval("{" + pasted + "}", {"ALL": ALL}).values()
        assert max(map(len, pasted.splitlines())) <= 140
        entry = next(entry for entry in chosen if entry.form == form)
        expected = {kernel: sizes_text(config) for kernel, config in table_row(entry, TARGET).items()}
        expected |= {row.kernel: row.best for row in rows if row.form == form}
        assert [str(size).replace("256", "ALL") for size in sizes] == list(expected.values())
    assert "55.8 → 47.2 µs, 1.18×, 1×64×128×128: 1.18×" in folded


def test_dtypes_of_a_class_have_to_agree():
    machine = rehearsal()
    bf16, fp16 = (tune.measure(replace(ENTRY, dtype=dtype), machine, "", 1e9, ticking()) for dtype in ("bf16", "fp16"))
    assert f"64: ({bf16.best}" in tune.proposals([bf16, fp16], machine)
    text = tune.proposals([bf16, replace(fp16, best=fp16.present)], machine)
    assert "forward: the dtypes do not agree" in text
    assert "64: (" not in text


def test_time_that_runs_out_ends_at_a_row_and_an_unfinished_row_is_taken_up_again(tmp_path, capsys):
    chosen = list(entries(["bf16"], [64], BY_WEIGHT))
    kept = tune.Rows(tmp_path / "tune.jsonl")
    rows = tune.tune(chosen, rehearsal(), kept, 60.0, ticking())
    *finished, last = rows
    assert finished
    assert all(row.complete for row in finished)
    assert len(rows) < len(chosen)
    assert not last.complete
    assert len(last.candidates) > 1
    assert last.best != last.present
    assert f"{len(chosen) - len(finished)} of {len(chosen)} entries are not finished" in capsys.readouterr().out

    again = tune.tune(chosen, rehearsal(), tune.Rows(kept.path), 1e9, ticking())
    assert all(row.complete for row in again)
    assert len(again) == len(chosen)
    assert again[: len(finished)] == finished
    assert len(kept.path.read_text().splitlines()) == len(chosen)
    assert tune.tune(chosen, rehearsal(), tune.Rows(kept.path), 0.0, ticking()) == again


@pytest.mark.parametrize("what", ["kernels", "torch", "sizes"])
def test_what_was_measured_of_something_else_is_measured_again(what, tmp_path, monkeypatch):
    kept, machine = tune.Rows(tmp_path / "tune.jsonl"), rehearsal()
    tune.tune([ENTRY], machine, kept, 1e9, ticking())
    if what == "kernels":
        monkeypatch.setattr(tune, "source_of_kernels", lambda: "others")
    elif what == "torch":
        machine.environment = machine.environment | {"torch": "3.0"}
    else:
        monkeypatch.setattr(kernels, "forward_config", lambda *_: PRESENT._replace(num_warps=8))
    tune.tune([ENTRY], machine, kept, 1e9, ticking())
    assert len(kept.rows) == 2


def test_candidates_are_timed_in_turn_and_back():
    order = []
    stub = SimpleNamespace(time=lambda config, case: order.append(config) or float(len(order)))
    assert tune.timed_in_turn(stub, list("abc"), 0, rounds=4) == {"a": [1, 6, 7, 12], "b": [2, 5, 8, 11], "c": [3, 4, 9, 10]}
    assert "".join(order) == "abccbaabccba"


def test_a_machine_that_fails_leaves_a_row_with_the_reason(tmp_path, monkeypatch):
    machine = rehearsal()
    monkeypatch.setattr(machine, "open", lambda _: torch.empty(2**62))
    (row,) = tune.tune([ENTRY], machine, tune.Rows(tmp_path / "tune.jsonl"), 1e9, ticking())
    assert row.reason
    assert not row.complete
    assert "cannot be measured" in tune.proposals([row], machine)


@pytest.mark.skipif(HAS_GPU, reason="there is a GPU")
def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench", "tune"])
    assert __main__.main() == 2
    assert "--dry-run" in capsys.readouterr().err


def test_a_candidate_is_what_is_compiled():
    entry = Entry("folded", "token_moments", "bf16", 16)
    config = table_row(entry, TARGET)["token_moments"]._replace(block_n=32, num_warps=8)
    compiled = compiled_for(entry, config, DEVICES["sm_90"])
    assert compiled.name == "token_moments_kernel"
    assert compiled.spills == 0 < compiled.shared_memory
    assert b".nv.info" in compiled.binary


# The trial on a GPU, with stubs for what only a GPU can do: launches fill nothing, and are told from each other by their arguments.


class StubbedKernel:
    """What Triton tells of a compiled kernel; starting it does nothing."""

    n_regs, n_spills, metadata = 90, 0, SimpleNamespace(shared=1024)

    def __getitem__(self, grid):
        return lambda *_: None


@pytest.fixture
def stubbed_gpu(monkeypatch):
    """A machine on the CPU; `launched` are the launches, `compiled` what each of them says of its kernel."""
    launched: list[tuple[str, dict]] = []
    compiled = StubbedKernel()

    def run(self, *args, grid, warmup, **kwargs):
        launched.append((self.__name__, kwargs))
        return compiled

    monkeypatch.setattr(JITFunction, "run", run)
    monkeypatch.setattr(kernels.launching, "_remembered", {})
    monkeypatch.setattr(dispatch, "unsupported_reasons", lambda *_: [])
    monkeypatch.setattr(triton_backend, "kernel_target", lambda _: TARGET)
    monkeypatch.setattr(trial, "kernel_target", lambda _: TARGET)
    shapes = [(2, 13), (1, 12)]  # more than one tile holds
    monkeypatch.setattr(
        Entry, "cases",
        lambda self: [Case("tune", "sagan" if self.form == "narrow" else "attention", n, self.channels, s, s, "bfloat16", False, "training")
                      for n, s in shapes],
    )  # fmt: skip
    machine = Gpu(torch.device("cpu"))
    machine.launched, machine.compiled = launched, compiled
    return machine


@pytest.mark.parametrize("entry", [entry for entry in EVERY if (entry.dtype, entry.channels) == ("bf16", 64)], ids=str)
def test_a_trial_times_the_candidates_own_kernel_and_no_other(entry, stubbed_gpu, monkeypatch):
    present = table_row(entry, TARGET)[entry.kernel]
    config = present._replace(num_warps=16)
    monkeypatch.setattr(problems, "errors", lambda *_: {"branch": 1e-4})
    verdicts = [(opened := stubbed_gpu.open(entry)).judge(c, None) for c in (present, config)]
    assert [verdict.reason for verdict in verdicts] == [None, None]
    assert verdicts[1][2:] == (90, 1024)
    warps = {name: {kwargs["num_warps"] for n, kwargs in stubbed_gpu.launched if n == name} for name, _ in stubbed_gpu.launched}
    assert warps.pop(entry.function) >= {16, present.num_warps}
    assert not any(16 in found for found in warps.values())

    for case, stage in enumerate(opened.stages):
        given = opened.launches[config, case].arguments
        if "d_out_ptr" in given:  # not a truth's, which is zero almost everywhere
            assert torch.equal(given["d_out_ptr"], stage.problem.d_out.flatten(2))

    monkeypatch.setattr(timing, "events", lambda calls, seconds, min_rounds: (calls[0](), timing.Timing(1.0, 2.0, 3.0))[1])
    for case in range(2):
        stubbed_gpu.launched.clear()
        assert opened.time(config, case) == 2.0
        ((name, kwargs),) = stubbed_gpu.launched
        assert (name, kwargs["num_warps"]) == (entry.function, 16)
        widths = {tensor.shape[-1] for tensor in kwargs.values() if isinstance(tensor, torch.Tensor)}
        assert {169, 144} & widths == {(169, 144)[case]}


@pytest.mark.parametrize(
    ("fault", "reason"),
    [("nothing", None), ("spills", "spills 8"), ("result", "branch: nan"), ("compiler", "RuntimeError: no such tile"),
     ("worse than the present", "branch: 5.0e-02, allowed 1.0e-02")],
)  # fmt: skip
def test_a_candidate_is_dropped_with_its_reason(fault, reason, stubbed_gpu, monkeypatch):
    opened = stubbed_gpu.open(ENTRY)
    original = problems.errors
    found = 5e-2 if fault.startswith("worse") else 1e-3
    opened.stages = [replace(stage, naive={"branch": 1.0}) for stage in opened.stages]
    if fault != "result":
        monkeypatch.setattr(problems, "errors", lambda *given: (original(*given), {"branch": found})[1])
    if fault == "spills":
        stubbed_gpu.compiled.n_spills = 8
    if fault == "compiler":

        def run(*_, **__):
            raise RuntimeError("at 44:24:\nno such tile")

        monkeypatch.setattr(JITFunction, "run", run)
    verdict = opened.judge(PRESENT, [{"branch": 1e-3}, {"branch": 1e-3}])
    assert (verdict.reason is None) if reason is None else (reason in verdict.reason), verdict.reason
    assert ((PRESENT, 0) in opened.launches) == (fault == "nothing")


def test_a_layer_that_ran_on_something_else_is_not_taken_for_the_kernel():
    with pytest.raises(RuntimeError, match="launched no attention_forward_kernel, but nothing"):
        launch_of(ENTRY, [])


@pytest.mark.gpu
def test_on_a_gpu(monkeypatch):
    """A configuration that works and one that does not compile, beside the present one."""
    monkeypatch.setattr(tune, "neighbours", lambda _, present: [present._replace(num_stages=1), present._replace(block_n=8)])
    row = tune.measure(ENTRY, Gpu(torch.device("cuda")), "", math.inf, time.monotonic)
    assert row.complete, row.reason
    present, working, broken = row.candidates
    for candidate in (present, working):
        assert len(candidate["rounds"]) == tune.ROUNDS
        assert min(candidate["rounds"]) > 5
        assert candidate["registers"] > 16
    assert broken["reason"]
