"""The project's targets, and which of them the rows say are met. No numbers but those of the rows."""

import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from .cases import LAYER_SUITES, Case, ModelCase, suite_cases
from .rows import TIMED, Row
from .summary import MAIN_EXECUTION, PEERS, Line, lines


def lowest(values: Iterable[float]) -> float | None:
    return min(values, default=None)


def geometric_mean(values: Iterable[float]) -> float | None:
    logs = [math.log(v) for v in values]
    return math.exp(sum(logs) / len(logs)) if logs else None


@dataclass(frozen=True)
class Verdict:
    """A target, the figure beside it, and whether it is met; a figure of None was not measured.

    counted, of: how many cases the figure is of, and the target. failed: in how many visattn was wrong, or could not run. by: which
    peers were timed, or from which rows a share of the floor is, and in how many cases where not in all.
    """

    target: str
    figure: float | None
    least: float
    counted: int
    of: int
    failed: int
    by: str

    @property
    def in_words(self) -> str:
        if self.failed:
            return f"not met: visattn wrong or not able to run in {self.failed} of {self.of} cases"
        if self.figure is None:
            return "not measured"
        return f"{'met' if self.figure >= self.least else 'not met'} ({self.counted} of {self.of} cases{self.by})"


@dataclass(frozen=True)
class Target:
    """What is to be reached: over the cases of `suites` that it covers, the lowest or the mean of their figures.

    figure: that of a line of `executions`, None where it was not measured, and the names that `by` tells of.
    """

    text: str
    least: float
    covers: Callable[[Case | ModelCase], bool]
    figure: Callable[[Line], tuple[float | None, tuple[str, ...]]]
    suites: tuple[str, ...] = ("cifar",)
    over: Callable[[list[float]], float | None] = lowest
    executions: tuple[str, ...] = MAIN_EXECUTION
    by: str = ""

    def verdict(self, rows: list[Row], device_type: str, size: str) -> Verdict:
        cases = {str(case) for case in suite_cases(self.suites, device_type, size) if self.covers(case)}
        measured = [line for suite in self.suites for line in lines(rows, suite, self.executions) if line.case in cases]
        timed = [line for line in measured if line.timed("visattn")]
        figures = [(figure, names) for figure, names in map(self.figure, timed) if figure is not None]
        failed = {row.case for row in rows if row.provider == "visattn" and row.state != TIMED and row.case in cases
                  and row.execution in (*MAIN_EXECUTION, *self.executions)} - {line.case for line in timed}  # fmt: skip
        counts = Counter(name for _, names in figures for name in names)
        named = ", ".join(name + f" in {count}" * (count < len(figures)) for name, count in counts.items())
        figure = self.over([figure for figure, _ in figures])
        return Verdict(self.text, figure, self.least, len(figures), len(cases), len(failed), self.by.format(named))


def verdicts(rows: list[Row], device_type: str) -> list[Verdict]:
    """The project's targets for a type of device, over the cases of the size that the rows are of."""
    size = next((row.size for row in rows if row.size != "full"), "full")
    return [target.verdict(rows, device_type, size) for target in (CPU_TARGETS if device_type == "cpu" else GPU_TARGETS)]


def least_ratio_on_cpu(form: str, dtype: str, channels: int, tokens: int, mode: str) -> float:
    """What the PyTorch path is to reach on a CPU, in times naive's speed: at the sizes of the early layers a gain, nowhere a loss."""
    if (form, dtype, tokens) == ("attention", "float32", 1024) and channels in (32, 64):
        return 2.2 if mode == "forward" else 1.5
    return 0.95


def _against_naive(line: Line) -> tuple[float | None, tuple[str, ...]]:
    return line.ratio_to_naive("visattn"), ()


def _against_peers(line: Line) -> tuple[float | None, tuple[str, ...]]:
    """Against the best of the peers that were timed."""
    peer = line.best(PEERS)
    return (line.ratio("visattn", peer) if peer else None), tuple(name for name in PEERS if line.timed(name))


def _of_floor(line: Line) -> tuple[float | None, tuple[str, ...]]:
    row = line.closest_to_floor
    return (row.share, (row.execution,)) if row else (None, ())


def _layers(
    precisions: tuple[str, ...], mode: str | None = None, shape: tuple[int, ...] | None = None, form: str | None = None
) -> Callable[[Case | ModelCase], bool]:
    """Whether a case is of a layer like this; None leaves it open."""

    def covers(case: Case | ModelCase) -> bool:
        return (
            isinstance(case, Case)
            and case.precision in precisions
            and mode in (None, case.mode)
            and shape in (None, case.shape)
            and form in (None, case.form)
        )

    return covers


def _on_cpu(least: float) -> Callable[[Case | ModelCase], bool]:
    """Whether this is the least ratio for a case."""

    def covers(case: Case | ModelCase) -> bool:
        return isinstance(case, Case) and least_ratio_on_cpu(case.form, case.dtype, case.channels, case.tokens, case.mode) == least

    return covers


def _near_floor(mode: str) -> Callable[[Case | ModelCase], bool]:
    def covers(case: Case | ModelCase) -> bool:
        return _layers(("bfloat16",), mode)(case) and isinstance(case, Case) and case.channels in (64, 128) and case.tokens >= 1024

    return covers


def _early_step(case: Case | ModelCase) -> bool:
    return isinstance(case, ModelCase) and (case.model, case.mode) == ("cnn_early_attention", "training") and case.precision in FP32


AGAINST, FROM = ", against {}", ", from {} rows"
FP32, HALF = ("float32", "tf32"), ("bfloat16", "float16")

CPU_TARGETS = (
    Target("fp32, 1024 pixels, 32 and 64 channels, forward: at least 2.2× naive", 2.2, _on_cpu(2.2), _against_naive),
    Target("the same, forward and backward: at least 1.5× naive", 1.5, _on_cpu(1.5), _against_naive),
    Target("every other CIFAR shape, fp32 and bf16: at least 0.95× naive", 0.95, _on_cpu(0.95), _against_naive),
)

GPU_TARGETS = (
    Target("(64, 64, 32, 32), fp32 with the same switch, forward: at least 8× naive", 8,
           _layers(FP32, "forward", (64, 64, 32, 32), "attention"), _against_naive),
    Target("the same, forward and backward: at least 6× naive", 6,
           _layers(FP32, "training", (64, 64, 32, 32), "attention"), _against_naive),
    Target("bf16 and fp16, CIFAR shapes: each at least 1.2× the best peer", 1.2, _layers(HALF), _against_peers, by=AGAINST),
    Target("the same, forward: geometric mean at least 1.6×", 1.6,
           _layers(HALF, "forward"), _against_peers, over=geometric_mean, by=AGAINST),
    Target("the same, forward and backward: geometric mean at least 1.4×", 1.4,
           _layers(HALF, "training"), _against_peers, over=geometric_mean, by=AGAINST),
    Target("fp32, CIFAR shapes: geometric mean at least 2.5× the best peer", 2.5,
           _layers(FP32), _against_peers, over=geometric_mean, by=AGAINST),
    Target("(64, 128, 8, 8), one call after another, forward: at least 3× naive", 3,
           _layers((*FP32, *HALF), "forward", (64, 128, 8, 8)), _against_naive, executions=("back to back",)),
    Target("the same, forward and backward: at least 2× naive", 2,
           _layers((*FP32, *HALF), "training", (64, 128, 8, 8)), _against_naive, executions=("back to back",)),
    Target("64 and 128 channels, from 1024 pixels, bf16: forward at least 0.55 of the floor", 0.55,
           _near_floor("forward"), _of_floor, LAYER_SUITES, by=FROM),
    Target("the same, forward and backward: at least 0.40 of the floor", 0.40, _near_floor("training"), _of_floor, LAYER_SUITES, by=FROM),
    Target("cnn_early_attention, training step of 64 images, fp32: at least 3× naive", 3, _early_step, _against_naive, ("models",)),
)  # fmt: skip
