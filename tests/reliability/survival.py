"""Training that is killed, that runs out of disk, that may not write: what is left of it, and whether it ends as if nothing had been.

Every run after a fault is gone on with, and compared with one that nothing happened to: the same bits, nothing else in the folder.
"""

import ctypes
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from visattn import checkpoint

from . import runs
from .figures import Figure
from .runs import Fault

MOMENTS = ("any time", "before a change of the file system", "within a file")


class Survival:
    """Trials in one folder, all against one run that nothing happened to; `wrong` says what was not as it should be."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.random = folder, random.Random(seed)
        self.whole = folder / "whole"
        self.changes, self.writes = runs.changes(folder / "counted")
        start = time.monotonic()
        assert runs.finish(self.whole) == 0, runs.said(self.whole)
        self.seconds = time.monotonic() - start
        self.kills: Counter[str] = Counter()
        self.wrong: list[str] = []

    def kill(self, moment: str) -> None:
        """One run, killed at that kind of moment, perhaps again when gone on with, and gone on with to its end."""
        out = Path(tempfile.mkdtemp(dir=self.folder)) / "run"
        generation, again = (-1, -1), True
        while again:
            process, pipe = self._start(out, moment)
            if moment == "any time":
                time.sleep(self.random.uniform(0, self.seconds))
                process.kill()
            process.join(120)
            generation = max([generation, *runs.received(pipe)])
            if process.exitcode == 0:
                break  # it was quicker
            if process.exitcode != -9:
                self.wrong.append(f"{moment}: exit status {process.exitcode}: {runs.said(out)[-300:]}")
            self.kills[moment] += 1
            self.wrong += [f"{moment}: {problem}" for problem in self._left(out, generation)]
            again = self.random.random() < 0.3
        self._go_on(out, moment)

    def take_wrong(self) -> int:
        """How much has gone wrong since it was last asked for, which is printed."""
        count = len(self.wrong)
        for problem in self.wrong:
            print(problem, file=sys.stderr)
        self.wrong.clear()
        return count

    def _start(self, out: Path, moment: str):
        if moment == "any time":
            return runs.start(out)
        if moment == "within a file":
            return runs.start(out, Fault("torn", self.random.randint(1, self.writes), self.random.random()))
        return runs.start(out, Fault("kill", self.random.randint(1, self.changes)))

    def _left(self, out: Path, generation: tuple[int, int]) -> list[str]:
        """What is wrong with the folder of a killed run that has said that `generation` is on the disk."""
        wrong = []
        found = checkpoint.load_newest(out / "last.safetensors")
        place = (-1, -1) if found is None else (found[1]["trainer"]["epoch"], found[1]["trainer"]["step"])
        if place < generation:
            wrong.append(f"{generation} was saved, {place} is left")
        if found is not None and found[2]:
            wrong.append(f"a kill damaged a checkpoint: {found[2]}")
        for path in out.iterdir() if out.exists() else ():
            if path.name.startswith("."):
                if path.name != ".lock" and path.suffix != ".partial":
                    wrong.append(f"{path.name} is left")
            elif path.suffix == ".safetensors":
                checkpoint.load(path)
            elif path.suffix == ".json":
                json.loads(path.read_text(encoding="utf-8"))
            elif path.suffix == ".jsonl":
                for line in path.read_text(encoding="utf-8").splitlines(keepends=True)[:-1]:
                    json.loads(line)
            elif not path.stat().st_size:
                wrong.append(f"{path.name} is empty")
        return wrong

    def _go_on(self, out: Path, what: str) -> None:
        status = runs.finish(out)
        if status:
            self.wrong.append(f"{what}: gone on with, exit status {status}: {runs.said(out)[-300:]}")
        else:
            self.wrong += [f"{what}: other than uninterrupted: {difference}" for difference in runs.differences(self.whole, out)]
        shutil.rmtree(out.parent)

    def fail(self, fault: Fault) -> bool:
        """A run whose writing fails must say so, leave nothing half done, and go on once it can; whether it failed at all."""
        out = Path(tempfile.mkdtemp(dir=self.folder)) / "run"
        process, pipe = runs.start(out, fault)
        process.join(120)
        if process.exitcode == 0:
            shutil.rmtree(out.parent)
            return False
        what, generation = str(fault), max([(-1, -1), *runs.received(pipe)])
        if process.exitcode != 2 or "visattn: [Errno" not in runs.said(out):
            self.wrong.append(f"{what}: exit status {process.exitcode}: {runs.said(out)[-300:]}")
        self.wrong += [f"{what}: {problem}" for problem in self._left(out, generation)]
        if partial := list(out.glob(".*.partial")):
            self.wrong.append(f"{what}: {partial} is left")
        self._go_on(out, what)
        return True


def kills(folder: Path, number: int, seed: int) -> Survival:
    """At least that many kills, the three kinds of moment in turn."""
    survival = Survival(folder, seed)
    while survival.kills.total() < number:
        survival.kill(MOMENTS[survival.kills.total() % len(MOMENTS)])
    return survival


def full_disks(survival: Survival, number: int) -> int:
    """Runs whose files may not grow beyond a size, or whose n-th change of the file system fails; returns how many failed."""
    failed = 0
    largest = max(path.stat().st_size for path in survival.whole.iterdir())
    for trial in range(number):
        at = survival.random.randrange(largest) if trial % 2 else survival.random.randint(1, survival.changes)
        failed += survival.fail(Fault("limit" if trial % 2 else "error", at))
    return failed


def full_file_system(survival: Survival, number: int) -> int | None:
    """Runs on a file system too small for them, which is then made larger; None where this process may not mount one."""
    place = survival.folder / "small"
    place.mkdir()
    for _ in range(number):
        kilobytes = survival.random.randint(40, 1400)  # two generations, the best weights and a file being written need more
        process = runs.warm().Process(target=_train_on_small_disk, args=(place, kilobytes, survival.whole))
        process.start()
        process.join(120)
        if process.exitcode == 3:
            return None
        if process.exitcode != 0:
            survival.wrong.append(f"a file system of {kilobytes} KiB: {runs.said(place / 'run')[-300:]}")
        (survival.folder / "small" / "run.log").unlink(missing_ok=True)
    return number


def _train_on_small_disk(place: Path, kilobytes: int, whole: Path) -> None:
    new_mounts = 0x00020000
    if ctypes.CDLL(None, use_errno=True).unshare(new_mounts):
        os._exit(3)
    mount = ["mount", "--make-rprivate", "/"], ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "none", str(place)]
    if any(subprocess.run(command, capture_output=True, check=False).returncode for command in mount):
        os._exit(3)
    first = runs.finish_here(place / "run")
    problems = [] if first == 2 and "No space left" in runs.said(place / "run") else [f"exit status {first}"]
    subprocess.run(["mount", "-o", "remount,size=20m", str(place)], check=True)
    second = runs.finish_here(place / "run")
    problems += list(runs.differences(whole, place / "run")) if second == 0 else [f"gone on with, exit status {second}"]
    print("\n".join(problems), flush=True)
    os._exit(bool(problems))


def read_only(survival: Survival) -> int:
    """Folders that may not be written to, at the beginning and when gone on with; returns how many were tried."""
    with tempfile.TemporaryDirectory(prefix="visattn-") as name:
        folder = Path(name)  # which others can look into, as they cannot into every temporary folder
        begun, fresh, told = folder / "begun", folder / "fresh", folder / "told"
        process, _ = runs.start(begun, Fault("kill", survival.changes // 2))
        process.join(120)
        fresh.mkdir()
        told.touch()
        for path in (folder, told):
            path.chmod(0o777)
        for out, inside in ((begun, begun), (fresh / "run", fresh)):
            before = {path.name: path.read_bytes() for path in inside.iterdir()}
            inside.chmod(0o555)
            process = runs.warm().Process(target=_train_without_rights, args=(out, told))
            process.start()
            process.join(120)
            inside.chmod(0o755)
            if process.exitcode != 2 or {path.name: path.read_bytes() for path in inside.iterdir()} != before:
                survival.wrong.append(f"a folder that may not be written to: exit status {process.exitcode}")
        if told.read_text(encoding="utf-8").count("Permission denied") != 2:
            survival.wrong.append(f"of folders that may not be written to was said: {told.read_text(encoding='utf-8')}")
        if status := runs.finish(begun):
            survival.wrong.append(f"after a folder could not be written to: exit status {status}")
        else:
            survival.wrong += [f"after a folder could not be written to: {problem}" for problem in runs.differences(survival.whole, begun)]
    return 2


def _train_without_rights(out: Path, told: Path) -> None:
    runs.dataset()  # which others may not be allowed to read
    if os.getuid() == 0:
        os.setresgid(65534, 65534, 65534)
        os.setresuid(65534, 65534, 65534)
    os._exit(runs.finish_here(out, log=str(told)))


def figures(number: int = 200, seed: int = 0) -> list[Figure]:
    with tempfile.TemporaryDirectory(prefix="visattn-") as name:
        survival = kills(Path(name), number, seed)
        killed, at_kills = survival.kills, survival.take_wrong()
        failed, at_failures = full_disks(survival, 60), survival.take_wrong()
        small, on_small = full_file_system(survival, 8), survival.take_wrong()
        forbidden, at_forbidden = read_only(survival), survival.take_wrong()
    by_moment = ", ".join(f"{count} {moment}" for moment, count in killed.items())
    same = "gone on with: the same bits as uninterrupted, no generation lost, nothing torn or left over"
    return [
        Figure(f"SIGKILL in training, seed {seed}: {by_moment}", f"{at_kills} wrong in {killed.total()} kills", same, not at_kills),
        Figure("writing fails, or files may not grow", f"{at_failures} wrong in {failed} failures", f"said; {same}", not at_failures),
        Figure(
            "a file system that is too small",
            f"{on_small} wrong in {small} runs" if small else "this process may not mount one",
            f"said; {same}",
            not on_small if small else None,
        ),
        Figure("a folder that may not be written to", f"{at_forbidden} wrong in {forbidden}", "said; nothing touched", not at_forbidden),
    ]
