"""Derivatives of both orders, which of them are computed, and the states in which PyTorch may call the layer."""

import copy
import itertools
import pickle

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import visattn
from visattn import functional, reference, second_order, torch_attention, use_backend

from .oracle import make_problem, recorded_backends


def double_leaves(shape=(2, 3, 3, 2), qk_channels=4) -> list[torch.Tensor]:
    """x, w_q, w_k, w_v, b_q, b_k, b_v, gamma in float64, asking for gradients."""
    p = make_problem(shape, torch.float64, qk_channels=qk_channels, regime="peaked")
    return [t.requires_grad_() for t in (p.x, p.w_q, p.w_k, p.w_v, p.b_q, p.b_k, p.b_v, p.gamma)]


def layer(x, w_q, w_k, w_v, b_q, b_k, b_v, gamma, residual=True):
    return functional.self_attention_2d(x, w_q, w_k, w_v, b_q, b_k, b_v, gamma=gamma, residual=residual)


@pytest.mark.parametrize("residual", [True, False])
def test_gradcheck(residual):
    assert torch.autograd.gradcheck(lambda *t: layer(*t, residual=residual), double_leaves())


@pytest.mark.parametrize("residual", [True, False])
def test_gradgradcheck(residual):
    assert torch.autograd.gradgradcheck(lambda *t: layer(*t, residual=residual), double_leaves())


def test_gradgradcheck_without_optional_parameters():
    leaves = double_leaves()[:4]
    assert torch.autograd.gradgradcheck(lambda x, q, k, v: functional.self_attention_2d(x, q, k, v, residual=False), leaves)


def test_derivatives_with_weights_of_convolutions():
    x, w_q, w_k, w_v, *rest = double_leaves()
    weights = [w.detach()[..., None, None].requires_grad_() for w in (w_q, w_k, w_v)]
    assert torch.autograd.gradcheck(layer, (x, *weights, *rest))
    assert torch.autograd.gradgradcheck(layer, (x, *weights, *rest))


def penalty_gradients(function, problem, names=("x", "w_q", "w_k", "w_v", "b_q", "b_v", "gamma")):
    """The gradients of a WGAN-GP penalty: a derivative of a derivative by every parameter."""
    leaves = {name: getattr(problem, name).detach().requires_grad_() for name in (*names, "b_k")}
    (d_x,) = torch.autograd.grad(function(**leaves).square().sum(), leaves["x"], create_graph=True)
    penalty = (d_x.flatten(1).norm(dim=1) - 1).square().mean()
    return torch.autograd.grad(penalty, [leaves[name] for name in names])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(("shape", "qk_channels"), [((3, 12, 5, 7), None), ((2, 20, 5, 13), 5)], ids=str)
def test_gradient_penalty(shape, qk_channels, dtype, backend, place):
    if backend == "triton" and dtype == torch.float64:
        pytest.skip("the kernels have no float64")
    problem = make_problem(shape, dtype, qk_channels=qk_channels, regime="peaked")
    with use_backend(backend), recorded_backends() as ran:
        ours = penalty_gradients(functional.self_attention_2d, problem.to(place))
    assert set(ran) == {backend}
    truth = penalty_gradients(reference.self_attention_2d, problem.to(torch.float64))
    for got, expected in zip(ours, truth, strict=True):
        error = float((got.cpu().double() - expected).norm() / expected.norm())
        assert error < (1e-10 if dtype == torch.float64 else 2e-5)


def test_third_order_raises_instead_of_being_wrong():
    x, *weights = double_leaves()
    (first,) = torch.autograd.grad(layer(x, *weights).square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no third ones"):
        second.square().sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="no third ones"):  # which goes through a part of the graph only
        torch.autograd.grad(second.square().sum(), x)


def test_second_order_works_in_chunks_like_in_one_piece(monkeypatch):
    problem = make_problem((3, 4, 5, 7), torch.float64, regime="peaked")
    whole = penalty_gradients(functional.self_attention_2d, problem)
    monkeypatch.setattr(second_order, "SCORES_AT_ONCE", 100)
    for got, expected in zip(penalty_gradients(functional.self_attention_2d, problem), whole, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("scores_at_once", [1, 100, 35 * 35 * 2])
def test_first_order_works_in_chunks_like_in_one_piece(scores_at_once, monkeypatch):
    leaves = double_leaves((3, 4, 5, 7))
    whole = torch.autograd.grad(layer(*leaves).square().sum(), leaves)
    monkeypatch.setattr(torch_attention, "SCORES_AT_ONCE", scores_at_once)
    for got, expected in zip(torch.autograd.grad(layer(*leaves).square().sum(), leaves), whole, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


SUBSETS = [*itertools.chain(*(itertools.combinations(range(8), n) for n in (0, 1, 2))), tuple(range(8))]


@pytest.mark.parametrize(
    ("shape", "qk_channels", "wanted"),
    [((1, 8, 3, 3), 8, w) for w in SUBSETS] + [((1, 20, 5, 13), 5, w) for w in ((0,), (1,), (2,), (3,), (4,), (0, 7), tuple(range(1, 8)))],
)
def test_any_subset_of_inputs_may_ask_for_a_gradient(shape, qk_channels, wanted, backend, place):
    problem = make_problem(shape, qk_channels=qk_channels).to(place)
    names = ("x", "w_q", "w_k", "w_v", "b_q", "b_k", "b_v", "gamma")
    tensors = [getattr(problem, name).requires_grad_() for name in names]
    with use_backend(backend):
        everything = torch.autograd.grad(layer(*tensors), tensors, problem.d_out)
        some = [t.detach().requires_grad_(i in wanted) for i, t in enumerate(tensors)]
        out = layer(*some)
        assert out.requires_grad == bool(wanted)
        if wanted:
            got = torch.autograd.grad(out, [some[i] for i in wanted], problem.d_out)
            for i, gradient in zip(wanted, got, strict=True):
                assert torch.equal(gradient, everything[i]), names[i]


def test_no_grad_and_inference_mode_save_nothing_and_agree(backend, place):
    module = visattn.Attention(16).to(place)
    x = torch.randn(2, 16, 5, 6, device=place)
    with use_backend(backend):
        expected = module(x)
        for context in (torch.no_grad, torch.inference_mode):
            with context():
                out = module(x)
            assert not out.requires_grad
            torch.testing.assert_close(out, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("index", [0, 1, 3], ids=["x", "w_q", "w_v"])
def test_in_place_change_of_what_backward_needs_raises(index):
    tensors = [t.detach() for t in double_leaves()]
    leaves = [t.clone().requires_grad_() for t in tensors]
    out = layer(*leaves)
    with torch.no_grad():
        leaves[index].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_a_second_backward_through_a_freed_graph_raises():
    leaves = double_leaves()
    loss = layer(*leaves).sum()
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


class TestAutocast:
    """The branch computes in the autocast dtype; the map that is only passed through is not rounded."""

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_dtypes_are_those_of_the_naive_layer(self, dtype):
        module, x = visattn.Attention(16), torch.randn(2, 16, 5, 6, requires_grad=True)
        weights = (module.conv_query.weight, module.conv_key.weight, module.conv_value.weight)
        with torch.autocast("cpu", dtype=dtype):
            out = module(x)
            naive = reference.self_attention_2d(x, *weights)
            inner = module(x.to(dtype))
        assert out.dtype == naive.dtype == torch.float32
        assert inner.dtype == dtype
        out.sum().backward()
        assert x.grad.dtype == torch.float32
        assert {p.grad.dtype for p in module.parameters()} == {torch.float32}

    def test_residual_is_not_rounded(self):
        module, x = visattn.Attention(16), torch.randn(2, 16, 5, 6)
        torch.nn.init.zeros_(module.conv_value.weight)
        torch.nn.init.zeros_(module.conv_value.bias)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(module(x), x)

    def test_backward_inside_of_autocast_is_the_same(self):
        """The sums behind the weights' gradients are fp32 and stay so (pytorch#87979)."""
        problem = make_problem((2, 16, 5, 6), torch.bfloat16)
        results = []
        for inside in (False, True):
            leaves = [t.detach().requires_grad_() for t in (problem.x, problem.w_q, problem.w_k, problem.w_v)]
            with torch.autocast("cpu", dtype=torch.bfloat16):
                out = functional.self_attention_2d(*leaves)
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=inside):
                results.append(torch.autograd.grad(out, leaves, problem.d_out))
        for a, b in zip(*results, strict=True):
            assert torch.equal(a, b)

    def test_float64_is_left_alone(self):
        module, x = visattn.Attention(4).double(), torch.randn(1, 4, 3, 3, dtype=torch.float64)
        expected = module(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(module(x), expected)


class TestState:
    """The layer in the hands of PyTorch's own machinery."""

    def test_deepcopy_and_pickle_compute_the_same(self):
        module, x = visattn.Attention(8), torch.randn(2, 8, 3, 4)
        for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            assert torch.equal(other(x), module(x))

    @pytest.mark.parametrize("use_reentrant", [True, False])
    def test_activation_checkpointing(self, use_reentrant, backend, place):
        module, x = visattn.Attention(8).to(place), torch.randn(2, 8, 3, 4, device=place, requires_grad=True)
        with use_backend(backend):
            expected = torch.autograd.grad(module(x).square().sum(), [x, *module.parameters()])
            for p in module.parameters():
                p.grad = None
            checkpoint(module, x, use_reentrant=use_reentrant).square().sum().backward()
        for got, want in zip((x.grad, *(p.grad for p in module.parameters())), expected, strict=True):
            assert torch.equal(got, want)

    def test_functional_call_and_function_transforms(self):
        module, x = visattn.Attention(4).double(), torch.randn(2, 4, 3, 3, dtype=torch.float64)
        parameters = dict(module.named_parameters())

        def loss(parameters):
            return torch.func.functional_call(module, parameters, (x,)).square().sum()

        gradients = torch.func.grad(loss)(parameters)
        expected = torch.autograd.grad(loss(parameters), list(parameters.values()))
        for got, want in zip(gradients.values(), expected, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)

    @pytest.mark.parametrize(
        "make",
        [
            lambda: visattn.Attention(4),
            lambda: visattn.Attention(4, normalize="queries"),
            lambda: visattn.SelfAttention2d(8, num_heads=2, norm_groups=2, out_proj=True),
            lambda: visattn.SelfAttention2d(8, norm_groups=2, out_proj=True, gamma=0.5),
        ],
        ids=["plain", "queries", "heads", "normalised"],
    )
    def test_function_transforms_of_function_transforms(self, make):
        module = make().double()
        x, v = torch.randn(2, 2, module.conv_query.in_channels, 3, 3, dtype=torch.float64).unbind()

        def loss(x):
            return module(x).square().sum()

        got = torch.func.grad(lambda x: (torch.func.grad(loss)(x) * v).sum())(x)
        x.requires_grad_()
        (first,) = torch.autograd.grad(loss(x), x, create_graph=True)
        (expected,) = torch.autograd.grad((first * v).sum(), x)
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)

    def test_weights_need_not_be_parameters(self):
        """Spectral norm makes the weight anew in every forward pass, with a graph of its own."""
        module = visattn.Attention(6).double()
        torch.nn.utils.parametrizations.spectral_norm(module.conv_query)
        x = torch.randn(2, 6, 3, 4, dtype=torch.float64)
        module(x).square().sum().backward()
        assert module.conv_query.parametrizations.weight.original.grad.abs().sum() > 0

    def test_training_moves_every_parameter_that_matters(self):
        module, x = visattn.Attention(6), torch.randn(2, 6, 3, 4)
        before = {name: p.detach().clone() for name, p in module.named_parameters()}
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        module(x).square().sum().backward()
        optimizer.step()
        moved = {name for name, p in module.named_parameters() if not torch.equal(p, before[name])}
        assert moved == set(before) - {"conv_key.bias"}


@pytest.mark.parametrize("options", [{}, {"num_heads": 2}, {"norm_groups": 2, "out_proj": True}], ids=str)
def test_jacobians_go_row_by_row(options):
    """`torch.func.jacrev` takes all rows at once by vmap, unless it is told otherwise."""
    layer, x = visattn.SelfAttention2d(4, **options).double(), torch.randn(1, 4, 2, 3, dtype=torch.float64)
    with pytest.raises(NotImplementedError, match=r"torch.vmap must not go over the layer.*jacrev with chunk_size=1"):
        torch.func.jacrev(layer)(x)
    expected = torch.autograd.functional.jacobian(layer, x)
    torch.testing.assert_close(torch.func.jacrev(layer, chunk_size=1)(x), expected, rtol=0, atol=1e-12)
