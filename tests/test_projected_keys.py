"""The kernels' form for narrow queries and keys: that it runs where it should, and the projection by itself.

What it computes is judged beside the other form in test_correctness.py, test_layouts.py and test_autograd.py.
"""

import importlib
from unittest import mock

import pytest
import torch

import visattn
from visattn import dispatch, use_backend
from visattn.device import kernel_target

from .conftest import HAS_GPU, INTERPRETING
from .oracle import make_problem, run_layer

kernels = pytest.importorskip("visattn.kernels", reason="needs Triton")

HOPPER = kernels.Target("hopper", "bf16x6")
PLACE = torch.device("cuda", 0) if HAS_GPU else torch.device("cpu")


class TestSelection:
    @pytest.mark.parametrize(
        ("channels", "qk_channels", "projected"),
        [
            (64, 8, True), (64, 32, True), (64, 33, False), (64, 64, False), (64, 100, False),
            (32, 4, True), (32, 16, True), (32, 17, False), (256, 128, True), (256, 129, False), (257, 8, False),
            (48, 20, True), (20, 5, True), (17, 1, True), (16, 2, False), (16, 1, False), (1, 1, False),
        ],
    )  # fmt: skip
    def test_padded_widths_decide(self, channels, qk_channels, projected):
        assert kernels.has_narrow_queries(channels, qk_channels) == projected
        assert kernels.projects_keys(1, channels, 65, qk_channels, torch.float32, HOPPER) == projected

    @pytest.mark.parametrize(("maps", "tokens", "target", "projected"), [
        (256, 64, HOPPER, False), (257, 64, HOPPER, True), (1, 65, HOPPER, True), (1, 64, kernels.Target("cdna", "ieee"), True),
    ])  # fmt: skip
    def test_maps_of_one_tile_fold_where_that_is_two_launches_backward(self, maps, tokens, target, projected):
        assert kernels.projects_keys(maps, 64, tokens, 8, torch.float32, target) == projected

    @pytest.mark.parametrize(("maps", "tokens", "projected"), [
        (1, 1024, True), (1, 2304, False), (1, 4096, False), (2, 4096, True), (1, 65536, True), (0, 4096, True),
    ])  # fmt: skip
    def test_a_few_maps_whose_keys_are_split_fold(self, maps, tokens, projected):
        assert kernels.projects_keys(maps, 64, tokens, 8, torch.bfloat16, HOPPER) == projected
        assert (kernels.key_splits(maps, 64, tokens, kernels.forward_config(64, torch.bfloat16, HOPPER)).number == 1) == projected

    @pytest.mark.kernels
    @pytest.mark.parametrize(
        ("channels", "qk_channels", "width", "projected"), [(24, 3, 17, True), (24, 24, 17, False), (16, 2, 17, False), (24, 3, 16, False)]
    )
    def test_that_form_runs(self, channels, qk_channels, width, projected):
        launchers = {
            True: ("projected_attention_forward", "projected_attention_backward"),
            False: ("attention_forward", "prepare_backward", "single_tile_backward"),
        }
        with mock.patch.multiple(kernels, **{name: mock.DEFAULT for name in launchers[not projected]}) as refused:
            run_layer(make_problem((1, channels, 4, width), qk_channels=qk_channels), "triton", PLACE)
        assert not any(launcher.called for launcher in refused.values())

    @pytest.mark.kernels
    def test_explain_says_which(self):
        x = torch.randn(1, 64, 9, 9, device=PLACE)
        with use_backend("auto"):
            assert dispatch.explain_selection(x, 8).endswith(", with thin projected keys.")
            assert dispatch.explain_selection(x[..., :7], 8).endswith(", keys and values are the map itself.")
            assert visattn.explain(visattn.Attention(64), x).endswith(", keys and values are the map itself.")


@pytest.mark.kernels
class TestProjection:
    """qkv_projection against the same sums in float64."""

    @pytest.mark.parametrize("wanted", ["k", "qk", "qkv", "v"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
    @pytest.mark.parametrize(("channels", "widths"), [(20, (5, 5, 20)), (64, (1, 33, 64)), (3, (2, 4, 7))], ids=str)
    def test_any_of_the_three(self, channels, widths, dtype, wanted):
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(2, 5, 13, channels, generator=generator).to(PLACE, dtype).permute(0, 3, 1, 2).flatten(2)
        factors = dict(zip("qkv", (0.3, None, None), strict=True))
        projections = {}
        for name, width in zip("qkv", widths, strict=True):
            if name in wanted:
                weight, bias = (torch.randn(*size, generator=generator).to(PLACE, dtype) for size in ((width, channels), (width,)))
                projections[name] = kernels.Projection(weight, None if name == "k" else bias, factors[name])
        config = kernels.projected_configs(max(channels, 17), dtype, kernel_target(PLACE)).qkv_projection
        *projected, shift = kernels.qkv_projection(x, **projections, config=config)
        assert shift is None
        results = dict(zip("qkv", projected, strict=True))
        assert {name for name, result in results.items() if result is not None} == set(wanted)
        for name, (weight, bias, factor) in projections.items():
            truth = torch.einsum("dc,ncl->ndl", weight.double(), x.double())
            truth = (truth if bias is None else truth + bias.double()[:, None]) * (factor or 1.0)
            assert results[name].dtype == dtype
            assert results[name].stride() == (80 * len(weight), 80, 1)  # 65 tokens in rows of a multiple of 16
            error = (results[name].double() - truth).abs().max() / truth.abs().max()
            assert error < 4 * torch.finfo(dtype).eps, name

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
    def test_keys_and_values_less_a_vector_of_each_map(self, dtype):
        """With a mean of 50, which would leave hardly a digit in half precision."""
        generator = torch.Generator().manual_seed(0)
        x, w_q, w_k, w_v = (torch.randn(size, generator=generator).to(PLACE, dtype) for size in ((2, 20, 70), (5, 20), (33, 20), (17, 20)))
        x += torch.tensor([50.0, -3.0], dtype=dtype, device=PLACE)[:, None, None]
        statistics = torch.stack([torch.zeros(2, 20, device=PLACE), x.float().mean(2)], 1)  # rows that are not neighbours
        config = kernels.projected_configs(20, dtype, kernel_target(PLACE)).qkv_projection
        projections = [kernels.Projection(w) for w in (w_q, w_k, w_v)]
        *projected, shift = kernels.qkv_projection(x, *projections, centre=statistics[:, 1], config=config)
        for got, weight, share in zip(projected, (w_q, w_k, w_v), (0, 1, 1), strict=True):
            truth = torch.einsum("dc,ncl->ndl", weight.double(), x.double() - share * statistics[:, 1, :, None])
            # In fp32 the products are off by their own size, that of the mean.
            allowed = 4 * torch.finfo(dtype).eps * (truth.abs().max() if dtype == torch.float16 else 400)
            assert (got.double() - truth).abs().max() < allowed
        torch.testing.assert_close(shift.double(), statistics[:, 1].double() @ w_v.double().T, rtol=1e-5, atol=1e-4)

    @pytest.mark.skipif(INTERPRETING, reason="70,000 programs would take the interpreter minutes")
    def test_batch_beyond_the_limit_of_other_grid_dimensions(self):
        x = torch.randn(70_000, 20, 2, device=PLACE)
        weight = torch.randn(5, 20, device=PLACE)
        config = kernels.projected_configs(20, torch.float32, kernel_target(PLACE)).qkv_projection
        _, k, *_ = kernels.qkv_projection(x, k=kernels.Projection(weight), config=config)
        torch.testing.assert_close(k, weight @ x, rtol=1e-4, atol=1e-4)


@pytest.mark.kernels
@pytest.mark.parametrize(("left", "right"), [(5, 20), (70, 33), (16, 512)], ids=str)
def test_moments(left, right, monkeypatch):
    """Two pairs of several maps and tiles, the last of them partial, more than splits: their products, and either factor by itself."""
    monkeypatch.setattr(importlib.import_module("visattn.kernels.token_moments"), "MAX_SPLITS", 4)
    generator = torch.Generator().manual_seed(0)
    pairs = [[torch.randn(3, c, 150, generator=generator).to(PLACE) for c in (left, right)] for _ in range(2)]
    config = kernels.backward_configs(32, torch.float32, kernel_target(PLACE)).token_moments
    sums = kernels.partial_moments(*pairs[0], (pairs[1][0], pairs[1][1]), need_right=True, need_arrived=True, config=config)
    product, total, right_total = (t.double().sum(0) for t in sums[:3])
    assert sums.arrived.tolist() == [0]
    for pair, (a, b) in enumerate(pairs):
        expected = torch.einsum("nal,ncl->ac", a.double(), b.double()), a.double().sum((0, 2)), b.double().sum((0, 2))
        for got, truth in zip((product[pair], total[pair], right_total[pair]), expected, strict=True):
            torch.testing.assert_close(got, truth, rtol=0, atol=1e-5 * float(truth.abs().max()))
