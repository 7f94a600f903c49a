"""Python runs this file before anything else if its folder is on PYTHONPATH: writes down what a process does to the world.

One JSON line an event, in the file that VISATTN_AUDIT names: the event, the process, and its first arguments.
"""

import json
import os
import sys

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
PATHS = {
    "os.chmod": 1, "os.chown": 1, "os.link": 2, "os.mkdir": 1, "os.mkfifo": 1, "os.remove": 1, "os.rename": 2, "os.rmdir": 1,
    "os.symlink": 2, "os.truncate": 1, "os.utime": 1, "os.setxattr": 1,
}  # fmt: skip
OTHERS = ("pickle.find_class", "socket.connect", "socket.bind", "subprocess.Popen", "os.system", "os.exec")


def _write_down(event: str, *what: object) -> None:
    os.write(_file, (json.dumps([event, os.getpid(), *map(str, what)]) + "\n").encode())


def _hook(event: str, arguments: tuple) -> None:
    if event == "open":
        if not isinstance(arguments[0], int) and (arguments[2] or 0) & WRITING:
            _write_down("open", os.path.realpath(os.fsdecode(arguments[0])))
    elif event in PATHS:
        for path in arguments[: PATHS[event]]:
            if not isinstance(path, int):
                _write_down(event, os.path.join(os.path.realpath(os.path.dirname(os.fsdecode(path))), os.path.basename(os.fsdecode(path))))
    elif event in OTHERS:
        _write_down(event, *arguments[:2])


_file = os.open(os.environ["VISATTN_AUDIT"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
sys.addaudithook(_hook)
