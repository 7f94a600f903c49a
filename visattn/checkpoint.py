"""Checkpoints: one safetensors file each, with what is no tensor, and a checksum, as JSON in its header. Nothing is ever unpickled.

A checkpoint takes the place of the one before only when all of it is on the disk, and that one is kept beside it.
"""

import json
import zlib
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialized
from torch import Tensor

from .files import replaced

DESCRIPTION, CHECKSUM = "visattn", "visattn.crc32"


def save(path: Path, tensors: dict[str, Tensor], description: dict[str, Any], *, keep_previous: bool = False) -> None:
    """Writes the file whole, or not at all; `description` is anything that JSON can hold.

    With `keep_previous`, what was at `path` moves to `previous(path)` once the new file is complete.
    """
    held = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    text = json.dumps(description)
    with replaced(path) as temporary:
        temporary.write_bytes(serialized(held, {DESCRIPTION: text, CHECKSUM: _checksum(held, text)}))
        if keep_previous and path.exists():
            path.replace(previous(path))


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `save` wrote.

    Raises:
        RuntimeError: the file is not there, is damaged, or is not a checkpoint of visattn.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise RuntimeError(f"there is no checkpoint {path}") from None
    except (SafetensorError, OSError) as error:
        raise RuntimeError(f"{path} is damaged ({error}); nothing was loaded from it") from None
    if DESCRIPTION not in header:
        raise RuntimeError(f"{path} holds tensors, but is not a checkpoint that visattn wrote")
    if header.get(CHECKSUM) != _checksum(tensors, header[DESCRIPTION]):
        raise RuntimeError(f"{path} is damaged (its checksum is wrong); nothing was loaded from it")
    return tensors, json.loads(header[DESCRIPTION])


def previous(path: Path) -> Path:
    return path.with_name(f"previous-{path.name}")


def load_newest(path: Path) -> tuple[dict[str, Tensor], dict[str, Any], list[str]] | None:
    """The checkpoint at `path`, or if it is missing or damaged the one before, and what was wrong; None if there never was any.

    Raises:
        RuntimeError: there are files, and none of them can be read.
    """
    problems: list[str] = []
    for candidate in (path, previous(path)):
        if candidate.exists():
            try:
                return *load(candidate), problems
            except RuntimeError as error:
                problems.append(str(error))
    if problems:
        raise RuntimeError("; ".join(problems))
    return None


def _checksum(tensors: dict[str, Tensor], text: str) -> str:
    value = zlib.crc32(text.encode())
    for name in sorted(tensors):
        value = zlib.crc32(tensors[name].flatten().view(torch.uint8).numpy().data, zlib.crc32(name.encode(), value))
    return f"{value:08x}"
