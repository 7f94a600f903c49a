"""python -m tests.reliability [PART …]: runs the attempts to break the package and prints what came of them; 1 if one is off."""

import argparse
import sys
import time
from collections.abc import Callable, Sequence

from . import bad_inputs, damage, filed, fuzzing, limits, mutants, processes, security, state, survival
from .figures import Figure, markdown

PARTS: dict[str, Callable[[], list[Figure]]] = {
    "fuzzing": fuzzing.figures,
    "bad_inputs": bad_inputs.figures,
    "limits": limits.figures,
    "mutants": mutants.figures,
    "state": state.figures,
    "damage": damage.figures,
    "survival": survival.figures,
    "processes": processes.figures,
    "security": security.figures,
}
"""Each part's name and the `figures` of its module."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.reliability", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)}; all of them if none is named")
    parser.add_argument("--file", action="store_true", help="keep what was found in bench/results, at a commit")
    parser.add_argument("--readme", action="store_true", help="try nothing; write the README's section and its page from what is kept")
    options = parser.parse_args(arguments)
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"no such part: {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    if options.readme:
        filed.write()
        return 0
    place = filed.place() if options.file else None
    found: list[Figure] = []
    for name in options.parts or PARTS:
        start = time.perf_counter()
        figures = PARTS[name]()
        seconds = time.perf_counter() - start
        print(f"{name}: {seconds:.0f} s", file=sys.stderr, flush=True)
        if place:
            filed.keep(name, figures, seconds, place)
        found += figures
    print(markdown(found))
    return int(any(figure.right is False for figure in found))


if __name__ == "__main__":
    sys.exit(main())
