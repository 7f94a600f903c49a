"""Do fused and naive attention train alike? `python -m bench.agreement run [MODEL …]` trains both from one seed on the embedded digits
and files the largest relative difference of their losses; `python -m bench.agreement table` writes that as a table and the README's line.

A rounding error grows while a model trains, whatever made it. So beside each pair stands a control: naive attention twice, the second
time from weights that are one rounding off. In fp64 there is room between what rounding grows to and what an error would be.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from visattn import comparison, data, files, models, provenance, training
from visattn.device import describe
from visattn.recipes import RECIPES

from .readme import README, Section

FILE = Path(__file__).resolve().parent / "results" / "agreement.json"
PAGE = FILE.with_suffix(".md")
SECTION = Section("agreement", "python -m bench.agreement table")
STEPS, LIMIT = 200, 1e-3
DTYPES = {"fp64": torch.float64, "fp32": torch.float32}


class Batches(NamedTuple):
    """How many images a step sees, and how wide they are, None for the model's own width."""

    size: int
    width: int | None = None


def batches(name: str) -> Batches:
    """Those of a model. Of few images of its own width the ReLU behind sagan_cnn's classifier dies, and no step teaches it anything."""
    return Batches(64, 8) if name == "sagan_cnn" else Batches(8)


class _InDtype(nn.Module):
    """A model that has a dtype of its own, for images in fp32."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.model, self.dtype = model, dtype

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images.to(self.dtype))


def kinds(name: str) -> tuple[str, str] | None:
    """The two kinds of attention that compute the same in two ways, None for a model without."""
    other = {"fused": "naive", "sdpa": "naive", "matmul": "einsum"}
    return next(((kind, other[kind]) for kind in models.attentions(name) if kind in other), None)


def losses(name: str, kind: str, dtype: torch.dtype, steps: int, one_rounding_off: bool = False) -> list[float]:
    """The first losses of training by the model's recipe but for batch and data, seed 0."""
    recipe = RECIPES[name]
    torch.manual_seed(0)
    model = models.create_model(name, recipe.head or 10, attention=kind).to(dtype)
    if one_rounding_off:
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                signs = torch.randint(-1, 2, parameter.shape, generator=generator).to(dtype)
                parameter.mul_(1 + signs * torch.finfo(dtype).eps)
    options = training.Options(recipe.normalization, batches(name).size, recipe.learning_rate, recipe.betas, drop_last=True)
    trainer = training.Trainer(_InDtype(model, dtype), data.load("digits", image_shape(name)).train, options, torch.device("cpu"))
    found: list[float] = []
    while len(found) < steps:
        for loss in trainer.steps():
            found.append(loss)
            if len(found) == steps:
                break
    return found


def image_shape(name: str) -> tuple[int, int, int]:
    """(C, H, W) of the images that the model is trained on here."""
    channels, height, width = models.input_shape(name)
    other = batches(name).width
    return (channels, height, width) if other is None else (channels, other, other)


def difference(some: list[float], others: list[float]) -> float:
    """The largest relative one of any step."""
    return max(abs(a - b) / b for a, b in zip(some, others, strict=True))


def measure(name: str, dtype: str, steps: int = STEPS) -> dict[str, Any]:
    """One row: what was compared, the largest difference and that of the control, and where."""
    pair = kinds(name)
    if pair is None:
        raise ValueError(f"{name} has no attention that is computed in two ways")
    runs = (pair[0], False), (pair[1], False), (pair[1], True)
    ours, naive, control = (losses(name, kind, DTYPES[dtype], steps, off) for kind, off in runs)
    return {
        "model": name, "kinds": pair, "dtype": dtype, "steps": steps,
        "batch_size": batches(name).size, "image_shape": image_shape(name),
        "learning_rate": RECIPES[name].learning_rate, "difference": difference(ours, naive), "control": difference(control, naive),
        "losses": [naive[0], naive[-1]],
        "processor": describe(torch.device("cpu")), "torch": torch.__version__, "commit": provenance.commit(),
    }  # fmt: skip


def filed() -> list[dict[str, Any]]:
    return json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else []


def file(row: dict[str, Any]) -> None:
    """In place of an older row of the same model and dtype."""
    rows = [r for r in filed() if (r["model"], r["dtype"]) != (row["model"], row["dtype"])] + [row]
    rows.sort(key=lambda r: (models.names().index(r["model"]), r["dtype"]))
    files.write(FILE, json.dumps(rows, indent=1) + "\n")


def section(rows: list[dict[str, Any]]) -> str:
    """The README's line: how many models there are in fp64, the largest difference, and what does not stay below the limit."""
    exact = [r for r in rows if r["dtype"] == "fp64"]
    if not exact:
        return "Nothing is filed.\n"
    beyond = [f"{r['model']} in {r['dtype']}: {r['difference']:.1e}" for r in rows if r["difference"] >= LIMIT]
    steps = min(r["steps"] for r in exact)
    text = f"In fp64 the losses of {len(exact)} models' first {steps} steps differ by at most {max(r['difference'] for r in exact):.1e}"
    also = f"; above {LIMIT:g}: {', '.join(beyond)}" if beyond else ""
    return f"{text}{also}. [All of them]({PAGE.relative_to(README.parent)}).\n"


def page(rows: list[dict[str, Any]]) -> str:
    """The table of all pairs, each with its control, and where they were trained."""
    lines = [
        [
            f"{r['model']} ({r['kinds'][0]} and {r['kinds'][1]})", r["dtype"],
            f"{r['batch_size']} of {r['image_shape'][1]}×{r['image_shape'][2]}",
            f"{r['losses'][0]:.3f} → {r['losses'][1]:.3f}",
            f"{r['difference']:.1e}", "yes" if r["difference"] < LIMIT else "no", f"{r['control']:.1e}",
        ]
        for r in rows
    ]  # fmt: skip
    table = comparison.report.markdown_table(
        ["model", "dtype", "digits a step", "loss", "largest relative difference", f"below {LIMIT:g}", "naive, weights one rounding off"],
        lines,
    )
    steps = sorted({r["steps"] for r in rows})
    sources = sorted({(r["processor"], r["torch"], r["commit"] or "unknown") for r in rows})
    head = (
        "# Do fused and naive attention train alike?\n\n"
        f"Losses of the first {', '.join(map(str, steps))} steps from one seed, the recipe's optimizer. Any rounding error grows while a "
        "model trains; beside each pair stands naive attention against itself, its weights one rounding off. sagan_cnn sees more images, "
        "and smaller ones: of a few of its own width the ReLU behind its classifier dies, and no step teaches it anything.\n"
    )
    return "\n".join([head, table, "Measured: " + "; ".join(f"{p}, torch {t}, commit `{c}`" for p, t, c in sources) + ".\n"])


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.agreement", description=__doc__)
    commands = parser.add_subparsers(required=True, dest="command")
    run = commands.add_parser("run", help="train, compare, file")
    with_attention = [name for name in models.names() if kinds(name)]
    run.add_argument("models", nargs="*", metavar="MODEL", default=with_attention, help=f"of {', '.join(with_attention)}; default: all")
    run.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    commands.add_parser("table", help="write the table and the README's line")
    options = parser.parse_args()
    if options.command == "table":
        SECTION.write(section(filed()))
        files.write(PAGE, page(filed()))
        return 0
    unknown = [name for name in options.models if name not in with_attention]
    if unknown:
        parser.error(f"no model with attention in two forms is called {', '.join(unknown)}; there are {', '.join(with_attention)}")
    for dtype in options.dtype:
        for name in options.models:
            row = measure(name, dtype)
            file(row)
            print(f"{name}, {dtype}: {row['difference']:.1e}, one rounding off {row['control']:.1e}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
