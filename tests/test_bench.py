"""The benchmark suite: what it calls right, how it keeps rows, and that everything runs, at toy sizes."""

import json
import math
import multiprocessing
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch

from bench import (
    cases,
    charts,
    environment,
    floors,
    host,
    layers,
    model_steps,
    problems,
    profiling,
    providers,
    report,
    rows,
    run,
    speed,
    summary,
    targets,
    timing,
    warm,
)
from visattn import reference

CPU = torch.device("cpu")
CEILINGS = floors.Ceilings({"float32": 1e12, "bfloat16": 2e12}, 1e11, 1e10)
HOW = layers.How(CPU, 0.0, "toy", CEILINGS, {"device": "an abacus", "commit": "abcdef0", "torch": "2"})


def options(out, **changes):
    given = {"suite": ["all"], "provider": ["naive", "sdpa", "visattn"], "case": None, "size": "toy", "out": out, "device": "cpu"}
    return SimpleNamespace(**given | {"seconds": 0.0} | changes)


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


def test_a_device_that_dies_leaves_its_row_and_the_next_run_goes_on(tmp_path, monkeypatch):
    """The row is kept before anybody asks the device, which answers nothing but errors from then on."""
    dead = []

    def stray(problem, trial):
        dead.append(True)
        raise RuntimeError("an illegal memory access was encountered")

    def synchronize(_):
        if dead:
            raise RuntimeError("an illegal memory access was encountered")

    by_mode = {"forward": stray, "training": providers.PROVIDERS["visattn"]}
    monkeypatch.setattr(timing, "synchronize", synchronize)
    monkeypatch.setattr(run, "measure_ceilings", lambda *_: CEILINGS)
    monkeypatch.setitem(providers.PROVIDERS, "visattn", lambda problem, trial: by_mode[problem.case.mode](problem, trial))
    given = options(tmp_path, suite=["cifar"], provider=["naive", "visattn"], case=["attention"])
    assert run.run(given) == run.DEAD
    naive, failed = rows.read(tmp_path / "rows.jsonl")
    assert (naive.provider, naive.state) == ("naive", rows.TIMED)
    assert (failed.provider, failed.state, failed.mode) == ("visattn", rows.CANNOT_RUN, "forward")
    assert failed.reason == "RuntimeError: an illegal memory access was encountered"
    dead.clear()  # as in a process of its own
    assert run.run(given) == 1, "visattn could not run a case"
    assert not dead, "the case was tried again"
    assert [(row.provider, row.mode, row.state) for row in rows.read(tmp_path / "rows.jsonl")[2:]] == [
        ("naive", "training", rows.TIMED), ("visattn", "training", rows.TIMED),
    ]  # fmt: skip


def test_a_timing_that_kills_the_device_is_one_row(monkeypatch):
    """Not two, of which the second, of the run that ends, would replace a time that was taken before."""

    def broken(*_):
        monkeypatch.setattr(timing, "synchronize", broken)
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setitem(layers.EXECUTIONS, "cpu", layers.EXECUTIONS["cpu"] | {"graph": broken})
    measured = []
    with pytest.raises(timing.DeadDevice):
        measured.extend(layers.measure_layer(a_case(mode="forward"), ["visattn"], HOW))
    assert [(row.execution, row.state) for row in measured] == [("pairs", rows.TIMED), ("graph", rows.CANNOT_RUN)]


def test_kinds_of_attention_that_are_missing_are_measured_alone():
    case = cases.ModelCase("cnn_early_attention", 2, "float32", False, "forward")
    measured = list(model_steps.measure_model(case, ["visattn"], HOW))
    assert [(row.provider, row.state) for row in measured] == [("visattn", rows.TIMED)]
    assert measured[0].ratio_p50


def test_cases_are_chosen_by_a_part_of_their_name():
    chosen = cases.suite_cases(("cifar", "large", "models"), "cuda", "full")
    found = cases.named(chosen, ["attention 64×64×32×32 bfloat16", "cnn_early_attention, 64 images, tf32, training"])
    assert [str(case) for case in found] == [
        "attention 64×64×32×32 bfloat16 forward", "attention 64×64×32×32 bfloat16 training",
        "cnn_early_attention, 64 images, tf32, training",
    ]  # fmt: skip
    assert str(next(case for case in chosen if case.suite == "models")).startswith("cnn_early_attention"), "a target is set for it"
    with pytest.raises(ValueError, match="no case has 'resnet' in its name; names are like 'attention 64×32"):
        cases.named(cases.layer_cases("cifar", "cuda", "full"), ["resnet"])


def test_every_process_warms_what_none_has_taken(monkeypatch, capsys):
    """One case that fails ends nothing; a dead device ends its process, before that takes every case only to fail."""
    chosen = warm.ours(cases.suite_cases(("cifar", "models"), "cpu", "toy"))
    assert [case.mode for case in chosen] == sorted((case.mode for case in chosen), reverse=True)
    launched, taken = [], multiprocessing.Value("i", 1)

    def launch(case, device):
        launched.append(case)
        if case == chosen[1]:
            raise RuntimeError("no kernel of this\nand a long trace")

    monkeypatch.setattr(warm, "launch", launch)
    with pytest.raises(SystemExit, match="1"):
        warm.work(chosen, taken, CPU)
    assert launched == chosen[1:]
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == f"{chosen[1]}: RuntimeError: no kernel of this"
    assert printed[1].startswith(f"{chosen[2]}: 0.")

    def broken(_):
        raise RuntimeError("dead")

    launched.clear()
    taken.value = 0
    monkeypatch.setattr(timing, "synchronize", broken)
    with pytest.raises(timing.DeadDevice):
        warm.work(chosen, taken, CPU)
    assert launched == chosen[:2]


@pytest.mark.parametrize("suite", ["cifar", "models"])
def test_what_is_warmed_is_our_layer(suite):
    with providers.noted_backends() as noted:
        for case in warm.ours(cases.suite_cases([suite], "cpu", "toy")):
            warm.launch(case, CPU)
    assert set(noted) == {"torch"}


def test_a_profile_is_of_the_precision_that_it_names(tmp_path, monkeypatch):
    seen = []
    original = layers.calls

    def watched(built, problem):
        (call,) = original(built, problem)
        return [lambda: (seen.append((problem.case.precision, torch.get_float32_matmul_precision())), call())]

    monkeypatch.setattr(layers, "calls", watched)
    monkeypatch.setattr(cases, "layer_cases", lambda *_: iter([a_case(tf32=True), a_case(), a_case(mode="forward")]))
    assert profiling.run(SimpleNamespace(device="cpu", out=tmp_path, size="toy", case=None)) == 0
    assert set(seen) == {("tf32", "high"), ("float32", "highest")}


def test_a_gpu_that_tells_its_state_by_a_library_is_not_asked_by_a_program(monkeypatch):
    gpu = torch.device("cuda")
    asked = []
    monkeypatch.setattr(environment, "_nvidia_smi", lambda query: asked.append(query) or "1980, 412.5, 45")
    for name, value in (("clock_rate", 1980), ("power_draw", 412_500), ("temperature", 45)):
        monkeypatch.setattr(torch.cuda, name, lambda _, value=value: value)
    by_library = environment.state(gpu)
    assert (by_library, asked) == (environment.State(1980, 412.5, 45), [])
    monkeypatch.delattr(torch.cuda, "power_draw")
    assert (environment.state(gpu), len(asked)) == (by_library, 1)


def test_the_state_is_asked_once_for_a_provider(monkeypatch):
    asked = []
    monkeypatch.setattr(environment, "state", lambda device: (asked.append(device), environment.State(1980.0, 400.0, 45.0))[1])
    monkeypatch.setitem(layers.EXECUTIONS, "cpu", layers.EXECUTIONS["cpu"] | {"graph": layers.EXECUTIONS["cpu"]["pairs"]})
    pairs, graph = layers.measure_layer(a_case(mode="forward"), ["visattn"], HOW)
    assert (pairs.clock, graph.clock, len(asked)) == (1980.0, 1980.0, 1)


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


def test_a_provider_is_measured_once_it_is_timed_in_every_way_or_fails(tmp_path):
    """A run that was stopped between two ways of timing goes on between them."""
    kept = rows.Rows(tmp_path / "rows.jsonl")
    kept.add(a_row(execution="eager"), a_row("sdpa", execution="eager", state=rows.WRONG))
    ways = ("eager", "back to back", "graph")

    def has(provider):
        return kept.has("cifar", str(a_case()), provider, ways)

    assert (has("visattn"), has("sdpa"), has("naive")) == (False, True, False)
    kept.add(a_row(execution="back to back"))
    assert not has("visattn")
    kept.add(a_row(execution="graph"))
    assert has("visattn")


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


def rows_of(case, executions, **times):
    """A row for each provider and execution of a case, timed with these medians."""
    told = {"suite": case.suite, "case": str(case), "form": getattr(case, "form", "model"), "shape": list(getattr(case, "shape", ()))}
    told |= {"dtype": case.dtype, "tf32": case.tf32, "mode": case.mode}
    return [a_row(provider, p50, execution=execution, **told) for provider, p50 in times.items() for execution in executions]


def full_cases(device_type, *texts, suite="cifar"):
    return cases.named(cases.suite_cases([suite], device_type, "full"), list(texts))


def test_targets_are_met_or_not_or_not_measured():
    early, *_ = full_cases("cpu", "attention 64×64×32×32 float32 forward")
    measured = rows_of(early, ["pairs"], naive=20.0, visattn=10.0)
    forward, training, never = targets.verdicts(measured, "cpu")
    assert (forward.figure, forward.in_words) == (2.0, "not met (1 of 2 cases)")
    assert (training.figure, training.in_words) == (None, "not measured")
    assert (never.figure, never.in_words) == (None, "not measured")
    bf16, *_ = full_cases("cpu", "attention 64×64×32×32 bfloat16 forward")
    never = targets.verdicts([*measured, *rows_of(bf16, ["pairs"], naive=20.0, visattn=10.0)], "cpu")[2]
    assert never.in_words == "met (1 of 32 cases)"


def test_a_target_says_how_many_of_its_cases_were_measured_and_against_whom():
    chosen = full_cases("cuda", "attention 64×64×32×32 float32 forward", "attention 64×64×32×32 bfloat16 forward")
    measured = [row for case in chosen for row in rows_of(case, ["eager"], naive=90.0, sdpa=30.0, visattn=10.0)]
    words = {verdict.target: verdict.in_words for verdict in targets.verdicts(measured, "cuda")}
    assert words["(64, 64, 32, 32), fp32 with the same switch, forward: at least 8× naive"] == "met (1 of 2 cases)"
    assert words["bf16 and fp16, CIFAR shapes: each at least 1.2× the best peer"] == "met (1 of 36 cases, against sdpa)"
    assert words["fp32, CIFAR shapes: geometric mean at least 2.5× the best peer"] == "met (1 of 36 cases, against sdpa)"
    other, *_ = full_cases("cuda", "attention 64×64×32×32 float16 forward")
    measured += rows_of(other, ["eager"], flex=11.0, sdpa=30.0, visattn=10.0)
    words = {verdict.target: verdict.in_words for verdict in targets.verdicts(measured, "cuda")}
    assert words["bf16 and fp16, CIFAR shapes: each at least 1.2× the best peer"] == "not met (2 of 36 cases, against sdpa, flex in 1)"
    (step, *_) = full_cases("cuda", "cnn_early_attention, 64 images, float32, training", suite="models")
    *_, model = targets.verdicts(rows_of(step, ["eager"], naive=90.0, visattn=10.0), "cuda")
    assert (model.figure, model.in_words) == (9.0, "met (1 of 2 cases)")


@pytest.mark.parametrize("state", [rows.WRONG, rows.CANNOT_RUN])
def test_a_target_is_not_met_where_one_of_its_cases_fails(state):
    right, wrong = full_cases("cuda", "attention 64×64×32×32 float32 forward", "attention 64×64×32×32 tf32 forward")
    failed = [replace(row, state=state, p50=None) for row in rows_of(wrong, ["eager"], visattn=10.0)]
    first, *_ = targets.verdicts([*rows_of(right, ["eager"], naive=90.0, visattn=10.0), *failed], "cuda")
    assert (first.figure, first.in_words) == (9.0, "not met: visattn wrong or not able to run in 1 of 2 cases")
    eight, *_ = full_cases("cuda", "attention 64×128×8×8 float32 forward")
    failed = [replace(row, state=state, p50=None) for row in rows_of(eight, ["eager"], visattn=10.0)]
    assert targets.verdicts(failed, "cuda")[6].in_words == "not met: visattn wrong or not able to run in 1 of 4 cases"


def test_the_share_of_a_floor_is_that_of_a_replay_where_there_is_one():
    """In single calls a kernel that is shorter than its launch would be judged by the host."""
    case, *_ = full_cases("cuda", "attention 64×64×32×32 bfloat16 forward")
    (eager,) = (replace(row, share=0.3) for row in rows_of(case, ["eager"], visattn=30.0))
    (graph,) = (replace(row, share=0.6) for row in rows_of(case, ["graph"], visattn=15.0))
    of_floor = "64 and 128 channels, from 1024 pixels, bf16: forward at least 0.55 of the floor"
    told = [next(v for v in targets.verdicts(kept, "cuda") if v.target == of_floor) for kept in ([eager], [eager, graph])]
    assert [(v.figure, v.in_words) for v in told] == [
        (0.3, "not met (1 of 7 cases, from eager rows)"), (0.6, "met (1 of 7 cases, from graph rows)"),
    ]  # fmt: skip
    tables = [report.layer_table(summary.lines(kept, "cifar")) for kept in ([eager], [eager, graph])]
    assert ["| 30 % |" in tables[0], "| 60 %, replayed |" in tables[1]] == [True, True]


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
    given = options(tmp_path)
    assert run.run(given) == 0
    measured = rows.read(tmp_path / "rows.jsonl")
    assert {row.suite for row in measured} == {"cifar", "large", "models"}
    assert {row.state for row in measured} == {rows.TIMED}
    assert all(row.environment["device"] and row.size == "toy" for row in measured)
    monkeypatch.setattr(layers, "measure_layer", lambda *_: pytest.fail("measured again"))
    assert run.run(given) == 0

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


def test_the_speed_section_tells_failed_from_not_measured():
    def cell(*measured):
        text = speed.section({"an-abacus": list(measured)})
        return next(line for line in text.splitlines() if line.startswith("| (3, 16, 5, 4)")).split(" | ")[-1].strip(" |")

    assert cell(a_row("naive", 20.0), a_row(state=rows.WRONG, p50=None)) == "**wrong**"
    assert cell(a_row("naive", 20.0), a_row(state=rows.CANNOT_RUN, p50=None)) == "**cannot run**"
    assert cell(a_row("naive", 20.0)) == "–"
    assert cell(a_row()) == "naive not measured"
    assert cell(a_row("naive", state=rows.CANNOT_RUN, p50=None), a_row(p50=10.0), a_row("sdpa", 20.0)) == "naive cannot run (2.00×)"


def test_lengths_are_drawn_where_there_are_several(tmp_path):
    several = [a_row(name, p, case=f"{side}", shape=[1, 64, side, side], floor=1.0, peak_bytes=2**20)
               for side in (32, 64) for name, p in (("naive", 4.0 * side), ("visattn", 1.0 * side))]  # fmt: skip
    charts.over_length(tmp_path / "length.png", summary.lines(several, "cifar"), "two lengths")
    assert (tmp_path / "length.png").stat().st_size > 5000


def test_a_device_has_a_folder():
    assert environment.slug("NVIDIA H200") == "nvidia-h200"
    assert environment.slug("AMD EPYC, 2 threads") == "amd-epyc-2-threads"
