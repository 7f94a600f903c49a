"""bench/on_gpu.sh with a Python that only notes what it is asked for, and ends as it is told; and the worker of a dead device."""

import os
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from . import conftest

SCRIPT = Path(__file__).resolve().parent.parent / "bench" / "on_gpu.sh"
PYTHON = """#!/usr/bin/env bash
[ "$1" = -c ] && echo "$COMMIT" && exit
echo "$*" >>calls.txt
case "$*" in *"$FAILING"*) exit "$(tail -n 1 <(head -n "$(grep -c -e "$FAILING" calls.txt)" statuses.txt))" ;; esac
"""
"""The calls with FAILING in them end with the statuses of statuses.txt, in turn."""

pytestmark = pytest.mark.skipif(not shutil.which("timeout"), reason="needs bash and the timeout of GNU's coreutils")


@pytest.fixture
def on_gpu(tmp_path):
    """Runs the script's copy with these arguments; failing: a part of a command, and its statuses."""
    (tmp_path / "bench").mkdir()
    script = shutil.copy(SCRIPT, tmp_path / "bench")
    (tmp_path / "python").write_text(PYTHON)
    (tmp_path / "python").chmod(0o755)

    def run(*arguments, commit="abcdef0", failing="nothing", statuses=(0,), minutes="9"):
        (tmp_path / "calls.txt").write_text("")
        (tmp_path / "statuses.txt").write_text("".join(f"{status}\n" for status in statuses))
        environment = os.environ | {"PYTHON": str(tmp_path / "python"), "COMMIT": commit, "FAILING": failing, "MINUTES": minutes}
        result = subprocess.run(["bash", script, *arguments], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
        return result, (tmp_path / "calls.txt").read_text().splitlines()

    return run


@pytest.mark.parametrize("commit", ["None", "abcdef0+", ""])
def test_without_a_commit_it_ends_at_once(on_gpu, commit, tmp_path):
    result, calls = on_gpu("out", commit=commit)
    assert (result.returncode, calls, (tmp_path / "out").exists()) == (2, [], False)
    assert f"expected a commit that rows can be filed under, got '{commit}'" in result.stderr
    assert "set VISATTN_COMMIT" in result.stderr
    result, calls = on_gpu("out", "--dry-run", commit=commit)
    assert result.returncode == 0
    assert calls[-1].startswith("-m bench run --toy --device cpu --suite cifar")


def test_kernels_are_compiled_and_suites_measured_before_all_tests_run(on_gpu, tmp_path):
    result, calls = on_gpu("out")
    assert result.returncode == 0
    stages = (tmp_path / "out" / "stages.txt").read_text().split()
    assert stages[:6] == ["install", "environment", "warm", "look", "cifar", "early"]
    assert set(stages[6:]) == {"large", "tests", "profile", "models", "races", "sanitizer", "compiled"}
    assert len(calls) == len(stages)
    result, calls = on_gpu("out")
    assert (result.returncode, calls) == (0, [])


def test_a_dead_device_is_left_and_the_suite_goes_on(on_gpu, tmp_path):
    result, calls = on_gpu("out", failing="suite cifar --provider", statuses=[75, 134, 1])
    assert result.returncode == 1
    assert sum("suite cifar --provider" in call for call in calls) == 3, "1 is a failure of ours, and final"
    assert "cifar" not in (tmp_path / "out" / "stages.txt").read_text().split()
    assert "cifar: failed with 1" in result.stdout
    _, calls = on_gpu("out", failing="suite cifar --provider", statuses=[75] * 9)
    assert [call for call in calls if "suite cifar --provider" in call] == calls
    assert len(calls) == 5
    result, calls = on_gpu("out", failing="suite cifar --provider", statuses=[75, 0])
    assert (result.returncode, len(calls)) == (0, 2)


def test_it_goes_on_from_another_folder(on_gpu, tmp_path):
    """What prepares is done again, since what is installed and compiled does not travel with the files."""
    on_gpu("first", failing="suite large", statuses=[1])
    (tmp_path / "first" / "rows.jsonl").write_text("a row\n")
    for path in (tmp_path / "first").iterdir():
        path.chmod(0o444)
    result, calls = on_gpu("second", "first")
    assert result.returncode == 0
    assert [call.split()[1:3] for call in calls] == [["pip", "install"], ["bench", "warm"], ["bench", "run"]]
    assert (tmp_path / "second" / "rows.jsonl").read_text() == "a row\n"
    assert (tmp_path / "second" / "log.txt").read_text().startswith("== install")
    (tmp_path / "second" / "rows.jsonl").write_text("a row\nanother\n")
    assert on_gpu("second", "first")[1] == []
    assert (tmp_path / "second" / "rows.jsonl").read_text() == "a row\nanother\n"


@pytest.mark.parametrize("arguments", [(), ("a", "b", "c"), ("--dry-run",), ("out", "empty")])
def test_what_it_cannot_do_it_says(on_gpu, arguments, tmp_path):
    (tmp_path / "empty").mkdir()
    result, calls = on_gpu(*arguments)
    assert (result.returncode, calls) == (2, [])
    assert ("holds no stages.txt" if "empty" in arguments else "usage: bash bench/on_gpu.sh OUT_DIR [FROM_DIR]") in result.stderr


def test_without_time_it_says_what_is_missing(on_gpu):
    result, calls = on_gpu("out", minutes="0")
    assert (result.returncode, calls) == (1, [])
    assert "cifar: no time left, run again" in result.stdout


@pytest.mark.parametrize(("failed", "dead", "ended"), [(True, True, [1]), (True, False, []), (False, True, [])])
def test_a_worker_whose_device_is_dead_ends_after_its_failure(failed, dead, ended, monkeypatch):
    def synchronize():
        if dead:
            raise RuntimeError("an illegal memory access was encountered")

    exits = []
    monkeypatch.setenv("PYTEST_XDIST_WORKER", "gw0")
    monkeypatch.setattr(conftest, "HAS_GPU", True)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr(os, "_exit", exits.append)
    conftest.pytest_runtest_logreport(SimpleNamespace(failed=failed))
    assert exits == ended
