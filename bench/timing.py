"""How long a call takes: on a GPU by events and by graph replay, on a CPU in pairs with a call that it is compared with."""

import ctypes
import gc
import re
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

Call = Callable[[], object]

L2_FLUSH_BYTES = 256 << 20  # several times the L2 of any GPU there is
CALLS_TOGETHER = 10  # between two events, where calls are short
LONG_CALL = 0.02  # seconds, from where on one is enough to say how long


class DeadDevice(Exception):
    """A GPU on which this process can run nothing any more; another process can."""


@dataclass(frozen=True)
class Timing:
    """Microseconds a call, quantiles 20, 50 and 80 %, and on a CPU the same of the ratios to the call beside it (above 1: quicker)."""

    p20: float
    p50: float
    p80: float
    ratio_p20: float | None = None
    ratio_p50: float | None = None
    ratio_p80: float | None = None


def quantiles(values: list[float]) -> tuple[float, float, float]:
    """20, 50 and 80 %; of a single value, that."""
    if len(values) == 1:
        return (values[0],) * 3
    tenths = statistics.quantiles(values, n=10, method="inclusive")
    return tenths[1], tenths[4], tenths[7]


def pairs(call: Call, beside: Call, seconds: float, min_rounds: int = 5) -> Timing:
    """Times both in turn for `seconds`: whatever else the machine does meets both alike, so that their ratio holds still."""
    own: list[float] = []
    others: list[float] = []
    with _no_collector():
        call(), beside()
        end = time.perf_counter() + seconds
        while len(own) < min_rounds or time.perf_counter() < end:
            others.append(_seconds(beside))
            own.append(_seconds(call))
    return Timing(*quantiles([1e6 * s for s in own]), *quantiles([b / a for a, b in zip(own, others, strict=True)]))


def alone(call: Call, seconds: float, min_rounds: int = 3) -> Timing:
    """Times a call that nothing can stand beside."""
    times: list[float] = []
    with _no_collector():
        end = time.perf_counter() + seconds
        while len(times) < min_rounds or time.perf_counter() < end:
            times.append(_seconds(call))
    return Timing(*quantiles([1e6 * s for s in times]))


def estimate(call: Call, device: torch.device) -> float:
    """Seconds of one call, roughly: after one to warm up the least of three, or of a long call, one."""

    def finished() -> None:
        call()
        synchronize(device)

    finished()
    first = _seconds(finished)
    return first if first > LONG_CALL else min(first, *(_seconds(finished) for _ in range(2)))


def events(calls: list[Call], seconds: float, min_rounds: int = 5) -> Timing:
    """Each call by a pair of events, the L2 cache flushed before it; the calls take turns."""
    flush = torch.empty(L2_FLUSH_BYTES, dtype=torch.int8, device="cuda")
    rounds = max(min_rounds, _that_fit(calls[0], seconds))
    started, ended = ([torch.cuda.Event(enable_timing=True) for _ in range(rounds)] for _ in range(2))
    for i in range(rounds):
        flush.zero_()
        started[i].record()
        calls[i % len(calls)]()
        ended[i].record()
    torch.cuda.synchronize()
    return Timing(*quantiles([1e3 * a.elapsed_time(b) for a, b in zip(started, ended, strict=True)]))


def back_to_back(calls: list[Call], seconds: float) -> Timing:
    """One call after another with no flush between, so that the host's own time counts where it is the longer one."""
    fit = _that_fit(calls[0], seconds)
    together = max(1, min(CALLS_TOGETHER, fit))
    rounds = max(3, fit // together)
    started, ended = ([torch.cuda.Event(enable_timing=True) for _ in range(rounds)] for _ in range(2))
    for i in range(rounds):
        torch.cuda.synchronize()
        started[i].record()
        for _ in range(together):
            calls[i % len(calls)]()
        ended[i].record()
    torch.cuda.synchronize()
    return Timing(*quantiles([1e3 * a.elapsed_time(b) / together for a, b in zip(started, ended, strict=True)]))


def graph_replay(call: Call, seconds: float) -> Timing:
    """The call captured in a CUDA graph: without the host, and with whatever the cache still holds of the replay before."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return back_to_back([graph.replay], seconds)


def peak_bytes(call: Call, device: torch.device) -> int | None:
    """Memory that a call takes beyond what is held before it; None where the system does not tell.

    On a GPU what PyTorch's allocator hands out, on a CPU what the process really touches, to the nearest few pages.
    """
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    status, clear = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not clear.exists():
        return None
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # pages that the allocator keeps would be reused unseen
    clear.write_text("5")  # resets the peak
    before = _kibibytes(status, "VmRSS")
    call()
    return max(0, _kibibytes(status, "VmHWM") - before) * 1024


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def check_alive(device: torch.device) -> None:
    """
    Raises:
        DeadDevice: what was launched before has failed in a way after which nothing runs in this process, a stray access say.
    """
    try:
        synchronize(device)
    except RuntimeError as error:
        raise DeadDevice(str(error)) from error


def _that_fit(call: Call, seconds: float) -> int:
    """How many calls fit into `seconds` on the GPU; a thousand are enough."""
    return min(1000, int(seconds / estimate(call, torch.device("cuda"))))


def _seconds(call: Call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _kibibytes(status: Path, field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", status.read_text())
    assert found, field
    return int(found[1])


@contextmanager
def _no_collector() -> Iterator[None]:
    """Python's collector would now and then stop one of the two."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
