"""Checkpoints: one safetensors file each, with what is no tensor, and a checksum, as JSON in its header. Nothing is ever unpickled.

A checkpoint takes the place of the one before only when all of it is on the disk, and that one is kept beside it.
"""

import json
import zlib
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .files import replaced

HEADER = "visattn"


def save(path: Path, tensors: dict[str, Tensor], description: dict[str, Any], *, keep_previous: bool = False) -> None:
    """Writes the file whole, or not at all; `description` is anything that JSON can hold.

    With `keep_previous`, what was at `path` moves to `previous(path)` once the new file is complete.
    """
    held = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    header = {"description": description, "crc32": _checksum(held)}
    with replaced(path) as temporary:
        save_file(held, temporary, {HEADER: json.dumps(header)})
        if keep_previous and path.exists():
            path.replace(previous(path))


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `save` wrote.

    Raises:
        RuntimeError: the file is not there, is damaged, or is not a checkpoint of visattn.
    """
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(HEADER)
            if text is None:
                raise RuntimeError(f"{path} holds tensors, but is not a checkpoint that visattn wrote")
            header = json.loads(text)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise RuntimeError(f"there is no checkpoint {path}") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise RuntimeError(f"{path} is damaged ({error}); nothing was loaded from it") from None
    if _checksum(tensors) != header["crc32"]:
        raise RuntimeError(f"{path} is damaged (its checksum is wrong); nothing was loaded from it")
    return tensors, header["description"]


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


def _checksum(tensors: dict[str, Tensor]) -> int:
    value = 0
    for name in sorted(tensors):
        value = zlib.crc32(tensors[name].flatten().view(torch.uint8).numpy().data, zlib.crc32(name.encode(), value))
    return value
