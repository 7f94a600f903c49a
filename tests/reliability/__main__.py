"""python -m tests.reliability [PART …]: runs the attempts to break the package and prints what came of them; 1 if one is off."""

import argparse
import sys
import time
from collections.abc import Callable, Sequence

from .figures import Figure, markdown

PARTS: dict[str, Callable[[], list[Figure]]] = {}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.reliability", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)}; all of them if none is named")
    options = parser.parse_args(arguments)
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"no such part: {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    found: list[Figure] = []
    for name in options.parts or PARTS:
        start = time.perf_counter()
        figures = PARTS[name]()
        print(f"{name}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
        found += figures
    print(markdown(found))
    return int(any(figure.right is False for figure in found))


if __name__ == "__main__":
    sys.exit(main())
