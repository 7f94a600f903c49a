"""Nothing foreign becomes code, and nothing is written where nobody asked for it: the short form of tests/reliability/security.py."""

import pytest

from .reliability import security


def test_nothing_turns_foreign_bytes_into_code():
    searched, found = security.forbidden_calls("visattn", "kernels", "bench")
    assert searched > 90
    assert not found


@pytest.mark.parametrize(
    "code",
    [
        "import pickle\npickle.load(f)",
        "import pickle as p\np.loads(b)",
        "from torch import load\nload(f)",
        "import torch\ntorch.load(f, weights_only=False)",
        "import numpy as np\nnp.load(f)",
        "eval('1')",
        "import subprocess\nsubprocess.run(c, shell=True)",
    ],
)
def test_what_would_is_found(tmp_path, monkeypatch, code):
    monkeypatch.setattr(security, "ROOT", tmp_path)
    (tmp_path / "bad.py").write_text(code)
    assert len(security.forbidden_calls("")[1]) == 1


def test_commands_write_into_their_output_folder_only(tmp_path):
    seen = security.commands(tmp_path, ("train",)) | {"convert": security.convert(tmp_path)}
    for name, watched in seen.items():
        assert security.wrong_with(name, watched) == []
    outside = security.watch("open('elsewhere', 'w'); import os; os.mkdir('folder')", tmp_path, tmp_path / "of-train")
    assert len(outside.written) == 2, "what is written elsewhere is seen"


def test_checkpoints_with_right_sums_and_wrong_contents_are_refused(tmp_path):
    assert not security.hostile_checkpoints(tmp_path)


def test_links_are_not_written_through(tmp_path):
    assert not security.planted_links(tmp_path)
