"""The ends of what fits: offsets beyond int32, batches beyond a grid's other dimensions, and the bugs of others, by name.

More than 2³¹ elements do not fit into a test, and need not: what goes wrong there is the product of an index and a stride. Here a few
numbers lie so far apart that the products pass 2³¹, in memory that is asked for and never touched in between. So lie the map, the
gradient that comes back, and everything that the kernels allocate on the way.
"""

import ast
import contextlib
import functools
import math
import mmap
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from visattn import functional, torch_backend, use_backend

from .figures import Figure

INT32 = 1 << 31
MAP_NORESERVE = 0x4000
"""Linux's, to be given addresses without being asked for memory; Python has the name from 3.13 on."""
TESTS = Path(__file__).resolve().parent.parent


ARRANGEMENTS = {
    "maps": (3, 6, 3), "channels": (1, 6, 3), "tokens": (1, 6, 70), "all together": (2, 6, 70), "one stride beyond int32": (2, 6, 3),
}  # fmt: skip
"""What lies far apart, and the shape (N, C, L) that shows it: of tokens there are more than a tile has."""


def strides_of(arrangement: str, shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Those of a tensor (N, C, L), with an offset beyond 2³¹ though each fits into int32, but for the last arrangement."""
    _, channels, length = shape
    far = [INT32 // max(1, size - 1) + 7 for size in shape]
    return {
        "maps": (far[0], length, 1),
        "channels": (length, far[1], 1),
        "tokens": (channels, 1, far[2]),
        "all together": (far[0] // 2, far[1] // 2, far[2] // 2),
        "one stride beyond int32": (INT32 + 5, length, 1),
    }[arrangement]


def scattered(tensor: Tensor, arrangement: str) -> Tensor:
    """The numbers of a tensor (N, C, L) or (N, C, 1, L), so far apart."""
    laid_out = _untouched(tensor.flatten(2).shape, strides_of(arrangement, tensor.flatten(2).shape), tensor.dtype).copy_(tensor.flatten(2))
    return laid_out if tensor.dim() == 3 else laid_out[:, :, None]


def _untouched(shape: torch.Size, strides: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """In memory of its own. It begins in the middle, so that an offset that wraps around leads to a zero and not to another process's."""
    offsets = sum(torch.arange(n).mul(s).view(-1, *[1] * (len(shape) - 1 - i)) for i, (n, s) in enumerate(zip(shape, strides, strict=True)))
    assert isinstance(offsets, Tensor)
    assert offsets.unique().numel() == math.prod(shape), "elements overlap"
    assert offsets.max() >= INT32
    numel = INT32 + int(offsets.max()) + 1
    memory = mmap.mmap(-1, numel * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
    return torch.frombuffer(memory, dtype=dtype).as_strided(shape, strides, INT32)


@contextlib.contextmanager
def scattered_allocations(arrangement: str) -> Iterator[None]:
    """Within the block, all that the Triton path makes for maps and tokens is scattered as well."""
    from visattn import triton_backend, triton_projected_tokens, wide_triton_backend

    empty_strided, new_empty, heads = torch.empty_strided, torch.Tensor.new_empty, triton_projected_tokens._heads

    def strided(shape: tuple[int, ...], strides: tuple[int, ...], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        far = sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True)) >= INT32
        return _untouched(shape, strides, dtype) if far else empty_strided(shape, strides, dtype=dtype, device=device)

    def new(tensor: Tensor, *arguments: Any, **options: Any) -> Tensor:
        made = new_empty(tensor, *arguments, **options)
        return scattered(made, arrangement) if made.dim() == 3 else made

    def of_tokens(t: Tensor, num_heads: int) -> Tensor:
        of_heads = heads(t, num_heads)
        return scattered(of_heads, arrangement) if t.dim() == 3 else of_heads

    def map_like(x: Tensor) -> Tensor:
        return scattered(torch.zeros_like(x), arrangement)

    with (
        mock.patch.object(wide_triton_backend, "empty_map_like", map_like),
        mock.patch.object(wide_triton_backend, "folded_queries", lambda *a: scattered(torch_backend.folded_queries(*a), arrangement)),
        mock.patch.object(torch, "empty_strided", strided),
        mock.patch.object(torch.Tensor, "new_empty", new),
        mock.patch.object(triton_backend, "empty_map_like", map_like),
        mock.patch.object(triton_projected_tokens, "empty_map_like", map_like),
        mock.patch.object(triton_projected_tokens, "_heads", of_tokens),
    ):
        yield


FORMS: dict[str, dict[str, Any]] = {
    "folded": {},
    "projected keys": {"channels": 17, "qk_channels": 3},
    "on tokens": {"num_heads": 2},
    "wide": {"channels": 257},
}
"""The ways of the kernels: widths and settings in which they differ from a plain call."""

TRIED = [(form, arrangement) for form in FORMS if form != "wide" for arrangement in ARRANGEMENTS]
TRIED += [("wide", "channels"), ("wide", "one stride beyond int32")]
"""Maps of 257 channels take the interpreter minutes, but for few pixels."""


def results(form: str, shape: tuple[int, int, int], arrangement: str | None, backend: str) -> list[Tensor]:
    """Output and gradients of one call, scattered or as usual."""
    options = dict(FORMS[form])
    maps, channels, length = shape
    channels, qk_channels = options.pop("channels", channels), options.pop("qk_channels", channels)
    generator = torch.Generator().manual_seed(0)
    x, d_out = (torch.randn(maps, channels, 1, length, generator=generator) for _ in range(2))
    weights = [torch.randn(rows, channels, generator=generator) * channels**-0.5 for rows in (qk_channels, qk_channels, channels)]
    if arrangement is not None:
        x, d_out = (scattered(t, arrangement) for t in (x, d_out))
    leaves = [t.detach().requires_grad_() for t in (x, *weights)]
    on_the_way = scattered_allocations(arrangement) if arrangement and backend == "triton" else contextlib.nullcontext()
    with use_backend(backend), on_the_way:
        out = functional.self_attention_2d(*leaves, **options, residual=False)
        return [t.contiguous() for t in (out, *torch.autograd.grad(out, leaves, d_out))]


as_usual = functools.cache(functools.partial(results, arrangement=None))


def complaints(form: str, arrangement: str, backend: str) -> list[str]:
    """What is not as it is where the numbers lie side by side. Kernels compute nothing from strides: the same bits are wanted.

    But PyTorch takes the sum of a map, which attention on tokens needs, in an order that goes with the strides.
    """
    same_bits = backend == "triton" and form != "on tokens"
    close = torch.equal if same_bits else lambda a, b: torch.allclose(a, b, rtol=1e-5, atol=1e-5)
    shape, names = ARRANGEMENTS[arrangement], ("out", "x", "w_q", "w_k", "w_v")
    pairs = zip(names, results(form, shape, arrangement, backend), as_usual(form, shape, backend=backend), strict=True)
    return [f"{name}: differs by {(got - wanted).abs().max()}" for name, got, wanted in pairs if not close(got, wanted)]


class Bug(NamedTuple):
    """One that others shipped: what went wrong, where, and the tests that would find it here. `on_gpu` where only a device can show it."""

    name: str
    where: str
    tests: tuple[str, ...]
    on_gpu: bool = False


BUGS = [
    Bug(
        "int32 offsets", "sglang#20389, fla#1080, SageAttention#386",
        ("test_limits.py::test_offsets_beyond_int32", "test_limits.py::test_an_offset_in_int32_is_noticed"),
    ),
    Bug("more elements than int32 counts", "sglang#20389", ("test_gpu.py::test_more_elements_than_int32",), on_gpu=True),
    Bug(
        "gradients without strides", "fla#1139, pytorch#194719",
        ("test_layouts.py::test_gradient_of_a_sum", "test_general_layer.py::TestLayout::test_gradient_without_strides"),
    ),
    Bug("only one stride checked", "TransformerEngine#2746", ("test_layouts.py::test_layouts", "test_token_attention.py::TestKernels")),
    Bug("tail rows never written", "lightning-attention#28", ("test_limits.py::test_every_element_is_written",)),
    Bug(
        "a grid beyond 65,535", "flashinfer#3125",
        ("test_limits.py::test_grids_have_one_dimension", "test_limits.py::test_large_batches"),
    ),
    Bug(
        "an empty batch", "pytorch#133780, pytorch#141218",
        ("test_correctness.py::test_empty_batch_gives_an_empty_map_and_zero_gradients", "test_general_layer.py::TestSizes::test_no_maps"),
    ),
    Bug("another device's context", "triton#2441", ("test_limits.py::test_kernels_start_on_the_device_of_their_input",)),
    Bug("another stream", "pytorch#178547", ("test_gpu.py::test_runs_on_the_current_stream",), on_gpu=True),
    Bug("strides of fake tensors", "pytorch#180445", ("test_compile.py::TestOpcheck", "test_general_layer.py::TestCompilers")),
    Bug(
        "autocast's dtype in the backward pass", "pytorch#87979, fla#1264",
        ("test_autograd.py::TestAutocast::test_backward_inside_of_autocast_is_the_same",),
    ),
    Bug("shared memory beyond the device's", "mamba#387, vllm#36802", ("test_ahead_of_time.py::test_representative",)),
    Bug("overflow of logits in fp16", "pytorch#119131", ("test_correctness.py::TestExtremeValues::test_logits_beyond_the_range_of_half",)),
    Bug("TF32 in gradients of fp32", "triton_docs_tutorials#6", ("test_limits.py::test_full_precision_is_the_default",)),
    Bug("a backward pass that assumes a causal mask", "triton#4541", ("test_limits.py::test_every_pixel_reaches_every_pixel",)),
    Bug("the tutorial's scale of 0.5", "attorch", ("test_oracle.py::test_wrong_forward_is_rejected",)),
    Bug(
        "processes that tune for themselves, and race", "pytorch#92664",
        ("test_limits.py::test_nothing_is_tuned_at_call_time", "test_state.py::test_processes_compile_into_one_cold_cache"),
    ),
    Bug(
        "threads on a cold cache", "triton#11494",
        ("test_state.py::test_threads_processes_and_forks_from_cold", "test_state.py::TestOnTheDevice::test_threads_on_a_cold_cache"),
        on_gpu=True,
    ),
]  # fmt: skip
"""Each with a test of its own here, or where it belongs."""


def missing(bug: Bug) -> list[str]:
    """Those of its tests that do not exist."""
    return [test for test in bug.tests if not _exists(*test.split("::"))]


def _exists(file: str, *names: str) -> bool:
    body: list[ast.stmt] = ast.parse((TESTS / file).read_text(encoding="utf-8")).body
    for name in names:
        found = [node for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name]
        if not found:
            return False
        body = found[0].body
    return True


def off(backend: str) -> list[str]:
    """All arrangements in all forms: what is not as it should be."""
    return [
        f"{form}, {arrangement}: {complaint}"
        for form, arrangement in TRIED for complaint in complaints(form, arrangement, backend)
    ]  # fmt: skip


def figures() -> list[Figure]:
    tried = f"{len(TRIED)} arrangements"
    in_pytorch = off("torch")
    command = [sys.executable, "-W", "ignore", "-m", "tests.reliability.limits"]
    kernels = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False)
    if in_pytorch or kernels.returncode:
        print(*in_pytorch, kernels.stdout, kernels.stderr, sep="\n", file=sys.stderr)
    without, on_gpu = [bug.name for bug in BUGS if missing(bug)], sum(bug.on_gpu for bug in BUGS)
    named = f"{len(BUGS) - len(without)} of {len(BUGS)}, {on_gpu} of them only on a GPU"
    return [
        Figure("offsets beyond 2³¹, PyTorch path", f"{tried}, {len(in_pytorch)} off", "0 off", not in_pytorch),
        Figure("offsets beyond 2³¹, kernels in the interpreter", f"{tried}, {kernels.returncode} off", "0 off", kernels.returncode == 0),
        Figure("bugs that others shipped, with a test by name", named, "all", not without),
    ]


if __name__ == "__main__":
    found = off("triton")
    print(*found, sep="\n")
    sys.exit(min(len(found), 100))
