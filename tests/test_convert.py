"""Weights of other people's blocks in this package's layers: the same results."""

import sys

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

import visattn
from visattn import convert

from .foreign_blocks import BLOCKS, C, GuidedDiffusion, Sagan, Vqgan

NON_LOCAL = {"qk_channels": C // 2, "value_channels": C // 2, "out_proj": True}
BIGGAN = {"qk_channels": C // 8, "value_channels": C // 2, "out_proj": True, "gamma": 0.0, "scale": 1.0, "pool": 2, "bias": False}
HEADS = {"num_heads": 2, "out_proj": True}
NORMED = {"norm_groups": 4, "out_proj": True}
SETTINGS = {
    "DANet": {"qk_channels": C // 8, "gamma": 0.0, "scale": 1.0},
    "SAGAN, wrapped": {"qk_channels": C // 8, "gamma": 0.0, "scale": 1.0},
    "fastai": {"qk_channels": C // 8, "gamma": 0.0, "scale": 1.0, "bias": False},
    "fastai, stacked": {"qk_channels": C // 8, "gamma": 0.0, "scale": 1.0, "bias": False},
    "BigGAN": BIGGAN,
    "StudioGAN": BIGGAN,
    "non-local": NON_LOCAL | {"scale": 1.0, "pool": 2},
    "non-local, plain": NON_LOCAL | {"scale": 1.0},
    "mmcv": NON_LOCAL,
    "mmcv, plain": NON_LOCAL | {"scale": 1.0},
    "timm NonLocalAttn": NON_LOCAL | {"scale": C**-0.5},
    "timm Attention2d": HEADS | {"residual": False},
    "timm Attention2d, new order": HEADS | {"residual": False},
    "VQGAN": NORMED,
    "DDPM": NORMED,
    "guided-diffusion": HEADS | NORMED | {"norm_eps": 1e-5},
    "guided-diffusion, new order": HEADS | NORMED | {"norm_eps": 1e-5},
    "score_sde": NORMED | {"res_scale": 2**-0.5},
    "score_sde, plain": NORMED,
    "lucidrains": HEADS | {"qk_channels": 8, "value_channels": 8, "residual": False},
}
"""What the layer has to be told, because it is no weight."""

ORDERS = {"timm Attention2d": "h3d", "timm Attention2d, new order": "3hd", "guided-diffusion": "h3d", "guided-diffusion, new order": "3hd"}


def make_layer(**settings) -> nn.Module:
    return visattn.SelfAttention2d(C, **settings).double()


def make_map() -> torch.Tensor:
    return torch.randn(2, C, 6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def assert_equal(layer: nn.Module, block: nn.Module) -> None:
    x = make_map()
    with torch.no_grad():
        torch.testing.assert_close(layer(x), block(x), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", SETTINGS)
def test_layer_computes_what_the_block_did(name):
    torch.manual_seed(0)
    block = BLOCKS[name]().double()
    block(make_map())  # running statistics
    block.eval()
    layer = make_layer(**SETTINGS[name])
    state = {f"model.attn.{key}": tensor for key, tensor in block.state_dict().items()} | {"model.other": torch.zeros(1)}
    convert.load(layer, state, "model.attn.", qkv_order=ORDERS.get(name))
    assert_equal(layer, block)


def test_edm_counts_its_channels_by_head_then_width_then_kind():
    block = GuidedDiffusion(C, num_heads=2).double()
    state = {f"norm2.{k}": v for k, v in block.norm.state_dict().items()} | {f"proj.{k}": v for k, v in block.proj_out.state_dict().items()}
    for key, tensor in block.qkv.state_dict().items():
        state[f"qkv.{key}"] = tensor.unflatten(0, (2, 3, -1)).transpose(1, 2).flatten(0, 2)
    state["conv0.weight"] = torch.zeros(C, C, 3, 3)  # the rest of the block
    layer = make_layer(**SETTINGS["guided-diffusion"])
    assert convert.load(layer, state) == "EDM"
    assert_equal(layer, block)


def test_two_dimensional_weights_under_old_names():
    block = Vqgan(C).double()
    names = {"norm": "group_norm", "q": "query", "k": "key", "v": "value", "proj_out": "proj_attn"}
    state = {f"{names[key.split('.')[0]]}.{key.split('.')[1]}": tensor.squeeze() for key, tensor in block.state_dict().items()}
    layer = make_layer(**NORMED)
    assert convert.load(layer, state) == "diffusers, old names"
    assert_equal(layer, block)


def pruned(layer):
    for name in ("weight", "bias"):
        prune.l1_unstructured(layer, name, 0.5)


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("normalise", [weight_norm, parametrizations.weight_norm, parametrizations.spectral_norm, spectral_norm, pruned])
def test_weights_made_of_others(normalise):
    block = Vqgan(C)
    for name in ("q", "k", "v", "proj_out"):
        normalise(getattr(block, name))
    block = block.double().eval()
    layer = make_layer(**NORMED)
    convert.load(layer, block.state_dict())
    assert_equal(layer, block)


def test_safetensors_file(tmp_path):
    from safetensors.torch import save_file

    block, layer = Vqgan(C).double(), make_layer(**NORMED)
    save_file(block.state_dict(), tmp_path / "block.safetensors")
    convert.load(layer, tmp_path / "block.safetensors")
    assert_equal(layer, block)
    with pytest.raises(ValueError, match=r"\.safetensors file"):
        convert.load(layer, "block.pt")
    (tmp_path / "damaged.safetensors").write_bytes((tmp_path / "block.safetensors").read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"damaged\.safetensors is no whole \.safetensors file"):
        convert.load(layer, tmp_path / "damaged.safetensors")
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(ValueError, match=r"a mapping or a \.safetensors file"):
        convert.load(layer, tmp_path / "folder.safetensors")


def test_a_file_without_the_package_that_reads_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ModuleNotFoundError, match="pip install safetensors"):
        convert.load(make_layer(), "block.safetensors")


def vqgan(prefix="", **changes):
    """The state dict of a VQGAN block; changes: tensors by their keys, dots as two underscores, None for a key that is missing."""
    state = Vqgan(C).state_dict() | {key.replace("__", "."): tensor for key, tensor in changes.items()}
    return {f"{prefix}{key}": tensor for key, tensor in state.items() if tensor is not None}


@pytest.mark.parametrize(
    ("settings", "state", "options", "message"),
    [
        ({}, Sagan(C).state_dict(), {}, "the block has gamma, the layer does not"),
        ({"gamma": 0.0}, Sagan(C).state_dict(), {}, r"conv_query.weight is \(2, 16\) in the block and \(16, 16, 1, 1\) in the layer"),
        (
            {"qk_channels": 4},
            {**visattn.Attention(C).state_dict(), "conv_query.weight": torch.zeros(C, 4)},
            {},
            r"is \(16, 4\) in the block",
        ),
        (NORMED, Vqgan(C).state_dict() | {"mem_kv": torch.zeros(2)}, {}, "unexpected ones: mem_kv"),
        (NORMED, {f"attn.{k}": v for k, v in Vqgan(C).state_dict().items()}, {}, "they are no known block's; the keys are attn.k.bias"),
        (NORMED, {"q.weight": torch.zeros(C, C)}, {"family": "VQGAN / LDM"}, "k, v, proj_out, norm of VQGAN / LDM are missing"),
        (NORMED, {}, {"family": "VQVAE"}, "family must be one of"),
        (HEADS | NORMED, GuidedDiffusion(C).state_dict(), {}, "qkv_order must be told for guided-diffusion with 2 heads"),
        (HEADS | NORMED, GuidedDiffusion(C).state_dict(), {"qkv_order": "dh3"}, "qkv_order must be one of"),
        (HEADS, Vqgan(C).state_dict(), {}, "the block has norm.weight, the layer does not"),
        (NORMED, vqgan(norm__bias=None), {}, "bias of norm are missing"),
        (NORMED, vqgan(norm__weight=None, norm__bias=None, norm__x=torch.zeros(1)), {}, "weight and bias of norm are missing"),
        (NORMED, vqgan(q__weight=torch.tensor(1.0)), {}, r"q must have a weight \(O, C\) .* its shape is \(\)"),
        (NORMED, vqgan(q__weight=None), {}, "no weight among bias of q"),
        (NORMED, vqgan(k__lora_A=torch.zeros(2, C)), {}, "k holds lora_A, which would be lost"),
        (
            NORMED,
            vqgan(q__weight=None, q__bias=None) | {"q.0.weight": torch.zeros(C, C), "q.1.weight": torch.ones(C)},
            {},
            "q holds 1.weight",
        ),
        (HEADS | NORMED, GuidedDiffusion(C).state_dict() | {"qkv.weight": torch.zeros(46, C)}, {"qkv_order": "h3d"}, "has 46 rows"),
        (NORMED, vqgan("a.b."), {}, "; blocks begin with 'a.b.'"),
        (NORMED, vqgan("a.b."), {"prefix": "a.b"}, "; blocks begin with 'a.b.'"),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_is_loaded(settings, state, options, message):
    layer = make_layer(**settings)
    before = {key: tensor.clone() for key, tensor in layer.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        convert.load(layer, state, **options)
    assert all(torch.equal(tensor, before[key]) for key, tensor in layer.state_dict().items())


def test_a_block_that_fits_by_its_keys_into_the_assignments_layer():
    block, layer = visattn.Attention(C), visattn.Attention(C)
    assert convert.load(layer, block.state_dict()) == "CIFAR-10 assignment"
    x = torch.randn(1, C, 3, 3)
    assert torch.equal(layer(x), block(x))
