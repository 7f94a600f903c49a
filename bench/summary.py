"""What the rows say: ratios, the best peer, targets met or not. No numbers but those of the rows."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from .providers import PROVIDERS
from .rows import TIMED, Row

OURS = ("visattn", "visattn_compiled")
PEERS = tuple(name for name in PROVIDERS if name not in ("naive", *OURS))
MAIN_EXECUTION = ("pairs", "eager")
"""What a table shows where a case was timed in several ways."""


@dataclass(frozen=True)
class Line:
    """All providers' rows of one case in one execution."""

    case: str
    rows: dict[str, Row]

    @property
    def first(self) -> Row:
        return next(iter(self.rows.values()))

    def timed(self, provider: str) -> Row | None:
        row = self.rows.get(provider)
        return row if row and row.state == TIMED else None

    def ratio_to_naive(self, provider: str) -> float | None:
        """Naive's time over the provider's: pair by pair where they were timed so, else of the medians."""
        row, naive = self.timed(provider), self.timed("naive")
        if row is None or row.p50 is None:
            return None
        if row.ratio_p50 is not None:
            return row.ratio_p50
        return naive.p50 / row.p50 if naive and naive.p50 else None

    def best(self, providers: Iterable[str]) -> str | None:
        """The quickest of those that were timed."""
        timed = [(self._slowness(name), name) for name in providers if self.timed(name)]
        return min(timed)[1] if timed else None

    def ratio(self, provider: str, other: str) -> float:
        """The other's time over the provider's; both were timed."""
        return self._slowness(other) / self._slowness(provider)

    def _slowness(self, provider: str) -> float:
        """Time, in units of naive's where pairs give it."""
        row = self.rows[provider]
        assert row.p50 is not None
        return 1 / row.ratio_p50 if row.ratio_p50 else row.p50


def lines(rows: Iterable[Row], suite: str, executions: tuple[str, ...] = MAIN_EXECUTION) -> list[Line]:
    """The cases of a suite, in the order in which they were measured."""
    found: dict[str, dict[str, Row]] = {}
    for row in rows:
        if row.suite == suite and row.execution in executions:
            found.setdefault(row.case, {})[row.provider] = row
    return [Line(case, by_provider) for case, by_provider in found.items()]


def geometric_mean(values: Iterable[float]) -> float | None:
    logs = [math.log(v) for v in values]
    return math.exp(sum(logs) / len(logs)) if logs else None


@dataclass(frozen=True)
class Verdict:
    """A target, the figure beside it, and whether it is met; a figure of None was not measured."""

    target: str
    figure: float | None
    least: float

    @property
    def in_words(self) -> str:
        return "not measured" if self.figure is None else "met" if self.figure >= self.least else "not met"


def verdicts(rows: list[Row], device_type: str) -> list[Verdict]:
    """The project's targets for a type of device."""
    return _cpu_verdicts(rows) if device_type == "cpu" else _gpu_verdicts(rows)


def least_ratio_on_cpu(form: str, dtype: str, channels: int, tokens: int, mode: str) -> float:
    """What the PyTorch path is to reach on a CPU, in times naive's speed: at the sizes of the early layers a gain, nowhere a loss."""
    if (form, dtype, tokens) == ("attention", "float32", 1024) and channels in (32, 64):
        return 2.2 if mode == "forward" else 1.5
    return 0.95


def _cpu_verdicts(rows: list[Row]) -> list[Verdict]:
    figures: dict[tuple[str, float], list[float]] = {}
    for line in lines(rows, "cifar"):
        row, ratio = line.first, line.ratio_to_naive("visattn")
        if ratio is not None:
            least = least_ratio_on_cpu(row.form, row.dtype, row.shape[1], row.shape[2] * row.shape[3], row.mode)
            figures.setdefault((row.mode if least > 1 else "any", least), []).append(ratio)
    return [
        Verdict(text, min(figures.get((mode, least), []), default=None), least)
        for text, mode, least in (
            ("fp32, 1024 pixels, 32 and 64 channels, forward: at least 2.2× naive", "forward", 2.2),
            ("the same, forward and backward: at least 1.5× naive", "training", 1.5),
            ("every other CIFAR shape, fp32 and bf16: at least 0.95× naive", "any", 0.95),
        )
    ]


def _gpu_verdicts(rows: list[Row]) -> list[Verdict]:
    cifar = [x for x in lines(rows, "cifar") if x.timed("visattn")]
    floors = [x for x in [*cifar, *lines(rows, "large")] if x.timed("visattn") and x.first.shape[1] in (64, 128) and x.first.shape[2] >= 32]

    def naive(shape: list[int], mode: str, precisions: tuple[str, ...], found: list[Line] = cifar) -> float | None:
        ratios = [x.ratio_to_naive("visattn") for x in found if (x.first.form, x.first.shape, x.first.mode) == ("attention", shape, mode)
                  and x.first.precision in precisions]  # fmt: skip
        return min((r for r in ratios if r is not None), default=None)

    def peers(precisions: tuple[str, ...], mode: str | None) -> list[float]:
        chosen = [x for x in cifar if x.first.precision in precisions and mode in (None, x.first.mode)]
        return [x.ratio("visattn", peer) for x in chosen if (peer := x.best(PEERS))]

    def share(mode: str) -> float | None:
        shares = [x.rows["visattn"].share for x in floors if x.first.mode == mode and x.first.precision == "bfloat16"]
        return min((s for s in shares if s is not None), default=None)

    def step(precisions: tuple[str, ...]) -> float | None:
        chosen = [x.ratio_to_naive("visattn") for x in lines(rows, "models") if x.first.form == "cnn_early_attention"
                  and x.first.mode == "training" and x.first.precision in precisions]  # fmt: skip
        return min((r for r in chosen if r is not None), default=None)

    fp32, half = ("float32", "tf32"), ("bfloat16", "float16")
    small = [x for x in lines(rows, "cifar", ("back to back",)) if x.timed("visattn")]
    return [
        Verdict("(64, 64, 32, 32), fp32 with the same switch, forward: at least 8× naive", naive([64, 64, 32, 32], "forward", fp32), 8),
        Verdict("the same, forward and backward: at least 6× naive", naive([64, 64, 32, 32], "training", fp32), 6),
        Verdict("bf16 and fp16, CIFAR shapes: each at least 1.2× the best peer", min(peers(half, None), default=None), 1.2),
        Verdict("the same, forward: geometric mean at least 1.6×", geometric_mean(peers(half, "forward")), 1.6),
        Verdict("the same, forward and backward: geometric mean at least 1.4×", geometric_mean(peers(half, "training")), 1.4),
        Verdict("fp32, CIFAR shapes: geometric mean at least 2.5× the best peer", geometric_mean(peers(fp32, None)), 2.5),
        Verdict("(64, 128, 8, 8), one call after another, forward: at least 3× naive",
                naive([64, 128, 8, 8], "forward", (*fp32, *half), small), 3),
        Verdict("the same, forward and backward: at least 2× naive", naive([64, 128, 8, 8], "training", (*fp32, *half), small), 2),
        Verdict("64 and 128 channels, from 1024 pixels, bf16: forward at least 0.55 of the floor", share("forward"), 0.55),
        Verdict("the same, forward and backward: at least 0.40 of the floor", share("training"), 0.40),
        Verdict("cnn_early_attention, training step of 64 images, fp32: at least 3× naive", step(fp32), 3),
    ]  # fmt: skip
