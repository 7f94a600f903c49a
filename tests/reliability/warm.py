"""python warm.py: imports what takes long, once; then runs pytest in a fork for each line of JSON on its input, [folder, arguments].

Its own folder is no part of what the fork imports: that begins with the folder it is told. Each run ends with a line END.
"""

import contextlib
import json
import os
import sys

import hypothesis  # noqa: F401  # not needed here, but where it forks, as the next
import numpy  # noqa: F401
import pytest
import torch
import torch._dynamo
import torch.testing

with contextlib.suppress(ImportError):
    import triton  # noqa: F401

END = "end of this run"


def run(folder: str, arguments: list[str]) -> None:
    os.chdir(folder)
    sys.path[:] = [folder, *(entry for entry in sys.path if entry)]
    pytest.main(arguments)


def main() -> None:
    sys.path.pop(0)  # this file's folder
    torch.set_num_threads(1)
    for line in sys.stdin:
        child = os.fork()
        if not child:
            with contextlib.suppress(BaseException):
                run(*json.loads(line))
            sys.stdout.flush()
            os._exit(0)
        os.waitpid(child, 0)
        print(END, flush=True)


if __name__ == "__main__":
    main()
