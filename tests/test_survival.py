"""The short form of tests/reliability/survival.py."""

import pytest
from rich.console import Console

from visattn import data, experiment, files

from .reliability import runs, survival


def test_killed_runs_end_as_if_nothing_had_been(tmp_path):
    found = survival.kills(tmp_path, 10, seed=1)
    print(f"{dict(found.kills)}, seed 1")
    assert not found.wrong


def test_runs_that_cannot_write_say_so_and_go_on_later(tmp_path):
    found = survival.Survival(tmp_path, seed=2)
    assert survival.full_disks(found, 4) >= 2
    survival.read_only(found)
    assert not found.wrong


def test_a_folder_has_one_writer_and_one_data_set(tmp_path):
    out, (train, test, classes) = tmp_path / "run", runs.dataset()
    process, _ = runs.start(out, runs.Fault("kill", 60))
    process.join(120)
    with files.locked(out):
        assert runs.finish(out) == 2
    assert "another process is writing to" in runs.said(out)

    def other_images(name, shape):
        return data.Dataset(data.Images(train.pixels.flip(0), train.labels), test, classes)

    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(RuntimeError, match="holds other images than when"):
        experiment.train(runs.SETTINGS, other_images, out, resume=True, console=Console(quiet=True))
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
