"""Random calls, and that known-wrong attentions do not survive them."""

import shlex
from dataclasses import replace

import pytest
from visattn.kernels import block_sizes

from visattn import reference

from .conftest import INTERPRETING
from .reliability import fuzzing
from .reliability.fuzzing import Case, cases, fuzz
from .wrong_attentions import general_attention, with_fault

SEED = 0


@pytest.mark.skipif(INTERPRETING, reason="about the PyTorch path")
def test_random_calls():
    outcome = fuzz(300, SEED)
    assert not outcome.mismatches, str(outcome)
    assert len(outcome.cases) == 300
    assert outcome.fits_no_block >= 0.4
    assert outcome.not_contiguous >= 0.3
    assert {case.form for case in outcome.cases} == {"plain", "folded", "projected", "queries"}
    assert {case.dtype for case in outcome.cases} == set(fuzzing.DTYPES)


@pytest.mark.kernels
def test_random_calls_on_the_kernels():
    outcome = fuzz(16, SEED + 1)
    assert not outcome.mismatches, str(outcome)
    assert {case.expected_backend for case in outcome.cases} <= {"triton", "torch"}


def plain(case: Case) -> Case:
    """What the known-wrong attentions take: in fp32, where they cannot hide, of more pixels and channels than one."""
    biases = ("b_q", "b_k", "b_v")
    case = replace(
        case, maps=2, channels=5, height=3, width=7, qk_channels=4, value_channels=None, num_heads=1, pool=1, groups=0, biases=biases,
        gamma=True, convolutions=False, scale=None, residual=False, res_scale=1.0, normalize="keys", dtype="float32", spoiled=False,
        backend="torch",
    )  # fmt: skip
    return replace(case, wanted=tuple(name for name in case.tensor_names if name != "b_k"))


def everything(case: Case) -> Case:
    case = replace(
        plain(case), channels=6, height=4, qk_channels=8, value_channels=4, num_heads=2, pool=2, groups=2, affine=True,
        biases=("b_q", "b_k", "b_v", "b_o"), scale=0.3, residual=True, res_scale=0.5, regime="peaked", layout="contiguous",
    )  # fmt: skip
    return replace(case, wanted=tuple(name for name in case.tensor_names if name != "b_k"))


FAULTS = [
    "", "scale 1/C", "one key dropped", "last tile unmasked", "height and width swapped", "gamma ignored", "attention matrix transposed",
    "bias of the query ignored", "values not projected",
]  # fmt: skip
GENERAL_FAULTS = ["", "heads interleaved", "another eps", "windows over the edge", "bias of the output without gamma", "result not scaled"]


@pytest.fixture
def _few_numbers(monkeypatch):
    """What is wrong is wrong on the first numbers as on the sixtieth."""
    monkeypatch.setattr(fuzzing, "POOLED", (3,))


@pytest.mark.skipif(INTERPRETING, reason="no kernel is involved")
@pytest.mark.usefixtures("_few_numbers")
@pytest.mark.parametrize("fault", FAULTS)
def test_known_wrong_attentions_are_found(fault):
    def function(normalize, num_heads, pool, scale, res_scale, norm, **arguments):
        return with_fault(fault)(**arguments, normalize=normalize)

    assert bool(fuzz(3, SEED, function, cases().map(plain)).mismatches) == bool(fault)


@pytest.mark.skipif(INTERPRETING, reason="no kernel is involved")
@pytest.mark.usefixtures("_few_numbers")
@pytest.mark.parametrize("fault", GENERAL_FAULTS)
def test_known_wrong_blocks_are_found(fault):
    def function(residual, normalize, **arguments):
        out = general_attention(**arguments, fault=fault)
        return out if residual else out - arguments["res_scale"] * arguments["x"]

    assert bool(fuzz(3, SEED, function, cases().map(everything)).mismatches) == bool(fault)


class TestBeyondEager:
    """The gradient of two nearly equal channels through their common norm: eager leaves the range of fp16, which the right one does not."""

    case = Case(
        maps=1, channels=10, height=1, width=366, qk_channels=1, value_channels=None, num_heads=1, pool=1, groups=5, affine=True,
        biases=("b_k", "b_v"), gamma=True, convolutions=True, scale=0.0, residual=False, res_scale=1.0, normalize="keys", dtype="float16",
        layout="one_column_for_all", gradient_layout="one_column_for_all", regime="uniform", mean=3.0, spoiled=False, wanted=("x",),
        backend="torch", seed=366,
    )  # fmt: skip

    def test_what_is_finite_is_right(self):
        assert not fuzzing.judge(self.case)

    def test_what_is_not_is_wrong(self):
        assert any("NaN or Inf" in complaint for complaint in fuzzing.judge(self.case, reference.self_attention_2d))


def test_cases_survive_the_command_line():
    for case in fuzz(3, SEED).cases:
        assert Case.parse(shlex.split(case.replay)[-1]) == case


def test_no_block_is_smaller_than_assumed():
    tables = (block_sizes.FOLDED_TABLE, block_sizes.PROJECTED_TABLE, block_sizes.TOKEN_TABLE, block_sizes.EQUAL_WIDTHS_TABLE)
    sizes = {size for table in tables for rows in table.values() for row in rows.values() for entry in row for size in entry[:4]}
    assert all(size % fuzzing.SMALLEST_BLOCK == 0 for size in sizes)
