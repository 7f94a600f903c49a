"""Small trainings in processes of their own, forked from a warm one, that can be hurt in a chosen way at a chosen moment."""

import contextlib
import functools
import json
import multiprocessing
import os
import resource
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock

import sklearn.datasets  # noqa: F401  what the warm process has imported costs its children nothing
import torch
import torch._dynamo  # which optimisers import
from rich.console import Console

from visattn import checkpoint, data, experiment, files, report

TRAIN_IMAGES, TEST_IMAGES = 200, 50

SETTINGS = experiment.settings_of(
    "cnn_mnist", {"data": "digits", "batch_size": 16, "epochs": 2, "check_every": 5, "validation": 0.2, "seed": 5}
)
"""Ten steps an epoch, a checkpoint after each fifth: one falls between an epoch's last step and its end. Dropout draws random numbers."""


@dataclass(frozen=True)
class Fault:
    """What is done to a run: `kind` at the `at`-th occasion.

    "kill": SIGKILL when the file system is about to be changed; "error": that change fails with ENOSPC instead.
    "torn": SIGKILL when `share` of a file has been written. "limit": no file may grow beyond `at` bytes.
    """

    kind: str
    at: int
    share: float = 0.0


@functools.cache
def dataset() -> data.Dataset:
    digits = data.load("digits", (1, 28, 28))
    train, test = (data.Images(part.pixels[:n], part.labels[:n]) for part, n in ((digits.train, TRAIN_IMAGES), (digits.test, TEST_IMAGES)))
    return data.Dataset(train, test, digits.classes)


def load_digits(name: str, shape: data.Shape) -> data.Dataset:
    return dataset()


def start(out: Path, fault: Fault | None = None) -> tuple[Any, Connection]:
    """Begins, or goes on with, the run in `out`; the process and a pipe that says (epoch, step) after each checkpoint."""
    receiver, sender = warm().Pipe(duplex=False)
    process = warm().Process(target=_run, args=(out, fault, sender))
    process.start()
    sender.close()
    return process, receiver


def finish(out: Path, fault: Fault | None = None) -> int:
    """The exit status of a run that nobody kills."""
    process, _ = start(out, fault)
    process.join(120)
    assert process.exitcode is not None, f"a run in {out} hangs"
    return process.exitcode


def said(out: Path) -> str:
    """All that the runs in `out` have printed."""
    path = out.with_name(f"{out.name}.log")
    return path.read_text(encoding="utf-8") if path.exists() else ""


def received(pipe: Connection) -> list[Any]:
    """What is left in the pipe of a process that has ended."""
    messages = []
    with contextlib.suppress(EOFError):
        while True:
            messages.append(pipe.recv())
    return messages


def changes(out: Path) -> tuple[int, int]:
    """How often a run that nothing happens to changes the file system, and writes or appends to a file."""
    process, pipe = start(out, Fault("count", 0))
    process.join()
    return received(pipe)[-1]


@functools.cache
def warm() -> Any:
    """Where processes are forked from that has everything imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


def _run(out: Path, fault: Fault | None, pipe: Connection) -> None:
    _report_checkpoints(pipe)
    status = finish_here(out, fault, pipe)
    if status:
        os._exit(status)


def finish_here(
    out: Path,
    fault: Fault | None = None,
    pipe: Connection | None = None,
    log: str | None = None,
    settings: experiment.Settings = SETTINGS,
) -> int:
    """0 where the run came to its end, 2 where it said what was wrong, as the command line does; any other error is the package's."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with (
            open(log or f"{out}.log", "a", encoding="utf-8") as file,
            mock.patch.object(experiment, "SECONDS_BETWEEN_CHECKPOINTS", -1.0),
            mock.patch.multiple(report, training_curves=_draw_nothing, confusion=_draw_nothing),  # takes longer than all the rest
        ):
            try:
                if fault is not None:
                    _FAULTS[fault.kind](out, fault, pipe)
                experiment.train(settings, load_digits, out, resume=True, console=Console(file=file, width=10_000))
            except (OSError, RuntimeError, ValueError) as error:
                file.write(f"visattn: {error}\n")
                return 2
    finally:
        torch.set_num_threads(threads)
    return 0


def _draw_nothing(path: Path, *what: Any) -> None:
    files.write(path, b"a picture")


def _report_checkpoints(pipe: Connection) -> None:
    save = checkpoint.save

    def reporting(path: Path, tensors: Any, description: dict[str, Any], *, keep_previous: bool = False) -> None:
        save(path, tensors, description, keep_previous=keep_previous)
        if keep_previous:
            pipe.send((description["trainer"]["epoch"], description["trainer"]["step"]))

    checkpoint.save = reporting


def _at_changes(out: Path, happen: Any) -> None:
    """Calls `happen(n)` before the n-th change of the file system below `out`, from 1."""
    inside, count = str(out), 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if event not in ("open", "os.rename", "os.remove", "os.mkdir", "os.truncate"):
            return
        path, reads = str(arguments[0]), event == "open" and not (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR)
        if path.startswith(inside) and not path.endswith(".log") and not reads:
            count += 1
            happen(count)

    sys.addaudithook(hook)


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def _kill(out: Path, fault: Fault, pipe: Connection) -> None:
    _at_changes(out, lambda count: _die() if count == fault.at else None)


def _error(out: Path, fault: Fault, pipe: Connection) -> None:
    def happen(count: int) -> None:
        if count == fault.at:
            raise OSError(28, "No space left on device")

    _at_changes(out, happen)


def _limit(out: Path, fault: Fault, pipe: Connection) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (fault.at, fault.at))


def _counting_writes(tear: Any) -> None:
    """Calls `tear(path, bytes, mode)` before each file, or line of one, is written."""
    write_bytes, append = Path.write_bytes, files.append

    def writing(path: Path, content: Any) -> int:
        tear(path, bytes(content), "wb")
        return write_bytes(path, content)

    def appending(path: Path, line: str) -> None:
        tear(path, f"{line}\n".encode(), "ab")
        append(path, line)

    Path.write_bytes = writing
    files.append = appending


def _torn(out: Path, fault: Fault, pipe: Connection) -> None:
    count = 0

    def tear(path: Path, content: bytes, mode: str) -> None:
        nonlocal count
        count += 1
        if count == fault.at:
            with path.open(mode) as file:
                file.write(content[: int(fault.share * len(content))])
            _die()

    _counting_writes(tear)


def _count(out: Path, fault: Fault, pipe: Connection) -> None:
    counts = [0, 0]

    def change(count: int) -> None:
        counts[0] = count

    def write(path: Path, content: bytes, mode: str) -> None:
        counts[1] += 1

    _at_changes(out, change)
    _counting_writes(write)
    # An exit of a forked process runs no handlers of atexit but those of multiprocessing.
    multiprocessing.util.Finalize(None, lambda: pipe.send(tuple(counts)), exitpriority=10)


_FAULTS = {"kill": _kill, "error": _error, "limit": _limit, "torn": _torn, "count": _count}


def without_times(path: Path) -> list[dict[str, Any]]:
    """The lines of metrics."""
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in path.read_text(encoding="utf-8").splitlines()]


def differences(expected: Path, found: Path) -> Iterator[str]:
    """What a finished run has other than one that nothing happened to: weights, optimiser, generators, metrics, result."""
    for name in ("last.safetensors", "best.safetensors"):
        theirs, ours = (checkpoint.load(folder / name)[0] for folder in (expected, found))
        yield from (f"{name} has {key} or lacks it" for key in theirs.keys() ^ ours.keys())
        yield from (f"{key} in {name}" for key in theirs.keys() & ours.keys() if not torch.equal(theirs[key], ours[key]))
    if without_times(expected / "metrics.jsonl") != without_times(found / "metrics.jsonl"):
        yield "metrics.jsonl"
    theirs, ours = (json.loads((folder / "result.json").read_text(encoding="utf-8")) for folder in (expected, found))
    measured = {"seconds_an_epoch", "share_of_time_for_data", "commit"}
    yield from (f"{key} in result.json" for key in theirs if key not in measured and theirs[key] != ours[key])
    if {p.name for p in expected.iterdir()} - {".lock"} != {p.name for p in found.iterdir()} - {".lock"}:
        yield f"files: {sorted(p.name for p in found.iterdir())}"
