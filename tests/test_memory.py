"""Memory linear in the number of pixels, measured in a process of its own."""

import subprocess
import sys

import pytest

SCRIPT = """
import resource, sys, torch, visattn
side, train, order = int(sys.argv[1]), sys.argv[2] == "train", sys.argv[3]
torch.set_num_threads(1)
layer = eval(sys.argv[4])
def run(side):
    x = torch.randn(1, 32, side, side, requires_grad=train)
    with torch.set_grad_enabled(train):
        out = layer(x)
    if order == "second":
        (d_x,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        d_x.square().sum().backward()
    elif train:
        out.sum().backward()
run(16)  # libraries and their pools
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
run(side)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def mebibytes(side: int, mode: str, layer: str, order: str = "first") -> int:
    result = subprocess.run([sys.executable, "-c", SCRIPT, str(side), mode, order, layer], capture_output=True, text=True, check=True)
    return int(result.stdout)


LAYERS = ["visattn.Attention(32)", "visattn.Attention(32, normalize='queries')", "visattn.ChannelAttention(32)"]


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("mode", ["forward", "train"])
def test_a_map_of_16384_pixels_takes_little(mode, layer):
    """The attention matrix alone would be 1 GiB."""
    assert mebibytes(128, mode, layer) < 256


@pytest.mark.parametrize("layer", LAYERS)
def test_second_derivatives_take_little(layer):
    assert mebibytes(96, "train", layer, "second") < 512


def test_attention_maps_normalised_over_the_queries_take_little():
    layer = "lambda x: visattn.attention_rows(visattn.Attention(32, normalize='queries'), x, torch.tensor([[1, 2]]))"
    assert mebibytes(128, "train", layer) < 256


def test_heads_over_pooled_keys_take_little():
    """One of their matrices is 84 MiB, and naive second derivatives hold a dozen at a time."""
    assert mebibytes(96, "train", "visattn.SelfAttention2d(32, num_heads=4, norm_groups=8, out_proj=True, pool=4)", "second") < 256
