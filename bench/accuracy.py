"""Test accuracies that were really measured: `python -m bench.accuracy file RUN …` files finished runs of `visattn train`,
`python -m bench.accuracy table` writes the README's section from what is filed and from nothing else.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from visattn import comparison, files, models
from visattn.recipes import RECIPES

from .readme import Section

RESULTS = Path(__file__).resolve().parent / "results" / "accuracy"
SECTION = Section("accuracy", "python -m bench.accuracy table")


def file_runs(folders: list[Path]) -> None:
    """Copies the result.json of each finished run to `RESULTS`, under a name that tells the run."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    for folder in folders:
        result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        parts = (result["model"], result["attention"], f"{result['epochs']}epochs", result["precision"], f"seed{result['seed']}")
        files.write(RESULTS / ("-".join(filter(None, parts)) + ".json"), json.dumps(result, indent=1) + "\n")


def filed() -> list[dict[str, Any]]:
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("*.json"))]


def section(results: list[dict[str, Any]]) -> str:
    """The README's section: runs by the whole recipe ranked, shortened ones listed, and what was not run."""
    whole = [r for r in results if r["epochs"] == RECIPES[r["model"]].epochs]
    short = sorted((r for r in results if r not in whole), key=lambda r: models.names().index(r["model"]))
    text: list[str] = []
    if whole:
        text += ["Trained by the whole recipe, last weights, test images never looked at before the end:\n"]
        text += [comparison.markdown(comparison.ranking(whole))]
    if short:
        lines = []
        for r in short:
            name = r["model"] + (f" ({r['attention']})" if r["attention"] else "")
            accuracy, time = f"{100 * r['test_accuracy']:.2f}", f"{r['seconds_an_epoch']:.0f} s"
            lines.append([name, r["data"].rpartition("/")[2], str(r["epochs"]), accuracy, str(r["seed"]), time])
        text += ["Shortened, to show that each trains; not to be compared with anything:\n"]
        header = ["model (attention)", "images", "epochs", "test accuracy, %", "seed", "time an epoch"]
        text += [comparison.report.markdown_table(header, lines)]
    missing = [name for name in models.names() if not any(r["model"] == name for r in whole)]
    few = sorted({r["model"] for r in whole if sum(o["model"] == r["model"] and o["attention"] == r["attention"] for o in whole) < 3})
    commits: dict[tuple[str, ...], set[str]] = {}
    for r in results:
        place = (r["data"], r["processor"], r["precision"], f"torch {r['versions']['torch']}")
        commits.setdefault(place, set()).add(f"`{r['commit'] or 'unknown'}`")
    sources = [f"{', '.join(place)}, commit {', '.join(sorted(found))}" for place, found in sorted(commits.items())]
    text += [
        f"Not run by the whole recipe: {', '.join(missing) or 'nothing'}. With fewer than three seeds: {', '.join(few) or 'nothing'}.\n"
    ]
    if sources:
        text += [f"Measured: {'; '.join(sources)}.\n"]
    return "\n".join(text)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.accuracy", description=__doc__)
    commands = parser.add_subparsers(required=True)
    file = commands.add_parser("file", help="file finished runs")
    file.add_argument("runs", nargs="+", type=Path, help="folders of `visattn train` or in one of `visattn compare`")
    file.set_defaults(command=lambda options: file_runs(options.runs))
    table = commands.add_parser("table", help="write the README's section")
    table.set_defaults(command=lambda _: SECTION.write(section(filed())))
    options = parser.parse_args()
    options.command(options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
