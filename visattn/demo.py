"""`visattn demo`: one CNN trained twice from the same seed, with the fused layer and with naive attention, side by side.

Each runs in a process of its own, so that its peak memory is its own; the two take turns step by step, so that whatever
else the machine is doing meets both alike and the ratio of their times is taken pair by pair.
"""

import json
import multiprocessing
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from . import data, files, report, training
from .models import create_model, input_shape
from .modules import attention_rows, explain
from .recipes import CIFAR

MODEL = "cnn_early_attention"
KINDS = ("fused", "naive")
PIXEL = (16, 16)
LEARNING_RATE = 5e-5
"""Low, because the two loss curves are compared: at the usual 1e-3 training on digits is chaotic, and a difference of one
rounding has grown to 1e-2 after 100 steps."""


@dataclass(frozen=True)
class Options:
    steps: int
    batch_size: int
    seed: int
    device: torch.device
    out: Path


class Step(NamedTuple):
    """One step of training: its loss, and the seconds it took from the images to the updated weights."""

    loss: float
    seconds: float


@dataclass
class Run:
    """What one of the two trainings did."""

    steps: list[Step]
    accuracy: float = 0.0
    memory_mib: float = 0.0
    explanation: str = ""
    picture: tuple[list, list] | None = None  # an image and the attention map of a pixel

    @property
    def losses(self) -> list[float]:
        return [step.loss for step in self.steps]


def run_demo(options: Options) -> None:
    """Trains, prints one table, and writes it with the metrics and two pictures to `options.out`."""
    console = Console()
    options.out.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("spawn")
    pipes: dict[str, Connection] = {}
    workers = []
    for kind in KINDS:
        pipes[kind], child = context.Pipe()
        worker = context.Process(target=_work, args=(kind, options, child), daemon=True)
        worker.start()
        child.close()
        workers.append(worker)
    try:
        runs = _take_turns(pipes, options, console)
    except (EOFError, ConnectionError):
        raise RuntimeError("a training process ended early; its own error stands above") from None
    finally:
        for worker in workers:
            worker.terminate()
    _write_report(runs, options, console)


def _take_turns(pipes: dict[str, Connection], options: Options, console: Console) -> dict[str, Run]:
    runs = {kind: Run([]) for kind in pipes}
    columns = [
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
        TextColumn("{task.fields[losses]}"),
    ]  # fmt: skip
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(f"training {MODEL}", total=options.steps, losses="")
        for _ in range(options.steps):
            for kind, pipe in pipes.items():
                pipe.send("step")
                runs[kind].steps.append(pipe.recv())
            losses = "  ".join(f"{kind} {run.losses[-1]:.4f}" for kind, run in runs.items())
            progress.update(task, advance=1, losses=f"loss: {losses}")
        progress.update(task, description="evaluating", losses="")
        for kind, pipe in pipes.items():
            pipe.send("finish")
            run = runs[kind]
            run.accuracy, run.memory_mib, run.explanation, run.picture = pipe.recv()
    return runs


def _work(kind: str, options: Options, pipe: Connection) -> None:
    """One training process: does a step, or evaluates, whenever it is told to."""
    torch.manual_seed(options.seed)
    digits = data.load("digits", input_shape(MODEL))
    model = create_model(MODEL, attention=kind)
    before = training.peak_memory_mib(options.device)
    how = training.Options(CIFAR, options.batch_size, LEARNING_RATE, drop_last=True, seed=options.seed)
    steps = _endless(training.Trainer(model, digits.train, how, options.device))
    while pipe.recv() == "step":
        start = time.perf_counter()
        loss = next(steps)
        pipe.send(Step(loss, time.perf_counter() - start))
    memory = training.peak_memory_mib(options.device) - before
    matrix = training.confusion_matrix(model, digits.test, CIFAR, num_classes=len(digits.classes), device=options.device)
    explanation, picture = "naive: matrix products of PyTorch, by definition", None
    if kind == "fused":
        image = digits.test.pixels[:1].to(options.device)
        with torch.no_grad():
            x = model[:2](CIFAR.apply(image))  # type: ignore[index]
            weights = attention_rows(model[2], x, torch.tensor([PIXEL], device=options.device))  # type: ignore[index]
        explanation, picture = explain(model[2], x), (digits.test.pixels[0].tolist(), weights[0].tolist())  # type: ignore[index]
    pipe.send((training.accuracy(matrix), memory, explanation, picture))


def _endless(trainer: training.Trainer) -> Iterator[float]:
    while True:
        yield from trainer.steps()


def _write_report(runs: dict[str, Run], options: Options, console: Console) -> None:
    title = f"{MODEL}, {options.steps} steps of {options.batch_size} digits, seed {options.seed}, fp32, {options.device}"
    table = report.markdown_table(["", *runs, "fused against naive"], _rows(runs["fused"], runs["naive"]))
    text = f"# {title}\n\n{table}\nfused: {runs['fused'].explanation}\n"
    files.write(options.out / "table.md", text)
    files.write(options.out / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in _metrics(runs)))
    report.loss_curves(options.out / "loss.png", {kind: runs[kind].losses for kind in ("naive", "fused")}, title)
    picture = runs["fused"].picture
    assert picture is not None
    image, weights = map(torch.tensor, picture)
    report.attention_maps(options.out / "attention.png", image, weights, [PIXEL], f"{MODEL} after {options.steps} steps")
    console.print(f"\n{text}", highlight=False, markup=False, soft_wrap=True)
    console.print(f"Written to {options.out}: table.md, metrics.jsonl, loss.png, attention.png", highlight=False, markup=False)


def _rows(fused: Run, naive: Run) -> list[list[str]]:
    difference = max(abs(a - b) / b for a, b in zip(fused.losses, naive.losses, strict=True))
    ratio = median(b.seconds / a.seconds for a, b in zip(fused.steps, naive.steps, strict=True))
    less = f"{naive.memory_mib / fused.memory_mib:.1f}× less" if fused.memory_mib else "–"  # some trainings are too short to be seen
    comparisons = {
        "loss, first → last step": (lambda run: f"{run.losses[0]:.4f} → {run.losses[-1]:.4f}", f"relative difference ≤ {difference:.1e}"),
        "held-out accuracy": (lambda run: f"{100 * run.accuracy:.2f} %", f"{100 * (fused.accuracy - naive.accuracy):+.2f} points"),
        "time a step, median": (lambda run: f"{1000 * median(s.seconds for s in run.steps):.0f} ms", f"{ratio:.2f}× quicker, pair by pair"),
        "peak memory of training": (lambda run: f"{run.memory_mib:.0f} MiB", less),
    }  # fmt: skip
    return [[name, cell(fused), cell(naive), verdict] for name, (cell, verdict) in comparisons.items()]


def _metrics(runs: dict[str, Run]) -> Iterator[dict[str, Any]]:
    for kind, run in runs.items():
        for number, step in enumerate(run.steps, 1):
            yield {"layer": kind, "step": number, "loss": step.loss, "seconds": step.seconds}
        yield {"layer": kind, "accuracy": run.accuracy, "peak_memory_mib": run.memory_mib, "explanation": run.explanation}
