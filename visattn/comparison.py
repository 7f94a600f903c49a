"""`visattn compare`: several models, several seeds, one ranking."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

from rich.console import Console

from . import experiment, files, models, processes, report
from .recipes import PUBLISHED, RECIPES


class Row(NamedTuple):
    """A model with one kind of attention: test accuracies in percent, of ours a run each and as published."""

    model: str
    attention: str | None
    ours: tuple[float, ...]
    published: tuple[float, ...]

    @property
    def name(self) -> str:
        return self.model + (f" ({self.attention})" if self.attention else "")


def compare(runs: Iterable[experiment.Settings], load: experiment.Loader, out: Path, console: Console) -> str:
    """Trains what is not trained yet, each in its own folder under `out`, and returns the ranking in Markdown.

    The ranking and its picture are written anew after every run, so that what is there is always true.
    """
    results: list[dict[str, Any]] = []
    table = ""
    for settings in runs:
        results.append(experiment.train(settings, load, out / experiment.run_name(settings), resume=True, console=console))
        rows = ranking(results)
        table = markdown(rows)
        if processes.is_first():
            heading = f"# Test accuracy on {settings.data.partition(':')[0]}, {experiment.epochs_in_words(settings.epochs)}"
            files.write(out / "ranking.md", f"{heading}\n\n{table}")
            report.ranking(out / "ranking.png", [(row.name, row.ours, row.published) for row in rows], "test accuracy (%)")
    return table


def ranking(results: Iterable[dict[str, Any]]) -> list[Row]:
    """Results of runs, a row for each model and kind of attention, the best mean first."""
    grouped: dict[tuple[str, str | None], list[tuple[int, float]]] = defaultdict(list)
    for result in results:
        grouped[result["model"], result["attention"]].append((result["seed"], 100 * result["test_accuracy"]))
    rows = []
    for key, found in grouped.items():
        published = PUBLISHED[key].accuracies if key in PUBLISHED else ()
        rows.append(Row(*key, tuple(accuracy for _, accuracy in sorted(found)), published))
    return sorted(rows, key=lambda row: -mean(row.ours))


def markdown(rows: Sequence[Row]) -> str:
    """The ranking as a table: mean, each run, the published mean and how far ours is from it."""
    lines = []
    for place, row in enumerate(rows, 1):
        published = f"{mean(row.published):.2f} ({_runs(row.published)})" if row.published else "–"
        difference = f"{mean(row.ours) - mean(row.published):+.2f}" if row.published else "–"
        lines.append([str(place), row.name, f"{mean(row.ours):.2f}", _runs(row.ours), published, difference])
    return report.markdown_table(["", "model (attention)", "mean test accuracy, %", "each run", "published", "difference"], lines)


def overview() -> str:
    """Every model: its kinds of attention, its parameters, its recipe."""
    lines = []
    for name in models.names():
        recipe = RECIPES[name]
        parameters = sum(p.numel() for p in models.create_model(name, recipe.head or (5 if name == "vit_flat" else 10)).parameters())
        trained = f"{recipe.data}, {recipe.epochs} epochs of batches of {recipe.batch_size}, Adam {recipe.learning_rate:g}"
        lines.append(
            [name, ", ".join(models.attentions(name)) or "–", "×".join(map(str, models.input_shape(name))), f"{parameters:,}", trained]
        )
    return report.markdown_table(["model", "kinds of attention, the default first", "images", "parameters", "recipe"], lines)


def _runs(accuracies: Sequence[float]) -> str:
    return ", ".join(f"{a:.2f}" for a in accuracies)
