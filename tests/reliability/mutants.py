"""Are the tests worth anything? Faults are seeded into a copy of the tree, one at a time; a test named for each must fail.

`python -m tests.reliability.mutants [WORD …]` prints what killed what, of all faults or those with a word in their line; 1 if one
survived. First all of these tests have to pass on the copy as it is, and the copy has to import its own files.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path

from visattn import report

from .figures import Figure
from .seeded_faults import MUTANTS, Mutant
from .warm import END

ROOT = Path(__file__).resolve().parent.parent.parent
PARTS = ("visattn", "kernels", "tests", "bench")
SECONDS = 120
"""What one test may take; they take a few."""


class Copy:
    """A copy of the tree, and a process that runs tests in it, on the CPU, the kernels in Triton's interpreter or not at all."""

    def __init__(self, folder: Path, interpreter: bool) -> None:
        self.folder = folder
        for part in PARTS:
            shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__", "results"))
        # As it is installed: what Python finds beside a package comes before what an installation has put in its place.
        (folder / "visattn" / "kernels").symlink_to(folder / "kernels", target_is_directory=True)
        shutil.copy(ROOT / "pyproject.toml", folder)
        own = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "TRITON", "VISATTN", "PYTHON"))}
        settings = {
            "PYTHONDONTWRITEBYTECODE": "1",  # a stale file would pass for one with a fault of the same length
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
        }
        self._process = subprocess.Popen(
            [sys.executable, str(folder / "tests" / "reliability" / "warm.py")], text=True, cwd=folder,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env=own | settings | ({"TRITON_INTERPRET": "1"} if interpreter else {}),
        )  # fmt: skip

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def run(self, tests: Sequence[str], *options: str) -> dict[str, list[str]]:
        """The ids of the tests that passed, failed and could not be run, under PASSED, FAILED and ERROR."""
        lines = self._pytest("-rA", "--tb=no", f"--timeout={SECONDS}", *options, *tests)
        words = ("PASSED", "FAILED", "ERROR")
        return {word: [line.removeprefix(f"{word} ") for line in lines if line.startswith(f"{word} ")] for word in words}

    def collect(self, tests: Sequence[str]) -> list[str]:
        """The ids of the tests that would be run."""
        return [line for line in self._pytest("--collect-only", *tests) if "::" in line]

    def _pytest(self, *arguments: str) -> list[str]:
        """The lines that pytest prints."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        order = [str(self.folder), ["-q", "-p", "no:cacheprovider", "-p", "pytest_timeout", *arguments]]
        print(json.dumps(order), file=self._process.stdin, flush=True)
        return [line.rstrip("\n") for line in takewhile(lambda line: line != f"{END}\n", self._process.stdout)]

    def imports_its_own_files(self) -> bool:
        """Whether a test in the copy runs the copy's package and kernels: each reports where it was found."""
        probe = self.folder / "tests" / "test_where.py"
        probe.write_text(WHERE, encoding="utf-8")
        passed = self.run([f"tests/{probe.name}"])["PASSED"]
        probe.unlink()
        return len(passed) == 1


WHERE = """
from pathlib import Path

import visattn
import visattn.kernels.primitives as primitives

def test_where():
    here = Path(__file__).resolve().parent.parent
    assert Path(visattn.__file__).resolve() == here / "visattn" / "__init__.py"
    assert Path(primitives.__file__).resolve() == here / "kernels" / "primitives.py"
"""


@contextmanager
def copy_of_the_tree(interpreter: bool) -> Iterator[Copy]:
    with tempfile.TemporaryDirectory(prefix="visattn-mutants-") as name:
        copy = Copy(Path(name), interpreter)
        try:
            yield copy
        finally:
            copy.close()


def check_control(copy: Copy, mutants: Sequence[Mutant]) -> int:
    """Makes sure that the copy imports its own files, and that every killer passes on it as it is; returns how many tests ran.

    Raises:
        RuntimeError: not so.
    """
    if not copy.imports_its_own_files():
        raise RuntimeError(f"Python in {copy.folder} imports the package from elsewhere, where no fault is seeded")
    killers = sorted({m.killer for m in mutants})
    results = copy.run(sorted({whole(killer) for killer in killers}))
    silent = [k for k in killers if not any(name.startswith(k) for name in results["PASSED"])]
    broken = [name for word in ("FAILED", "ERROR") for name in results[word] if any(name.startswith(k) for k in killers)]
    if silent or broken:
        raise RuntimeError(f"without a fault every killer must pass; failed: {broken}; did not run: {silent}")
    return len(results["PASSED"])


def whole(killer: str) -> str:
    """What pytest is told to run for a killer's id: itself, or where it ends within its brackets, the test with all its parameters."""
    return killer if killer.endswith("]") else killer.partition("[")[0]


def seeded(text: str, mutant: Mutant) -> str:
    """The file's text with the fault in it."""
    if text.count(mutant.old) != 1:
        raise ValueError(f"{mutant.name}: {mutant.file} must hold {mutant.old!r} once, it does {text.count(mutant.old)} times")
    return text.replace(mutant.old, mutant.new)


def is_killed(copy: Copy, mutant: Mutant) -> bool:
    """Whether the named test fails with the fault in the copy, which is as before afterwards. An import that fails kills nothing."""
    path = copy.folder / mutant.file
    before = path.read_text(encoding="utf-8")
    path.write_text(seeded(before, mutant), encoding="utf-8")
    try:
        failed = copy.run([whole(mutant.killer)], "-x")["FAILED"]
    finally:
        path.write_text(before, encoding="utf-8")
    return any(name.startswith(mutant.killer) for name in failed)


def try_all(mutants: Sequence[Mutant], control: bool = True) -> dict[Mutant, bool]:
    """For each whether it was killed: those of the interpreter in one process, the others in another."""

    def attempt(interpreter: bool) -> dict[Mutant, bool]:
        chosen = [m for m in mutants if m.interpreter == interpreter]
        if not chosen:
            return {}
        with copy_of_the_tree(interpreter) as copy:
            if control:
                where = "in the interpreter" if interpreter else "in PyTorch"
                print(f"without a fault {check_control(copy, chosen)} tests pass {where}, on a copy that imports its own files", flush=True)
            return {mutant: is_killed(copy, mutant) for mutant in chosen}

    with ThreadPoolExecutor(2) as pool:
        in_pytorch, in_interpreter = pool.map(attempt, (False, True))
    found = in_pytorch | in_interpreter
    return {mutant: found[mutant] for mutant in mutants}


def table(killed: dict[Mutant, bool]) -> str:
    rows = [[m.name, m.file, f"{'killed by' if dead else '**survived**'} {m.killer}"] for m, dead in killed.items()]
    return report.markdown_table(["fault", "file", "what became of it"], rows)


def figures() -> list[Figure]:
    killed = try_all(MUTANTS)
    print(table(killed))
    found = f"{sum(killed.values())} of {len(killed)} found by the test named for each"
    return [Figure(f"faults seeded into {len({m.file for m in MUTANTS})} files", found, "all", all(killed.values()))]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.reliability.mutants", description=__doc__)
    parser.add_argument(
        "words", nargs="*", metavar="WORD", help="try faults with one of these in name, file or killer; all if none is given"
    )
    words = parser.parse_args(arguments).words
    killed = try_all([m for m in MUTANTS if not words or any(word in f"{m.name} {m.file} {m.killer}" for word in words)])
    print(table(killed))
    print(f"{sum(killed.values())} of {len(killed)} killed")
    return int(not all(killed.values()))


if __name__ == "__main__":
    sys.exit(main())
