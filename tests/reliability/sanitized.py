"""python -m tests.reliability.sanitized: every kernel under NVIDIA's compute-sanitizer, which sees stray accesses and races.

It comes with the CUDA toolkit, not with PyTorch: where it is not found, this says so. 1 if it has found anything.
"""

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

import visattn
from visattn import use_backend

TOOLS = ("memcheck", "racecheck")
LAYERS = {
    "folded": ({"in_channels": 16, "gamma": 0.5}, (2, 16, 5, 13)),
    "channels that are no power of two": ({"in_channels": 24}, (1, 24, 9, 9)),
    "read in steps": ({"in_channels": 256}, (1, 256, 3, 11)),
    "thin queries": ({"in_channels": 64, "qk_channels": 8, "gamma": 0.5}, (1, 64, 9, 15)),
    "heads over pooled keys": ({"in_channels": 24, "num_heads": 4, "pool": 2, "out_proj": True}, (1, 24, 10, 14)),
}
"""Arguments of the layer and a map for each form of the kernels: few, since every access is watched, and with a rest in every loop."""

MISSING = "compute-sanitizer was not found (it comes with the CUDA toolkit): nobody has looked for stray accesses and races"


def found() -> str | None:
    """The sanitizer's path."""
    toolkits = [os.environ.get("CUDA_HOME", ""), *map(str, sorted(Path("/usr/local").glob("cuda*"), reverse=True))]
    beside = [f"{toolkit}/{folder}" for toolkit in toolkits if toolkit for folder in ("bin", "compute-sanitizer")]
    return shutil.which("compute-sanitizer", path=os.pathsep.join([os.environ.get("PATH", ""), *beside]))


def work() -> int:
    """One pass forward and back through every form in every dtype; returns how many, for the device at hand."""
    on_gpu = torch.cuda.is_available()
    device, dtypes = ("cuda", (torch.float16, torch.bfloat16, torch.float32)) if on_gpu else ("cpu", (torch.float32,))
    with use_backend("triton" if on_gpu else "torch"):
        for options, shape in LAYERS.values():
            for dtype in dtypes:
                layer = visattn.SelfAttention2d(**options, device=device, dtype=dtype)
                x = torch.randn(shape, device=device, dtype=dtype, requires_grad=True)
                layer(x).sum().backward()
    return len(LAYERS) * len(dtypes)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.reliability.sanitized", description=__doc__)
    parser.add_argument("--work", action="store_true", help="only run what is to be watched")
    if parser.parse_args(arguments).work:
        print(f"{work()} passes forward and back")
        return 0
    tool, status = found(), 0
    if tool is None or not torch.cuda.is_available():
        print(MISSING if tool is None else "no GPU: nothing to watch")
        return 0
    # Without PyTorch's own cache every tensor is an allocation of its own, with nothing behind its end.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    for name in TOOLS:
        command = [tool, "--tool", name, "--error-exitcode", "1", sys.executable, "-m", __spec__.name, "--work"]
        result = subprocess.run(command, env=environment, check=False)
        status |= int(result.returncode != 0)
        print(f"{name}: {'nothing found' if result.returncode == 0 else f'ended with {result.returncode}'}", flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
