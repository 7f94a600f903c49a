"""The least time that a layer can take on a device: from ceilings that are measured there, in the same run.

A floor is the longest of three: the attention's matrix products at the best rate of the dtype, one exponential for each
score, and each input read and each output written once. Projections are left out, so no share of a floor is flattered by them.
"""

import math
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from visattn.device import float32_precision

from . import environment, timing
from .cases import Case

BACKWARD_FACTOR = 3.5  # forward and backward together: two products a pair of tokens, then five


@dataclass(frozen=True)
class Ceilings:
    """What a device reached: FLOP/s of a large matrix product by precision, bytes/s of a copy (read and written), exponentials/s."""

    flops: dict[str, float]
    bytes: float
    exponentials: float | None

    def for_file(self) -> dict[str, Any]:
        return asdict(self)

    def floor(self, case: Case) -> float:
        """Microseconds."""
        element = 4 if case.dtype == "float32" else 2
        scores = case.batch * case.tokens**2
        map_bytes = case.batch * case.channels * case.tokens * element
        products = 2.0 * scores * (case.qk_channels + case.channels)
        if case.mode == "training":
            # Reads x and d_out, writes out and d_x; scores are exponentiated again in the backward pass.
            products, scores, map_bytes = BACKWARD_FACTOR * products, 2 * scores, 2 * map_bytes
        times = [products / self._rate(case), 2 * map_bytes / self.bytes]
        if self.exponentials:
            times.append(scores / self.exponentials)
        return 1e6 * max(times)

    def _rate(self, case: Case) -> float:
        """The best rate that keeps the precision: products of full fp32 may also be made of three of TF32 or six of bfloat16.

        Those of 16 bits may be made in fp32, which is the quicker on processors without instructions for them.
        """
        if case.precision != "float32":
            return max(self.flops[case.precision], self.flops["float32"])
        parts = [self.flops["float32"]]
        if "tf32" in self.flops:
            parts += [self.flops["tf32"] / 3, self.flops["bfloat16"] / 6]
        return max(parts)


def measure_ceilings(device: torch.device, quick: bool) -> Ceilings:
    """On random data; the best of several, since a ceiling is not a typical value."""
    on_gpu = device.type == "cuda"
    size = (2048 if quick else 8192) if on_gpu else (512 if quick else 1024)
    precisions = ["float32", "tf32", "bfloat16", "float16"] if on_gpu else ["float32", "bfloat16"]
    flops = {precision: 2 * size**3 / _least_seconds(_product(size, precision, device), device) for precision in precisions}

    source = torch.randn(2**28 if on_gpu and not quick else 2**24, device=device)
    target = torch.empty_like(source)
    copied = 2 * source.numel() * source.element_size() / _least_seconds(lambda: target.copy_(source), device)

    if on_gpu:
        return Ceilings(flops, copied, _exponentials_of_gpu(device))
    cached = torch.randn(2**16)
    result = torch.empty_like(cached)
    return Ceilings(flops, copied, cached.numel() / _least_seconds(lambda: torch.exp(cached, out=result), device))


def _product(size: int, precision: str, device: torch.device) -> timing.Call:
    dtype = torch.float32 if precision == "tf32" else getattr(torch, precision)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))

    def call() -> Tensor:
        with float32_precision(precision == "tf32"):
            return a @ b

    return call


def _exponentials_of_gpu(device: torch.device) -> float | None:
    """16 a clock and multiprocessor, by NVIDIA's table of arithmetic throughput, at the highest clock; None where that is not told."""
    clock = environment.max_clock(device)
    return 16 * torch.cuda.get_device_properties(device).multi_processor_count * 1e6 * clock if clock else None


def _least_seconds(call: timing.Call, device: torch.device, seconds: float = 0.3) -> float:
    call()
    least, end = math.inf, time.perf_counter() + seconds
    while time.perf_counter() < end or least == math.inf:
        timing.synchronize(device)
        start = time.perf_counter()
        call()
        timing.synchronize(device)
        least = min(least, time.perf_counter() - start)
    return least
