"""Maps with weights of their own, which is what a normalised map comes to: as if each were a batch of one."""

import pytest
import torch
from torch import Tensor

from visattn import autograd, reference
from visattn.folding import Weights

from . import oracle

MAPS = 3


def one_at_a_time(x: Tensor, *weights: Tensor) -> Tensor:
    *own, gamma = weights
    outs = []
    for n in range(len(x)):
        w_q, b_q, w_k, w_v, b_v = (w[n] for w in own)
        outs.append(reference.self_attention_2d(x[n : n + 1], w_q, w_k, w_v, b_q, None, b_v, gamma=gamma))
    return torch.cat(outs)


def all_at_once(x: Tensor, *weights: Tensor, backend: str) -> Tensor:
    settings = autograd.Settings(weights[0].shape[1] ** -0.5, True, "keys", backend)
    return autograd.differentiable(x, None, Weights(*weights), settings)


def leaves(dtype: torch.dtype, channels: int, qk_channels: int, side: int) -> tuple[list[Tensor], Tensor]:
    """The map, the six weights, and a gradient of the output; numbers that `dtype` holds exactly, in float64."""
    generator = torch.Generator().manual_seed(channels + side)
    d, c = qk_channels, channels
    shapes = [(MAPS, c, side, side + 1), (MAPS, d, c), (MAPS, d), (MAPS, d, c), (MAPS, c, c), (MAPS, c), (1,), (MAPS, c, side, side + 1)]
    gains = (1.0, *(c**-0.5,) * 5, 1.0, 1.0)
    made = [(gain * torch.randn(s, generator=generator)).to(dtype).double() for gain, s in zip(gains, shapes, strict=True)]
    return made[:-1], made[-1]


def gradients(attention, tensors: list[Tensor], d_out: Tensor, second: bool = False) -> list[Tensor]:
    inputs = [t.clone().requires_grad_() for t in tensors]
    out = attention(*inputs)
    first = torch.autograd.grad(out, inputs, d_out, create_graph=second)
    found = [out, *first]
    if second:
        penalty = sum((d * torch.linspace(-1, 1, d.numel(), dtype=d.dtype).view(d.shape)).sum() for d in first)
        found += torch.autograd.grad(penalty, inputs)
    return [t.detach() for t in found]


SMALL = [(24, 24, 5), (64, 8, 4)]  # folded, and projected in the kernels
LARGE = (64, 8, 16)  # projected in PyTorch too


@pytest.mark.parametrize(("channels", "qk_channels", "side"), [*SMALL, LARGE])
def test_both_derivatives_in_float64(channels, qk_channels, side):
    tensors, d_out = leaves(torch.float64, channels, qk_channels, side)
    with oracle.recorded_backends() as ran:
        ours = gradients(lambda *t: all_at_once(*t, backend="torch"), tensors, d_out, second=True)
    assert ran[:2] == ["torch", "torch"]
    for actual, expected in zip(ours, gradients(one_at_a_time, tensors, d_out, second=True), strict=True):
        assert (actual - expected).abs().max() <= 1e-11 * expected.abs().max()


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("channels", "qk_channels", "side"), SMALL)
def test_as_exact_as_one_map_at_a_time(backend, place, channels, qk_channels, side, channels_last):
    tensors, d_out = leaves(torch.float32, channels, qk_channels, side)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    narrow = [t.float().to(place) for t in (*tensors, d_out)]
    narrow[0], narrow[-1] = (t.contiguous(memory_format=memory_format) for t in (narrow[0], narrow[-1]))
    with oracle.recorded_backends() as ran:
        ours = gradients(lambda *t: all_at_once(*t, backend=backend), narrow[:-1], narrow[-1])
    assert ran == [backend, backend]
    limits = (2e-6,) * 7 + (2e-5,)  # the last is one number, whose error is chance: naive loses 3e-6 of it
    for actual, expected, limit in zip(ours, gradients(one_at_a_time, tensors, d_out), limits, strict=True):
        assert oracle.relative_rms(actual.cpu(), expected) < limit
