"""How kernels are started: compiled the first time by Triton, found again by a key that costs less to make than Triton's own.

`kernel[grid](…)` binds its arguments, describes each of them, prints the options and looks at the environment in every call. What is
compiled depends on less, and `launch` looks at no more; `python -m bench host` times both.
"""

from typing import Any

import torch
from triton import JITFunction

ALIGNMENT = 16
"""Bytes. Triton compiles one kernel for pointers that are multiples of it and another for those that are not."""

FITS_INT32 = 2**31 - 1
"""Bytes. For AMD GPUs Triton compiles another kernel where a tensor's memory is no larger, with offsets of 32 bits."""

MAX_REMEMBERED = 4096
"""Problems whose kernels are remembered; after so many different ones all are found anew, by Triton."""

Constants = dict[str, Any]
"""A kernel's constants by name, options of the compiler among them. Each is made once: a kernel is found again by the dict itself."""

_remembered: dict[tuple[Any, ...], tuple[Any, list[Any], Constants]] = {}
"""By what launches depend on, the compiled kernel and the values that follow its arguments; and the constants, or another dict might get
their number."""


def launch(kernel: JITFunction, programs: int, constants: Constants, *args: Any) -> None:
    """Starts so many programs of a kernel, as `kernel[(programs,)](*args, **constants)` does, on the current device.

    args: the kernel's first arguments, a tensor before all others: tensors, whole numbers, floats and None. constants: all that follow.
    The key takes the values of whole numbers, of which Triton asks whether they are 1, multiples of 16 or large; of tensors the dtype, and
    whether they are aligned; of floats nothing.
    """
    key: list[Any] = [id(kernel), id(constants), args[0].get_device()]
    for arg in args:
        kind = arg.__class__
        if kind is int or arg is None:
            key.append(arg)
        elif kind is float:
            key.append(float)
        else:
            key.append(arg.dtype if arg.data_ptr() % ALIGNMENT == 0 else (arg.dtype,))
    if torch.version.hip:
        key += (arg.untyped_storage().nbytes() <= FITS_INT32 for arg in args if isinstance(arg, torch.Tensor))
    found = _remembered.get(tuple(key))
    if found is not None:
        compiled, rest, _ = found
        compiled[programs, 1, 1](*args, *rest)
        return
    compiled = kernel[(programs,)](*args, **constants)
    if compiled is not None:  # the interpreter compiles nothing
        if len(_remembered) >= MAX_REMEMBERED:
            _remembered.clear()
        _remembered[tuple(key)] = compiled, [constants[name] for name in kernel.arg_names[len(args) :]], constants
