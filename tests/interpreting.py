"""Triton's interpreter, quicker: two files of tests took a third less, a block by itself half.

Whenever a kernel starts, and again at each call of a device function within it, the interpreter looks through all of `triton.language` for
what it has to replace, which takes up to as long as everything else it does. Here it looks once a launch.
"""

from types import FunctionType

import triton.language as tl
from triton.runtime import interpreter

_replace_language = interpreter._patch_lang


class Replaced:
    """The modules of the language that are replaced at the moment."""

    def __init__(self) -> None:
        self.modules: set[str] = set()

    def replace(self, function: FunctionType) -> interpreter._LangPatchScope:
        """In the place of `interpreter._patch_lang`: nothing where what the function sees of the language has been replaced already."""
        seen = {value.__name__ for value in function.__globals__.values() if value is tl or value is tl.core}
        if seen <= self.modules:
            return interpreter._LangPatchScope()
        scope = _replace_language(function)
        restore = scope.restore

        def restore_and_forget() -> None:
            self.modules.clear()
            restore()

        scope.restore = restore_and_forget
        self.modules |= seen
        return scope


def look_once_a_launch() -> None:
    """From now on, in this process."""
    interpreter._patch_lang = Replaced().replace
