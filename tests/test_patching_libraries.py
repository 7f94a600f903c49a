"""The blocks of timm and diffusers themselves; `pip install '.[test-models]'` brings both."""

import copy
import pickle

import pytest
import torch
from torch import nn

import visattn


def assert_same_results(ours: nn.Module, theirs: nn.Module, x: torch.Tensor, *further: torch.Tensor) -> None:
    """Outputs and gradients of all parameters, in float64."""
    found = []
    for model in (ours, theirs):
        out = model(x, *further)
        out = out if isinstance(out, torch.Tensor) else out.sample
        gradients = torch.autograd.grad(out.square().sum(), list(model.parameters()), allow_unused=True)
        found.append([out, *gradients])
    for mine, expected in zip(*found, strict=True):
        if expected is not None:
            torch.testing.assert_close(mine, expected, rtol=1e-10, atol=1e-10)


class TestTimm:
    @pytest.fixture(autouse=True)
    def _needs_timm(self):
        pytest.importorskip("timm", reason="needs timm")

    @pytest.mark.parametrize("head_first", [True, False])
    def test_blocks(self, head_first):
        from timm.layers.attention2d import Attention2d
        from timm.layers.non_local_attn import NonLocalAttn
        from timm.models.maxxvit import Attention2d as MaxxvitAttention

        torch.manual_seed(0)
        model = nn.Sequential(
            NonLocalAttn(32),
            Attention2d(32, num_heads=4, head_first=head_first),
            MaxxvitAttention(32, dim_head=8, head_first=head_first),
        ).double()
        nn.init.ones_(model[0].norm.weight)
        theirs = copy.deepcopy(model)
        assert visattn.patch_model(model).replaced == ["0", "1", "2"]
        assert_same_results(model, theirs, torch.randn(2, 32, 5, 6, dtype=torch.float64))

    def test_position_bias_is_left(self):
        from timm.layers import RelPosBias
        from timm.models.maxxvit import Attention2d

        block = Attention2d(16, dim_head=8, rel_pos_cls=lambda num_heads, **_: RelPosBias((4, 4), num_heads))
        assert "further parameters: rel_pos" in dict(visattn.patch_model(block).skipped)[""]


class TestDiffusers:
    @pytest.fixture(autouse=True)
    def _needs_diffusers(self):
        pytest.importorskip("diffusers", reason="needs diffusers")

    def make_vae(self) -> nn.Module:
        from diffusers import AutoencoderKL

        torch.manual_seed(0)
        return AutoencoderKL(block_out_channels=(32,), layers_per_block=1, norm_num_groups=8).double()

    def test_autoencoder(self):
        vae, x = self.make_vae(), torch.randn(1, 3, 8, 8, dtype=torch.float64)
        theirs = copy.deepcopy(vae)
        report = visattn.patch_model(vae)
        assert report.replaced == ["encoder.mid_block.attentions.0", "decoder.mid_block.attentions.0"]
        assert list(vae.state_dict()) == list(theirs.state_dict())
        assert_same_results(vae, theirs, x)
        assert_same_results(pickle.loads(pickle.dumps(vae)), theirs, x)
        assert visattn.unpatch_model(vae) == report.replaced
        kinds = [[type(processor) for processor in model.attn_processors.values()] for model in (vae, theirs)]
        assert kinds[0] == kinds[1]

    def test_unet_with_heads(self):
        from diffusers import UNet2DModel

        torch.manual_seed(0)
        unet = UNet2DModel(
            sample_size=8, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8, attention_head_dim=8,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"), mid_block_scale_factor=2,
        ).double()  # fmt: skip
        theirs = copy.deepcopy(unet)
        with visattn.patch_model(unet) as report:
            assert len(report.replaced) == 4
            assert not report.skipped
            assert_same_results(unet, theirs, torch.randn(1, 3, 8, 8, dtype=torch.float64), torch.tensor([3]))

    @pytest.mark.parametrize(
        ("settings", "reason"),
        [
            ({"cross_attention_dim": 8}, "cross-attention"),
            ({"added_kv_proj_dim": 8}, "keys and values from another input"),
            ({"spatial_norm_dim": 8, "norm_num_groups": 8}, "normalisation depends on another input"),
            ({}, "takes tokens, not maps"),
            ({"norm_num_groups": 4, "qk_norm": "layer_norm"}, "normalises its queries"),
            ({"norm_num_groups": 4, "kv_heads": 1}, "fewer heads of keys"),
            ({"norm_num_groups": 4, "dropout": 0.5}, "at random"),
        ],
    )
    def test_other_attention_is_left_with_the_reason(self, settings, reason):
        from diffusers.models.attention_processor import Attention

        report = visattn.patch_model(Attention(32, heads=4, dim_head=8, **settings))
        assert reason in dict(report.skipped)[""]

    def test_own_processors_are_left(self):
        from diffusers.models.attention_processor import Attention, AttnProcessor

        class Watching(AttnProcessor):
            pass

        block = Attention(16, heads=2, dim_head=8, norm_num_groups=4, processor=Watching())
        assert "a processor of its own, Watching" in dict(visattn.patch_model(block).skipped)[""]

    def test_masks_and_tokens_raise(self):
        from diffusers.models.attention_processor import Attention

        block = Attention(16, heads=2, dim_head=8, norm_num_groups=4, residual_connection=True)
        assert visattn.patch_model(block).replaced == [""]
        x = torch.randn(1, 16, 4, 4)
        block(x)
        for inputs in ({"attention_mask": torch.zeros(1, 16)}, {"encoder_hidden_states": torch.zeros(1, 3, 16)}):
            with pytest.raises(ValueError, match="takes a map"):
                block(x, **inputs)
        with pytest.raises(ValueError, match="takes a map"):
            block(x.flatten(2).mT)
