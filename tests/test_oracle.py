"""The tests are tested: the gates accept the right formula and reject every known-wrong attention."""

import functools
from dataclasses import replace

import pytest
import torch

from .oracle import Problem, Results, complaints, eager_of, make_problems, mask_trap, run, stacked, truth_of
from .wrong_attentions import BACKWARD_FAULTS, FORWARD_FAULTS, attention, by_hand, with_fault


@functools.cache
def gate_problems() -> list[tuple[list[Problem], Results, Results]]:
    """Problems, each with the truth and what eager makes of it: both regimes and the mask trap, with and without the residual."""
    shape = (2, 20, 7, 9)
    uniform, peaked = make_problems(shape), make_problems(shape, regime="peaked")
    gamma = torch.tensor([0.7])
    traps = [replace(mask_trap(shape, torch.float32, seed), gamma=gamma) for seed in range(6)]
    kinds = [uniform, peaked, traps, [replace(p, residual=True) for p in peaked]]
    return [(problems, stacked([truth_of(p) for p in problems]), stacked([eager_of(p) for p in problems])) for problems in kinds]


def rejections(candidate) -> list[str]:
    """Everything that the gates have to say about an attention, over all their problems."""
    found = []
    for problems, truth, eager in gate_problems():
        found += complaints(stacked([run(candidate, p) for p in problems]), truth, eager)
    return found


def without_exact_zero(found: list[str]) -> list[str]:
    """Autograd's gradient of the keys' bias is a rounding error, not zero: a right formula in eager has this complaint too."""
    return [complaint for complaint in found if not complaint.startswith("b_k: gradient")]


def test_the_right_formula_is_accepted():
    assert without_exact_zero(rejections(attention)) == []


def test_the_right_backward_by_hand_is_accepted():
    assert rejections(by_hand("")) == []


@pytest.mark.parametrize("fault", FORWARD_FAULTS)
def test_wrong_forward_is_rejected(fault):
    assert without_exact_zero(rejections(with_fault(fault))), f"no gate noticed: {fault}"


@pytest.mark.parametrize("fault", BACKWARD_FAULTS)
def test_wrong_backward_is_rejected(fault):
    assert rejections(by_hand(fault)), f"no gate noticed: {fault}"


def test_number_of_known_wrong_attentions():
    """At least twenty, all different; conftest.py prints the count."""
    assert len(set(FORWARD_FAULTS + BACKWARD_FAULTS)) == len(FORWARD_FAULTS) + len(BACKWARD_FAULTS) >= 20


@pytest.mark.parametrize("fault", ["nan", "inf", "shape", "dtype"])
def test_results_of_another_kind_are_rejected(fault):
    problem = make_problems((1, 8, 3, 3))[0]
    ours = run(attention, problem)
    if fault in ("nan", "inf"):
        ours["out"][0, 0, 0, 0] = float(fault)
    elif fault == "shape":
        ours["out"] = ours["out"][:, :, :2]
    else:
        ours["out"] = ours["out"].double()
    assert any(c.startswith("out:") for c in complaints(ours, truth_of(problem), eager_of(problem)))
