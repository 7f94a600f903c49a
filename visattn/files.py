"""Files are written whole or not at all, and a folder has one writer."""

import fcntl
import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class DamagedError(RuntimeError):
    """A file does not hold what was written to it."""


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`; what the block has written there takes its place, once the block has ended well.

    After an error, or a crash at any moment, `path` holds what it held before. A crash leaves the temporary file, which no reader
    takes for anything and `remove_leftovers` removes.

    Raises:
        IsADirectoryError: path is a folder.
    """
    if path.is_dir():
        raise IsADirectoryError(f"{path} must be the path of a file, it is a folder")
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write(path: Path, content: str | bytes) -> None:
    """Replaces a file's content."""
    with replaced(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def append(path: Path, line: str) -> None:
    """Adds a line to a file, and returns when it is on the disk. After a crash the last line may be torn."""
    with path.open("a", encoding="utf-8") as file:
        file.write(f"{line}\n")
        file.flush()
        os.fsync(file.fileno())


def read_json(path: Path) -> Any:
    """What a JSON file holds.

    Raises:
        DamagedError: it holds none.
    """
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise DamagedError(f"{path} is damaged ({error}); nothing was read from it") from None


def remove_leftovers(folder: Path) -> None:
    """Removes what killed processes began to write there. Only for who holds the folder's lock."""
    for path in folder.glob(".*.partial"):
        path.unlink()


@contextmanager
def locked(folder: Path, *, wait: bool = False) -> Iterator[None]:
    """Within the block, no other process holds this lock on the folder. The system takes it back however a process ends.

    Raises:
        RuntimeError: another process holds it, and `wait` is False.
    """
    with open(folder / ".lock", "w", opener=_not_through_a_link) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise RuntimeError(f"another process is writing to {folder}; wait for it, or choose another folder") from None
        yield


def _not_through_a_link(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)
