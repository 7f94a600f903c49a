"""The command line: `visattn` or `python -m visattn`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns 0, or 2 where something that it needs is missing."""
    options = _parser().parse_args(arguments)
    try:
        return options.command(options)
    except ModuleNotFoundError as error:
        print(f"visattn: the package {error.name} is missing; install it with: pip install 'visattn[train]'", file=sys.stderr)
    except (OSError, RuntimeError) as error:
        print(f"visattn: {error}", file=sys.stderr)
    return 2


def _demo(options: argparse.Namespace) -> int:
    from .demo import Options, run_demo
    from .device import chosen_device

    run_demo(Options(options.steps, options.batch_size, options.seed, chosen_device(options.device), options.out))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="visattn", description="Self-attention for feature maps.")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    demo = commands.add_parser("demo", help="train one CNN with the fused layer and with naive attention, and compare")
    demo.add_argument("--steps", type=_positive, default=100, help="training steps of each (default 100)")
    demo.add_argument("--batch-size", type=_positive, default=32, help="images a step (default 32)")
    demo.add_argument("--seed", type=int, default=0, help="of weights and order of images (default 0)")
    demo.add_argument("--device", help="cpu, cuda, cuda:1, … (default: cuda where there is one)")
    demo.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder for the results (default runs/demo)")
    demo.set_defaults(command=_demo)
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value
