"""Output and all gradients of both backends against the float64 oracle, over shapes, dtypes and regimes."""

from dataclasses import replace

import pytest
import torch

from .conftest import HAS_GPU, INTERPRETING
from .oracle import assert_correct, assert_keys_get_no_mean, make_problem, make_problems, mask_trap, run_layer, truth_of

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
# (N, C, H, W): tokens at and around every block size, maps that are not square, channels that are no power of two.
SHAPES = [
    (2, 3, 1, 1), (1, 8, 1, 2), (2, 16, 3, 5), (1, 20, 4, 4), (1, 32, 7, 7), (1, 48, 9, 7), (2, 64, 8, 8),
    (1, 64, 5, 13), (1, 33, 14, 14), (3, 16, 10, 10), (1, 96, 6, 11), (1, 128, 8, 8), (1, 256, 5, 7), (1, 200, 3, 11),
]  # fmt: skip
# The same with D, for queries and keys so narrow that the kernels project them, but on maps of one tile: every step has a tail somewhere.
NARROW_SHAPES = [
    ((2, 24, 1, 1), 3), ((1, 20, 3, 5), 5), ((1, 32, 5, 13), 4), ((1, 48, 9, 15), 20), ((1, 64, 6, 11), 8), ((1, 64, 1, 70), 32),
    ((1, 72, 3, 27), 9),
]  # fmt: skip
# Wider than one program accumulates, with parts that are nearly empty, half full and full, and with D, the regime and the mean.
WIDE_CASES = [((1, 257, 6, 8), None, "peaked", 0.0), ((2, 320, 5, 7), 40, "peaked", 0.0), ((1, 512, 3, 7), None, "uniform", 3.0)]
PLACE = torch.device("cuda" if HAS_GPU else "cpu")
LONG_SHAPES = [(1, 16, 25, 40), (1, 32, 31, 33), (1, 64, 32, 32), (1, 16, 25, 41), (1, 8, 64, 64)]


def skip_unsupported(backend: str, dtype: torch.dtype) -> None:
    if backend == "triton" and dtype == torch.float64:
        pytest.skip("the kernels have no float64; dispatch is tested elsewhere")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_channel(dtype, backend, place):
    """In the peaked regime a single channel's logits are in the hundreds and the ratio of two errors is chance."""
    skip_unsupported(backend, dtype)
    assert_correct(make_problems((2, 1, 1, 17), dtype), backend, place)


@pytest.mark.parametrize("regime", ["uniform", "peaked"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_branch_and_gradients(shape, dtype, regime, backend, place):
    skip_unsupported(backend, dtype)
    channels = shape[1]
    if backend == "triton" and INTERPRETING and dtype == torch.float32 and channels >= 200 and (regime == "peaked") != (channels == 256):
        pytest.skip("takes the interpreter half a minute; 200 channels are judged in one regime, 256 in the other")
    assert_correct(make_problems(shape, dtype, regime=regime), backend, place)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("shape", "qk_channels", "regime", "mean"), WIDE_CASES, ids=str)
def test_more_channels_than_one_program_accumulates(shape, qk_channels, regime, mean, dtype, backend, place):
    skip_unsupported(backend, dtype)
    if backend == "triton" and INTERPRETING and dtype != torch.bfloat16 and shape[1] > 257:
        pytest.skip("takes the interpreter long; the loops are those of bf16, in fp16 the blocks too")
    assert_correct(make_problem(shape, dtype, qk_channels=qk_channels, regime=regime, mean=mean), backend, place)


@pytest.mark.parametrize("shape", LONG_SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_many_tokens(shape, dtype, backend, place):
    if backend == "triton" and INTERPRETING and (shape[2] * shape[3] > 2000 or shape[1] > 32):
        pytest.skip("takes the interpreter minutes; the loop over tiles is the same as with fewer")
    # In fp32 no saturated rows in the interpreter; a GPU has to pass them. Numpy's product may round differently by which operand is
    # transposed; then the logits of the two backward kernels differ, and the weights of such a row do not sum to one.
    regime = "uniform" if INTERPRETING and backend == "triton" and dtype == torch.float32 else "peaked"
    assert_correct(make_problems(shape, dtype, regime=regime), backend, place)


@pytest.mark.parametrize("qk_channels", [1, 4, 8, 12, 16, 64, 100])
def test_queries_of_any_width(qk_channels, backend, place):
    width = 9 if backend == "torch" else 13  # more pixels than a tile, which the kernels would fold
    assert_correct(make_problems((2, 32, 5, width), qk_channels=qk_channels, regime="peaked"), backend, place)


@pytest.mark.parametrize(
    ("dtype", "regime"), [(torch.float32, "uniform"), (torch.float32, "peaked"), (torch.float16, "peaked"), (torch.bfloat16, "peaked")]
)
@pytest.mark.parametrize(("shape", "qk_channels"), NARROW_SHAPES, ids=str)
def test_narrow_queries(shape, qk_channels, dtype, regime, backend, place):
    skip_unsupported(backend, dtype)
    assert_correct(make_problems(shape, dtype, qk_channels=qk_channels, regime=regime), backend, place)


@pytest.mark.parametrize(("height", "qk_channels"), [(5, None), (11, None), (11, 5)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("gamma", [True, False])
def test_optional_parameters(bias, gamma, height, qk_channels, backend, place):
    assert_correct(make_problems((2, 20, height, 6), qk_channels=qk_channels, bias=bias, gamma=gamma, regime="peaked"), backend, place)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("shape", "qk_channels"),
    [((1, 16, 1, 1), None), ((2, 16, 5, 13), None), ((1, 24, 9, 9), None), ((1, 64, 3, 3), None), ((1, 24, 5, 14), 6)],
    ids=str,
)
def test_keys_that_do_not_exist_have_no_weight(shape, qk_channels, dtype, backend, place):
    """A zero-filled key beyond the last pixel would win this softmax, forward and backward."""
    assert_correct([mask_trap(shape, dtype, seed, qk_channels) for seed in range(6)], backend, place)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("shape", "qk_channels"), [((1, 64, 16, 16), None), ((1, 64, 9, 9), 8)], ids=str)
def test_common_mean_does_not_cost_accuracy(shape, qk_channels, dtype, backend, place):
    """Activations after a ReLU have a common mean; rounding keys or values would lose it."""
    skip_unsupported(backend, dtype)
    assert_correct(make_problems(shape, dtype, qk_channels=qk_channels, mean=3.0, gain=2.0), backend, place)


@pytest.mark.parametrize("qk_channels", [64, 8])
def test_rounding_does_not_meet_a_large_mean(qk_channels, backend, place):
    """Rows of dS that sum to zero but for rounding would multiply the mean of the keys, and their columns that of the map."""
    assert_correct(make_problems((1, 64, 6, 11), qk_channels=qk_channels, mean=10.0, gain=2.0), backend, place)


def test_rounding_does_not_meet_a_large_mean_where_pytorch_projects():
    """So many channels and pixels that the PyTorch path takes thin queries and keys."""
    assert_correct(make_problems((1, 128, 16, 17), qk_channels=8, mean=10.0, gain=2.0), "torch", PLACE)


@pytest.mark.parametrize(
    ("shape", "qk_channels", "dtype"),
    [(shape, qk, dtype) for shape, qk in (((1, 16, 6, 6), None), ((1, 24, 9, 15), 4)) for dtype in (torch.float16, torch.float32)]
    + [((1, 257, 3, 4), 32, torch.float16)],
    ids=str,
)
def test_rounding_of_a_mean_does_not_reach_the_keys(shape, qk_channels, dtype, backend, place):
    assert_keys_get_no_mean(shape, qk_channels, dtype, backend, place)


@pytest.mark.parametrize(
    ("shape", "qk_channels"), [((2, 24, 6, 11), 24), ((2, 24, 6, 11), 3), ((1, 257, 3, 4), 16)], ids=["24", "3", "wide"]
)
def test_residual_adds_the_map_once_and_passes_the_gradient_once(shape, qk_channels, backend, place):
    problem = make_problem(shape, qk_channels=qk_channels)
    without, with_ = run_layer(problem, backend, place), run_layer(replace(problem, residual=True), backend, place)
    torch.testing.assert_close(with_["out"] - problem.x, without["out"], rtol=0, atol=1e-6)
    torch.testing.assert_close(with_["x"] - problem.d_out, without["x"], rtol=0, atol=2e-6)
    for name in ("w_q", "w_k", "w_v", "b_q", "b_v", "gamma"):
        assert torch.equal(with_[name], without[name]), name


def test_rows_of_the_softmax_sum_to_one(backend, place):
    """With W_v = 0 and b_v = 1 the branch is the sum of each row: exactly 1."""
    problem = make_problem((2, 16, 7, 9), regime="peaked", gamma=False)
    problem = replace(problem, w_v=torch.zeros_like(problem.w_v), b_v=torch.ones_like(problem.b_v))
    assert torch.equal(run_layer(problem, backend, place)["out"], torch.ones_like(problem.x))


def test_permuting_pixels_permutes_the_output(backend, place):
    problem = make_problem((1, 16, 6, 8), regime="peaked")
    order = torch.randperm(48, generator=torch.Generator().manual_seed(1))

    def permuted(t):
        return t.flatten(2)[:, :, order].reshape(t.shape)

    ours = run_layer(problem, backend, place)["out"]
    moved = run_layer(replace(problem, x=permuted(problem.x)), backend, place)["out"]
    torch.testing.assert_close(moved, permuted(ours), rtol=0, atol=5e-6)  # what either is off by


def test_maps_of_a_batch_do_not_see_each_other(backend, place):
    problem = make_problem((5, 16, 6, 8), regime="peaked")
    together = run_layer(problem, backend, place)
    for n in range(5):
        alone = run_layer(replace(problem, x=problem.x[n : n + 1], d_out=problem.d_out[n : n + 1]), backend, place)
        torch.testing.assert_close(alone["out"], together["out"][n : n + 1], rtol=0, atol=1e-6)
        torch.testing.assert_close(alone["x"], together["x"][n : n + 1], rtol=0, atol=2e-6)


@pytest.mark.parametrize("qk_channels", [24, 3])
def test_repeats_are_bitwise_equal(qk_channels, backend, place):
    problem = make_problem((3, 24, 9, 11), qk_channels=qk_channels, regime="peaked")
    first, second = run_layer(problem, backend, place), run_layer(problem, backend, place)
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_keys_bias_has_no_gradient(backend, place):
    results = run_layer(make_problem((2, 16, 5, 5), regime="peaked"), backend, place)
    assert torch.equal(results["b_k"], torch.zeros(16))


@pytest.mark.parametrize("qk_channels", [20, 5])
def test_empty_batch_gives_an_empty_map_and_zero_gradients(qk_channels, backend, place):
    results = run_layer(make_problem((0, 20, 5, 5), qk_channels=qk_channels), backend, place)
    assert results["out"].shape == (0, 20, 5, 5)
    assert results["x"].shape == (0, 20, 5, 5)
    for name in ("w_q", "w_k", "w_v", "b_q", "b_v", "gamma"):
        assert torch.equal(results[name], torch.zeros_like(results[name])), name


@pytest.mark.skipif(INTERPRETING, reason="70,000 programs would take the interpreter minutes; the arithmetic is the same")
def test_batch_beyond_the_limit_of_other_grid_dimensions(backend, place):
    """CUDA's second and third grid dimension end at 65,535; a batch may not."""
    problem = make_problem((70_000, 2, 1, 2), regime="peaked")
    ours, truth = run_layer(problem, backend, place), truth_of(problem)
    torch.testing.assert_close(ours["out"].double(), truth["out"], rtol=0, atol=5e-5)
    torch.testing.assert_close(ours["x"].double(), truth["x"], rtol=0, atol=5e-5)


class TestExtremeValues:
    """Values at the edges of the dtypes: the pattern of NaN and Inf is eager's, everything else is right."""

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
    def test_one_bad_pixel_spoils_what_it_spoils_in_eager(self, value, backend, place):
        problem = make_problem((2, 16, 4, 5))
        problem.x[0, 3, 2, 1] = value
        ours = run_layer(problem, backend, place)["out"]
        assert not ours[0].isfinite().any()
        assert torch.equal(ours[1], run_layer(make_problem((2, 16, 4, 5)), backend, place)["out"][1])

    def test_zeros(self, backend, place):
        problem = make_problem((1, 16, 4, 5))
        assert_correct(replace(problem, x=torch.zeros_like(problem.x)), backend, place)

    def test_constant(self, backend, place):
        problem = make_problem((1, 16, 4, 5))
        assert_correct(replace(problem, x=torch.ones_like(problem.x)), backend, place)

    def test_logits_beyond_the_range_of_half(self, backend, place):
        """|q·k| is far beyond 65,504; softmax and output are not."""
        problem = make_problem((1, 64, 4, 8), torch.float16, gain=1e4)
        ours, truth = run_layer(problem, backend, place)["out"], truth_of(problem)["out"]
        assert ours.isfinite().all()
        assert float((ours.double() - truth).norm() / truth.norm()) < 2e-3

    def test_tiny(self, backend, place):
        assert_correct(make_problems((1, 16, 4, 5), gain=1e-7), backend, place)
