"""The backward pass of a few maps, whose keys and queries are split among programs; test_key_splits.py has what a GPU is to pass."""

from dataclasses import replace

import pytest
import torch

from visattn import functional

from .conftest import HAS_GPU
from .oracle import assert_correct, assert_keys_get_no_mean, complaints, eager_of, make_problem, make_problems, run_layer, truth_of

kernels = pytest.importorskip("visattn.kernels", reason="needs Triton")

PLACE = torch.device("cuda", 0) if HAS_GPU else torch.device("cpu")
HOPPER = kernels.Target("hopper", "bf16x6")


class TestWhereItPays:
    """(1, 1): as they are where there are programs enough."""

    @pytest.mark.parametrize(
        ("maps", "channels", "tokens", "numbers"),
        [
            (1, 64, 4096, (2, 2)),  # 64 programs become 128
            (1, 64, 2304, (3, 3)),
            (1, 64, 1024, (1, 1)),  # would save 12 steps of 64
            (1, 256, 1024, (8, 8)),  # 8 programs of more than twice as long steps become 64
            (2, 64, 4096, (1, 1)),
            (64, 64, 1024, (1, 1)),
            (1, 64, 65536, (1, 1)),
            (0, 64, 4096, (1, 1)),
            (1, 12, 4096, (1, 2)),  # keys are not split over so few channels
        ],
    )
    def test_folded_on_hopper(self, maps, channels, tokens, numbers):
        self.judge(maps, channels, tokens, kernels.backward_configs(channels, torch.bfloat16, HOPPER), numbers)

    @pytest.mark.parametrize(("maps", "tokens", "numbers"), [(1, 4096, (1, 2)), (1, 1024, (4, 8)), (2, 4096, (1, 1))])
    def test_wide_on_hopper(self, maps, tokens, numbers):
        self.judge(maps, 512, tokens, kernels.wide_configs(torch.bfloat16, HOPPER), numbers)

    def judge(self, maps, channels, tokens, configs, numbers):
        splits = kernels.gradient_splits(maps, channels, tokens, configs)
        assert tuple(found.number for found in splits) == numbers
        for number, length in splits:
            assert (number - 1) * length < tokens <= number * length


@pytest.mark.kernels
class TestKernels:
    @pytest.fixture(autouse=True)
    def _short_splits(self, monkeypatch):
        """As many as there are steps, so that short maps will do."""
        self.splits = []

        def every_step(_maps, _channels, num_tokens, configs):
            for step in (configs.query_gradient.block_n, configs.key_value_gradient.block_m):
                self.splits.append(kernels.Splits(-(-num_tokens // step), step))
            return tuple(self.splits[-2:])

        monkeypatch.setattr(kernels, "gradient_splits", every_step)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
    @pytest.mark.parametrize("regime", ["uniform", "peaked"])
    def test_branch_and_gradients(self, dtype, regime):
        assert_correct(make_problem((2, 24, 11, 13), dtype, regime=regime), "triton", PLACE)
        assert min(self.splits).number > 2

    @pytest.mark.parametrize(
        ("shape", "qk_channels", "dtype"),
        [((1, 200, 9, 15), None, torch.float16), ((1, 260, 9, 15), 16, torch.float16), ((1, 96, 7, 10), None, torch.float32)],
        ids=str,
    )
    def test_many_channels(self, shape, qk_channels, dtype):
        assert_correct(make_problem(shape, dtype, qk_channels=qk_channels, regime="peaked"), "triton", PLACE)
        assert min(self.splits).number > 1

    @pytest.mark.parametrize("qk_channels", [3, 20])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
    def test_narrow_queries_that_are_folded(self, qk_channels, dtype, monkeypatch):
        """As all are where a few maps are split."""
        monkeypatch.setattr(kernels, "projects_keys", lambda *_: False)
        assert_correct(make_problem((1, 24, 9, 15), dtype, qk_channels=qk_channels, regime="peaked"), "triton", PLACE)
        assert self.splits

    def test_channels_last(self):
        problem = make_problem((2, 24, 11, 13), torch.float32, regime="peaked")
        assert_correct(replace(problem, x=problem.x.contiguous(memory_format=torch.channels_last)), "triton", PLACE)
        assert self.splits

    def test_rows_that_begin_anywhere(self):
        assert_correct(make_problem((1, 68, 9, 15), torch.float16), "triton", PLACE)
        assert self.splits

    def test_rounding_does_not_meet_a_large_mean(self):
        assert_correct(make_problems((1, 32, 9, 11), mean=10.0, gain=2.0), "triton", PLACE)
        assert self.splits

    def test_rounding_of_a_mean_does_not_reach_the_keys(self):
        assert_keys_get_no_mean((1, 24, 9, 15), None, torch.float16, "triton", PLACE)
        assert self.splits

    @pytest.mark.parametrize(("shape", "qk_channels"), [((1, 24, 9, 15), None), ((1, 257, 5, 7), 16)], ids=str)
    def test_residual_passes_the_gradient_once(self, shape, qk_channels):
        problem = make_problem(shape, qk_channels=qk_channels)
        without, with_ = run_layer(problem, "triton", PLACE), run_layer(replace(problem, residual=True), "triton", PLACE)
        torch.testing.assert_close(with_["x"] - problem.d_out, without["x"], rtol=0, atol=4e-6)
        assert min(self.splits).number > 1

    def test_weights_alone(self):
        """Then neither the gradient of the map nor that of keys and values is computed."""
        problem = make_problem((1, 24, 9, 15), regime="peaked")
        weights = {name: getattr(problem, name).to(PLACE).requires_grad_() for name in ("w_q", "w_k", "w_v", "b_q", "b_v")}
        out = functional.self_attention_2d(problem.x.to(PLACE), **weights, residual=False, backend="triton")
        found = torch.autograd.grad(out, list(weights.values()), problem.d_out.to(PLACE))
        without_gamma = replace(problem, gamma=None, b_k=None)
        truth, eager = ({name: results[name] for name in weights} for results in (truth_of(without_gamma), eager_of(without_gamma)))
        assert not complaints({name: g.cpu() for name, g in zip(weights, found, strict=True)}, truth, eager)
        assert self.splits
