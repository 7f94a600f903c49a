"""The layer as a module, and the attention maps of chosen pixels."""

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import spectral_norm

import visattn
from visattn import reference


class PlainAttention(nn.Module):
    """The layer as anybody writes it: three convolutions and two matrix products."""

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        self.conv_query = nn.Conv2d(in_channels, in_channels, 1)
        self.conv_key = nn.Conv2d(in_channels, in_channels, 1)
        self.conv_value = nn.Conv2d(in_channels, in_channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (conv(x).flatten(2) for conv in (self.conv_query, self.conv_key, self.conv_value))
        weights = torch.softmax(q.mT @ k / x.shape[1] ** 0.5, dim=-1)
        return x + (v @ weights.mT).view_as(x)


def test_state_dicts_interchange_with_a_plain_module():
    plain, ours = PlainAttention(12).double(), visattn.Attention(12).double()
    x = torch.randn(2, 12, 5, 6, dtype=torch.float64)
    assert list(plain.state_dict()) == list(ours.state_dict())
    assert {k: v.shape for k, v in plain.state_dict().items()} == {k: v.shape for k, v in ours.state_dict().items()}
    ours.load_state_dict(plain.state_dict(), strict=True)
    torch.testing.assert_close(ours(x), plain(x), rtol=0, atol=1e-12)
    other = visattn.Attention(12).double()
    plain.load_state_dict(other.state_dict(), strict=True)
    torch.testing.assert_close(other(x), plain(x), rtol=0, atol=1e-12)


def test_the_same_seed_initialises_like_a_plain_module():
    torch.manual_seed(5)
    plain = PlainAttention(12)
    torch.manual_seed(5)
    ours = visattn.Attention(12)
    for a, b in zip(plain.parameters(), ours.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "change", [spectral_norm, lambda conv: prune.l1_unstructured(conv, "weight", 0.5)], ids=["spectral norm", "pruning"]
)
def test_weights_that_something_else_makes(change):
    """They are no parameters of the convolution then, and the layer takes what the convolution itself would."""
    ours, plain = visattn.Attention(12).double().eval(), PlainAttention(12).double().eval()
    plain.load_state_dict(ours.state_dict())
    for layer in (ours, plain):
        torch.manual_seed(0)
        change(layer.conv_key)
        change(layer.conv_value)
    x = torch.randn(2, 12, 5, 6, dtype=torch.float64)
    torch.testing.assert_close(ours(x), plain(x), rtol=0, atol=1e-12)
    torch.func.functional_call(ours, {"conv_query.weight": torch.zeros(12, 12, 1, 1, dtype=torch.float64)}, (x,))
    assert ours.conv_query.weight.any()


def test_factory_arguments():
    layer = visattn.Attention(4, device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in layer.parameters()} == {("meta", torch.bfloat16)}


def test_repr():
    assert repr(visattn.Attention(64)).startswith("Attention(\n  64\n  (conv_query): Conv2d(64, 64, kernel_size=(1, 1)")


class TestAttentionRows:
    pixels = torch.tensor([[0, 0], [2, 5], [4, 1]])

    def test_rows_are_those_of_the_full_matrix(self):
        layer, x = visattn.Attention(10).double(), torch.randn(2, 10, 5, 6, dtype=torch.float64)
        q, k = layer.conv_query, layer.conv_key
        expected = reference.attention_rows(x, q.weight, k.weight, self.pixels, q.bias, k.bias)
        got = visattn.attention_rows(layer, x, self.pixels)
        assert got.shape == (2, 3, 5, 6)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-13)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    def test_rows_sum_to_one(self, dtype):
        layer, x = visattn.Attention(10).to(dtype), torch.randn(2, 10, 5, 6, dtype=dtype)
        rows = visattn.attention_rows(layer, x, self.pixels)
        assert rows.dtype == dtype
        torch.testing.assert_close(rows.float().sum((2, 3)), torch.ones(2, 3), rtol=0, atol=2e-2)
