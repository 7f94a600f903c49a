"""The short form of tests/reliability/damage.py."""

import gzip
import hashlib

import pytest
from torchvision import datasets

from visattn import data

from .reliability import damage


def test_nothing_is_read_from_a_damaged_checkpoint(tmp_path):
    tried, wrong = damage.checkpoints(tmp_path, 20, seed=1)
    print(f"{dict(tried)}, seed 1")
    assert not wrong


def test_runs_with_damaged_files_say_so_and_go_on_or_stop(tmp_path):
    folders = damage.Folders(tmp_path)
    assert not damage.generations(folders, 2, seed=1)
    assert not damage.other_files(folders)
    assert not damage.best_weights(folders)


def test_images_that_are_none_are_refused_by_name(tmp_path):
    assert not damage.images(tmp_path, 70, seed=1)[1]


def test_mnist_of_another_structure_is_refused(tmp_path):
    assert not damage.mnist(tmp_path, 60, seed=1)[1]


def test_mnist_is_compared_with_its_archives(tmp_path, monkeypatch):
    raw = damage.write_mnist(tmp_path)
    resources = []
    for path in sorted(raw.iterdir()):
        archive = raw / f"{path.name}.gz"
        archive.write_bytes(gzip.compress(path.read_bytes()))
        resources.append((archive.name, hashlib.md5(archive.read_bytes()).hexdigest()))
    monkeypatch.setattr(datasets.MNIST, "resources", resources)
    assert len(data.load("mnist", (1, 28, 28), root=tmp_path).train.labels) == 7
    for path, message in ((raw / resources[0][0], "another checksum"), (raw / "t10k-labels-idx1-ubyte", "is not what")):
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(RuntimeError, match=message):
            data.load("mnist", (1, 28, 28), root=tmp_path)
        path.write_bytes(content)


def test_foreign_pickles_are_not_unpickled(tmp_path):
    assert not damage.foreign_pickles(tmp_path)
