"""Files that are not what was written: checkpoints, the other files of a run, data sets, archives. They are read right, or not at all."""

import functools
import http.server
import io
import json
import pickle
import random
import shutil
import struct
import tarfile
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torchvision import datasets

from visattn import checkpoint, data

from . import runs
from .figures import Figure
from .runs import Fault

FORMATS = ("png", "jpeg", "gif", "webp", "bmp", "tiff", "ppm")


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def regions(content: bytes) -> dict[str, tuple[int, int]]:
    """Where the parts of a checkpoint begin and end."""
    header = 8 + int.from_bytes(content[:8], "little")
    description = content.index(b'"visattn":"')
    checksum = content.index(b'"visattn.crc32":"')
    return {
        "length of the header": (0, 8),
        "header": (8, header),
        "description": (description, content.index(b'",', description) if description < checksum else header),
        "checksum": (checksum, checksum + len('"visattn.crc32":"01234567"')),
        "tensors": (header, len(content)),
    }


def damaged(content: bytes, chance: random.Random) -> Iterator[tuple[str, bytes]]:
    """One of each kind of damage to a checkpoint, what it is called first."""
    for name, (begin, end) in regions(content).items():
        at, flipped = chance.randrange(begin, end), bytearray(content)
        flipped[at] ^= 1 << chance.randrange(8)
        yield f"bit flipped, {name}", bytes(flipped)
    yield "truncated", content[: chance.randrange(1, len(content))]
    begin = chance.randrange(len(content) // 4096) * 4096
    zeroed = bytearray(content)
    zeroed[begin : begin + 4096] = bytes(4096)
    yield "a page of zeros", bytes(zeroed[: len(content)])
    yield "empty", b""
    yield "bytes after its end", content + b"\0"


def checkpoints(folder: Path, rounds: int, seed: int) -> tuple[Counter[str], list[str]]:
    """Damage of each kind, so many rounds of it: how often each was tried, and what was read in spite of it."""
    chance, tried, wrong = random.Random(seed), Counter[str](), []
    path = folder / "c.safetensors"
    tensors = {
        "a": torch.randn(60, 60, generator=seeded(seed)),
        "b": torch.tensor(2.5, dtype=torch.bfloat16),
        "c": torch.arange(30),
        "d": torch.empty(0),
    }
    checkpoint.save(path, tensors, {"epoch": 1, "loss": 0.1, "classes": ["ä", "b"]})
    content = path.read_bytes()
    for _ in range(rounds):
        for kind, bad in damaged(content, chance):
            tried[kind] += 1
            path.write_bytes(bad)
            try:
                checkpoint.load(path)
                if bad != content:
                    wrong.append(f"{kind}: read")
            except RuntimeError:
                pass
            except Exception as error:
                wrong.append(f"{kind}: {error!r}")
    return tried, wrong


class Folders:
    """A run that nothing happened to, and copies of one that was killed in its middle, to be damaged and gone on with."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.whole, self.begun = folder, folder / "whole", folder / "begun"
        assert runs.finish(self.whole) == 0, runs.said(self.whole)
        process, _ = runs.start(self.begun, Fault("kill", 70))
        process.join(120)
        assert checkpoint.previous(self.begun / "last.safetensors").exists()

    def go_on(self, source: Path, hurt: Callable[[Path], Any], told: str, *, ends: bool, killed_at: int = 0) -> list[str]:
        """What is wrong when a copy of `source` is hurt and gone on with: it must say `told`, and end with the same bits, or not at all.

        killed_at: the change of the file system before which it is killed, and then gone on with again.
        """
        out = Path(tempfile.mkdtemp(dir=self.folder)) / "run"
        shutil.copytree(source, out)
        hurt(out)
        before = {path.name: path.read_bytes() for path in out.iterdir()}
        if killed_at:
            runs.start(out, Fault("kill", killed_at))[0].join(120)
        status, wrong = runs.finish(out), []
        if told not in runs.said(out):
            wrong.append(f"said {runs.said(out)[-300:]!r}, not {told!r}")
        if status != (0 if ends else 2):
            wrong.append(f"exit status {status}: {runs.said(out)[-300:]}")
        elif ends:
            wrong += runs.differences(self.whole, out)
        elif {path.name: path.read_bytes() for path in out.iterdir()} != before:
            wrong.append("the folder was touched")
        shutil.rmtree(out.parent)
        return wrong


def rewrite(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], Any]:
    return lambda out: (out / name).write_bytes(change((out / name).read_bytes()))


def flip(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 16]) + content[middle + 1 :]


def generations(folders: Folders, number: int, seed: int) -> list[str]:
    """So many runs whose newest checkpoint is damaged go on from the one before, and say so; each is killed once more on its way."""
    chance, wrong = random.Random(seed), []
    content = (folders.begun / "last.safetensors").read_bytes()
    kinds = list(damaged(content, chance))
    for trial in range(number):
        kind, bad = kinds[trial % len(kinds)]
        found = folders.go_on(
            folders.begun,
            rewrite("last.safetensors", lambda _, bad=bad: bad),
            "going on from the checkpoint before",
            ends=True,
            killed_at=1 + trial % 27,
        )
        wrong += [f"{kind}, killed at {1 + trial % 27}: {problem}" for problem in found]
    return wrong


def _both(out: Path) -> None:
    for path in (out / "last.safetensors", checkpoint.previous(out / "last.safetensors")):
        path.write_bytes(flip(path.read_bytes()))


def _other_seed(content: bytes) -> bytes:
    return json.dumps(json.loads(content) | {"seed": 6}).encode()


OTHER_FILES: tuple[tuple[str, str, Callable[[Path], Any], str, bool], ...] = (
    ("both checkpoints", "begun", _both, "is damaged", False),
    ("metrics, a bit", "begun", rewrite("metrics.jsonl", flip), "metrics.jsonl is damaged", False),
    ("metrics, missing", "begun", lambda out: (out / "metrics.jsonl").unlink(), "metrics.jsonl is damaged", False),
    ("metrics, torn last line", "begun", rewrite("metrics.jsonl", lambda content: content + b'{"epo'), "going on at", True),
    ("settings, truncated", "begun", rewrite("settings.json", lambda content: content[:50]), "settings.json is damaged", True),
    ("settings, missing", "begun", lambda out: (out / "settings.json").unlink(), "going on at", True),
    ("settings, others", "begun", rewrite("settings.json", _other_seed), "seed was 6, now 5", False),
    ("result, truncated", "whole", rewrite("result.json", lambda content: content[:50]), "result.json is damaged", True),
)


def other_files(folders: Folders) -> list[str]:
    """Damage to what else a run keeps: gone on with where that can be right, else refused with nothing touched."""
    wrong = []
    for what, source, hurt, told, ends in OTHER_FILES:
        wrong += [f"{what}: {problem}" for problem in folders.go_on(getattr(folders, source), hurt, told, ends=ends)]
    return wrong


def best_weights(folders: Folders) -> list[str]:
    """Damaged best weights are not judged in silence: what is kept instead is said."""
    out = folders.folder / "best"
    shutil.copytree(folders.begun, out)
    rewrite("best.safetensors", flip)(out)
    status, wrong = runs.finish(out), []
    if status or "the best weights of before are lost" not in runs.said(out):
        wrong.append(f"best weights: exit status {status}: {runs.said(out)[-300:]}")
    checkpoint.load(out / "best.safetensors")
    return wrong


def images(folder: Path, number: int, seed: int) -> tuple[Counter[str], list[str]]:
    """Damaged image files: how many were read and how many refused, and what was raised other than the one error."""
    chance, came, wrong = random.Random(seed), Counter[str](), []
    picture = Image.fromarray(torch.randint(0, 256, (20, 20, 3), dtype=torch.uint8, generator=seeded(seed)).numpy())
    for form in FORMATS:
        buffer = io.BytesIO()
        picture.save(buffer, form)
        for trial in range(number // len(FORMATS) + 1):
            bad = bytearray(buffer.getvalue())
            if trial % 4 == 0:
                bad = bad[: chance.randrange(len(bad))]
            else:
                bad[chance.randrange(min(len(bad), chance.choice((40, len(bad)))))] ^= 1 << chance.randrange(8)
            path = folder / f"image.{form}"
            path.write_bytes(bad)
            try:
                read = data.read_image(path, (3, 32, 32))
                came["read"] += 1
                if read.shape != (3, 32, 32):
                    wrong.append(f"{form}: {read.shape}")
            except RuntimeError:
                came["refused"] += 1
            except Exception as error:
                wrong.append(f"{form}: {error!r}")
    return came, wrong


def write_mnist(root: Path, number: int = 7) -> Path:
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    pixels = torch.randint(0, 256, (number, 28, 28), dtype=torch.uint8, generator=seeded(0))
    for part in ("train", "t10k"):
        for name, array in (("images-idx3", pixels), ("labels-idx1", torch.arange(number, dtype=torch.uint8))):
            header = struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
            (raw / f"{part}-{name}-ubyte").write_bytes(header + array.numpy().tobytes())
    return raw


def mnist(folder: Path, number: int, seed: int) -> tuple[Counter[str], list[str]]:
    """Damaged files of MNIST without their archives: structure is all that can be wrong; a pixel is what it is."""
    chance, came, wrong = random.Random(seed), Counter[str](), []
    raw = write_mnist(folder)
    for trial in range(number):
        path = chance.choice(sorted(raw.iterdir()))
        content = path.read_bytes()
        header = 16 if "images" in path.name else 8
        bad = bytearray(content)
        if trial % 3 == 0:
            bad = bad[: chance.randrange(len(bad))]
        else:
            bad[chance.randrange(header if trial % 3 == 1 else len(bad))] ^= 1 << chance.randrange(8)
        path.write_bytes(bad)
        try:
            read = data.load("mnist", (1, 28, 28), root=folder).train
            came["read"] += 1
            if trial % 3 < 2 or len(read.labels) != len(read.pixels) or not 0 <= read.labels.min() <= read.labels.max() < 10:
                wrong.append(f"{path.name}: read")
        except RuntimeError:
            came["refused"] += 1
        except Exception as error:
            wrong.append(f"{path.name}: {error!r}")
        path.write_bytes(content)
    return came, wrong


class Payload:
    """A pickle of it, once unpickled, makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self) -> tuple[Any, ...]:
        import os

        return os.mkdir, (self.folder,)


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    """Serves a folder, and says nothing."""

    def log_message(self, *arguments: Any) -> None:
        pass


def foreign_pickles(folder: Path) -> list[str]:
    """Pickles with code in them, in every place where a data set keeps its own: refused, and the code does not run."""
    ran, wrong = folder / "ran", []
    pickled = pickle.dumps(Payload(ran))
    pickle.loads(pickled)
    ran.rmdir()  # it would have worked

    batches = folder / "batches" / "cifar-10-batches-py"
    batches.mkdir(parents=True)
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"):
        (batches / name).write_bytes(pickled)
    processed = folder / "processed" / "MNIST" / "processed"
    processed.mkdir(parents=True)
    for name in ("training.pt", "test.pt"):
        torch.save(Payload(ran), processed / name)
    archive = folder / "tampered.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(batches, "cifar-10-batches-py")
        tar.add(batches / "batches.meta", "../escaped")

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(QuietHandler, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = datasets.CIFAR10.url
    datasets.CIFAR10.url = f"http://127.0.0.1:{server.server_port}/{archive.name}"
    try:
        cases = ("batches", "cifar10", False), ("processed", "mnist", False), ("archive", "cifar10", True)
        for place, name, download in cases:
            (folder / place).mkdir(exist_ok=True)
            before = sorted(path for path in folder.rglob("*") if path.name != ".lock")
            try:
                data.load(name, (3, 32, 32), root=folder / place, download=download)
                wrong.append(f"{place}: read")
            except RuntimeError as error:
                if download and "corrupted" not in str(error):
                    wrong.append(f"{place}: {error}")
            if ran.exists():
                wrong.append(f"{place}: unpickled")
            if (now := sorted(path for path in folder.rglob("*") if path.name != ".lock")) != before:
                wrong.append(f"{place}: {sorted({*now} - {*before})} is there")
    finally:
        datasets.CIFAR10.url = address
        server.shutdown()
        server.server_close()
    return wrong


def figures(seed: int = 0) -> list[Figure]:
    with tempfile.TemporaryDirectory(prefix="visattn-") as name:
        place = Path(name)
        for part in ("files", "runs", "images", "mnist", "pickles"):
            (place / part).mkdir()
        tried, read = checkpoints(place / "files", 300, seed)
        folders = Folders(place / "runs")
        fallen, other, best = generations(folders, 54, seed), other_files(folders), best_weights(folders)
        pictures, raised = images(place / "images", 2800, seed)
        numbers, misread = mnist(place / "mnist", 1200, seed)
        unpickled = foreign_pickles(place / "pickles")
    for problem in (*read, *fallen, *other, *best, *raised, *misread, *unpickled):
        print(problem)
    return [
        Figure(
            f"checkpoints damaged in {len(tried)} ways, seed {seed}",
            f"{len(read)} of {tried.total()} read, or refused with another error",
            "none",
            not read,
        ),
        Figure("newest checkpoint damaged, gone on with, killed", f"{len(fallen)} wrong in 54", "says so, the same bits", not fallen),
        Figure(
            "other files of a run damaged or missing",
            f"{len(other) + len(best)} wrong in {len(OTHER_FILES) + 1}",
            "the same bits, or refused and untouched",
            not other and not best,
        ),
        Figure(
            f"image files damaged, {len(FORMATS)} formats",
            f"{len(raised)} other errors; {pictures['refused']} refused, {pictures['read']} read",
            "refused by name, or read",
            not raised,
        ),
        Figure(
            "MNIST's files damaged, without their archives",
            f"{len(misread)} wrong in {numbers.total()}; {numbers['read']} with another pixel or label read",
            "structure: refused",
            not misread,
        ),
        Figure(
            "pickled code as CIFAR-10's batches, archive, MNIST's old form",
            f"{len(unpickled)} wrong in 3",
            "not run",
            not unpickled,
        ),
    ]
