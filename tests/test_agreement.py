"""That the comparison of trainings compares what it says."""

import pytest
import torch

from bench import agreement


def test_which_kinds_are_the_same_in_two_ways():
    assert agreement.kinds("cnn_early_attention") == ("fused", "naive")
    assert agreement.kinds("vit") == ("sdpa", "naive")
    assert agreement.kinds("vit_flat") == ("matmul", "einsum")
    assert agreement.kinds("cnn_vanilla") is None
    with pytest.raises(ValueError, match="cnn_vanilla has no attention"):
        agreement.measure("cnn_vanilla", "fp64")


def test_one_step_of_both_and_the_control():
    row = agreement.measure("vit_mnist", "fp64", steps=2)
    assert row["difference"] < 1e-12  # of some versions of PyTorch zero
    assert 0 < row["control"] < 1e-12
    assert agreement.measure("vit_mnist", "fp32", steps=2)["control"] > 1e-9


def test_another_attention_is_told(monkeypatch):
    """The losses of a model with attention of another kind are not those of the fused one."""
    monkeypatch.setattr(agreement, "kinds", lambda name: ("fused", "channel"))
    assert agreement.measure("cnn_late_attention", "fp64", steps=2)["difference"] > 1e-6


def test_largest_relative_difference():
    assert agreement.difference([1.0, 2.2, 3.0], [1.0, 2.0, 3.0]) == pytest.approx(0.1)


def test_rows_replace_older_ones_of_their_kind_and_make_the_section(monkeypatch, tmp_path):
    monkeypatch.setattr(agreement, "FILE", tmp_path / "agreement.json")
    row = {
        "model": "vit", "kinds": ["sdpa", "naive"], "dtype": "fp64", "steps": 2, "batch_size": 8, "image_shape": [3, 32, 24],
        "learning_rate": 1e-3, "difference": 2e-3, "control": 1e-9, "losses": [2.3, 1.1],
        "processor": "an abacus", "torch": torch.__version__, "commit": None,
    }  # fmt: skip
    agreement.file(row)
    agreement.file(row | {"dtype": "fp32"})
    agreement.file(row | {"difference": 4e-4})
    assert [(r["dtype"], r["difference"]) for r in agreement.filed()] == [("fp32", 2e-3), ("fp64", 4e-4)]
    assert "1 models' first 2 steps differ by at most 4.0e-04; above 0.001: vit in fp32: 2.0e-03" in agreement.section(agreement.filed())
    text = agreement.page(agreement.filed())
    assert "| vit (sdpa and naive) | fp32 | 8 of 32×24 | 2.300 → 1.100 | 2.0e-03 | no | 1.0e-09 |" in text
    assert "| fp64 | 8 of 32×24 | 2.300 → 1.100 | 4.0e-04 | yes |" in text
    assert "an abacus" in text
