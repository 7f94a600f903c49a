"""The layer as a module, and the attention maps of chosen pixels."""

import copy
import functools

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

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


def pruned(convolution):
    prune.l1_unstructured(convolution, "weight", 0.5)


def pruned_bias(convolution):
    prune.l1_unstructured(convolution, "bias", 0.5)


def pruned_both(convolution):
    pruned(convolution)
    pruned_bias(convolution)


def equalised(convolution):
    """As StyleGAN's followers have it: the weight is made by a hook of their own."""
    convolution.register_parameter("weight_orig", nn.Parameter(convolution.weight.data))
    del convolution._parameters["weight"]
    convolution.register_forward_pre_hook(lambda layer, inputs: setattr(layer, "weight", layer.weight_orig * 0.5))


MAKERS = [parametrizations.spectral_norm, parametrizations.weight_norm, spectral_norm, weight_norm]


@pytest.mark.parametrize("make", [visattn.Attention, visattn.SelfAttention2d])
@pytest.mark.parametrize("change", [*MAKERS, pruned, pruned_bias, pruned_both, equalised])
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_weights_that_something_else_makes(change, make):
    """They are no parameters of the convolution then, and the layer takes and trains what the convolution itself would, step by step."""
    ours, plain = make(12).double(), PlainAttention(12).double()
    plain.load_state_dict(ours.state_dict())
    x = torch.randn(2, 12, 5, 6, dtype=torch.float64)
    for layer in (ours, plain):
        torch.manual_seed(0)
        change(layer.conv_key)
        change(layer.conv_value)
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.01)
        for _ in range(3):
            optimizer.zero_grad()
            layer(x).square().mean().backward()
            optimizer.step()
    visattn.explain(ours, x)  # asking makes no step
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter, plain.get_parameter(name), rtol=0, atol=1e-12)
    torch.testing.assert_close(ours(x), plain(x), rtol=0, atol=1e-12)
    torch.testing.assert_close(ours.eval()(x), plain.eval()(x), rtol=0, atol=1e-12)


def test_weights_that_a_hook_changes():
    """As WGAN clamps them, here by a hook that takes keywords as well."""

    def clamp(layer, inputs, named):
        layer.weight.data.clamp_(-0.1, 0.1)

    layer, x = visattn.Attention(12), torch.randn(2, 12, 5, 6)
    expected = copy.deepcopy(layer)
    expected.conv_key.weight.data.clamp_(-0.1, 0.1)
    layer.conv_key.register_forward_pre_hook(clamp, with_kwargs=True)
    assert torch.equal(layer(x), expected(x))
    assert torch.equal(layer.conv_key.weight, expected.conv_key.weight)


def test_weights_of_a_replica():
    """Where `nn.DataParallel` has put them: they are plain attributes."""
    layer, x = visattn.Attention(12), torch.randn(2, 12, 5, 6)
    expected = layer(x)
    replica = layer.conv_key._replicate_for_data_parallel()
    replica.weight, replica.bias = layer.conv_key.weight.clone(), layer.conv_key.bias.clone()
    layer.conv_key = replica
    assert torch.equal(layer(x), expected)


def test_functional_call_leaves_the_weights_of_the_layer():
    layer, x = visattn.Attention(12), torch.randn(2, 12, 5, 6)
    torch.func.functional_call(layer, {"conv_query.weight": torch.zeros(12, 12, 1, 1)}, (x,))
    assert layer.conv_query.weight.any()


class Adapted(nn.Module):
    """A convolution and something beside it, as adapters have it."""

    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__()
        self.base, self.weight, self.bias = convolution, convolution.weight, convolution.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + x


class Standardised(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight - weight.mean(), bias)


def replaced(method):
    convolution = nn.Conv2d(4, 4, 1)
    setattr(convolution, method, lambda x, *further: 0 * x)
    return convolution


def hooked(hook):
    convolution = nn.Conv2d(4, 4, 1)
    convolution.register_forward_pre_hook(hook)
    return convolution


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (lambda: nn.Conv2d(4, 4, 1, stride=2), "conv_key is not a 1×1 convolution but Conv2d.*stride"),
        (lambda: nn.Conv2d(4, 4, 1, padding=1), "conv_key is not a 1×1 convolution but Conv2d.*padding"),
        (lambda: nn.Sequential(nn.Conv2d(4, 4, 1)), "conv_key is a Sequential, which computes in a way of its own"),
        (lambda: Adapted(nn.Conv2d(4, 4, 1)), "conv_key is a Adapted, which computes in a way of its own"),
        (lambda: Standardised(4, 4, 1), "conv_key is a Standardised, which computes in a way of its own"),
        (lambda: replaced("forward"), "conv_key.forward has been replaced"),
        (lambda: replaced("_conv_forward"), "conv_key._conv_forward has been replaced"),
        (lambda: hooked(lambda layer, inputs: (2 * inputs[0],)), "pre-hook .*lambda.* of conv_key failed .IndexError"),
        (lambda: hooked(lambda layer, inputs: tuple(2 * x for x in inputs)), "pre-hook .*lambda.* of conv_key returns an input"),
        (lambda: None, "conv_key is missing: a 1×1 convolution is expected"),
    ],
    ids=["stride", "padding", "stack", "adapter", "method", "forward", "_conv_forward", "hook", "another input", "none"],
)
def test_what_is_no_pointwise_convolution_is_refused(other, said):
    """Its weight alone would be taken, and the rest of it forgotten."""
    layer, x = visattn.SelfAttention2d(4, out_proj=True), torch.randn(1, 4, 3, 3)
    layer.conv_key = other()
    with pytest.raises(RuntimeError, match=said):
        layer(x)
    with pytest.raises(RuntimeError, match=said):
        visattn.attention_rows(layer, x, torch.tensor([[0, 0]]))


def test_a_convolution_that_was_deleted_is_named():
    layer = visattn.Attention(4)
    del layer.conv_value
    with pytest.raises(RuntimeError, match="conv_value is missing: a 1×1 convolution is expected"):
        layer(torch.randn(1, 4, 3, 3))


def test_forward_hooks_never_run():
    """Summaries and counters of operations register them on every module there is."""
    layer, x = visattn.Attention(4), torch.randn(1, 4, 3, 3)
    expected = layer(x)
    layer.conv_value.register_forward_hook(lambda layer, inputs, out: 0 * out)
    assert torch.equal(layer(x), expected)


def test_a_pruned_norm_is_read_as_it_is_now():
    layer, x = visattn.SelfAttention2d(4, norm_groups=2), torch.randn(1, 4, 3, 3)
    plain = copy.deepcopy(layer)
    prune.l1_unstructured(layer.norm, "weight", 0.5)
    with torch.no_grad():
        layer.norm.weight_orig.mul_(3)
        plain.norm.weight.mul_(3 * layer.norm.weight_mask)
    assert torch.equal(layer(x), plain(x))


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

    @pytest.mark.parametrize("options", [{}, {"num_heads": 2}, {"pool": 2}], ids=str)
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_logits_are_not_rounded_to_half_precision(self, options, dtype):
        """They reach some 100,000 here: beyond fp16, and hundreds apart in bf16."""
        torch.manual_seed(0)
        layer, x = visattn.SelfAttention2d(16, scale=1.0, **options).to(dtype), 300 * torch.randn(1, 16, 5, 6).to(dtype)
        got, expected = (visattn.attention_rows(m, t, self.pixels) for m, t in ((layer, x), (copy.deepcopy(layer).double(), x.double())))
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), expected, rtol=0, atol=torch.finfo(dtype).eps)

    @pytest.mark.parametrize(
        "make", [visattn.Attention, functools.partial(visattn.Attention, normalize="queries")], ids=["keys", "queries"]
    )
    def test_autocast_changes_nothing(self, make):
        layer, x = make(10), torch.randn(2, 10, 5, 6)
        expected = visattn.attention_rows(layer, x, self.pixels)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(visattn.attention_rows(layer, x, self.pixels), expected)
