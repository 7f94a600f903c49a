"""What the package reads, writes, runs and connects to: its source is searched, and its commands are watched while they work."""

import ast
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import torch
from safetensors.torch import save_file

from visattn import checkpoint, experiment, models

from . import runs
from .figures import Figure

ROOT = Path(__file__).resolve().parent.parent.parent

FORBIDDEN = (
    "pickle.load", "pickle.loads", "pickle.Unpickler", "torch.load", "torch.hub", "torch.jit.load", "torch.package", "joblib.load",
    "marshal.load", "marshal.loads", "shelve.open", "dill.load", "dill.loads", "cloudpickle.load", "yaml.load", "numpy.load", "np.load",
    "eval", "exec", "os.system", "os.popen", "tarfile.open", "zipfile.ZipFile", "shutil.unpack_archive", "urllib.request.urlopen",
    "urllib.request.urlretrieve", "requests.get", "socket.socket", "tempfile.mktemp",
)  # fmt: skip
"""What turns foreign bytes into code, or fetches them. Data sets are fetched, and CIFAR-10's checked batches read, by torchvision."""

COMMANDS: dict[str, tuple[str, ...]] = {
    "models": ("models",),
    "train": ("train", "--model", "mlp_mnist", "--data", "digits", "--epochs", "1", "--out", "OUT/run"),
    "compare": ("compare", "--models", "mlp_mnist", "--seeds", "0", "--data", "digits", "--epochs", "1", "--out", "OUT/runs"),
    "evaluate": ("evaluate", "TRAINED/best.safetensors", "--out", "OUT/matrix.png"),
    "map": ("map", "OUT/untrained.safetensors", "--data", "digits", "--out", "OUT/attention.png"),
    "demo": ("demo", "--steps", "2", "--batch-size", "4", "--out", "OUT/demo"),
}

CONVERT = "import torch, visattn; print(visattn.convert.load(visattn.Attention(4), 'OUT/foreign.safetensors'))"


class Watched(NamedTuple):
    """What a command did to the world."""

    status: int
    said: str
    written: list[str]  # paths outside of its output folder
    unpickled: set[str]  # names that a pickle brought in
    connected: list[str]
    started: list[str]  # programs


def calls(path: Path) -> Iterator[tuple[int, str]]:
    """The line and the dotted name of every call and import in a file."""
    names: dict[str, str] = {}
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                top = alias.name.partition(".")[0]
                names[alias.asname or top] = alias.name if alias.asname else top
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            yield node.lineno, names.get(node.id, node.id)
        elif isinstance(node, ast.Attribute):
            dotted = ast.unparse(node)
            first, _, rest = dotted.partition(".")
            yield node.lineno, f"{names.get(first, first)}.{rest}"
        elif isinstance(node, ast.keyword) and node.arg in ("shell", "allow_pickle") and ast.unparse(node.value) != "False":
            yield node.value.lineno, f"{node.arg}="


def forbidden_calls(*folders: str) -> tuple[int, list[str]]:
    """How many files were searched, and where they hold what turns foreign bytes into code."""
    files = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    found = []
    for path in files:
        for line, name in calls(path):
            if name in FORBIDDEN or name.endswith("=") or (name.startswith("torch.load") and name != "torch.load"):
                found.append(f"{path.relative_to(ROOT)}:{line}: {name}")
    return len(files), found


def watch(code: str, folder: Path, out: Path) -> Watched:
    """Runs Python code that may write below `out`, and to the caches of PyTorch, Triton and matplotlib."""
    caches = folder / "caches"
    caches.mkdir(exist_ok=True)
    audit = folder / "audit.jsonl"
    audit.unlink(missing_ok=True)
    places = ("TMPDIR", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
    environment = os.environ | {name: str(caches) for name in places} | {
        "PYTHONPATH": f"{Path(__file__).parent / 'audited'}{os.pathsep}{ROOT}",
        "VISATTN_AUDIT": str(audit), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    result = subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True, check=False)
    written, unpickled, connected, started = [], set(), [], []
    libraries = (matplotlib.get_cachedir(), matplotlib.get_configdir())
    allowed = tuple(str(Path(path).resolve()) for path in (out, caches, *libraries, os.devnull))
    for event, _, *what in map(json.loads, audit.read_text(encoding="utf-8").splitlines()):
        if event == "pickle.find_class":
            unpickled.add(".".join(what))
        elif event.startswith("socket."):
            connected.append(what[1])
        elif event in ("subprocess.Popen", "os.system", "os.exec"):
            started.append(Path(what[0]).name)
        elif not what[0].startswith(allowed):
            written.append(f"{event} {what[0]}")
    return Watched(result.returncode, result.stdout + result.stderr, written, unpickled, connected, started)


def commands(folder: Path, names: Sequence[str]) -> dict[str, Watched]:
    """Each command, watched; `evaluate` reads the checkpoint of `train`, which comes before it."""
    found = {}
    for name in names:
        out = folder / f"of-{name}"
        out.mkdir()
        if name == "map":
            weights, description = untrained("cnn_late_attention")
            checkpoint.save(out / "untrained.safetensors", weights, description)
        words = [word.replace("OUT", str(out)).replace("TRAINED", str(folder / "of-train" / "run")) for word in COMMANDS[name]]
        device = ["--device", "cpu"] if name in ("train", "compare", "evaluate", "demo") else []
        found[name] = watch(f"import sys; from visattn.cli import main; sys.exit(main({words + device!r}))", folder, out)
    return found


def convert(folder: Path) -> Watched:
    """`visattn.convert.load`, watched."""
    out = folder / "of-convert"
    out.mkdir()
    layer = {f"conv_{name}.{part}": torch.zeros((4, 4, 1, 1) if part == "weight" else 4) for name in ("query", "key", "value")
             for part in ("weight", "bias")}  # fmt: skip
    save_file(layer, out / "foreign.safetensors")
    return watch(CONVERT.replace("OUT", str(out)), folder, out)


def wrong_with(name: str, seen: Watched) -> list[str]:
    """What a command should not have done. The demo's two trainings are processes of its own, and tell it their results in pickles."""
    own = ("multiprocessing.", "visattn.demo.", "torch.device", "pathlib.") if name == "demo" else ("\0",)
    wrong = [f"writes: {path}" for path in seen.written]
    wrong += [f"unpickles {dotted}" for dotted in seen.unpickled if not dotted.startswith(own)]
    wrong += [f"connects to {address}" for address in seen.connected]
    wrong += [f"starts {program}" for program in seen.started if program not in ("git", "ldconfig", "fc-list", "lscpu", "uname")]
    if seen.status:
        wrong.append(f"exit status {seen.status}: {seen.said[-500:]}")
    return [f"{name} {what}" for what in wrong]


HOSTILE: dict[str, Any] = {
    "a list": [],
    "nothing": {},
    "settings that are none": {"settings": 1, "width": 10, "classes": []},
    "settings of nobody": {"settings": {"command": "rm"}, "width": 10, "classes": []},
    "a model that is a path": {"model": "../../etc/passwd"},
    "a width beyond memory": {"width": 10**15},
    "a negative width": {"width": -1},
    "a width that is text": {"width": "ten"},
    "classes that are none": {"classes": None},
    "a normalisation of one number": {"normalization": 3},
    "a device that is none": {"width": 7},
}
"""Descriptions in place of, or as changes to, one that `visattn train` writes."""


def untrained(model: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """What a checkpoint of the model holds."""
    settings = experiment.settings_of(model, {"data": "digits"})
    weights = {f"model.{name}": t for name, t in models.create_model(model, 10).state_dict().items()}
    return weights, {"settings": settings.for_file(), "classes": list("0123456789"), "width": 10}


def hostile_checkpoints(folder: Path) -> list[str]:
    """Checkpoints whose sums are right and whose contents are not: what was neither refused with a sentence nor harmless."""
    weights, right = untrained("mlp_mnist")
    wrong = []
    for what, change in HOSTILE.items():
        bad = change
        if isinstance(change, dict) and change and "settings" not in change:
            of_run = {name: value for name, value in change.items() if name in right}
            bad = right | of_run | {"settings": right["settings"] | {name: value for name, value in change.items() if name not in right}}
        checkpoint.save(folder / "bad.safetensors", weights, bad)
        try:
            experiment.model_of(folder / "bad.safetensors")
            wrong.append(f"{what}: read")
        except RuntimeError:
            pass
        except Exception as error:
            wrong.append(f"{what}: {error!r}")
    return wrong


def planted_links(folder: Path) -> list[str]:
    """Links in an output folder, to files elsewhere: what was written through one."""
    out, wrong = folder / "linked", []
    out.mkdir()
    victims = {}
    for name in ("metrics.jsonl", "settings.json", "result.json", "report.md", "curves.png", "best.safetensors"):
        victims[name] = folder / f"victim-{name}"
        victims[name].write_text("precious")
        if name != "settings.json":  # a run is recognised by it
            (out / name).symlink_to(victims[name])
    assert runs.finish(out) == 0, runs.said(out)
    wrong += [f"{name} was written through a link" for name, victim in victims.items() if victim.read_text() != "precious"]
    (out / ".lock").unlink()
    (out / ".lock").symlink_to(folder / "not-there")
    (out / "result.json").unlink()
    if runs.finish(out) != 2 or (folder / "not-there").exists():
        wrong.append(".lock was written through a link")
    return wrong


def audit_dependencies() -> tuple[int, int, list[str]] | None:
    """pip-audit over what is installed: packages judged, not judged, and known vulnerabilities; None where it is not installed."""
    if importlib.util.find_spec("pip_audit") is None:
        return None
    result = subprocess.run(
        [sys.executable, "-m", "pip_audit", "--format", "json", "--skip-editable", "--progress-spinner", "off"],
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    try:
        packages = json.loads(result.stdout)["dependencies"]
    except ValueError:
        return 0, 0, []
    judged = [package for package in packages if "vulns" in package]
    return len(judged), len(packages) - len(judged), [f"{p['name']} {v['id']}" for p in judged for v in p["vulns"]]


def figures() -> list[Figure]:
    searched, found = forbidden_calls("visattn", "kernels", "bench")
    with tempfile.TemporaryDirectory(prefix="visattn-") as name:
        folder = Path(name)
        seen = commands(folder, tuple(COMMANDS)) | {"convert": convert(folder)}
        wrong = [problem for what, watched in seen.items() for problem in wrong_with(what, watched)]
        hostile, linked = hostile_checkpoints(folder), planted_links(folder)
    audited = audit_dependencies()
    for problem in (*found, *wrong, *hostile, *linked):
        print(problem)
    programs = Counter(program for watched in seen.values() for program in watched.started)
    return [
        Figure(f"calls that turn foreign bytes into code, {searched} files of visattn, kernels, bench", str(len(found)), "0", not found),
        Figure(
            f"commands watched by an audit hook: {', '.join(seen)}",
            f"{len(wrong)} writes outside of --out, unpickled names or connections; started: {', '.join(sorted(programs)) or 'nothing'}",
            "0; git, and what libraries ask the system",
            not wrong,
        ),
        Figure("checkpoints with right sums and wrong contents", f"{len(hostile)} of {len(HOSTILE)} not refused", "0", not hostile),
        Figure("links planted in an output folder", f"{len(linked)} of 6 written through", "0", not linked),
        Figure(
            "dependencies with known vulnerabilities (pip-audit)",
            f"{len(audited[2])} in {audited[0]} packages, {audited[1]} could not be looked up" if audited else "pip-audit is not installed",
            "0",
            not audited[2] if audited and audited[0] and not audited[1] else None,
        ),
    ]
