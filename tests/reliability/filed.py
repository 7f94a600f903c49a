"""What was found is kept in bench/results, part by part, each with its commit; the README's section and a page of its own say it."""

import dataclasses
import json
from typing import Any

import torch

from bench.environment import environment
from bench.readme import README, Section
from bench.rows import RESULTS
from visattn import files

from .figures import Figure, markdown

FILE = RESULTS / "reliability.json"
PAGE = RESULTS / "reliability.md"
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


def write() -> None:
    """The README's section and the page, from what is kept."""
    parts = read()
    SECTION.write(section(parts))
    files.write(PAGE, page(parts))


def section(parts: Parts) -> str:
    """The table of all parts, and below it where to read more."""
    if not parts:
        return "Nothing is filed."
    commits = sorted({part["environment"]["commit"] for part in parts.values()})
    places = sorted({_place(part) for part in parts.values()})
    where = f"{'; '.join(places)}, commit {', '.join(f'`{commit}`' for commit in commits)}"
    figures = _figures(parts)
    off, untold = (sum(figure.right is right for figure in figures) for right in (False, None))
    counted = f"{len(figures)} figures, {off} not as wanted, {untold} not verified here"
    return (
        f"{counted}: {where}. [Every single attempt]({PAGE.relative_to(README.parent)}).\n\n"
        f"<details><summary>The table</summary>\n\n{markdown(figures)}\n</details>\n"
    )


def page(parts: Parts) -> str:
    """Part by part: when and where it was tried, the table, and every single attempt where a reader would want to see them."""
    text = ["# Reliability\n", f"Written by `{SECTION.command}` from {FILE.name}.\n"]
    for name, part in parts.items():
        figures = _figures({name: part})
        where = f"{_place(part)}, commit `{part['environment']['commit']}`"
        text += [f"## {name}\n", f"{where}, {part['seconds']} s.\n", markdown(figures)]
        text += [f"### {figure.what}: all of them\n\n{figure.details}" for figure in figures if figure.details]
    return "\n".join(text)


def _place(part: dict[str, Any]) -> str:
    at = part["environment"]
    return f"{at['device']}, torch {at['torch']}, triton {at['triton']}"


def _figures(parts: Parts) -> list[Figure]:
    return [Figure(**figure) for part in parts.values() for figure in part["figures"]]
