"""What was found is kept in bench/results, part by part, each with its commit, and the README's section is written from it."""

import dataclasses
import json
from typing import Any

import torch

from bench.environment import environment
from bench.readme import Section
from bench.rows import RESULTS
from visattn import files

from .figures import Figure, markdown

FILE = RESULTS / "reliability.json"
SECTION = Section("reliability", "python -m tests.reliability --readme")

Parts = dict[str, dict[str, Any]]
"""By name: environment, seconds, figures."""


def place() -> dict[str, Any]:
    """Where figures are found that are to be kept; ask before the first of them is.

    Raises:
        SystemExit: the code is not that of a commit, so that nobody could find these figures again.
    """
    found = environment(torch.device("cpu"))
    if found["commit"] is None or found["commit"].endswith("+"):
        raise SystemExit("figures are kept at a commit, and the code is in none, or has been changed since; commit, or leave out --file")
    return found


def keep(name: str, figures: list[Figure], seconds: float, found_at: dict[str, Any]) -> None:
    """Puts a part's figures in the place of those that it had."""
    told = {"environment": found_at, "seconds": round(seconds), "figures": [dataclasses.asdict(figure) for figure in figures]}
    files.write(FILE, json.dumps(read() | {name: told}, indent=1) + "\n")


def read() -> Parts:
    return json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else {}


def section(parts: Parts) -> str:
    """The table of all parts, below it where and when each was tried, and what can be unfolded."""
    if not parts:
        return "Nothing is filed."
    figures = [Figure(**figure) for part in parts.values() for figure in part["figures"]]
    places: dict[str, list[str]] = {}
    for name, part in parts.items():
        at = part["environment"]
        where = f"{at['device']}, torch {at['torch']}, triton {at['triton']}, commit `{at['commit']}`"
        places.setdefault(where, []).append(f"{name} ({part['seconds']} s)")
    told = "; ".join(f"{', '.join(names)}: {where}" for where, names in places.items())
    unfolded = [f"<details><summary>{f.what}: all of them</summary>\n\n{f.details}\n</details>" for f in figures if f.details]
    return "\n".join([markdown(figures), f"`make reliability`. {told}.", *(f"\n{text}" for text in unfolded)])
