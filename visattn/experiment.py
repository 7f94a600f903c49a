"""`visattn train`: one model trained into one folder, with everything that a reader of its result wants to see.

The folder holds settings.json (what was asked for), metrics.jsonl (a line for each check and each epoch), last.safetensors (to go
on from) and best.safetensors, and at the end result.json, report.md, curves.png and confusion.png.
"""

import json
import math
import time
import zlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn

from . import checkpoint, data, files, models, processes, provenance, report, training
from .device import describe, float32_precision
from .dispatch import use_backend
from .modules import AttentionLayer, explain
from .recipes import RECIPES, Recipe

SECONDS_BETWEEN_CHECKPOINTS = 60.0
"""About as much work as a killed process loses; a checkpoint is written at the first check after it."""

CHECKS_AN_EPOCH = 4
"""At least as many, so that a run on few images has curves too."""


@dataclass(frozen=True)
class Settings(Recipe):
    """Everything that a run's result depends on: the recipe as it was changed, and what it is applied to.

    The same settings give the same bits on the same CPU with the same number of threads.
    processes: how many share each batch.
    """

    model: str = ""
    attention: str | None = None
    seed: int = 0
    precision: str = "fp32"
    backend: str = "auto"
    compile: bool = False
    device: str = "cpu"
    processes: int = 1

    def for_file(self) -> dict[str, Any]:
        """As JSON holds it."""
        return json.loads(json.dumps(asdict(self)))

    @classmethod
    def from_file(cls, stored: dict[str, Any]) -> "Settings":
        """What `for_file` gave, in this version or an older one.

        Raises:
            RuntimeError: it was no version that this one knows.
        """
        if unknown := stored.keys() - {f.name for f in fields(cls)}:
            raise RuntimeError(f"the settings {', '.join(sorted(unknown))} are of another version of visattn")
        return cls(**stored | {"normalization": data.Normalization(*map(tuple, stored["normalization"])), "betas": tuple(stored["betas"])})

    @property
    def options(self) -> training.Options:
        names = set(training.Options._fields)
        return training.Options(**{f.name: getattr(self, f.name) for f in fields(self) if f.name in names})


def settings_of(model: str, changes: dict[str, Any]) -> Settings:
    """The recipe of the model with `changes` in place of what it says; a change to None is none.

    Raises:
        ValueError: there is no such model or kind of attention, or values do not fit each other.
    """
    kinds = models.attentions(model)
    recipe = {f.name: getattr(RECIPES[model], f.name) for f in fields(Recipe)}
    chosen = recipe | {"attention": kinds[0] if kinds else None} | {name: value for name, value in changes.items() if value is not None}
    settings = Settings(model=model, **chosen)
    if settings.attention not in (kinds or (None,)):
        raise ValueError(
            f"attention of {model} must be {' or '.join(map(repr, kinds)) or 'left out, it has none'}, got {settings.attention!r}"
        )
    channels = models.input_shape(model)[0]
    if any(len(numbers) != channels for numbers in settings.normalization):
        raise ValueError(f"{model} takes {channels} channels, got the normalization {tuple(settings.normalization)} for others")
    if settings.keep == "accuracy" and not settings.validation:
        raise ValueError("without validation images their best accuracy cannot be kept; give --keep loss, or --validation")
    return settings


@dataclass
class Tally:
    """What a run has seen, besides the trainer's own position."""

    losses: float = 0.0  # their sum in this epoch
    best: float | None = None  # accuracy on validation images, or minus the mean loss
    best_accuracy: float | None = None
    seconds: float = 0.0  # of training, without checks
    lines: int = 0  # of metrics.jsonl
    lines_checksum: int = 0  # crc32


class Run:
    """One training in one folder, from its beginning or from its last checkpoint to its report.

    Several processes do all of it together; the first alone writes.
    """

    def __init__(self, settings: Settings, dataset: data.Dataset, out: Path, console: Console) -> None:
        self.settings, self.dataset, self.out, self.console = settings, dataset, out, console
        self.device = processes.own_device(torch.device(settings.device))
        train, self.validation = dataset.train.split(round(settings.validation * len(dataset.train.labels)))
        torch.manual_seed(settings.seed)
        self.width = settings.head or len(dataset.classes)
        if self.width < len(dataset.classes):
            raise ValueError(f"--head {settings.head} is narrower than the {len(dataset.classes)} classes of {settings.data}")
        model = models.create_model(settings.model, self.width, attention=settings.attention)
        if not processes.is_first():
            torch.manual_seed(processes.own_seed(settings.seed))
        self.trainer = training.Trainer(processes.with_common_statistics(model, self.device), train, settings.options, self.device)
        if not self.trainer.steps_an_epoch:
            raise ValueError(f"there are {len(train.labels)} images to train on, not one batch of {settings.batch_size}")
        smallest = settings.batch_size if settings.drop_last else len(train.labels) % settings.batch_size or settings.batch_size
        if smallest < processes.count():
            raise ValueError(
                f"a batch of {smallest} has not one image for each of {processes.count()} processes; "
                "give another --batch-size, or --drop-last for the last one of an epoch"
            )
        self.check_every = min(settings.check_every, max(1, self.trainer.steps_an_epoch // CHECKS_AN_EPOCH))
        self.tally = Tally()
        self.data_checksum = dataset.checksum()
        self.metrics, self.best, self.last = (out / name for name in ("metrics.jsonl", "best.safetensors", "last.safetensors"))
        self.unfiled: list[float] = []  # losses of the steps since the last line of metrics
        self.last_saved = time.monotonic()

    def resume(self) -> None:
        """Goes back to the newest checkpoint that can be read, if there is one, and drops the metrics of what came after.

        Raises:
            RuntimeError: no checkpoint can be read, or it belongs to other settings, data or metrics.
        """
        found = checkpoint.load_newest(self.last)
        kept: list[bytes] = []
        problems: list[str] = []
        if found is not None:
            tensors, description, problems = found
            if "data" not in description:
                raise RuntimeError(f"{self.last} is of an older version of visattn, which kept less; begin anew with another --out")
            _refuse_other_settings(self.last, description["settings"], self.settings)
            if description["data"] != self.data_checksum:
                raise RuntimeError(f"{self.settings.data} holds other images than when {self.out} was begun; choose another --out")
            self.trainer.restore(tensors, description["trainer"])
            self.tally = Tally(**description["tally"])
            kept = self._lines_of_metrics()
            self._go_on_without_a_damaged_best()
            for problem in problems:
                self._warn(f"{problem}; going on from the checkpoint before")
            if self.trainer.epoch < self.settings.epochs:
                self._say(f"going on at epoch {self.trainer.epoch + 1}, step {self.trainer.step}")
        places = processes.gathered(torch.tensor([self.trainer.epoch, self.trainer.step]))
        if (places != places[0]).any():
            raise RuntimeError(f"the processes do not find the same checkpoint in {self.out}; it must be one folder for all of them")
        if processes.is_first():
            if problems:
                checkpoint.previous(self.last).replace(self.last)  # what can be read is the newest now; what cannot, nothing
            files.remove_leftovers(self.out)
            files.write(self.metrics, b"".join(kept))

    def _lines_of_metrics(self) -> list[bytes]:
        """Those up to the checkpoint that the tally comes from."""
        lines = self.metrics.read_bytes().splitlines(keepends=True) if self.metrics.exists() else []
        lines = lines[: self.tally.lines]
        if len(lines) < self.tally.lines or zlib.crc32(b"".join(lines)) != self.tally.lines_checksum:
            raise RuntimeError(
                f"{self.metrics} is damaged: it does not hold the {self.tally.lines} lines of before the checkpoint; "
                "put them back, or begin anew with another --out"
            )
        return lines

    def _go_on_without_a_damaged_best(self) -> None:
        try:
            checkpoint.load(self.best)
        except RuntimeError as error:
            self._warn(f"{error}; the best weights of before are lost, and from here on the best are kept")
            self.tally.best = self.tally.best_accuracy = None

    def train(self) -> None:
        """Trains to the last epoch."""
        trainer, settings = self.trainer, self.settings
        columns = [
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
            TextColumn("{task.fields[state]}"),
        ]  # fmt: skip
        with Progress(*columns, console=self.console) as bar:
            done = trainer.epoch * trainer.steps_an_epoch + trainer.step
            task = bar.add_task(settings.model, total=settings.epochs * trainer.steps_an_epoch, completed=done, state="")
            for epoch in range(trainer.epoch, settings.epochs):
                for loss in self._timed(trainer.steps()):
                    if not math.isfinite(loss):
                        raise RuntimeError(
                            f"the loss became {loss} in epoch {epoch + 1}, step {trainer.step}; a lower --learning-rate or fp32 may help"
                        )
                    self.unfiled.append(loss)
                    self.tally.losses += loss
                    if trainer.step % self.check_every == 0:
                        self._check(epoch)
                    bar.update(
                        task, advance=1, description=f"{settings.model} epoch {epoch + 1}/{settings.epochs}", state=self._state(loss)
                    )
                self._end_of_epoch(epoch)

    def _timed(self, steps: Iterator[float]) -> Iterator[float]:
        """The steps, their time added up without what happens between them."""
        while True:
            start = time.perf_counter()
            loss = next(steps, None)
            self.tally.seconds += time.perf_counter() - start
            if loss is None:
                return
            yield loss

    def _check(self, epoch: int) -> None:
        self._look({"epoch": epoch + 1, "step": self.trainer.step}, sum(self.unfiled) / len(self.unfiled))
        if processes.first_decides(time.monotonic() - self.last_saved > SECONDS_BETWEEN_CHECKPOINTS):
            self._save_last()

    def _end_of_epoch(self, epoch: int) -> None:
        loss = self.tally.losses / self.trainer.steps_an_epoch
        seconds = round(self.tally.seconds, 3)
        self._look({"epoch": epoch + 1, "step": self.trainer.steps_an_epoch, "epoch_loss": loss, "seconds": seconds}, loss)
        self.tally.losses = 0.0
        self._save_last()

    def _look(self, line: dict[str, Any], loss: float) -> None:
        """Measures accuracy on the validation images, keeps the weights if they are the best so far, and files the line.

        `loss` is the mean over the steps that are judged.
        """
        quality = -loss
        if len(self.validation.labels):
            accuracy = training.accuracy(self._confusion(self.validation))
            line["validation_accuracy"] = accuracy
            self.tally.best_accuracy = max(accuracy, self.tally.best_accuracy or 0.0)
            if self.settings.keep == "accuracy":
                quality = accuracy
        if self.tally.best is None or quality > self.tally.best:
            self.tally.best = quality
            self._save_best()
        line["losses"] = [round(loss, 5) for loss in self.unfiled]
        self.unfiled.clear()
        text = json.dumps(line)
        if processes.is_first():
            files.append(self.metrics, text)
        self.tally.lines += 1
        self.tally.lines_checksum = zlib.crc32(f"{text}\n".encode(), self.tally.lines_checksum)

    def _save_best(self) -> None:
        weights = {f"model.{name}": t for name, t in self.trainer.model.state_dict().items()}
        if processes.is_first():
            checkpoint.save(self.best, weights, self._description())

    def _save_last(self) -> None:
        tensors, numbers = self.trainer.state()
        description = self._description() | {"trainer": numbers, "tally": asdict(self.tally), "data": self.data_checksum}
        if processes.is_first():
            checkpoint.save(self.last, tensors, description, keep_previous=True)
        self.last_saved = time.monotonic()

    def _description(self) -> dict[str, Any]:
        return {"settings": self.settings.for_file(), "classes": self.dataset.classes, "width": self.width}

    def _confusion(self, images: data.Images) -> Tensor:
        matrix = training.confusion_matrix(
            self.trainer.model, data.Images(*map(processes.share, images)), self.settings.normalization,
            num_classes=len(self.dataset.classes), device=self.device, precision=self.settings.precision,
        )  # fmt: skip
        processes.add_up([matrix])
        return matrix

    def _say(self, text: str, style: str | None = None) -> None:
        self.console.print(text, style=style, highlight=False, markup=False, soft_wrap=True)

    def _warn(self, text: str) -> None:
        self._say(text, "yellow")

    def _paths(self) -> list[str]:
        """On what the attention layers of this package ran, each sentence once."""
        if self.settings.attention == "naive":
            return []
        model, images = self.trainer.model.eval(), self.settings.normalization.apply(self.dataset.test.pixels[:1].to(self.device))
        layers = [module for module in model.modules() if isinstance(module, AttentionLayer)]
        return list(dict.fromkeys(explain(layer, training.input_of(model, layer, images)) for layer in layers))

    def _state(self, loss: float) -> str:
        best = self.tally.best_accuracy
        return f"loss {loss:.4f}" + (f"  best validation {100 * best:.2f} %" if best is not None else "")

    def finish(self) -> dict[str, Any]:
        """Judges the weights on the test images and writes result.json, report.md and the pictures."""
        settings, model = self.settings, self.trainer.model
        if self.tally.best is None:
            self._save_best()  # what was there was damaged, and training had come to its end
        last = self._confusion(self.dataset.test)
        weights, _ = checkpoint.load(self.best)
        model.load_state_dict(training.part_of(weights, "model."))
        best = self._confusion(self.dataset.test)
        tested = best if settings.tested == "best" else last
        metrics = [json.loads(line) for line in self.metrics.read_text(encoding="utf-8").splitlines()]
        result = {
            **settings.for_file(),
            "parameters": sum(p.numel() for p in model.parameters()),
            "test_accuracy": training.accuracy(tested),
            "test_accuracy_last": training.accuracy(last),
            "test_accuracy_best": training.accuracy(best),
            "validation_accuracy_best": self.tally.best_accuracy,
            "epoch_losses": [line["epoch_loss"] for line in metrics if "epoch_loss" in line],
            "train_images": len(self.trainer.images.labels),
            "validation_images": len(self.validation.labels),
            "test_images": len(self.dataset.test.labels),
            "seconds_an_epoch": self.tally.seconds / settings.epochs,
            "share_of_time_for_data": self.trainer.seconds_for_data / self.tally.seconds,
            "processor": describe(self.device),
            "paths": self._paths(),
            "commit": provenance.commit(),
            "versions": provenance.versions("visattn", "torch"),
        }
        if processes.is_first():
            self._write_report(result, tested, metrics)
        return result

    def _write_report(self, result: dict[str, Any], tested: Tensor, metrics: list[dict[str, Any]]) -> None:
        settings, names = self.settings, self.dataset.classes
        report.training_curves(self.out / "curves.png", metrics, self.trainer.steps_an_epoch, title(settings))
        heading = f"{title(settings)}: {100 * result['test_accuracy']:.2f} % of {result['test_images']} test images"
        report.confusion(self.out / "confusion.png", tested, names, heading)
        files.write(self.out / "report.md", report.training_report(result, title(settings)))
        files.write(self.out / "result.json", json.dumps(result, indent=1) + "\n")


def title(settings: Settings) -> str:
    """A run in words."""
    attention = f" ({settings.attention})" if settings.attention else ""
    data_set = settings.data.partition(":")[0]
    return f"{settings.model}{attention} on {data_set}, {epochs_in_words(settings.epochs)}, seed {settings.seed}"


def epochs_in_words(epochs: int) -> str:
    return f"{epochs} epoch{'s' * (epochs > 1)}"


def run_name(settings: Settings) -> str:
    """A folder's name for a run."""
    return "-".join(filter(None, (settings.model, settings.attention, f"seed{settings.seed}")))


class Loader:
    """Reads data sets when they are first needed, each once for every size of image."""

    def __init__(self, root: Path, download: bool, console: Console) -> None:
        self.root, self.download, self.console = root, download, console
        self._read: dict[tuple[str, data.Shape], data.Dataset] = {}

    def __call__(self, name: str, shape: data.Shape) -> data.Dataset:
        if (name, shape) not in self._read:
            with self.console.status(f"reading {escape(name)}"):
                self._read[name, shape] = data.load(name, shape, root=self.root, download=self.download)
        return self._read[name, shape]


def train(settings: Settings, load: Loader, out: Path, *, resume: bool, console: Console) -> dict[str, Any]:
    """Trains, or with `resume` trains on, and gives what result.json holds.

    Raises:
        RuntimeError: `out` holds a run, and `resume` was not asked for or its settings are others. Nothing was touched.
        RuntimeError, ValueError: the data cannot be had, or the settings do not fit it. Nothing was written.
    """
    if processes.first_decides(processes.is_first() and _is_finished(settings, out, resume, console)):
        return files.read_json(out / "result.json")
    dataset = load(settings.data, models.input_shape(settings.model))
    with use_backend(settings.backend), float32_precision(tf32=settings.precision == "tf32"):
        run = Run(settings, dataset, out, console)
        with _only_writer(out):
            run.resume()
            if processes.is_first():
                files.write(out / "settings.json", json.dumps(settings.for_file(), indent=1) + "\n")
            run.train()
            return run.finish()


def _only_writer(out: Path) -> AbstractContextManager[None]:
    if not processes.is_first():
        return nullcontext()
    out.mkdir(parents=True, exist_ok=True)
    return files.locked(out)


def _is_finished(settings: Settings, out: Path, resume: bool, console: Console) -> bool:
    """Whether the folder holds this very run's result."""
    stored, result = out / "settings.json", out / "result.json"
    if not resume and (stored.exists() or (out / "last.safetensors").exists()):
        raise RuntimeError(f"{out} holds a run already; add --resume to go on with it, or choose another folder with --out")
    if not stored.exists():
        return False
    try:
        _refuse_other_settings(stored, files.read_json(stored), settings)
        return result.exists() and files.read_json(result)["epochs"] == settings.epochs
    except files.DamagedError as error:
        console.print(f"{error}; it will be written anew", style="yellow", highlight=False, markup=False, soft_wrap=True)
        return False  # checkpoints hold the settings, too


def _refuse_other_settings(path: Path, stored: dict[str, Any], asked: Settings) -> None:
    """A run may be gone on with if all that changed is that it takes longer."""
    before, now = Settings.from_file(stored).for_file(), asked.for_file()
    before["epochs"] = max(before["epochs"], now["epochs"])
    differing = [f"{name} was {before[name]!r}, now {now[name]!r}" for name in now if before[name] != now[name]]
    if differing:
        raise RuntimeError(f"{path} is of a run with other settings: {'; '.join(differing)}; give the same, or choose another --out")


def model_of(path: Path) -> tuple[nn.Module, Settings, tuple[str, ...]]:
    """The model of a checkpoint with its weights, in evaluation mode, the settings of its run, and its classes.

    Raises:
        RuntimeError: it cannot be read, or is none of `visattn train`.
    """
    tensors, description = checkpoint.load(path)
    try:
        settings = Settings.from_file(description["settings"])
        model = models.create_model(settings.model, description["width"], attention=settings.attention)
        classes = tuple(map(str, description["classes"]))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise RuntimeError(f"{path} is no checkpoint that visattn train wrote ({error!r})") from None
    model.load_state_dict(training.part_of(tensors, "model."))
    return model.eval(), settings, classes
