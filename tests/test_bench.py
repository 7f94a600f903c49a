"""The benchmark suite: what it calls right, how it keeps rows, and that everything runs, at toy sizes."""

import json
import math
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch

from bench import cases, charts, environment, floors, host, layers, problems, providers, report, rows, run, speed, summary, timing
from visattn import reference

CPU = torch.device("cpu")
CEILINGS = floors.Ceilings({"float32": 1e12, "bfloat16": 2e12}, 1e11, 1e10)
HOW = layers.How(CPU, 0.0, "toy", CEILINGS, {"device": "an abacus", "commit": "abcdef0", "torch": "2"})


def a_case(form="attention", mode="training", **changes):
    return replace(cases.Case("cifar", form, 3, 16, 5, 4, "float32", False, mode), **changes)


@pytest.mark.parametrize("form", ["attention", "sagan"])
def test_what_is_right_is_the_reference_in_float64(form, monkeypatch):
    monkeypatch.setattr(problems, "QUERIES_AT_ONCE", 7)
    problem = problems.make_problem(a_case(form), CPU)
    truths = problems.truths_of(problem)
    assert [truth.maps for truth in truths] == [[0, 2], [1]]
    for truth in truths:
        x, *weights = (t.double().requires_grad_() for t in (problem.inputs[0], *problem.weights.given()))
        w_q, b_q, w_k, b_k, w_v, b_v, *gamma = weights
        out = reference.self_attention_2d(
            x, w_q, w_k, w_v, b_q, b_k, b_v, gamma=gamma[0] if gamma else None, scale=problem.case.scale, residual=False
        )
        gradients = torch.autograd.grad(out, [x, w_q, b_q, w_v, b_v, *gamma], truth.d_out.double())
        expected = dict(zip(("x", "w_q", "b_q", "w_v", "b_v", "gamma"), gradients, strict=False))
        expected |= {"x": expected["x"][truth.maps], "branch": out[truth.maps]}
        for name, tensor in expected.items():
            torch.testing.assert_close(truth.tensors[name], tensor.detach().view_as(truth.tensors[name]), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("form", ["attention", "sagan"])
@pytest.mark.parametrize("mode", cases.MODES)
def test_every_eager_provider_is_right_and_says_what_it_ran_on(form, mode):
    measured = {row.provider: row for row in layers.measure_layer(a_case(form, mode), ["naive", "sdpa", "visattn"], HOW)}
    assert {row.state for row in measured.values()} == {rows.TIMED}, measured
    assert measured["visattn"].backend == "torch"
    assert measured["sdpa"].backend == "flash_attention" + ", queries and keys padded" * (form == "sagan")
    for row in measured.values():
        assert row.p20 <= row.p50 <= row.p80
        assert row.share == pytest.approx(row.floor / row.p50)
        assert row.errors["branch"] > 0
        assert (len(row.errors) > 5) == (mode == "training")


@pytest.mark.parametrize("fault", ["output", "gradient", "nan"])
def test_a_wrong_result_is_not_timed(fault, monkeypatch):
    original = providers.ours

    def wrong(problem, trial):
        built = original(problem, trial)

        def forward(x):
            out = built.forward(x)
            if fault == "gradient":
                return out + 0.001 * (x - x.detach())
            return x + (out - x) * (1.001 if fault == "output" else math.nan)

        return replace(built, forward=forward)

    monkeypatch.setitem(providers.PROVIDERS, "visattn", wrong)
    monkeypatch.setattr(timing, "pairs", lambda *_: pytest.fail("a wrong result was timed"))
    (row,) = layers.measure_layer(a_case(), ["visattn"], HOW)
    assert row.state == rows.WRONG
    assert row.p50 is None
    assert ("x:" if fault == "gradient" else "branch:") in row.reason


def test_a_provider_that_cannot_run_says_why():
    (row,) = layers.measure_layer(a_case(), ["flex"], HOW)
    assert (row.state, row.reason) == (rows.CANNOT_RUN, "flex_attention has no backward pass on the CPU")


def test_a_provider_that_breaks_has_the_error_as_its_reason(monkeypatch):
    def broken(problem, trial):
        raise RuntimeError("no kernel for this\nand a long trace")

    monkeypatch.setitem(providers.PROVIDERS, "sdpa", broken)
    sdpa, ours = layers.measure_layer(a_case(mode="forward"), ["sdpa", "visattn"], HOW)
    assert (sdpa.state, sdpa.reason) == (rows.CANNOT_RUN, "RuntimeError: no kernel for this")
    assert ours.state == rows.TIMED


def test_a_way_of_timing_that_breaks_loses_no_other(monkeypatch):
    def broken(*_):
        raise RuntimeError("no graph of this")

    monkeypatch.setitem(layers.EXECUTIONS, "cpu", layers.EXECUTIONS["cpu"] | {"graph": broken})
    pairs, graph = layers.measure_layer(a_case(mode="forward"), ["visattn"], HOW)
    assert (pairs.execution, pairs.state) == ("pairs", rows.TIMED)
    assert (graph.execution, graph.state, graph.reason) == ("graph", rows.CANNOT_RUN, "RuntimeError: no graph of this")


def test_matrices_that_do_not_fit_are_not_tried(monkeypatch):
    monkeypatch.setattr(layers, "SCORES_HELD", {"forward": 1e15, "training": 1e15})
    naive, ours = layers.measure_layer(a_case(mode="forward"), ["naive", "visattn"], HOW)
    assert naive.state == rows.CANNOT_RUN
    assert "20×20 matrices take" in naive.reason
    assert ours.state == rows.TIMED
    assert ours.ratio_p50 is None


def test_floor_is_the_longest_of_three():
    case = a_case(batch=64, channels=64, height=32, width=32, mode="forward")
    products, scores, traffic = 4 * 64 * 1024**2 * 64 / 1e12, 64 * 1024**2 / 1e10, 2 * 64 * 64 * 1024 * 4 / 1e11
    assert CEILINGS.floor(case) == pytest.approx(1e6 * max(products, scores, traffic))
    assert CEILINGS.floor(replace(case, mode="training")) == pytest.approx(1e6 * 3.5 * products)
    slow_exp = replace(CEILINGS, exponentials=1e8)
    assert slow_exp.floor(replace(case, mode="training")) == pytest.approx(2e6 * 64 * 1024**2 / 1e8)
    with_tensor_cores = floors.Ceilings({"float32": 67e12, "tf32": 400e12, "bfloat16": 790e12}, 4e12, None)
    assert with_tensor_cores.floor(case) == pytest.approx(1e6 * products * 1e12 / (400e12 / 3))
    emulated = replace(CEILINGS, flops={"float32": 1e12, "bfloat16": 5e10})  # 16 bits at a twentieth of the rate of fp32
    assert emulated.floor(replace(case, dtype="bfloat16")) == CEILINGS.floor(case)


def test_quantiles():
    assert timing.quantiles([3.0]) == (3.0, 3.0, 3.0)
    assert timing.quantiles([float(n) for n in range(11)]) == (2.0, 5.0, 8.0)


def test_pairs_time_both_in_turn():
    order = []
    timing.pairs(lambda: order.append("ours"), lambda: order.append("naive"), 0.0, min_rounds=3)
    assert order == ["ours", "naive"] + ["naive", "ours"] * 3


@pytest.mark.parametrize(("milliseconds", "flushed", "back_to_back"), [(500.0, 5, 3), (25.0, 5, 4 * 3), (0.1, 1000, 1000)])
def test_long_calls_on_a_gpu_are_timed_few_times(milliseconds, flushed, back_to_back, monkeypatch):
    """A step of a second must not run 140 times; the time that there is, 0.12 s, decides."""
    event = SimpleNamespace(record=lambda: None, elapsed_time=lambda _: 1.0)
    monkeypatch.setattr(torch.cuda, "Event", lambda **_: event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch, "empty", lambda *_, **__: torch.zeros(1))
    monkeypatch.setattr(timing, "estimate", lambda *_: milliseconds / 1000)
    ran = []
    timing.events([lambda: ran.append("flushed")], 0.12)
    timing.back_to_back([lambda: ran.append("back to back")], 0.12)
    assert (ran.count("flushed"), ran.count("back to back")) == (flushed, back_to_back)


def test_an_estimate_runs_a_long_call_twice(monkeypatch):
    ran = []
    monkeypatch.setattr(timing, "LONG_CALL", 0.0)
    timing.estimate(lambda: ran.append(1), CPU)
    monkeypatch.setattr(timing, "LONG_CALL", 1.0)
    timing.estimate(lambda: ran.append(2), CPU)
    assert ran == [1, 1, 2, 2, 2, 2]


def test_peak_memory_of_a_call():
    peak = timing.peak_bytes(lambda: torch.ones(1 << 24).add_(1), CPU)
    assert peak is None or 0.9 * 2**26 < peak < 1.3 * 2**26


def a_row(provider="visattn", p50=10.0, **changes):
    case = a_case()
    row = rows.Row("cifar", str(case), provider, "pairs", case.form, list(case.shape), case.dtype, case.tf32, case.mode, rows.TIMED)
    return replace(row, **{"p20": p50, "p50": p50, "p80": p50, "environment": HOW.environment} | changes)


def test_rows_are_kept_and_replaced_by_key(tmp_path):
    kept = rows.Rows(tmp_path / "deep" / "rows.jsonl")
    kept.add(a_row("naive", 20.0), a_row(p50=10.0))
    kept.add(a_row(p50=5.0), a_row(execution="graph"))
    again = rows.Rows(kept.path)
    assert [(r.provider, r.execution, r.p50) for r in again.rows] == [
        ("naive", "pairs", 20.0), ("visattn", "pairs", 5.0), ("visattn", "graph", 10.0),
    ]  # fmt: skip
    assert again.has("cifar", str(a_case()), "naive")
    assert again.has("cifar", str(a_case()))
    assert not again.has("cifar", str(a_case()), "sdpa")


def test_a_file_that_holds_no_rows_is_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(asdict(a_row()) | {"colour": "red"}) + "\n")
    with pytest.raises(ValueError, match=r"rows\.jsonl does not hold rows of this suite"):
        rows.read(path)


def test_ratios_are_those_of_pairs_or_of_medians():
    paired = summary.lines(
        [a_row("naive", 20.0, ratio_p50=1.0), a_row(p50=10.0, ratio_p50=2.5), a_row("sdpa", 8.0, ratio_p50=2.0)], "cifar"
    )
    (line,) = paired
    assert (line.ratio_to_naive("visattn"), line.best(summary.PEERS), line.ratio("visattn", "sdpa")) == (2.5, "sdpa", 1.25)
    (line,) = summary.lines([a_row("naive", 20.0, execution="eager"), a_row(p50=10.0, execution="eager")], "cifar")
    assert (line.ratio_to_naive("visattn"), line.best(summary.PEERS)) == (2.0, None)


def test_targets_are_met_or_not_or_not_measured():
    wide = [64, 64, 32, 32]
    measured = [a_row("naive", 20.0, ratio_p50=1.0), a_row(ratio_p50=2.1)]
    measured = [replace(row, shape=wide, mode="forward") for row in measured]
    forward, training, never = summary.verdicts(measured, "cpu")
    assert (forward.figure, forward.in_words) == (2.1, "not met")
    assert (training.figure, training.in_words) == (None, "not measured")
    assert (never.figure, never.in_words) == (None, "not measured")
    bf16 = [replace(row, dtype="bfloat16", case="in bf16") for row in measured]
    assert [v.in_words for v in summary.verdicts([*measured, *bf16], "cpu")] == ["not met", "not measured", "met"]
    on_gpu = [replace(row, execution="eager", ratio_p50=None, p50=p) for row, p in zip(measured, (90.0, 10.0), strict=True)]
    first, *rest = summary.verdicts(on_gpu, "cuda")
    assert (first.figure, first.in_words) == (9.0, "met")
    assert {verdict.in_words for verdict in rest} == {"not measured"}


def test_only_full_rows_of_a_commit_are_filed(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    options = SimpleNamespace(folder=tmp_path)

    def file(row):
        (tmp_path / "rows.jsonl").write_text(json.dumps(asdict(row)) + "\n")
        return report.run_import(options)

    with pytest.raises(ValueError, match="--quick or --toy"):
        file(a_row(size="toy"))
    for commit in (None, "abcdef0+"):
        with pytest.raises(ValueError, match="come from no commit"):
            file(a_row(environment=HOW.environment | {"commit": commit}))
    assert not (tmp_path / "results").exists()
    assert file(a_row()) == 0
    assert rows.read(tmp_path / "results" / "an-abacus" / "rows.jsonl") == [a_row()]

    figures = host.Figures(HOW.environment, 0.5, [host.Row("a call", "forward", host.WHOLE, 1, 1.0, 2.0, 3.0)])
    host.write(tmp_path / rows.HOST_FILE, figures)
    assert file(a_row()) == 0
    assert host.read(tmp_path / "results" / "an-abacus" / rows.HOST_FILE) == figures
    host.write(tmp_path / rows.HOST_FILE, replace(figures, environment=HOW.environment | {"commit": None}))
    with pytest.raises(ValueError, match="1 of 2 rows come from no commit"):
        file(a_row())


def test_the_hosts_figures_alone_make_a_report(tmp_path):
    host.write(tmp_path / rows.HOST_FILE, host.Figures(HOW.environment, 0.5, [host.Row("a call", "forward", host.WHOLE, 1, 1.0, 2.0, 3.0)]))
    report.write([], tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert text.startswith("# an abacus\n")
    assert "| a call | forward | 1.0 | 2.0 | 3.0 |" in text


def test_the_whole_suite_runs_reports_and_goes_on(tmp_path, monkeypatch, capsys):
    options = SimpleNamespace(suite=["all"], provider=["naive", "sdpa", "visattn"], size="toy", out=tmp_path, device="cpu", seconds=0.0)
    assert run.run(options) == 0
    measured = rows.read(tmp_path / "rows.jsonl")
    assert {row.suite for row in measured} == {"cifar", "large", "models"}
    assert {row.state for row in measured} == {rows.TIMED}
    assert all(row.environment["device"] and row.size == "toy" for row in measured)
    monkeypatch.setattr(layers, "measure_layer", lambda *_: pytest.fail("measured again"))
    assert run.run(options) == 0

    assert report.run(SimpleNamespace(folder=tmp_path)) == 0
    text = (tmp_path / "report.md").read_text()
    for picture in ("cifar-forward.png", "cifar-training.png", "large-forward.png", "models-forward.png", "models-training.png"):
        assert f"]({picture})" in text
        assert (tmp_path / picture).stat().st_size > 5000
    assert "not measured" in text
    assert "A quick look" in text


def test_the_speed_section_says_what_is_missing():
    text = speed.section({"an-abacus": [a_row("naive", 20.0, ratio_p50=1.0), a_row(ratio_p50=2.0), a_row("sdpa", 8.0, ratio_p50=1.0)]})
    assert "an abacus, torch 2, commit `abcdef0`" in text
    assert "| (3, 16, 5, 4) float32 | – | 2.00× (2.00×) |" in text
    assert "Not measured: **anything on a GPU**" in text
    assert "suite large on an-abacus; suite models on an-abacus" in text


def test_lengths_are_drawn_where_there_are_several(tmp_path):
    several = [a_row(name, p, case=f"{side}", shape=[1, 64, side, side], floor=1.0, peak_bytes=2**20)
               for side in (32, 64) for name, p in (("naive", 4.0 * side), ("visattn", 1.0 * side))]  # fmt: skip
    charts.over_length(tmp_path / "length.png", summary.lines(several, "cifar"), "two lengths")
    assert (tmp_path / "length.png").stat().st_size > 5000


def test_a_device_has_a_folder():
    assert environment.slug("NVIDIA H200") == "nvidia-h200"
    assert environment.slug("AMD EPYC, 2 threads") == "amd-epyc-2-threads"
