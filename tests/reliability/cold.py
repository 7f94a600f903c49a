"""What needs a process in which nothing has been computed yet: `run` starts one, which prints what came of each attempt as JSON.

In that process every cache is cold, and it may fork: PyTorch has no threads yet.
"""

import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import visattn

ROOT = Path(__file__).resolve().parent.parent.parent
SECONDS = 120
"""After which a child that hangs is ended."""

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "Attention": lambda: visattn.Attention(8),
    "SelfAttention2d": lambda: visattn.SelfAttention2d(8, num_heads=2, norm_groups=2, out_proj=True, gamma=0.5, pool=2),
    "SelfAttention2d of thin queries": lambda: visattn.SelfAttention2d(8, qk_channels=4, norm_groups=2, out_proj=True, gamma=0.5),
    "SelfAttention2d that folds": lambda: visattn.SelfAttention2d(8, norm_groups=2, out_proj=True, gamma=0.5),
    "ChannelAttention": lambda: visattn.ChannelAttention(8),
}
"""Each of the layers, in each form that it takes."""


def make(name: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> nn.Module:
    """The layer of that name, always with the same parameters."""
    torch.manual_seed(0)
    return LAYERS[name]().to(device, dtype)


def make_map(*shape: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    """A map, by default (4, 8, 6, 5), always the same."""
    return torch.randn(shape or (4, 8, 6, 5), generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def step(module: nn.Module, x: Tensor) -> list[Tensor]:
    """The output, and the gradients of the mean of its square by x and every parameter."""
    x = x.detach().requires_grad_()
    out = module(x)
    return [out.detach(), *torch.autograd.grad(out.float().square().mean(), [x, *module.parameters()])]


def same(some: list[Tensor], others: list[Tensor]) -> bool:
    """Whether they are equal bit by bit."""
    return len(some) == len(others) and all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


def run(*names: str, **environment: str) -> dict[str, Any]:
    """The results of these attempts, one after the other in one new process."""
    result = subprocess.run(
        [sys.executable, "-m", __name__, *names], capture_output=True, text=True, cwd=ROOT, timeout=4 * SECONDS,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment, check=False,
    )  # fmt: skip
    if result.returncode:
        raise RuntimeError(f"a process that tried {', '.join(names)} ended with {result.returncode}: {result.stderr}")
    return json.loads(result.stdout.splitlines()[-1])


def threads(device: str = "cpu", count: int = 8) -> int:
    """How many of so many threads, which start at once and each run every layer first of all, got other bits than a later run."""
    layers = {name: make(name, device) for name in LAYERS}
    maps, found, together = [make_map(device=device, seed=seed) for seed in range(count)], {}, threading.Barrier(count)

    def attempt(index: int) -> None:
        together.wait()
        found[index] = [step(layer, maps[index]) for layer in layers.values()]

    started = [threading.Thread(target=attempt, args=(index,)) for index in range(count)]
    for thread in started:
        thread.start()
    for thread in started:
        thread.join(SECONDS)
    alone = [[step(layer, x) for layer in layers.values()] for x in maps]
    return sum(index not in found or not all(map(same, found[index], alone[index])) for index in range(count))


def fork() -> bool:
    """Whether a child that is forked after the parent has used every layer computes the same bits."""

    def everything() -> list[Tensor]:
        return [t for name in LAYERS for t in step(make(name), make_map())]

    expected = everything()
    return forked([lambda: same(everything(), expected)]) == [True]


def ranks() -> list[str]:
    """Where `DistributedDataParallel` in two processes gave other gradients than the mean of both halves, or an error."""
    settings = [(name, unused) for name in LAYERS for unused in (False, True)]
    halves = make_map().chunk(2)
    expected = {}
    for name in LAYERS:
        both = [step(make(name), half)[2:] for half in halves]
        expected[name] = [(a + b) / 2 for a, b in zip(*both, strict=True)]

    def train(rank: int, store: str) -> list[str]:
        torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=timedelta(seconds=60))
        wrong = []
        for name, unused in settings:
            layer = DistributedDataParallel(make(name), find_unused_parameters=unused)
            for _ in range(2):  # the second step finds out whether the first one has waited for every gradient
                layer.zero_grad()
                layer(halves[rank]).square().mean().backward()
            got = [p.grad for p in layer.parameters()]
            if not all(torch.allclose(a, b, rtol=1e-5, atol=1e-7) for a, b in zip(got, expected[name], strict=True)):
                wrong.append(f"{name}, find_unused_parameters={unused}, rank {rank}")
        torch.distributed.destroy_process_group()
        return wrong

    with tempfile.TemporaryDirectory() as folder:
        return [line for found in forked([lambda rank=rank: train(rank, f"{folder}/store") for rank in range(2)]) for line in found]


def repeats_in_the_interpreter(times: int = 10) -> int:
    """How many passes forward and back through every layer on the kernels gave other bits than the first. Fewer channels: it is slow."""
    with visattn.use_backend("triton"):
        layers = [make(name) for name in LAYERS if name != "ChannelAttention"]
        first, *others = [[t for layer in layers for t in step(layer, make_map(1, 8, 6, 5))] for _ in range(times + 1)]
    return sum(not same(found, first) for found in others)


def capture(warm: bool) -> dict[str, str]:
    """What came of capturing each layer's forward pass as a CUDA graph: "right", or the error; captured `warm`, or in its first call."""
    found = {}
    for name in LAYERS:
        module, x = make(name, "cuda", torch.float16), make_map(device="cuda", dtype=torch.float16)
        with torch.no_grad():
            if warm:
                module(x)
            graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(graph):
                    out = module(x)
            except RuntimeError as error:
                torch.cuda.synchronize()
                found[name] = f"{error}".splitlines()[0]
                continue
            x.copy_(make_map(device="cuda", dtype=torch.float16, seed=2))
            graph.replay()
            found[name] = "right" if torch.equal(out, module(x)) else "wrong"
    return found


def compiling(count: int = 8) -> dict[str, int]:
    """So many processes compile one kernel into one cold cache at once: how many finished, binaries, and half-written files left."""
    from bench.ahead_of_time import DEVICES, compile_launch
    from bench.passes import layer_launches

    device = DEVICES["sm_80"]
    launch = layer_launches(device, torch.float16, 16, 64)[-1]

    def attempt() -> str:
        return hashlib.sha256(compile_launch(launch, device).binary).hexdigest()

    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder
        binaries = forked([attempt] * count)
        left = sum(".tmp." in path.name or path.name.startswith("tmp") for path in Path(folder).rglob("*"))
    return {"finished": len(binaries), "binaries": len(set(binaries)), "left": left}


def forked(attempts: list[Callable[[], Any]]) -> list[Any]:
    """What each returns in a child of its own, all of them at once; it has to go into JSON.

    Raises:
        RuntimeError: a child ended in an error, or not at all.
    """
    children = []
    for attempt in attempts:
        reading, writing = os.pipe()
        child = os.fork()
        if not child:
            signal.alarm(SECONDS)
            try:
                with os.fdopen(writing, "w") as file:
                    json.dump(attempt(), file)
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        os.close(writing)
        children.append((child, reading))
    results = []
    for child, reading in children:
        with os.fdopen(reading) as file:
            text = file.read()
        if os.waitpid(child, 0)[1] or not text:
            raise RuntimeError("a child process ended in an error or hung")
        results.append(json.loads(text))
    return results


ATTEMPTS: dict[str, Callable[[], Any]] = {
    "compiling": compiling,
    "ranks": ranks,
    "threads": threads,
    "fork": fork,
    "threads on a GPU": lambda: threads("cuda"),
    "repeats in the interpreter": repeats_in_the_interpreter,
    "warm capture": lambda: capture(warm=True),
    "cold capture": lambda: capture(warm=False),
}
"""Those that fork come first where several are tried, and none after something on a GPU, which does not survive it."""


def main() -> None:
    print(json.dumps({name: ATTEMPTS[name]() for name in sys.argv[1:]}))


if __name__ == "__main__":
    main()
