"""The layer against naive attention on the CPU: `pytest bench --benchmark-only`.

Before every timed round of ours, naive does the same work on the same input. The figure is the median of the ratios of such
pairs: absolute times drift with whatever else the machine does, pairs do not. A result is timed only after it is checked.
"""

import time
from typing import Any

import pytest
import torch

import visattn
from visattn.models import NaiveAttention

# (N, C, H, W), then the ratio to naive that is to be reached: forward, training (forward and backward)
TARGETS = [((64, 64, 32, 32), 2.2, 1.5), ((64, 32, 32, 32), 2.2, 1.5), ((64, 128, 8, 8), 0.95, 0.95)]


@pytest.mark.parametrize("mode", ["forward", "training"])
@pytest.mark.parametrize(
    ("shape", "forward_target", "training_target"), TARGETS, ids=lambda v: "x".join(map(str, v)) if isinstance(v, tuple) else ""
)
def test_ratio_to_naive(benchmark: Any, shape: tuple[int, ...], forward_target: float, training_target: float, mode: str) -> None:
    torch.manual_seed(0)
    ours, naive = visattn.Attention(shape[1]), NaiveAttention(shape[1])
    naive.load_state_dict(ours.state_dict())
    training = mode == "training"
    x, d_out = torch.randn(shape, requires_grad=training), torch.randn(shape)

    def step(layer: torch.nn.Module) -> tuple[torch.Tensor, ...]:
        if not training:
            with torch.no_grad():
                return (layer(x),)
        out = layer(x)
        return (out, *torch.autograd.grad(out, [x, *layer.parameters()], d_out))

    for got, expected in zip(step(ours), step(naive), strict=True):
        # 1e-4 beside gradients of 1 to 100: naive's gradient of the keys' bias is a rounding error, ours is zero.
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4 + 1e-3 * expected.abs().max().item())

    naive_seconds = []

    def time_naive() -> None:
        start = time.perf_counter()
        step(naive)
        naive_seconds.append(time.perf_counter() - start)

    rounds = 101 if shape[2] == 8 else 9
    benchmark.pedantic(step, args=(ours,), setup=time_naive, rounds=rounds, warmup_rounds=2)
    ratios = sorted(n / o for n, o in zip(naive_seconds[-rounds:], benchmark.stats.stats.data, strict=True))
    median = ratios[rounds // 2]
    benchmark.extra_info |= {
        "ratio to naive, p20 p50 p80": [round(ratios[int(q * (rounds - 1))], 3) for q in (0.2, 0.5, 0.8)],
    }
    target = training_target if training else forward_target
    print(f"\n{shape} fp32 {mode}: {median:.2f}× naive (target {target})")
    assert median >= target
