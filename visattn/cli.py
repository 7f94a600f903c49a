"""The command line: `visattn` or `python -m visattn`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import __version__


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns 0, 2 where something that it needs is missing or wrong, 130 where it was interrupted."""
    options = _parser().parse_args(arguments)
    try:
        options.command(options)
        return 0
    except ModuleNotFoundError as error:
        print(f"visattn: the package {error.name} is missing; install it with: pip install 'visattn[train]'", file=sys.stderr)
    except (OSError, RuntimeError, ValueError) as error:
        print(f"visattn: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print("visattn: interrupted; the same command with --resume goes on", file=sys.stderr)
        return 130
    return 2


def _demo(options: argparse.Namespace) -> None:
    from .demo import Options, run_demo
    from .device import chosen_device

    run_demo(Options(options.steps, options.batch_size, options.seed, chosen_device(options.device), options.out))


def _train(options: argparse.Namespace) -> None:
    from rich.console import Console

    from . import experiment, processes
    from .device import chosen_device

    with processes.group(chosen_device(options.device), options.timeout):
        console = Console(quiet=not processes.is_first())
        settings = experiment.settings_of(options.model, _changes(options) | {"seed": options.seed, "attention": options.attention})
        out = options.out or Path("runs", experiment.run_name(settings))
        load = experiment.Loader(options.data_root, options.download, console)
        result = experiment.train(settings, load, out, resume=options.resume, console=console)
    _say(console, f"{experiment.title(settings)}: {100 * result['test_accuracy']:.2f} % of {result['test_images']} test images")
    _say(console, f"Written to {out}: report.md, result.json, metrics.jsonl, curves.png, confusion.png, best.safetensors, last.safetensors")


def _compare(options: argparse.Namespace) -> None:
    from rich.console import Console

    from . import comparison, experiment, processes
    from .device import chosen_device

    with processes.group(chosen_device(options.device), options.timeout):
        console = Console(quiet=not processes.is_first())
        runs = []
        for name in dict.fromkeys(options.models):  # each once
            model, _, attention = name.partition(":")
            for seed in dict.fromkeys(options.seeds):
                runs.append(experiment.settings_of(model, _changes(options) | {"seed": seed, "attention": attention or None}))
        load = experiment.Loader(options.data_root, options.download, console)
        table = comparison.compare(runs, load, options.out, console)
    _say(console, f"\n{table}\nWritten to {options.out}: ranking.md, ranking.png, and a folder for each run")


def _evaluate(options: argparse.Namespace) -> None:
    from rich.console import Console

    from . import evaluation, experiment
    from .device import chosen_device

    console = Console()
    load = experiment.Loader(options.data_root, options.download, console)
    text = evaluation.evaluate(options.checkpoint, load, options.data, chosen_device(options.device), options.out)
    _say(console, text)


def _map(options: argparse.Namespace) -> None:
    from rich.console import Console

    from . import evaluation, experiment

    console = Console()
    load = experiment.Loader(options.data_root, options.download, console)
    text = evaluation.draw_attention(
        options.checkpoint,
        load,
        options.data,
        options.image,
        options.index,
        options.layer,
        [(row, column) for row, column in options.pixel or []],
        options.out,
    )
    _say(console, text)


def _models(options: argparse.Namespace) -> None:
    from rich.console import Console

    from . import comparison

    _say(Console(), comparison.overview())


def _say(console: Any, text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def _changes(options: argparse.Namespace) -> dict[str, Any]:
    """What a command line asks for in place of a recipe's values; None where it does not."""
    from . import processes
    from .data import Normalization
    from .device import chosen_device

    if (options.mean is None) != (options.deviation is None):
        raise ValueError("--mean and --deviation belong together")
    names = ("data", "validation", "check_every", "keep", "tested", "batch_size", "epochs", "learning_rate", "head", "drop_last",
             "precision", "backend", "compile")  # fmt: skip
    return {name: getattr(options, name) for name in names} | {
        "normalization": Normalization(tuple(options.mean), tuple(options.deviation)) if options.mean else None,
        "betas": tuple(options.betas) if options.betas else None,
        "device": str(chosen_device(options.device)),
        "processes": processes.count(),
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="visattn", description="Self-attention for feature maps.")
    parser.add_argument("--version", action="version", version=f"visattn {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help="train one CNN with the fused layer and with naive attention, and compare")
    demo.add_argument("--steps", type=_positive, default=100, help="training steps of each (default 100)")
    demo.add_argument("--batch-size", type=_positive, default=32, help="images a step (default 32)")
    demo.add_argument("--seed", type=_seed, default=0, help="of weights and order of images (default 0)")
    demo.add_argument("--device", help="cpu, cuda, cuda:1, … (default: cuda where there is one)")
    demo.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder for the results (default runs/demo)")
    demo.set_defaults(command=_demo)

    models = commands.add_parser("models", help="list the models, their kinds of attention and their recipes")
    models.set_defaults(command=_models)

    train = commands.add_parser("train", help="train one model by its recipe, and report on it; torchrun shares it among processes")
    train.add_argument("--model", required=True, help="one of those that `visattn models` lists")
    train.add_argument("--attention", help="kind of its attention layers (default: the first that `visattn models` lists)")
    train.add_argument("--seed", type=_seed, default=0, help="of weights, dropout and order of images (default 0)")
    train.add_argument("--out", type=Path, help="folder for the results (default: one under runs/ named after the run)")
    train.add_argument("--resume", action="store_true", help="go on with the run in that folder, if there is one")
    _add_recipe(train)
    _add_data(train)
    train.set_defaults(command=_train)

    compare = commands.add_parser("compare", help="train several models with several seeds, and rank them; goes on where it was stopped")
    compare.add_argument("--models", nargs="+", required=True, metavar="MODEL[:ATTENTION]", help="as `visattn models` lists them")
    compare.add_argument("--seeds", nargs="+", type=_seed, default=[0, 1, 2], help="(default 0 1 2)")
    compare.add_argument("--out", type=Path, default=Path("runs/compare"), help="folder for the results (default runs/compare)")
    _add_recipe(compare)
    _add_data(compare)
    compare.set_defaults(command=_compare)

    evaluate = commands.add_parser("evaluate", help="measure a checkpoint on the test images")
    evaluate.add_argument("checkpoint", type=Path, help="a best.safetensors or last.safetensors")
    evaluate.add_argument("--data", help="digits, cifar10, mnist, fashion_mnist or folder:PATH (default: what it was trained on)")
    evaluate.add_argument("--device", help="cpu, cuda, cuda:1, … (default: cuda where there is one)")
    evaluate.add_argument("--out", type=Path, help="a PNG to draw the confusion matrix to")
    _add_data(evaluate)
    evaluate.set_defaults(command=_evaluate)

    map_ = commands.add_parser("map", help="draw where a pixel of an image looks")
    map_.add_argument("checkpoint", type=Path, help="a best.safetensors or last.safetensors of a model with attention over pixels")
    map_.add_argument("--image", type=Path, help="an image file (default: a test image of the data set)")
    map_.add_argument("--index", type=int, default=0, help="of the test image (default 0)")
    map_.add_argument("--data", help="digits, cifar10, mnist, fashion_mnist or folder:PATH (default: what it was trained on)")
    map_.add_argument("--layer", help="name of the attention layer (default: the first)")
    map_.add_argument("--pixel", type=int, nargs=2, action="append", metavar=("ROW", "COLUMN"),
                      help="of the layer's map; may be given several times (default: four of them)")  # fmt: skip
    map_.add_argument("--out", type=Path, default=Path("attention.png"), help="the picture (default attention.png)")
    _add_data(map_)
    map_.set_defaults(command=_map)
    return parser


def _add_recipe(parser: argparse.ArgumentParser) -> None:
    recipe = parser.add_argument_group("recipe", "what is left out is as the model's document has it")
    recipe.add_argument("--data", help="digits, cifar10, mnist, fashion_mnist or folder:PATH with train/ and test/ or val/")
    recipe.add_argument("--validation", type=_share, help="share of the training images that is held back")
    recipe.add_argument("--mean", type=float, nargs="+", help="subtracted from each channel, of values between 0 and 1")
    recipe.add_argument("--deviation", type=_divisor, nargs="+", help="that each channel is divided by")
    recipe.add_argument("--epochs", type=_positive)
    recipe.add_argument("--batch-size", type=_positive)
    recipe.add_argument("--learning-rate", type=float, help="of Adam")
    recipe.add_argument("--betas", type=float, nargs=2, help="of Adam")
    recipe.add_argument("--drop-last", action=argparse.BooleanOptionalAction, help="leave out an epoch's last, smaller batch")
    recipe.add_argument("--head", type=_positive, help="width of the classifier (default: one output a class)")
    recipe.add_argument("--check-every", type=_positive, help="iterations between two looks at loss and validation accuracy")
    recipe.add_argument("--keep", choices=("accuracy", "loss"), help="what the best checkpoint is the best of")
    recipe.add_argument("--tested", choices=("last", "best"), help="the weights that are judged on the test images")
    machine = parser.add_argument_group("machine")
    machine.add_argument("--device", help="cpu, cuda, cuda:1, … (default: cuda where there is one)")
    machine.add_argument("--precision", choices=("fp32", "tf32", "bf16", "fp16"), help="of matrix products (default fp32)")
    machine.add_argument("--backend", choices=("auto", "triton", "torch"), help="of the fused layers (default auto)")
    machine.add_argument("--compile", action=argparse.BooleanOptionalAction, help="run the model through torch.compile")
    machine.add_argument("--timeout", type=_positive, default=120, metavar="SECONDS",
                         help="for which processes that torchrun started wait for each other (default 120)")  # fmt: skip


def _add_data(parser: argparse.ArgumentParser) -> None:
    place = parser.add_argument_group("data")
    place.add_argument("--data-root", type=Path, default=Path("data"), help="where downloaded data sets are (default data)")
    place.add_argument("--download", action="store_true", help="fetch the data set if it is missing")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _divisor(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be greater than 0, got {value}")
    return value


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 0 and less than 1, got {value}")
    return value


def _seed(text: str) -> int:
    value = int(text)
    if not 0 <= value < 2**32:
        raise argparse.ArgumentTypeError(f"must be between 0 and 2³² - 1, got {value}")
    return value
