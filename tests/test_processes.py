"""Several processes on one batch: the short form of tests/reliability/processes.py."""

import signal
from dataclasses import replace

import pytest
import torch

from visattn import processes

from .reliability import runs
from .reliability.processes import Ranks, deviation, draws, losses, refusal, restarted, same_everywhere, stop_one, train


def test_one_process_is_a_group_of_one():
    rows = torch.arange(5)
    with processes.group(torch.device("cpu"), timeout=1):
        assert (processes.count(), processes.rank(), processes.is_first()) == (1, 0, True)
        assert processes.share(rows) is rows or torch.equal(processes.share(rows), rows)
        assert processes.gathered(rows).shape == (1, 5)
        assert processes.first_decides(True)
        assert not processes.first_decides(False)
        assert processes.own_device(torch.device("cuda", 1)) == torch.device("cuda", 1)
        processes.add_up([rows])
        assert rows.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(("count", "name", "batch_size"), [(2, "mlp_mnist", 16), (3, "cnn_late_attention", 20)])
def test_losses_are_those_of_one_process(count, name, batch_size):
    """The batches do not divide by the processes, nor the images by the batches."""
    one = losses(name, batch_size, 7)
    several = Ranks(count, losses, name, batch_size, 7).results()
    assert same_everywhere(several)
    assert deviation(one, several[0]) < 1e-5


def test_a_sum_of_other_gradients_would_be_noticed():
    assert deviation(losses("mlp_mnist", 16, 7), losses("mlp_mnist", 15, 7)) > 1e-3


def test_what_cannot_be_shared_is_refused():
    for said in Ranks(2, refusal, "resnet10", 16).results():
        assert "batch norms, which several processes can share on GPUs only" in said
    for said in Ranks(3, refusal, "cnn_mnist", 53).results():
        assert "a batch of 1 has not one image for each of 3 processes" in said


def test_each_process_draws_its_own_numbers_and_one_process_those_of_before(tmp_path):
    numbers, states = zip(*Ranks(3, draws, tmp_path).results(), strict=True)
    assert numbers[0] == draws(tmp_path)[0]
    assert len(set(map(tuple, numbers))) == 3
    assert len(set(map(tuple, states[0]))) == 3


def test_two_processes_go_on_with_the_same_bits_and_one_may_not(tmp_path):
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    assert Ranks(2, train, whole, 2).wait(120) == [0, 0]
    assert Ranks(2, train, halves, 1).wait(120) == [0, 0]
    assert runs.finish_here(halves, settings=replace(runs.SETTINGS, epochs=2)) == 2
    assert "processes was 2, now 1" in runs.said(halves)
    assert Ranks(2, train, halves, 2).wait(120) == [0, 0]
    assert list(runs.differences(whole, halves)) == []


@pytest.mark.parametrize(("how", "timeout"), [(signal.SIGKILL, 60), (signal.SIGSTOP, 2)])
def test_the_others_end_when_one_is_gone(tmp_path, how, timeout):
    seconds, statuses, said = stop_one(tmp_path, how, timeout)
    assert seconds < 15
    assert statuses == [2, -signal.SIGKILL]
    assert "another of the 2 processes has ended or does not answer" in said


def test_torchrun_starts_again_from_the_last_checkpoint(tmp_path):
    assert restarted(tmp_path) == ([], True)
