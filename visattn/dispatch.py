"""Which backend runs: asked for by an argument, by `use_backend`, by VISATTN_BACKEND, or else chosen."""

import functools
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from . import device, validation

BACKENDS = ("auto", "triton", "torch")
MAX_CHANNELS = 512  # as many as the kernels' launch configurations are for
KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
WITHOUT_KERNEL = {
    "queries": "softmax over the queries has no kernel: its rows do not sum to one, so a query's output is not finished in one pass",
    "channels": "attention over the channels has no kernel: it runs in PyTorch through the Gram matrix of the channels",
}
"""Why not, for each kind of attention but that normalised over the keys: over the map itself ("keys") or on tokens ("tokens")."""

logger = logging.getLogger("visattn")


class _Request:
    """What `use_backend` asks for at present.

    A plain object, because torch.compile guards on its attribute and traces anew when it changes. torch 2.11 cannot trace a
    context variable and does not guard on a thread's own one, so that compiled code would go on with the old choice.
    """

    backend: str | None = None


_request = _Request()


@contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Within the block, every call runs on `backend`: "triton" or "torch" or raises, "auto" chooses.

    Holds for the whole process, as PyTorch's own switches do, so that the threads of a model see it too.

    Raises:
        ValueError: the name is not one of the three.
    """
    validation.check_backend(backend, BACKENDS, "use_backend")
    outer, _request.backend = _request.backend, backend
    try:
        yield
    finally:
        _request.backend = outer


def requested_backend(backend: str | None) -> str:
    """The argument if given, else `use_backend`'s, else VISATTN_BACKEND's, else "auto"."""
    if backend is not None:
        validation.check_backend(backend, BACKENDS, "backend")
        return backend
    if _request.backend is not None:
        return _request.backend
    in_environment = os.environ.get("VISATTN_BACKEND")
    if not in_environment:  # set to nothing is not set
        return "auto"
    validation.check_backend(in_environment, BACKENDS, "VISATTN_BACKEND")
    return in_environment


def unsupported_reasons(x: Tensor, qk_channels: int, kind: str = "keys", value_channels: int = 0) -> list[str]:
    """Every reason why the Triton kernels cannot take x (N, C, H, W) with queries of `qk_channels`; none means they can.

    With kind "tokens" the widths are those of one head, and `value_channels` that of its values.
    """
    reasons = [WITHOUT_KERNEL[kind]] if kind in WITHOUT_KERNEL else []
    interpreting = device.triton_is_interpreting()
    if not device.TRITON_IS_INSTALLED:
        reasons.append("the package triton is not installed")
    if x.dtype not in KERNEL_DTYPES:
        reasons.append(f"the kernels compute in float16, bfloat16 and float32, x is {_name(x.dtype)}")
    if interpreting and x.dtype == torch.bfloat16:
        reasons.append("Triton's interpreter computes bfloat16 dots wrongly")
    channels = x.shape[1]
    if kind == "tokens" and max(qk_channels, value_channels) > MAX_CHANNELS:
        reasons.append(f"the kernels hold heads of at most {MAX_CHANNELS} channels, they have {qk_channels} and {value_channels} in values")
    elif kind != "tokens" and max(channels, qk_channels) > MAX_CHANNELS:
        reasons.append(f"the kernels hold at most {MAX_CHANNELS} channels, x has {channels} and the queries have {qk_channels}")
    if x.is_cuda:
        capability = device.compute_capability(x.device)
        if capability < device.MIN_COMPUTE_CAPABILITY:
            reasons.append(f"the kernels need compute capability 8.0 or newer, {x.device} has {capability[0]}.{capability[1]}")
    elif not (x.is_cpu and interpreting):
        reasons.append(f"the kernels need a CUDA or ROCm device, x is on {x.device}")
    return reasons


def select_backend(x: Tensor, qk_channels: int, backend: str | None, kind: str = "keys", value_channels: int = 0) -> str:
    """ "triton" or "torch", for what `unsupported_reasons` is asked about.

    Raises:
        RuntimeError: "triton" was asked for and cannot run; the message holds all the reasons.
    """
    requested = requested_backend(backend)
    if requested == "torch":
        return "torch"
    reasons = unsupported_reasons(x, qk_channels, kind, value_channels)
    if not reasons:
        return "triton"
    if requested == "triton":
        raise RuntimeError(f"backend 'triton' cannot run: {'; '.join(reasons)}. Use backend 'torch' or 'auto'.")
    if not torch.compiler.is_compiling():
        _log_once("; ".join(reasons))
    return "torch"


def explain_selection(
    x: Tensor, qk_channels: int, backend: str | None = None, kind: str = "keys", value_channels: int = 0,
    *, normalized: bool = False, on_kernels: str = "", in_pytorch: str = "",
) -> str:  # fmt: skip
    """Which backend a call with x would run on, in which form, and why not on the other, in sentences.

    normalized: whether x is normalised before. on_kernels: a clause on its form with kind "tokens"; in_pytorch: a sentence on the form
    that it takes on the PyTorch path.
    """
    requested = requested_backend(backend)
    reasons = unsupported_reasons(x, qk_channels, kind, value_channels)
    problem = f"x {tuple(x.shape)} {_name(x.dtype)} on {x.device}"
    if requested == "triton" and reasons:
        return f"{problem}: would raise, backend 'triton' was asked for and cannot run: {'; '.join(reasons)}."
    if requested == "torch":
        possible = "could run as well" if not reasons else f"could not run: {'; '.join(reasons)}"
        return f"{problem}: runs on the PyTorch path, because backend 'torch' was asked for; the Triton kernels {possible}.{in_pytorch}"
    if reasons:
        return f"{problem}: runs on the PyTorch path; the Triton kernels cannot run: {'; '.join(reasons)}.{in_pytorch}"
    interpreter = ", in the interpreter" if device.triton_is_interpreting() else ""
    return f"{problem}: runs on the Triton kernels{interpreter}, {on_kernels or _form(x, qk_channels, normalized)}."


def _form(x: Tensor, qk_channels: int, normalized: bool) -> str:
    """Which of the kernels' forms runs; Triton is imported only here, where it is known to run."""
    from . import kernels

    maps, channels, height, width = x.shape
    target = device.kernel_target(x.device)
    if kernels.projects_keys(maps, channels, height * width, qk_channels, x.dtype, target):
        return "with thin projected keys" + ", after the map has been normalised" * normalized
    if not normalized:
        return "keys and values are the map itself"
    if kernels.attends_normalized(channels, x.dtype, target):
        return "keys and values are the map itself, which is normalised on the way"
    return "keys and values are the map, after it has been normalised"


@functools.cache
def _log_once(reasons: str) -> None:
    logger.info("running on the PyTorch path: %s", reasons)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
