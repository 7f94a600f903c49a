"""Triton's interpreter, quicker.

Whenever a kernel starts, and again at each call of a device function within it, the interpreter looks through all of `triton.language` for
what it has to replace, which takes up to as long as everything else it does. Here it looks once a launch.

Each operation makes a table of numpy's dtypes to look into once; here its answer is remembered. Each sum and product of whole numbers is
computed again in 64 bits, for an assertion that is only made where a kernel is debugged; here it is not.
"""

import functools
from types import FunctionType
from typing import Any

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


def _remember_dtypes() -> None:
    look_up = interpreter._get_np_dtype
    of_numbers = functools.cache(look_up)

    def dtype(tt_dtype: tl.dtype) -> Any:
        if tt_dtype.__class__ is tl.block_type:
            tt_dtype = tt_dtype.element_ty
        return (of_numbers if tt_dtype.__class__ is tl.dtype else look_up)(tt_dtype)

    interpreter._get_np_dtype = dtype


def make_quicker() -> None:
    """From now on, in this process."""
    interpreter._patch_lang = Replaced().replace
    _remember_dtypes()
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)
