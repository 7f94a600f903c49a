"""`python -m bench`: measure, file, report, look at what the kernels compile to."""

import argparse
import json
import sys

from visattn.device import chosen_device

from . import gallery, host, profiling, report, run, static, tune, warm
from .environment import environment


def configure_env(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: a GPU where there is one)")


def run_env(options: argparse.Namespace) -> int:
    print(json.dumps(environment(chosen_device(options.device)), indent=1))
    return 0


COMMANDS = {
    "warm": ("compile what the suites launch, in many processes", warm.configure, warm.run),
    "run": ("measure suites", run.configure, run.run),
    "report": ("tables and pictures of rows, and the README's section", report.configure, report.run),
    "import": ("file rows under the name of their device", report.configure_import, report.run_import),
    "static": ("what the kernels compile to for a device that need not be here, and what bounds them", static.configure, static.run),
    "tune": ("block sizes by measurement, on a GPU", tune.configure, tune.run),
    "host": ("what a call costs before a kernel runs, and where it goes", host.configure, host.run),
    "gallery": ("models of other people before and after patch_model, and the README's section", gallery.configure, gallery.run),
    "profile": ("which kernels a step launches, and how long each takes", profiling.configure, profiling.run),
    "env": ("what a row says of the machine", configure_env, run_env),
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description="Measures visattn and its peers.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, (summary, configure, command) in COMMANDS.items():
        configure(subparser := commands.add_parser(name, help=summary, description=summary))
        subparser.set_defaults(command=command)
    options = parser.parse_args()
    try:
        return options.command(options)
    except (ValueError, FileNotFoundError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
