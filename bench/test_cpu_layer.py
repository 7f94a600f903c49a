"""The layer against naive attention on the CPU: `pytest bench --benchmark-only`, and `--benchmark-compare` between commits.

Before every timed round of ours, naive does the same work on the same input. The figure is the median of the ratios of such
pairs: absolute times drift with whatever else the machine does, pairs do not. A result is timed only after it is checked.
"""

import time
from typing import Any

import pytest
import torch

from bench import layers, problems, timing
from bench.cases import Case, layer_cases
from bench.providers import PROVIDERS
from bench.targets import least_ratio_on_cpu

CASES = list(layer_cases("cifar", "cpu", "full"))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_ratio_to_naive(benchmark: Any, case: Case) -> None:
    problem = problems.make_problem(case, torch.device("cpu"))
    truths = problems.truths_of(problem)
    built = {name: PROVIDERS[name](problem, layers.no_choice) for name in ("naive", "visattn")}
    errors = {name: problems.errors(b.forward, b.parameters, problem, truths) for name, b in built.items()}
    assert not problems.complaints(errors["visattn"], errors["naive"], case.precision)
    (naive,), (ours,) = (layers.calls(b, problem) for b in built.values())
    naive_seconds = []

    def time_naive() -> None:
        start = time.perf_counter()
        naive()
        naive_seconds.append(time.perf_counter() - start)

    rounds = 101 if case.height == 8 else 9
    with torch.set_grad_enabled(case.mode == "training"):
        benchmark.pedantic(ours, setup=time_naive, rounds=rounds, warmup_rounds=2)
    ratios = [n / o for n, o in zip(naive_seconds[-rounds:], benchmark.stats.stats.data, strict=True)]
    quantiles = timing.quantiles(ratios)
    benchmark.extra_info["ratio to naive, p20 p50 p80"] = [round(q, 3) for q in quantiles]
    target = least_ratio_on_cpu(case.form, case.dtype, case.channels, case.tokens, case.mode)
    print(f"\n{case}: {quantiles[1]:.2f}× naive (target {target})")
    assert quantiles[1] >= target
