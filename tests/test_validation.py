"""Bad input ends in an error that says what was expected, what came and what to do, before anything has run."""

import pytest
import torch

import visattn
from visattn import functional
from visattn.functional import GroupNorm

from .oracle import recorded_backends

X = torch.randn(2, 8, 3, 4)
W = torch.randn(8, 8)
B = torch.randn(8)

# (what is changed, the error, a part of its text)
BAD_CALLS = [
    ({"x": X[0]}, ValueError, r"shape \(N, C, H, W\), got \(8, 3, 4\); add a batch dimension"),
    ({"x": X[None]}, ValueError, r"got \(1, 2, 8, 3, 4\)"),
    ({"x": X.flatten(2)}, ValueError, r"got \(2, 8, 12\)"),
    ({"x": X.long()}, TypeError, r"floating dtype, got torch.int64; convert it with x.float\(\)"),
    ({"x": X.to(torch.complex64)}, TypeError, "floating dtype, got torch.complex64"),
    ({"x": X.bool()}, TypeError, "floating dtype"),
    ({"x": X.to_sparse()}, TypeError, "dense tensor"),
    ({"x": X.numpy()}, TypeError, "x must be a torch.Tensor, got ndarray"),
    ({"x": None}, TypeError, "x must be a torch.Tensor, got NoneType"),
    ({"x": X[:, :0]}, ValueError, "at least one channel"),
    ({"x": X[:, :, :0]}, ValueError, "at least one channel and one pixel"),
    ({"x": X[:, :, :, :0]}, ValueError, "only N may be 0"),
    ({"x": X[:, :7]}, ValueError, r"w_q must take x's 7 channels, its shape \(8, 8\) takes 8"),
    ({"x": X.double()}, TypeError, r"w_q must have x's dtype torch.float64, got torch.float32; convert one of them"),
    ({"x": X.half()}, TypeError, "or use torch.autocast"),
    ({"w_q": None}, TypeError, "w_q must be a torch.Tensor"),
    ({"w_q": W.to("meta")}, ValueError, "w_q must be on x's device cpu, got meta; move the layer or x"),
    ({"w_q": W[None]}, ValueError, r"w_q must have shape \(out, in\) or \(out, in, 1, 1\), got \(1, 8, 8\)"),
    ({"w_q": torch.randn(8, 8, 3, 3)}, ValueError, r"got \(8, 8, 3, 3\)"),
    ({"w_q": torch.randn(8, 4)}, ValueError, "w_q must take x's 8 channels"),
    ({"w_q": W[:0]}, ValueError, "w_q must have at least one row"),
    ({"w_k": torch.randn(4, 8)}, ValueError, r"w_k must give 8 channels, its shape \(4, 8\) gives 4"),
    ({"w_k": torch.randn(8, 4)}, ValueError, "w_k must take x's 8 channels"),
    ({"w_v": torch.randn(4, 8)}, ValueError, "w_v must give 8 channels"),
    ({"w_v": W.double()}, TypeError, "w_v must have x's dtype"),
    ({"b_q": B[:4]}, ValueError, r"b_q must have shape \(8,\) to match its weight, got \(4,\)"),
    ({"b_k": B[None]}, ValueError, "b_k must have shape"),
    ({"b_v": B[:4]}, ValueError, "b_v must have shape"),
    ({"b_q": 1.0}, TypeError, "b_q must be a torch.Tensor, got float"),
    ({"b_v": B.double()}, TypeError, "b_v must have x's dtype"),
    ({"gamma": B}, ValueError, r"gamma must have exactly one element, got shape \(8,\)"),
    ({"gamma": 0.5}, TypeError, "gamma must be a torch.Tensor, got float"),
    ({"scale": torch.tensor(0.1)}, TypeError, "scale must be a float or None"),
    ({"scale": "0.1"}, TypeError, "scale must be a float or None"),
    ({"backend": "gpu"}, ValueError, "backend must be one of"),
]

OUT, HALF = torch.randn(8, 4), torch.randn(4, 8)
GROUPS = GroupNorm(2, B, B)

BAD_BLOCKS = [
    ({"w_v": HALF, "w_o": W}, ValueError, r"w_o must take w_v's 4 channels, its shape \(8, 8\) takes 8"),
    ({"w_v": HALF, "w_o": torch.randn(4, 4)}, ValueError, r"w_o must give 8 channels, its shape \(4, 4\) gives 4"),
    ({"w_v": HALF, "w_o": OUT[None]}, ValueError, r"w_o must have shape \(out, in\)"),
    ({"w_v": HALF, "w_o": OUT.double()}, TypeError, "w_o must have x's dtype"),
    ({"w_v": HALF, "w_o": OUT, "b_v": B}, ValueError, r"b_v must have shape \(4,\)"),
    ({"w_v": HALF, "w_o": OUT, "b_o": B[:4]}, ValueError, r"b_o must have shape \(8,\), got \(4,\)"),
    ({"w_v": HALF, "num_heads": 2}, ValueError, "w_v must give 8 channels"),
    ({"w_o": "W"}, TypeError, "w_o must be a torch.Tensor, got str"),
    ({"b_o": B}, ValueError, "b_o is the bias of the output projection .* got w_o=None; pass w_o as well"),
    ({"num_heads": 3}, ValueError, "num_heads must divide the query channels, got 3 heads for 8"),
    ({"w_v": torch.randn(6, 8), "w_o": torch.randn(8, 6), "num_heads": 4}, ValueError, "divide the value channels, got 4 heads for 6"),
    ({"num_heads": 0}, ValueError, "num_heads must be at least 1, got 0"),
    ({"num_heads": 2.0}, TypeError, "num_heads must be an int, got 2.0"),
    ({"pool": 0}, ValueError, "pool must be at least 1"),
    ({"pool": (2, 2)}, TypeError, r"pool must be an int, got \(2, 2\)"),
    ({"pool": 4}, ValueError, "pool must leave at least one key, got 4 for a map of 3×4; use a smaller pool"),
    ({"norm": 2}, TypeError, "norm must be a visattn.functional.GroupNorm or None, got int"),
    ({"norm": GROUPS._replace(num_groups=3)}, ValueError, "norm.num_groups must divide the 8 channels of the map, got 3"),
    ({"norm": GROUPS._replace(num_groups=None)}, TypeError, "norm.num_groups must be an int"),
    ({"norm": GROUPS._replace(weight=B[:4])}, ValueError, r"norm.weight must have shape \(8,\), got \(4,\)"),
    ({"norm": GROUPS._replace(bias=B.double())}, TypeError, "norm.bias must have x's dtype"),
    ({"norm": GROUPS._replace(eps="0")}, TypeError, "norm.eps must be a float, got str"),
    ({"res_scale": "1"}, TypeError, "res_scale must be a float, got str"),
    ({"num_heads": 2, "gamma": B}, ValueError, "gamma must have exactly one element"),
    ({"normalize": "queries", "num_heads": 2}, ValueError, "'queries' must come with one head .*got num_heads=2.*use normalize='keys'"),
    ({"normalize": "queries", "norm": GROUPS}, ValueError, "norm=GroupNorm"),
    ({"normalize": "queries", "pool": 2}, ValueError, "pool=2"),
    ({"normalize": "queries", "w_o": W}, ValueError, r"w_o=\(8, 8\)"),
]


@pytest.mark.parametrize(("change", "error", "text"), BAD_CALLS + BAD_BLOCKS, ids=lambda v: next(iter(v)) if isinstance(v, dict) else None)
def test_bad_calls(change, error, text):
    arguments = {"x": X, "w_q": W, "w_k": W, "w_v": W} | change
    with recorded_backends() as ran, pytest.raises(error, match=text):
        functional.self_attention_2d(**arguments)
    assert ran == []


def test_unknown_arguments_are_not_swallowed():
    with pytest.raises(TypeError, match="unexpected keyword"):
        functional.self_attention_2d(X, W, W, W, num_head=2)


@pytest.mark.parametrize(
    ("in_channels", "error"), [(0, ValueError), (-1, ValueError), (8.0, TypeError), ("8", TypeError), (True, TypeError), (None, TypeError)]
)
def test_bad_layers(in_channels, error):
    with pytest.raises(error, match="in_channels must be"):
        visattn.Attention(in_channels)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        (
            {"value_channels": 4},
            ValueError,
            r"must equal in_channels \(8\) without an output projection, got 4; pass out_proj",
        ),
        ({"qk_channels": 6, "num_heads": 4}, ValueError, "num_heads must divide the query channels, got 4 heads for 6"),
        ({"qk_channels": 0}, ValueError, "qk_channels must be at least 1"),
        ({"norm_groups": 3}, ValueError, "norm_groups must divide the 8 channels"),
        ({"norm_eps": None, "norm_groups": 2}, TypeError, "norm_eps must be a float"),
        ({"gamma": True}, TypeError, "gamma must be a float, got bool"),
        ({"scale": "1"}, TypeError, "scale must be a float"),
        ({"res_scale": None}, TypeError, "res_scale must be a float"),
        ({"pool": 1.0}, TypeError, "pool must be an int"),
    ],
    ids=str,
)
def test_bad_blocks_of_layers(options, error, text):
    with pytest.raises(error, match=text):
        visattn.SelfAttention2d(8, **options)


@pytest.mark.parametrize(
    ("pixels", "error", "text"),
    [
        ([[0, 0]], TypeError, "integer torch.Tensor"),
        (torch.tensor([[0.0, 0.0]]), TypeError, "integer torch.Tensor"),
        (torch.tensor([0, 0]), ValueError, r"shape \(P, 2\)"),
        (torch.tensor([[0, 0, 0]]), ValueError, r"shape \(P, 2\)"),
        (torch.tensor([[0, 4]]), ValueError, r"inside the 3×4 map, got \[0, 4\]"),
        (torch.tensor([[0, 0], [-1, 0]]), ValueError, r"inside the 3×4 map, got \[-1, 0\]"),
    ],
)
def test_bad_pixels(pixels, error, text):
    with pytest.raises(error, match=text):
        visattn.attention_rows(visattn.Attention(8), X, pixels)
