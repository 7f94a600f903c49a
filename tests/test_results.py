"""What is filed under bench/results is what the README says."""

import re

import pytest
import torch

from bench import accuracy, agreement, speed
from bench.readme import README
from visattn import comparison
from visattn.recipes import PUBLISHED, RECIPES

from .conftest import INTERPRETING
from .reliability import filed


def test_the_readme_holds_the_table_of_the_filed_runs():
    text = README.read_text(encoding="utf-8")
    assert accuracy.SECTION.replaced(text, accuracy.section(accuracy.filed())) == text, "run: python -m bench.accuracy table"


def test_the_readme_holds_the_table_of_the_filed_rows():
    text = README.read_text(encoding="utf-8")
    assert speed.SECTION.replaced(text, speed.section(speed.filed())) == text, "run: python -m bench report"


def test_filed_runs_name_no_place_and_come_from_a_commit():
    for path in accuracy.RESULTS.glob("*.json"):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r'"/|/home|/tmp', text), path.name
    for result in accuracy.filed():
        assert re.fullmatch(r"[0-9a-f]{7,}", result["commit"]), "a result of changed code cannot be repeated"


def a_result(model, attention, accuracy, seed, epochs=10):
    told = {"model": model, "attention": attention, "test_accuracy": accuracy, "seed": seed, "epochs": epochs, "commit": "abcdef0"}
    return told | {"data": "cifar10", "processor": "abacus", "precision": "fp32", "versions": {"torch": "2"}, "seconds_an_epoch": 9.6}


def test_ranking_has_means_runs_and_the_published_mean_beside_them():
    results = [
        a_result("cnn_vanilla", None, 0.60, 1), a_result("cnn_vanilla", None, 0.58, 0),
        a_result("cnn_late_attention", "queries", 0.61, 0), a_result("cnn_late_attention", "fused", 0.5, 0),
    ]  # fmt: skip
    first, second, third = comparison.ranking(results)
    assert (first.name, second.name, third.name) == ("cnn_late_attention (queries)", "cnn_vanilla", "cnn_late_attention (fused)")
    assert second.ours == pytest.approx((58.0, 60.0))
    table = comparison.markdown([first, second, third])
    assert "| 61.00 | 61.00 | 57.45 (56.37, 57.68, 58.30) | +3.55 |" in table
    assert "| 50.00 | 50.00 | – | – |" in table


def test_the_section_tells_whole_from_shortened_and_what_is_missing():
    text = accuracy.section([a_result("cnn_vanilla", None, 0.6, 0), a_result("sagan_cnn", "fused", 0.3, 0, epochs=1)])
    assert "| 1 | cnn_vanilla | 60.00 | 60.00 |" in text
    assert "| sagan_cnn (fused) | cifar10 | 1 | 30.00 | 0 | 10 s |" in text
    assert re.search(r"Not run by the whole recipe: cnn_early.*sagan_cnn.*vit_mnist\. With fewer than three seeds: cnn_vanilla", text)
    assert "abacus, fp32, torch 2, commit `abcdef0`" in text


def test_every_model_has_a_recipe_and_published_figures_belong_to_models_there_are():
    from visattn import models

    assert list(RECIPES) == models.names()
    for model, attention in PUBLISHED:
        assert attention in (models.attentions(model) or (None,))


def test_the_readme_holds_the_table_of_what_was_tried():
    text = README.read_text(encoding="utf-8")
    assert filed.SECTION.replaced(text, filed.section(filed.read())) == text, "run: python -m tests.reliability --readme"
    assert filed.PAGE.read_text(encoding="utf-8") == filed.page(filed.read()), "run: python -m tests.reliability --readme"


def test_the_readme_says_whether_fused_and_naive_attention_train_alike():
    text = README.read_text(encoding="utf-8")
    assert agreement.SECTION.replaced(text, agreement.section(agreement.filed())) == text, "run: python -m bench.agreement table"
    assert agreement.PAGE.read_text(encoding="utf-8") == agreement.page(agreement.filed()), "run: python -m bench.agreement table"


def launches_of_row(line):
    """The forward and backward launches that a row of kernels/README.md names, and the shape and width of queries that it is of."""
    maps, *passes = (cell.strip() for cell in line.strip("|\n").split("|"))
    n, c, h, w = map(int, re.match(r"\((\d+), (\d+), (\d+), (\d+)\)", maps).groups())
    narrow = re.search(r"(\d+) query channels", maps)
    named = [f"{name}_kernel" for cell in passes for name in re.findall(r"`(\w+)`", cell)]
    return {"channels": c, "tokens": h * w, "maps": n, "qk_channels": int(narrow[1]) if narrow else None}, named


@pytest.mark.skipif(INTERPRETING, reason="the interpreter has no launches to catch")
def test_the_kernels_readme_names_the_launches_there_are():
    pytest.importorskip("triton")
    from bench.ahead_of_time import DEVICES
    from bench.passes import layer_launches

    text = (README.parent / "kernels" / "README.md").read_text(encoding="utf-8")
    rows = [launches_of_row(line) for line in text.splitlines() if re.match(r"\| \(\d", line)]
    assert len(rows) == 6
    for problem, named in rows:
        launches = layer_launches(DEVICES["sm_90"], torch.bfloat16, problem.pop("channels"), **problem)
        assert [launch.name for launch in launches] == named, problem


def test_the_kernels_readme_names_every_file():
    folder = README.parent / "kernels"
    named = set(re.findall(r"`(\w+\.py)`", (folder / "README.md").read_text(encoding="utf-8")))
    assert named == {path.name for path in folder.glob("*.py")} - {"__init__.py"}


@pytest.mark.parametrize("folder", ["visattn", "bench"])
def test_contributing_names_every_file(folder):
    text = (README.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(?:\w+/)*(\w+\.py)`", text))
    missing = {path.name for path in (README.parent / folder).glob("*.py")} - named - {"__init__.py", "__main__.py", "conftest.py"}
    assert not {name for name in missing if not name.startswith("test_")}
