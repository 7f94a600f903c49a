"""Where a result comes from: the commit and the versions that made it."""

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path


def commit() -> str | None:
    """The commit of the checkout that this package is imported from, with + if it was changed since.

    Outside of a checkout what VISATTN_COMMIT says, for a copy of one without its history; else None.
    """
    git = ("git", "-C", str(Path(__file__).parent))
    try:
        head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*git, "status", "--porcelain", "--untracked-files=no"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("VISATTN_COMMIT")
    return head + "+" * bool(changed)


def versions(*distributions: str) -> dict[str, str]:
    """Of Python and of those of the named distributions that are installed."""
    found = {"python": platform.python_version()}
    for name in distributions:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
