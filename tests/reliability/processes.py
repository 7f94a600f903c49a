"""Several processes that train one model: the same losses as one, and what becomes of the others when one is killed or hangs."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from visattn import checkpoint, cli, data, models, processes, training
from visattn.recipes import RECIPES

from . import runs
from .figures import Figure

CPU = torch.device("cpu")
MODELS = ("mlp_mnist", "cnn_late_attention", "sagan_cnn")
"""None has batch norms or dropout, so that several processes compute what one does, up to rounding."""

Outcome = tuple[list[float], dict[str, Any]]


class Ranks:
    """Processes that believe that torchrun started them; each sends what its function returns, which without `timeout` makes the group."""

    def __init__(self, count: int, function: Any, *arguments: Any, timeout: float | None = 30) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.pipes: list[Connection] = []
        self.processes: list[Any] = []
        for rank in range(count):
            receiver, sender = runs.warm().Pipe(duplex=False)
            process = runs.warm().Process(target=_work, args=(rank, count, port, timeout, sender, function, arguments))
            process.start()
            sender.close()
            self.pipes.append(receiver)
            self.processes.append(process)

    def results(self) -> list[Any]:
        """What each has returned."""
        found = [pipe.recv() for pipe in self.pipes]
        for process in self.processes:
            process.join(60)
        return found

    def wait(self, seconds: float) -> list[int | None]:
        """The exit status of each, None if it is still there; those are killed."""
        end = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.0, end - time.monotonic()))
        found = [process.exitcode for process in self.processes]
        for process in self.processes:
            process.kill()
            process.join()
        return found


def _work(rank: int, count: int, port: int, timeout: float | None, pipe: Connection, function: Any, arguments: Sequence[Any]) -> None:
    torch.set_num_threads(1)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in place.items()} | {"TORCHELASTIC_RUN_ID": "visattn"}
    with processes.group(CPU, timeout) if timeout else contextlib.nullcontext():
        result = function(*arguments)
        pipe.send(result)
    if isinstance(result, int):
        sys.exit(result)


def losses(name: str, batch_size: int, steps: int, precision: str = "fp32") -> Outcome:
    """The losses of the first steps of a training, and the weights after them."""
    torch.manual_seed(0)
    model = models.create_model(name, 10)
    images = data.load("digits", models.input_shape(name)).train
    images = data.Images(images.pixels[:100], images.labels[:100])
    options = training.Options(RECIPES[name].normalization, batch_size, 1e-3, seed=1, precision=precision)
    trainer = training.Trainer(processes.with_common_statistics(model, CPU), images, options, CPU)
    found: list[float] = []
    while len(found) < steps:
        found += trainer.steps()
    return found[:steps], {name: t.numpy() for name, t in model.state_dict().items()}


def deviation(one: Outcome, several: Outcome) -> float:
    """The largest difference of a loss, relative to it."""
    return max(abs(a - b) / abs(a) for a, b in zip(one[0], several[0], strict=True))


def same_everywhere(outcomes: Sequence[Outcome]) -> bool:
    """Whether every process has seen the same losses and holds the same weights, to the bit."""
    first_losses, first = outcomes[0]
    return all(o[0] == first_losses and all((first[name] == t).all() for name, t in o[1].items()) for o in outcomes)


def refusal(name: str, batch_size: int) -> str:
    """What is said of a model or a batch that several processes cannot share."""
    settings = replace(runs.SETTINGS, model=name, batch_size=batch_size, processes=processes.count())
    try:
        with tempfile.TemporaryDirectory() as out:
            runs.experiment.Run(settings, runs.dataset(), Path(out), runs.Console(quiet=True))
    except ValueError as error:
        return str(error)
    return "nothing"


def draws(out: Path) -> tuple[list[float], list[list[int]]]:
    """What a process draws for itself after it has begun a run, and where all of their generators stand."""
    run = runs.experiment.Run(replace(runs.SETTINGS, processes=processes.count()), runs.dataset(), out, runs.Console(quiet=True))
    return torch.rand(8).tolist(), run.trainer.state()[0]["rng.cpu"].tolist()


def train(out: Path, epochs: int) -> int:
    """A run, as far as that many epochs."""
    return runs.finish_here(out, settings=replace(runs.SETTINGS, epochs=epochs, processes=processes.count()))


def stop_one(folder: Path, how: signal.Signals, timeout: float) -> tuple[float, list[int | None], str]:
    """Does that to the second of two processes in training: the seconds until all have ended, their status, what was said."""
    out = folder / f"stopped-{how.name}"
    ranks = Ranks(2, train, out, 10_000, timeout=timeout)
    wait_for(out / "last.safetensors")
    os.kill(ranks.processes[1].pid, how)
    start = time.monotonic()
    ranks.processes[0].join(timeout + 30)
    seconds = time.monotonic() - start
    if how is signal.SIGSTOP:
        os.kill(ranks.processes[1].pid, signal.SIGKILL)
    return seconds, ranks.wait(5), runs.said(out)


def wait_for(path: Path, seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end, f"{path} does not come"
        time.sleep(0.01)


TRAIN = ("train", "--model", "cnn_mnist", "--data", "digits", "--device", "cpu")


def command_line(*arguments: str) -> int:
    return cli.main(arguments)


def torchrun(out: Path, *arguments: str, restarts: int = 0) -> subprocess.Popen[str]:
    """`torchrun --nproc-per-node 2 -m visattn train`, into `out`."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", str(restarts)]
    command += ["-m", "visattn", *TRAIN, "--out", str(out), *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


def kill_a_worker(launcher: subprocess.Popen[str], out: Path) -> None:
    """SIGKILL for the last of torchrun's processes, when the first checkpoint is there."""
    wait_for(out / "last.safetensors")
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    with contextlib.suppress(ProcessLookupError):
        os.kill(int(children[-1]), signal.SIGKILL)


def restarted(folder: Path) -> tuple[list[str], bool]:
    """A run under torchrun, of which a process is killed, and which torchrun starts again: how it differs from one left alone."""
    arguments = ("--epochs", "3", "--resume")
    left, out = folder / "left-alone", folder / "restarted"
    assert Ranks(2, command_line, *TRAIN, "--out", str(left), *arguments, timeout=None).wait(120) == [0, 0]
    launcher = torchrun(out, *arguments, restarts=2)
    kill_a_worker(launcher, out)
    said = launcher.communicate(timeout=240)[0]
    if launcher.returncode:
        return [f"exit status {launcher.returncode}: {said[-500:]}"], False
    expected, found = (checkpoint.load(path / "last.safetensors")[0] for path in (left, out))
    wrong = [name for name, tensor in expected.items() if not torch.equal(tensor, found[name])]
    if runs.without_times(left / "metrics.jsonl") != runs.without_times(out / "metrics.jsonl"):
        wrong.append("metrics.jsonl")
    return wrong, "going on at epoch" in said


def not_restarted(folder: Path) -> tuple[float, int]:
    """The same without restarts: the seconds from the kill to torchrun's end, and its exit status."""
    out = folder / "killed"
    launcher = torchrun(out, "--epochs", "100000")
    kill_a_worker(launcher, out)
    start = time.monotonic()
    launcher.communicate(timeout=240)
    return time.monotonic() - start, launcher.returncode


def figures() -> list[Figure]:
    most, unequal, trials = 0.0, 0, 0
    for name in MODELS:
        one = losses(name, 30, 8)
        for count in (2, 3, 4):
            outcomes = Ranks(count, losses, name, 30, 8).results()
            most, trials = max(most, deviation(one, outcomes[0])), trials + 1
            unequal += not same_everywhere(outcomes)
    with tempfile.TemporaryDirectory(prefix="visattn-") as name:
        folder = Path(name)
        assert Ranks(2, train, folder / "whole", 2).wait(120) == [0, 0]
        Ranks(2, train, folder / "halves", 1).wait(120)
        Ranks(2, train, folder / "halves", 2).wait(120)
        halves = list(runs.differences(folder / "whole", folder / "halves"))
        killed, statuses, _ = stop_one(folder, signal.SIGKILL, 60)
        hung, hung_statuses, told = stop_one(folder, signal.SIGSTOP, 3)
        wrong, went_on = restarted(folder)
        ended, status = not_restarted(folder)
    for problem in (*halves, *wrong):
        print(problem)
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return [
        Figure(
            f"losses of 2, 3, 4 processes against one, {len(MODELS)} models, 8 steps",
            f"largest relative difference {most:.1e}; weights unequal between processes in {unequal} of {trials}",
            "below 1e-4; 0",
            most < 1e-4 and not unequal,
        ),
        Figure("two processes stopped between epochs and gone on with", f"{len(halves)} differences", "the same bits", not halves),
        Figure(
            "one of two processes killed",
            f"the other ended after {killed:.1f} s with status {statuses[0]}; under torchrun all after {ended:.1f} s with status {status}",
            "within 10 s, not 0",
            killed < 10 and statuses[0] == 2 and ended < 10 and status != 0,
        ),
        Figure(
            "one of two processes hangs, --timeout 3",
            f"the other ended after {hung:.1f} s with status {hung_statuses[0]}",
            "within 10 s, not 0, and says why",
            hung < 10 and hung_statuses[0] == 2 and "does not answer" in told,
        ),
        Figure(
            "one of two processes killed, torchrun --max-restarts",
            f"{len(wrong)} differences from a run left alone",
            "goes on from the last checkpoint to the same bits",
            not wrong and went_on,
        ),
        Figure("NCCL, and batch norms in several processes", f"{gpus} GPUs here", "2 GPUs", None),
    ]
