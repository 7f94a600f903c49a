"""Matrix instructions of NVIDIA GPUs in Triton's interpreter, which by itself rounds a dot as a processor does, and bf16 not at all.

A matrix instruction multiplies exactly, adds the products of STEP channels to what there was, and cuts off what fp32 cannot hold, where a
processor rounds: so Fasi et al., "Numerical behavior of NVIDIA tensor cores" (2021), found on V100, T4 and A100, and Khattak and Mikaitis,
"Accurate models of NVIDIA tensor cores" (2025), on H100 and B200. Left out is that terms are aligned to the largest before they are added,
with few bits more than fp32 has.

How operands in fp32 come in parts, and in which order their products are taken, is what Triton compiles `input_precision` to.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from visattn.kernels import Target

from visattn import device, dispatch

STEP = {"half": 16, "tf32": 8}
"""Channels that an instruction takes at once, of operands in 16 bits and in TF32."""

PRECISIONS = ("tf32", "tf32x3", "ieee", "bf16x3", "bf16x6")

Array = Any


def _bits(x: Array) -> Array:
    return np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)


def _rounded(x: Array, bits: int) -> Array:
    """fp32 to the nearest number with so many bits less, ties to even."""
    whole = _bits(x)
    odd = (whole >> np.uint32(bits)) & np.uint32(1)
    result = (whole + np.uint32((1 << (bits - 1)) - 1) + odd) & np.uint32(~((1 << bits) - 1) & 0xFFFFFFFF)
    return np.where(np.isfinite(x), result.view(np.float32), x)


def _cut(x: Array, bits: int) -> Array:
    return (_bits(x) & np.uint32(~((1 << bits) - 1) & 0xFFFFFFFF)).view(np.float32)


def _cut_to_fp32(x: Array) -> Array:
    """float64 to fp32, towards zero."""
    nearest = x.astype(np.float32)
    return np.where(np.abs(nearest.astype(np.float64)) > np.abs(x), np.nextafter(nearest, np.float32(0)), nearest)


def _instructions(a: Array, b: Array, acc: Array, step: int) -> Array:
    """acc + a b, in fp32, an instruction after the other."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    for start in range(0, a.shape[1], step):
        acc = _cut_to_fp32(acc.astype(np.float64) + a[:, start : start + step] @ b[start : start + step])
    return acc


def _in_parts(a: Array, b: Array, split: Callable[[Array], list[Array]], pairs: list[tuple[int, int]], step: int) -> Array:
    """The products of pairs of parts, the largest last, without what smaller ones make of infinities."""
    a_parts, b_parts = split(a), split(b)
    acc = np.zeros((a.shape[0], b.shape[1]), np.float32)
    for i, j in pairs:
        acc = _instructions(a_parts[i], b_parts[j], acc, step)
    acc = np.where(np.isnan(acc), np.float32(0), acc)
    return _instructions(a_parts[0], b_parts[0], acc, step)


def _parts_in_tf32(x: Array) -> list[Array]:
    large = _rounded(x, 13)
    return [large, _cut(x - large, 13)]


def _parts_in_bf16(x: Array) -> list[Array]:
    high = _rounded(x, 16)
    middle = _rounded(x - high, 16)
    return [high, middle, _rounded(x - high - middle, 16)]


def _dot(a: Array, b: Array, acc: Array, precision: str) -> Array:
    """acc + a b of fp32 operands."""
    if precision == "tf32":
        return _instructions(_cut(a, 13), _cut(b, 13), acc, STEP["tf32"])
    if precision == "tf32x3":
        return _in_parts(a, b, _parts_in_tf32, [(1, 0), (0, 1)], STEP["tf32"]) + acc
    if precision == "bf16x6":
        return _in_parts(a, b, _parts_in_bf16, [(1, 1), (2, 0), (0, 2), (1, 0), (0, 1)], STEP["half"]) + acc
    raise NotImplementedError(f"no device that is known here takes {precision}")


def _as_fp32(handle: interpreter.TensorHandle) -> Array:
    if handle.dtype.scalar == tl.bfloat16:
        return (handle.data.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return handle.data.astype(np.float32)


def _create_dot(self: Any, a: Any, b: Any, d: Any, precision: Any, max_num_imprecise_acc: int) -> interpreter.TensorHandle:
    acc = d.data.astype(np.float32)
    if a.dtype.scalar == tl.float32:
        result = _dot(a.data, b.data, acc, precision.name.lower())
    else:
        result = _instructions(_as_fp32(a), _as_fp32(b), acc, STEP["half"])
    return interpreter.TensorHandle(result.astype(d.data.dtype), d.dtype.scalar)


def _cast_impl(self: Any, src: Any, dst_type: Any) -> interpreter.TensorHandle:
    """With bf16 rounded to nearest, as the instruction does; the interpreter cuts it off."""
    if dst_type.scalar == tl.bfloat16:
        data = (_bits(_rounded(_as_fp32(src), 16)) >> np.uint32(16)).astype(np.uint16)
    elif src.dtype.scalar == tl.bfloat16:
        data = _as_fp32(src).astype(interpreter._get_np_dtype(dst_type))
    else:
        data = src.data.astype(interpreter._get_np_dtype(dst_type))
    return interpreter.TensorHandle(data, dst_type.scalar)


def _get_bf16(self: Any, value: float) -> interpreter.TensorHandle:
    """A constant, which Triton 3.6 has none of in bf16."""
    return _cast_impl(self, self.get_fp32(value), tl.bfloat16)


def _not_in_bf16(operation: Callable[..., Any]) -> Callable[..., Any]:
    """Refused, since it would be done on whole numbers."""

    def refuse(self: Any, *operands: Any) -> Any:
        if any(isinstance(t, interpreter.TensorHandle) and t.dtype.scalar == tl.bfloat16 for t in operands):
            raise NotImplementedError("arithmetic on bf16 itself; kernels are to convert to fp32 before")
        return operation(self, *operands)

    return refuse


def _reasons_but_bf16(*args: Any, **kwargs: Any) -> list[str]:
    return [reason for reason in _unsupported_reasons(*args, **kwargs) if "bfloat16 dots" not in reason]


_unsupported_reasons = dispatch.unsupported_reasons


@contextmanager
def tensor_cores(architecture: str) -> Iterator[None]:
    """Within the block the kernels run with the block sizes of this class of devices, and their dots as such a device computes them."""
    builder = interpreter.InterpreterBuilder
    options = interpreter.InterpreterOptions(sanitize_overflow=False, allowed_dot_input_precisions=PRECISIONS)
    with ExitStack() as stack:
        for name, replacement in (
            ("create_dot", _create_dot),
            ("cast_impl", _cast_impl),
            ("get_bf16", _get_bf16),
            ("binary_op", _not_in_bf16(builder.binary_op)),
            ("unary_op", _not_in_bf16(builder.unary_op)),
            ("ternary_op", _not_in_bf16(builder.ternary_op)),
        ):
            stack.enter_context(mock.patch.object(builder, name, replacement, create=True))
        stack.enter_context(mock.patch.object(interpreter.interpreter_builder, "options", options))
        stack.enter_context(mock.patch.object(dispatch, "unsupported_reasons", _reasons_but_bf16))
        stack.enter_context(
            mock.patch.object(device, "_kernel_target", lambda _, highest: Target(architecture, "bf16x6" if highest else "tf32"))
        )
        yield
