"""The layers in the hands of PyTorch's own machinery, and whether repeats give the same bits.

What needs a process of its own is in `cold.py`; what needs a GPU is in `tests/test_state.py` alone.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from . import cold
from .cold import LAYERS, make, make_map, same, step
from .figures import Figure

REPEATS = 1000
ONE_BINARY = {"finished": 8, "binaries": 1, "left": 0}
RMS_FLOOR = {torch.bfloat16: 1e-2, torch.float16: 2e-3}
"""Relative RMS errors that no path is held to less than, as in `tests/oracle.py`."""

SIZES = [(4, 8, 6, 5), (1, 8, 7, 9), (3, 8, 16, 17), (2, 8, 33, 2), (5, 8, 4, 4), (2, 8, 12, 31), (6, 8, 20, 20), (2, 8, 9, 2)]
"""Maps of 18 to 400 pixels, on both sides of where the PyTorch path changes its form, one of them alone in its batch."""


def different_repeats(module: nn.Module, x: Tensor, times: int) -> int:
    """How many of so many passes forward and back gave other bits than the first."""
    first = step(module, x)
    return sum(not same(step(module, x), first) for _ in range(times))


def checkpointed_is_the_same(name: str, use_reentrant: bool) -> bool:
    """Whether activation checkpointing, which runs the layer again in the backward pass, gives the same bits."""
    module, x = make(name), make_map().requires_grad_()
    checkpoint(module, x, use_reentrant=use_reentrant).square().mean().backward()
    assert x.grad is not None
    return same([x.grad, *(p.grad for p in module.parameters() if p.grad is not None)], step(module, x)[1:])


def errors_under_autocast(name: str, dtype: torch.dtype) -> dict[str, tuple[float, float]]:
    """For the output and each gradient, its relative RMS error, and that of the layer and the map in `dtype` itself."""
    module, x = make(name), make_map()
    with torch.autocast("cpu", dtype=dtype):
        ours = step(module, x)
    truth, narrow = step(make(name, dtype=torch.float64), x.double()), step(make(name, dtype=dtype), x.to(dtype))
    floor = 1e-3 * max(float(t.norm()) for t in truth[1:])  # for gradients that are zero but for rounding

    def error(tensor: Tensor, right: Tensor) -> float:
        return float((tensor.double() - right).norm() / right.norm().clamp(min=floor))

    names = ["out", "x", *(n for n, _ in module.named_parameters())]
    return {n: (error(a, t), error(b, t)) for n, a, b, t in zip(names, ours, narrow, truth, strict=True)}


def step_of_an_optimizer(name: str, scale: float | None, loss_factor: float = 1.0) -> list[Tensor]:
    """The parameters after a step in fp16 autocast, without a `GradScaler` or with one that begins with `scale`."""
    module = make(name)
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    with torch.autocast("cpu", dtype=torch.float16):
        out = module(make_map())
    loss = loss_factor * out.float().square().mean()
    if scale is None:
        loss.backward()
        optimizer.step()
    else:
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    return [p.detach() for p in module.parameters()]


def scaler_is_right(name: str) -> bool:
    """Whether a step with a `GradScaler` is that without one, and is left out where the loss is infinite."""
    without, with_ = step_of_an_optimizer(name, None), step_of_an_optimizer(name, 2.0**10)
    skipped = step_of_an_optimizer(name, 2.0**10, float("inf"))
    close = all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(without, with_, strict=True))
    return close and same(skipped, list(make(name).parameters())) and not same(skipped, without)


def graphs_for_many_sizes(name: str, sizes: Sequence[tuple[int, ...]], dynamic: bool | None) -> int:
    """How many graphs `torch.compile` makes for maps of these sizes, after making sure that each result is eager's."""
    torch.compiler.reset()
    counter, module = CompileCounterWithBackend("aot_eager"), make(name)
    compiled = torch.compile(module, fullgraph=True, backend=counter, dynamic=dynamic)
    for size in sizes:
        for got, expected in zip(step(compiled, make_map(*size)), step(module, make_map(*size)), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)
    torch.compiler.reset()
    return counter.frame_count


def figures() -> list[Figure]:
    torch.set_num_threads(1)
    repeats = {name: different_repeats(make(name), make_map(), REPEATS) for name in LAYERS}
    came_of = cold.run("compiling", "ranks", "threads", "fork") | cold.run("repeats in the interpreter", TRITON_INTERPRET="1")
    compiled, ranks = came_of["compiling"], came_of["ranks"]
    checkpointed = [checkpointed_is_the_same(name, use_reentrant) for name in LAYERS for use_reentrant in (True, False)]
    errors = [(dtype, *pair) for name in LAYERS for dtype in RMS_FLOOR for pair in errors_under_autocast(name, dtype).values()]
    off = sum(ours > max(2 * narrow, RMS_FLOOR[dtype]) for dtype, ours, narrow in errors)
    scaled = [scaler_is_right(name) for name in LAYERS]
    graphs = [graphs_for_many_sizes(name, SIZES, None) for name in LAYERS]
    on_kernels = came_of["repeats in the interpreter"]
    same = f"{sum(checkpointed)} of {len(checkpointed)} the same bits"
    return [
        *(Figure(f"{REPEATS} passes forward and back, {name}, CPU", f"{n} with other bits", "0", n == 0) for name, n in repeats.items()),
        Figure("10 passes on the kernels in the interpreter", f"{on_kernels} with other bits", "0", on_kernels == 0),
        Figure("8 threads start where nothing has run before", f"{came_of['threads']} with other bits", "0", came_of["threads"] == 0),
        Figure("a child forked after the layers have run", "the same bits" if came_of["fork"] else "others", "the same", came_of["fork"]),
        Figure(
            "8 processes compile a kernel into one cold cache",
            f"{compiled['finished']} finish, {compiled['binaries']} binary, {compiled['left']} half-written files", "8, 1, 0",
            compiled == ONE_BINARY,
        ),
        Figure(
            "DistributedDataParallel, 2 processes, find_unused_parameters or not",
            f"{len(ranks)} of {4 * len(LAYERS)} results differ", "0", not ranks,
        ),
        Figure("activation checkpointing, use_reentrant or not", same, "all", all(checkpointed)),
        Figure("autocast against the layer in bf16 and fp16 itself", f"{off} of {len(errors)} tensors twice as wrong", "0", off == 0),
        Figure("GradScaler: same step, and none where the loss is infinite", f"{sum(scaled)} of {len(scaled)} layers", "all", all(scaled)),
        Figure(f"graphs that torch.compile makes for {len(SIZES)} sizes", ", ".join(map(str, graphs)), "at most 5", max(graphs) <= 5),
        Figure("races on a GPU: repeats, threads, graph capture, streams, sanitizer", "–", "none", None),
    ]  # fmt: skip
