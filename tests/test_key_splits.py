"""Keys split among programs where there are few: what is merged is what one program would have found."""

import importlib
from dataclasses import replace

import pytest
import torch

from visattn import SelfAttention2d, use_backend
from visattn.device import kernel_target

from .conftest import HAS_GPU
from .oracle import assert_correct, make_problem, make_problems

kernels = pytest.importorskip("visattn.kernels", reason="needs Triton")
launch_config = importlib.import_module("visattn.kernels.launch_config")
wide_attention = importlib.import_module("visattn.kernels.wide_attention")

PLACE = torch.device("cuda", 0) if HAS_GPU else torch.device("cpu")


class TestRule:
    @pytest.mark.parametrize(
        ("programs", "num_tokens", "splits"),
        [
            (16, 1024, 4),
            (64, 4096, 2),
            (36, 2304, 3),
            (2, 1, 1),
            (1, 448, 1),
            (1, 449, 2),
            (100, 4096, 1),
            (128, 10**6, 1),
            (10**6, 10**6, 1),
        ],
    )
    def test_programs_fill_a_chip_with_four_steps_at_least(self, programs, num_tokens, splits):
        found, keys = launch_config.token_splits(programs, num_tokens, 64)
        assert found == splits
        assert keys % 64 == 0
        assert (found - 1) * keys < num_tokens <= found * keys

    def test_no_split_is_empty(self):
        for steps in range(1, 200):
            for programs in (1, 2, 3, 7, 20):
                found, keys = launch_config.token_splits(programs, 64 * steps - 5, 64)
                assert (found - 1) * keys < 64 * steps - 5 <= found * keys


class TestWhereItPays:
    @pytest.mark.parametrize(
        ("maps", "channels", "tokens", "splits"),
        [
            (1, 64, 4096, 2),  # 64 programs become 128
            (1, 64, 2304, 3),
            (1, 64, 1024, 1),  # saves 12 steps of 64 keys
            (1, 256, 1024, 4),  # the same steps, more than twice as long
            (2, 128, 1024, 1),
            (2, 64, 4096, 1),  # fills the chip
            (64, 64, 1024, 1),
            (1, 64, 65536, 1),
            (0, 64, 4096, 1),
        ],
    )
    def test_forward_on_hopper(self, maps, channels, tokens, splits):
        config = kernels.forward_config(channels, torch.bfloat16, kernels.Target("hopper", "bf16x6"))
        assert config.block_m == config.block_n == 64
        found, keys = kernels.key_splits(maps, channels, tokens, config)
        assert found == splits
        assert (found - 1) * keys < tokens <= found * keys


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(1, 512, 32, 32), (1, 256, 32, 32), (1, 64, 64, 64)], ids=str)
def test_one_map(shape, dtype):
    assert_correct(make_problem(shape, dtype, regime="peaked"), "triton", PLACE)


@pytest.mark.kernels
class TestKernels:
    @pytest.fixture(autouse=True)
    def _short_splits(self, monkeypatch):
        """As many as there are steps, so that short maps will do."""
        self.splits = []

        def every_step(programs, num_tokens, block):
            self.splits.append((launch_config.num_tiles(num_tokens, block), block))
            return self.splits[-1]

        monkeypatch.setattr(wide_attention, "token_splits", every_step)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
    def test_branch_and_gradients(self, dtype):
        shape = (2, 260, 7, 19) if dtype == torch.float16 else (1, 260, 5, 13)  # the blocks of fp32 are small
        assert_correct(make_problem(shape, dtype, qk_channels=16, regime="peaked"), "triton", PLACE)
        assert self.splits[0][0] > 2

    def test_channels_last(self):
        problem = make_problem((1, 260, 7, 10), torch.float16, qk_channels=16, regime="peaked")
        assert_correct(replace(problem, x=problem.x.contiguous(memory_format=torch.channels_last)), "triton", PLACE)
        assert self.splits[0][0] > 1

    def test_rounding_does_not_meet_a_large_mean(self):
        assert_correct(make_problems((1, 257, 6, 12), torch.float16, qk_channels=16, mean=10.0), "triton", PLACE)

    def test_lse_and_y_are_those_of_all_keys(self):
        """Logits of one split far above those of the others, and of another far below."""
        generator = torch.Generator().manual_seed(0)
        x, u = (torch.randn(1, 260, 200, generator=generator).to(PLACE) for _ in range(2))
        u *= 0.05
        x[:, :, 70] += 30 * u[:, :, 3]
        y, lse = torch.empty_like(x), x.new_empty(1, 200)
        kernels.wide_attention_forward(x, u, y, lse, config=kernels.wide_configs(x.dtype, kernel_target(PLACE)).forward)
        logits = (u.mT.double() @ x.double()) * torch.log(torch.tensor(2.0, dtype=torch.float64))
        torch.testing.assert_close(
            lse.double(), logits.logsumexp(2) / torch.log(torch.tensor(2.0, dtype=torch.float64)), rtol=1e-5, atol=1e-5
        )
        torch.testing.assert_close(y.double(), x.double() @ logits.softmax(2).mT, rtol=1e-5, atol=1e-5)


@pytest.mark.kernels
class TestFolded:
    """Maps that one program holds: three launches instead of one forward, the same backward."""

    @pytest.fixture(autouse=True)
    def _short_splits(self, monkeypatch):
        """As many as there are steps, so that short maps will do."""
        self.splits = []

        def every_step(num_maps, num_channels, num_tokens, config):
            self.splits.append((launch_config.num_tiles(num_tokens, config.block_n), config.block_n))
            return self.splits[-1]

        monkeypatch.setattr(kernels, "key_splits", every_step)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
    @pytest.mark.parametrize("regime", ["uniform", "peaked"])
    def test_branch_and_gradients(self, dtype, regime):
        assert_correct(make_problem((2, 24, 11, 13), dtype, regime=regime), "triton", PLACE)
        assert self.splits[0][0] > 2

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
    def test_narrow_queries_that_are_folded(self, dtype, monkeypatch):
        monkeypatch.setattr(kernels, "projects_keys", lambda *_: False)
        assert_correct(make_problems((2, 24, 11, 13), dtype, qk_channels=3, mean=1.0), "triton", PLACE)
        assert self.splits[0][0] > 2

    @pytest.mark.parametrize(("channels", "dtype"), [(200, torch.float16), (96, torch.float32)], ids=str)
    def test_parked_queries(self, channels, dtype):
        """Splits park them in memory of their own, in fp32 where y takes their place."""
        assert kernels.forward_config(channels, dtype, kernels.Target("hopper", "ieee")).parks_queries(channels)
        assert_correct(make_problem((1, channels, 9, 15), dtype, regime="peaked"), "triton", PLACE)
        assert self.splits[0][0] > 1

    def test_channels_last_without_a_graph(self):
        problem = make_problem((2, 24, 11, 13), torch.float32, regime="peaked")
        x = problem.x.contiguous(memory_format=torch.channels_last)
        assert_correct(replace(problem, x=x), "triton", PLACE)
        assert self.splits[0][0] > 1

    def test_a_single_launch_finds_the_same(self, monkeypatch):
        """With the normalised map as well, which bf16 alone takes raw: fp16 stands for it here."""
        layer = SelfAttention2d(24, norm_groups=4, gamma=0.7).to(PLACE, torch.float16)
        x = torch.randn(2, 24, 9, 17, generator=torch.Generator().manual_seed(0)).to(PLACE, torch.float16) + 3
        monkeypatch.setattr(launch_config, "attends_normalized", lambda *_: True)
        monkeypatch.setattr(kernels, "attends_normalized", lambda *_: True)
        with torch.no_grad(), use_backend("triton"):
            in_splits = layer(x)
            monkeypatch.setattr(kernels, "key_splits", lambda _maps, _channels, tokens, _config: (1, tokens))
            torch.testing.assert_close(in_splits, layer(x), rtol=2e-3, atol=2e-3)
        assert self.splits[0][0] > 1
