"""The gallery: its models are made to run on visattn with the same results, its code runs, and its section says what rows do."""

import argparse
import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

import visattn
from bench import gallery
from bench.gallery_models import EXAMPLES, Result
from bench.readme import README

ROW = gallery.Row(
    "sagan", "full", [2, 3, 256, 256], 1474 << 20, 115 << 20, 4.2e6, 2.1e6, 1.9, 2.0, 2.1, 5e-7, 4e-7, 9e-11, 0.0, "1 attention block", 0.5,
    "python -m bench gallery", {"device": "an abacus", "commit": "abcdef0", "torch": "2"},
)  # fmt: skip


def options(out, **changes):
    return argparse.Namespace(**({"out": out, "only": ["segmentation"], "readme": False, "size": "toy"} | changes))


@pytest.fixture(params=EXAMPLES)
def example(request):
    found = EXAMPLES[request.param]
    if found.needs:
        pytest.importorskip(found.needs, reason=f"needs {found.needs}")
    return found


def make(example):
    torch.manual_seed(0)
    return example.make().double(), torch.randn(example.shapes["toy"], dtype=torch.float64)


def test_models_run_on_visattn_with_the_same_results(example):
    before, x = make(example)
    after = copy.deepcopy(before)
    assert visattn.patch_model(after, attention_maps=example.attention_maps).replaced
    results = example.step(before, x), example.step(after, x)
    compared = gallery._compared(example, *results)
    assert compared["output_error"] < 1e-12
    assert compared["gradient_error"] is None or 0 < compared["gradient_error"] < 1e-9
    assert bool(example.no_effect) == bool(results[0].gradients)
    if example.no_effect:
        assert compared["no_effect_before"] < 1e-12
        assert compared["no_effect_after"] == 0


def test_the_code_in_the_readme_runs(example):
    model, x = make(example)
    labels = torch.zeros(1, *(size // 8 for size in x.shape[2:]), dtype=torch.long)
    names = dict(zip(example.inputs, (model, x.requires_grad_()), strict=True))
    exec(example.code, names | {"torch": torch, "visattn": visattn, "nn": nn, "labels": labels})
    assert bool(example.no_effect) == any(p.grad is not None for p in model.parameters())


def test_differences_are_seen():
    before = Result(torch.ones(4), {"weight": torch.ones(2), "bias": torch.full((2,), 1e-9)})
    example = replace(EXAMPLES["sagan"], no_effect="bias")
    compared = gallery._compared(example, before, Result(torch.tensor([1.0, 1.0, 1.0, 0.8]), {"weight": torch.zeros(2)}))
    assert compared == pytest.approx({"output_error": 0.1, "gradient_error": 1.0, "no_effect_before": 1e-9, "no_effect_after": 0.0})


def test_a_run_leaves_rows_and_keeps_those_that_it_did_not_measure(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(gallery, "_in_own_process", lambda function, *arguments: function(*arguments))
    out = tmp_path / "gallery.json"
    gallery.write(out, [ROW])
    assert gallery.run(options(out)) == 0
    kept, row = gallery.read(out)
    assert kept == ROW
    assert (row.name, row.size, row.shape) == ("segmentation", "toy", [1, 3, 48, 48])
    assert row.output_error < 1e-5
    assert row.report.startswith("1 attention block on visattn, 0 left")
    assert "segmentation: **" in capsys.readouterr().out


def test_processes_have_one_thread():
    assert gallery._in_own_process(torch.get_num_threads) == gallery.THREADS


@pytest.mark.parametrize(("size", "commit"), [("quick", "abcdef0"), ("full", "abcdef0+"), ("full", None)])
def test_what_cannot_be_repeated_is_not_filed(size, commit, monkeypatch):
    monkeypatch.setattr(gallery.provenance, "commit", lambda: commit)
    monkeypatch.setattr(gallery, "measure", lambda *_: pytest.fail("measured"))
    with pytest.raises(ValueError, match="give another --out"):
        gallery.run(options(gallery.FILED, size=size))


def test_other_files_are_refused(tmp_path):
    (tmp_path / "rows.json").write_text('[{"name": "sagan"}]')
    with pytest.raises(ValueError, match="does not hold rows of the gallery"):
        gallery.read(tmp_path / "rows.json")


def test_the_section_says_what_was_measured_and_what_was_not():
    text = gallery.section([ROW])
    assert "**1474 → 115 MiB**, 4.2 → 2.1 s (2.00×, 1.90 to 2.10); output equal to 5e-07, gradients to 4e-07." in text
    assert "```python\nvisattn.patch_model(discriminator" in text
    assert "an abacus, torch 2, commit `abcdef0`" in text
    assert "`vae`; `segmentation`; `diffusers`." in text
    assert "guided-diffusion" in text


def test_the_readme_holds_the_filed_rows():
    text = README.read_text(encoding="utf-8")
    assert gallery.SECTION.replaced(text, gallery.section(gallery.read(gallery.FILED))) == text, "run: python -m bench gallery --readme"


def test_filed_rows_come_from_a_commit():
    for row in gallery.read(gallery.FILED):
        gallery.check_filing(row.size, row.environment["commit"])
        assert row.environment["device"].endswith("1 thread")
