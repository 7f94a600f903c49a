"""The short form of tests/reliability/survival.py."""

from .reliability import survival


def test_killed_runs_end_as_if_nothing_had_been(tmp_path):
    found = survival.kills(tmp_path, 10, seed=1)
    print(f"{dict(found.kills)}, seed 1")
    assert not found.wrong


def test_runs_that_cannot_write_say_so_and_go_on_later(tmp_path):
    found = survival.Survival(tmp_path, seed=2)
    assert survival.full_disks(found, 4) >= 2
    survival.read_only(found)
    assert not found.wrong
