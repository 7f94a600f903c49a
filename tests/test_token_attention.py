"""Attention on tokens on the Triton kernels: the blocks of published models, and the kernels by themselves in any strides."""

import math

import pytest
import torch

import visattn
from visattn import block, functional, ops, projected_tokens, reference, token_attention, use_backend

from .conftest import HAS_GPU
from .general_problems import BLOCKS, Block, make_problem, run, run_on_kernels, truth_of
from .oracle import complaints, stacked

pytestmark = pytest.mark.kernels

PLACE = torch.device("cuda", 0) if HAS_GPU else torch.device("cpu")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ON_TOKENS = ["BigGAN", "non-local", "timm NonLocal", "timm Attention2d", "diffusers VAE", "guided-diffusion", "everything"]


def assert_correct(problems) -> None:
    """As in test_general_layer.py: of pooled maps in half precision only the output is judged."""
    ours = stacked([run_on_kernels(p, PLACE) for p in problems])
    truth = stacked([truth_of(reference.self_attention_2d, p) for p in problems])
    if problems[0].d_out.dtype != torch.float32 and problems[0].settings.get("pool", 1) > 1:
        ours = {"out": ours["out"]}
    found = complaints(ours, truth, stacked([run(reference.self_attention_2d, p) for p in problems]))
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("name", "dtype"), [(name, dtype) for dtype in DTYPES for name in BLOCKS if dtype == torch.float32 or name in ON_TOKENS], ids=str
)
def test_blocks_of_published_models(name, dtype):
    """Those that fold too. In the interpreter each costs seconds: few maps, one regime for each dtype."""
    regime = "uniform" if dtype == torch.float32 else "peaked"
    assert_correct([make_problem(BLOCKS[name], dtype, maps=1, size=(5, 7), regime=regime, seed=s, residual=False) for s in range(3)])


def test_saturated_rows():
    """In fp32, where a single row holds the largest error: so many maps that this is not chance."""
    assert_correct([make_problem(BLOCKS["BigGAN"], torch.float32, maps=8, regime="peaked", seed=s, residual=False) for s in range(3)])


@pytest.mark.parametrize(
    ("block_", "dtype", "regime"),
    [
        (Block(24, 256, 256, settings={"pool": 2}), torch.float16, "peaked"),
        (Block(8, 136, 264, settings={"pool": 2}), torch.float32, "uniform"),
        (Block(24, 520, 528, settings={"num_heads": 2}), torch.float16, "uniform"),
    ],
    ids=["non-local", "wide values", "two heads"],
)
def test_heads_of_more_channels_than_one_program_accumulates(block_, dtype, regime):
    """Of 256 channels, as a non-local block within a ResNet has them, a program accumulates 128 for the keys."""
    assert_correct([make_problem(block_, dtype, maps=1, size=(5, 7), regime=regime, seed=s, residual=False) for s in range(2)])


def test_a_large_common_mean():
    assert_correct([make_problem(BLOCKS["non-local"], torch.float32, maps=1, mean=30.0, seed=s, size=(6, 6)) for s in range(6)])


def test_more_tokens_than_a_tile_holds():
    """The loops' unmasked part, and a rest: 130 queries, 65 keys."""
    assert_correct([make_problem(Block(4, 2, 3, settings={"pool": 2}), torch.float32, maps=1, size=(10, 26), regime="peaked")])


@pytest.mark.parametrize("layout", ["channels_last", "sliced"])
def test_layouts_of_the_map(layout):
    problem = make_problem(BLOCKS["timm Attention2d"], torch.float32, maps=1, size=(4, 3))
    x = problem.tensors["x"]
    laid_out = x.contiguous(memory_format=torch.channels_last) if layout == "channels_last" else torch.cat([x, x], 1)[:, : x.shape[1]]
    expected = run_on_kernels(problem, PLACE)
    results = run_on_kernels(type(problem)(problem.tensors | {"x": laid_out}, problem.d_out, problem.groups, problem.settings), PLACE)
    for name, result in results.items():
        torch.testing.assert_close(result, expected[name], rtol=1e-5, atol=1e-6)


def test_strides_of_results():
    layer = visattn.SelfAttention2d(8, num_heads=2, pool=2, device=PLACE)
    for layout in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(1, 8, 4, 6, device=PLACE).contiguous(memory_format=layout)
        with use_backend("triton"):
            assert layer(x).is_contiguous(memory_format=layout)


def packed(channels, length, dtype, generator):
    """Tokens as in a projection that holds more channels than these: (B, channels, length)."""
    return torch.randn(2, 3 * channels, length, generator=generator).to(PLACE, dtype)[:, channels : 2 * channels]


def token_major(channels, length, dtype, generator):
    return torch.randn(2, length, channels, generator=generator).to(PLACE, dtype).mT


class TestKernels:
    """forward and backward of visattn.triton_token_attention against float64."""

    @pytest.mark.parametrize(
        ("qk_channels", "value_channels", "queries", "keys", "make"),
        [
            (3, 17, 70, 5, packed),
            (20, 1, 33, 67, token_major),
            (1, 1, 1, 1, packed),
            (40, 8, 2, 130, token_major),
            (300, 40, 17, 19, packed),
            (16, 400, 33, 40, token_major),
            (130, 300, 16, 35, packed),
        ],
        ids=lambda value: getattr(value, "__name__", str(value)),  # the same in every process, as test runs in parallel need
    )
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_any_widths_lengths_and_strides(self, qk_channels, value_channels, queries, keys, dtype, make):
        generator = torch.Generator().manual_seed(queries + keys)
        q, k = (make(qk_channels, length, dtype, generator) for length in (queries, keys))
        v, scale = make(value_channels, keys, dtype, generator) + 2, 0.7 * qk_channels**-0.5
        d_y = make(value_channels, queries, dtype, generator)
        results = self.run("triton", d_y, q, k, v, scale)
        truth = self.run("torch", *(t.cpu().double() for t in (d_y, q, k, v)), scale)
        for name, got, expected in zip(("y", "d_q", "d_k", "d_v"), results, truth, strict=True):
            assert got.dtype == dtype
            error = (got.cpu().double() - expected).abs().max() / max(expected.abs().max(), 0.1)
            assert error < 8 * torch.finfo(dtype).eps, name

    @staticmethod
    def run(backend, d_y, q, k, v, scale):
        on_tokens = token_attention.implementation(backend)
        y, lse = on_tokens.forward(q, k, v, scale)
        return y, *on_tokens.backward(d_y, q, k, v, y if lse is not None else None, lse, scale)

    def test_wide_heads_of_which_a_part_is_read_at_a_time(self):
        generator = torch.Generator().manual_seed(0)
        q, k, v, d_y = (packed(c, 5, torch.float32, generator) for c in (128, 128, 16, 16))
        results = self.run("triton", d_y, q, k, v, 0.05)
        for got, expected in zip(results, self.run("torch", *(t.cpu().double() for t in (d_y, q, k, v)), 0.05), strict=True):
            assert (got.cpu().double() - expected).norm() < 1e-6 * expected.norm()

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_rounding_of_the_values_mean_does_not_reach_the_keys(self, dtype):
        """y is stored with the mean of the values, and Δ is made of it. Measured 0.6 ε (fp32: 2.2 ε); without mending Δ, 27 ε and more."""
        generator = torch.Generator().manual_seed(0)
        q, k, v, d_y = (torch.randn(2, c, n, generator=generator) for c, n in ((8, 70), (8, 40), (16, 40), (16, 70)))
        tensors = [t.to(PLACE, dtype) for t in (d_y, q + 10, k, v + 100)]
        d_k = self.run("triton", *tensors, 0.1)[2].cpu().double()
        expected = self.run("torch", *(t.cpu().double() for t in tensors), 0.1)[2]
        assert (d_k - expected).norm() < 8 * torch.finfo(dtype).eps * expected.norm()

    def test_lse_is_that_of_the_logits_with_centred_keys(self):
        q, k, v = (token_major(4, n, torch.float32, torch.Generator().manual_seed(n)) for n in (6, 9, 9))
        _, lse = token_attention.implementation("triton").forward(q, k, v, 0.3)
        logits = 0.3 * q.mT.double() @ (k - k.mean(2, keepdim=True)).double()
        torch.testing.assert_close(lse.double(), logits.logsumexp(2) / math.log(2), rtol=1e-6, atol=1e-6)

    def test_repeats_are_bitwise_equal_and_batches_independent(self):
        generator = torch.Generator().manual_seed(0)
        q, k, v, d_y = (packed(4, n, torch.float32, generator) for n in (9, 5, 5, 9))
        first, second = (self.run("triton", d_y, q, k, v, 0.5) for _ in range(2))
        alone = self.run("triton", d_y[1:], q[1:], k[1:], v[1:], 0.5)
        for one, again, single in zip(first, second, alone, strict=True):
            assert torch.equal(one, again)
            assert torch.equal(one[1:], single)

    def test_a_key_that_does_not_exist_wins_nothing(self):
        """All logits far below zero, the logit of a key read as zeros; its value would be none."""
        q, k, v = torch.full((1, 4, 3), 8.0, device=PLACE), torch.full((1, 4, 5), -8.0, device=PLACE), torch.ones(1, 2, 5, device=PLACE)
        k[:, :, 0] = -9.0
        y, *gradients = self.run("triton", torch.ones(1, 2, 3, device=PLACE), q, k, v, 1.0)
        torch.testing.assert_close(y, torch.ones_like(y), rtol=0, atol=1e-6)
        assert all(g.isfinite().all() for g in gradients)
        torch.testing.assert_close(gradients[2].sum(2), torch.full((1, 2), 3.0, device=PLACE), rtol=1e-5, atol=0)

    def test_no_maps(self):
        q, k, v = (torch.empty(0, 4, n, device=PLACE) for n in (6, 3, 3))
        y, d_q, d_k, d_v = self.run("triton", torch.empty(0, 4, 6, device=PLACE), q, k, v, 1.0)
        assert [t.shape for t in (y, d_q, d_k, d_v)] == [(0, 4, 6), (0, 4, 6), (0, 4, 3), (0, 4, 3)]


class TestSelection:
    @pytest.mark.parametrize("name", BLOCKS)
    def test_attention_on_tokens_runs_where_the_form_says_so(self, name, monkeypatch):
        problem, ran = make_problem(BLOCKS[name], torch.float32, maps=1, size=(2, 2)).to(PLACE), []
        attend = projected_tokens.implementation
        monkeypatch.setattr(projected_tokens, "implementation", lambda: ran.append(name) or attend())
        with use_backend("triton"):
            problem.call(functional.self_attention_2d, problem.tensors)
        assert ran == [name] * (name in ON_TOKENS)

    def test_widths_are_padded_as_the_kernels_pad_them(self):
        from visattn.kernels.launch_config import block_channels

        x = torch.empty(1, 100, 3, 3)
        for qk, value in ((1, 1), (15, 17), (33, 60), (64, 8)):
            folded, projected = block._multiplications(x, qk, value, "triton")
            assert projected == (9 + 2 * 128) * (block_channels(qk) + block_channels(max(qk, value)))
            assert folded > 0

    def test_explain_says_which(self):
        x = torch.randn(1, 64, 4, 4, device=PLACE)
        heads, thin = visattn.SelfAttention2d(64, num_heads=2), visattn.SelfAttention2d(64, qk_channels=8, value_channels=8, out_proj=True)
        with use_backend("auto"):
            assert visattn.explain(heads, x).endswith(
                "on queries, keys and values: each of the 2 heads has queries, keys and values of its own."
            )
            assert "on queries, keys and values: a pixel takes 4608 multiplications, and 7424" in visattn.explain(thin, x)
            wide = visattn.SelfAttention2d(64, qk_channels=1026, num_heads=2)
            assert "runs on the PyTorch path" in visattn.explain(wide, x)
            assert "they have 513 and 32 in values" in visattn.explain(wide, x)


def test_second_derivatives_from_the_kernels():
    """Of the kernels' backward pass, which autograd may differentiate once more: as from the PyTorch path."""
    problem, penalties = make_problem(BLOCKS["non-local"], torch.float32, maps=1, size=(4, 4)).to(PLACE), []
    for backend in ("triton", "torch"):
        leaves = problem.leaves()
        with use_backend(backend):
            (d_x,) = torch.autograd.grad(problem.call(functional.self_attention_2d, leaves).square().sum(), leaves["x"], create_graph=True)
            penalties.append(torch.autograd.grad(d_x.square().sum(), [t for name, t in leaves.items() if name not in ("b_k", "b_o")]))
    for got, expected in zip(*penalties, strict=True):
        assert (got - expected).norm() <= 1e-5 * expected.norm()


def test_contracts_of_the_ops():
    torch.use_deterministic_algorithms(False)
    q, k, v = (torch.randn(1, 4, n, device=PLACE, requires_grad=True) for n in (6, 5, 5))
    utilities = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(ops.token_attention, (q, k, v, torch.randn(4, requires_grad=True), 0.3, "triton"), test_utils=utilities)
    q, k, v = (t.detach() for t in (q, k, v))
    y, lse = ops.token_attention(q, k, v, None, 0.3, "triton")
    torch.library.opcheck(ops.token_attention_backward, (torch.randn_like(y), q, k, v, y, lse, 0.3, "triton"), test_utils=utilities)
