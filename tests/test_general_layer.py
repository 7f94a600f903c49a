"""The general layer against its reference: the blocks of published models, in every dtype and to both orders."""

import copy
import pickle

import pytest
import torch

import visattn
from visattn import block, functional, ops, reference, token_attention, torch_attention, torch_token_attention, use_backend
from visattn.functional import GroupNorm

from .general_problems import BLOCKS, Block, make_problem, run, truth_of
from .oracle import complaints, stacked
from .wrong_attentions import GENERAL_FAULTS, general_attention

every_block = pytest.mark.parametrize("name", BLOCKS)
HEADS, POOLED = BLOCKS["everything"], Block(4, 2, 2, settings={"pool": 2})


@pytest.fixture(autouse=True)
def _on_the_pytorch_path():
    with use_backend("torch"):
        yield


def assert_correct(problems) -> None:
    """Passes the gates; several problems of one shape are judged as one.

    In half precision two pixels of a window may round to one value, and the gradient of their maximum go to either: judged is the output.
    """
    ours = stacked([run(functional.self_attention_2d, p) for p in problems])
    truth = stacked([truth_of(reference.self_attention_2d, p) for p in problems])
    if problems[0].d_out.dtype in (torch.bfloat16, torch.float16) and problems[0].settings.get("pool", 1) > 1:
        ours = {"out": ours["out"]}
    eager = stacked([run(reference.self_attention_2d, p) for p in problems])
    found = complaints(ours, truth, eager)
    assert not found, "\n".join(found)


@pytest.mark.parametrize("regime", ["uniform", "peaked"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@every_block
def test_blocks_of_published_models(name, dtype, regime):
    """The branch and its gradient by every tensor. Odd numbers of rows and columns, of which pooling drops the last.

    Where a softmax is nearly saturated, a single row holds the largest error; so many maps that this is not chance.
    """
    assert_correct([make_problem(BLOCKS[name], dtype, maps=8, regime=regime, seed=seed, residual=False) for seed in range(6)])


@every_block
def test_the_whole_block(name):
    assert_correct([make_problem(BLOCKS[name], regime="peaked", size=(6, 4))])


@pytest.mark.parametrize("name", ["timm Attention2d", "timm NonLocal", "diffusers VAE", "everything"])
def test_maps_large_enough_for_the_cpu_kernel(name):
    assert_correct([make_problem(BLOCKS[name], torch.float32, size=(16, 17), mean=3.0, seed=seed, residual=False) for seed in range(6)])


def test_softmax_over_the_queries_in_a_scaled_sum():
    shape = Block(8, 4, 8, out=False, gamma=True, settings={"normalize": "queries", "res_scale": 0.5})
    problem = make_problem(shape, regime="peaked")
    ours, eager = (run(f, problem) for f in (functional.self_attention_2d, reference.self_attention_2d))
    assert not complaints(ours, truth_of(reference.self_attention_2d, problem), eager, without_effect="b_q")


@pytest.mark.parametrize("name", ["timm NonLocal", "everything"])
def test_with_kernels_of_sdpa(name, monkeypatch):
    """What a GPU takes; `scaled_dot_product_attention` itself runs here as well."""
    monkeypatch.setattr(torch_attention, "sdpa_takes", lambda tokens: True)
    assert_correct([make_problem(BLOCKS[name], residual=False)])


@pytest.mark.parametrize("scores_at_once", [1, 100, 700])
def test_chunks_give_what_one_piece_gives(scores_at_once, monkeypatch):
    monkeypatch.setattr(torch_attention, "SCORES_AT_ONCE", scores_at_once)
    monkeypatch.setattr(token_attention, "SCORES_AT_ONCE", scores_at_once)
    assert_correct([make_problem(HEADS, maps=3, size=(4, 5))])
    assert_penalties_agree(make_problem(HEADS, maps=3, size=(4, 5)))


@pytest.mark.parametrize("fault", ["", *GENERAL_FAULTS])
def test_the_right_block_is_accepted_and_known_wrong_ones_are_rejected(fault):
    problems = [make_problem(HEADS, torch.float32, regime=r, seed=s, size=(6, 7)) for r in ("uniform", "peaked") for s in range(3)]
    truth, eager = (stacked([f(reference.self_attention_2d, p) for p in problems]) for f in (truth_of, run))
    wrong = stacked([run(lambda **a: general_attention(**a, fault=fault), p) for p in problems])
    found = [c for c in complaints(wrong, truth, eager) if not c.startswith("b_k: gradient")]
    assert bool(found) == bool(fault), found


class TestSizes:
    """At the ends of what is allowed."""

    @pytest.mark.parametrize("settings", [{"num_heads": 1}, {"num_heads": 2}, {"pool": 2}], ids=str)
    def test_no_maps(self, settings):
        problem = make_problem(BLOCKS["VQGAN"], maps=0, **settings)
        results = run(functional.self_attention_2d, problem)
        assert results["out"].shape == (0, 16, 5, 7)
        assert all(not t.any() for t in results.values())

    @pytest.mark.parametrize("size", [(1, 1), (1, 9), (3, 1)], ids=str)
    @pytest.mark.parametrize("heads", [1, 2])
    def test_few_pixels(self, size, heads):
        assert_correct([make_problem(Block(4, 2, 4, groups=2), size=size, num_heads=heads)])

    def test_one_channel(self):
        assert_correct(
            [
                make_problem(Block(1, 1, 1, groups=1, gamma=True)),
            ]
        )
        assert_correct([make_problem(Block(1, 3, 3, groups=1), num_heads=3, pool=2)])

    def test_windows_as_large_as_the_map_leave_one_key(self):
        assert_correct([make_problem(POOLED, size=(5, 5), pool=5)])

    def test_one_pixel_in_a_group_of_its_own(self):
        """Its variance is zero; PyTorch's own module refuses a single image of this kind."""
        assert_correct([make_problem(Block(4, 4, 4, groups=4), maps=1, size=(1, 1), num_heads=heads) for heads in (1, 2)])

    def test_a_large_common_mean(self):
        assert_correct([make_problem(HEADS, torch.float32, mean=30.0, seed=s, size=(6, 6)) for s in range(6)])


class TestLayout:
    @pytest.mark.parametrize("name", ["VQGAN", "everything", "timm Attention2d", "score_sde"])
    def test_strides_of_results(self, name):
        problem = make_problem(BLOCKS[name], size=(4, 6))
        expected = run(functional.self_attention_2d, problem)
        x = problem.tensors["x"]
        for layout, laid_out in (
            (torch.channels_last, x.contiguous(memory_format=torch.channels_last)),
            (torch.contiguous_format, x.mT.contiguous().mT),
            (torch.contiguous_format, torch.cat([x, x], 1)[:, : x.shape[1]]),
        ):
            out = problem.call(functional.self_attention_2d, problem.tensors | {"x": laid_out})
            assert out.is_contiguous(memory_format=layout)
            torch.testing.assert_close(out, expected["out"], rtol=0, atol=1e-12)

    def test_gradient_without_strides(self):
        problem = make_problem(HEADS)
        leaves = problem.leaves()
        problem.call(functional.self_attention_2d, leaves).sum().backward()
        (expected,) = torch.autograd.grad(problem.call(reference.self_attention_2d, leaves).sum(), leaves["x"])
        torch.testing.assert_close(leaves["x"].grad, expected, rtol=0, atol=1e-12)


def penalty_gradients(function, problem):
    """The gradients of a WGAN-GP penalty by every tensor but b_k: derivatives of a derivative."""
    leaves = problem.leaves()
    (d_x,) = torch.autograd.grad(problem.call(function, leaves).square().sum(), leaves["x"], create_graph=True)
    penalty = (d_x.flatten(1).norm(dim=1) - 1).square().mean()
    return torch.autograd.grad(penalty, [t for name, t in leaves.items() if name != "b_k"])


def assert_penalties_agree(problem) -> None:
    truth = penalty_gradients(reference.self_attention_2d, problem)
    for got, expected in zip(penalty_gradients(functional.self_attention_2d, problem), truth, strict=True):
        assert (got - expected).norm() <= 1e-9 * expected.norm()


class TestSecondOrder:
    @every_block
    def test_gradient_penalty(self, name):
        assert_penalties_agree(make_problem(BLOCKS[name], regime="peaked"))

    @pytest.mark.parametrize("shape", [Block(4, 2, 2, gamma=True, groups=2, settings={"num_heads": 2}), POOLED], ids=["heads", "pooled"])
    def test_gradgradcheck(self, shape):
        problem = make_problem(shape, regime="peaked", maps=1, size=(2, 4))
        names, tensors = zip(*((n, t) for n, t in problem.leaves().items() if n != "b_k"), strict=True)

        def layer(*leaves):
            return problem.call(functional.self_attention_2d, dict(zip(names, leaves, strict=True)))

        assert torch.autograd.gradcheck(layer, tensors)
        assert torch.autograd.gradgradcheck(layer, tensors)

    def test_third_order_raises_instead_of_being_wrong(self):
        problem = make_problem(BLOCKS["timm Attention2d"])
        leaves = problem.leaves()
        (first,) = torch.autograd.grad(problem.call(functional.self_attention_2d, leaves).square().sum(), leaves["x"], create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), leaves["x"], create_graph=True)
        with pytest.raises(RuntimeError, match="no third ones"):
            second.square().sum().backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="no third ones"):
            torch.autograd.grad(second.square().sum(), leaves["x"])


class TestForm:
    """Which form runs, and what is said about it."""

    @pytest.mark.parametrize("name", BLOCKS)
    def test_attention_on_tokens_runs_where_the_form_says_so(self, name, monkeypatch):
        problem, ran = make_problem(BLOCKS[name]), []
        attend = torch_token_attention.forward
        monkeypatch.setattr(torch_token_attention, "forward", lambda *a: ran.append(a) or attend(*a))
        problem.call(functional.self_attention_2d, problem.tensors)
        projected = {"BigGAN", "non-local", "timm NonLocal", "timm Attention2d", "diffusers VAE", "guided-diffusion", "everything"}
        assert bool(ran) == (name in projected)

    def test_thin_queries_and_values_are_projected(self):
        x = torch.empty(1, 64, 8, 8)
        assert block.form_of(x, 8, 8, 1, 1).name == "projected"
        assert "3072 multiplications, and 9728" in block.form_of(x, 8, 8, 1, 1).reason
        assert block.form_of(x, 8, None, 1, 1).name == block.form_of(x, 64, 64, 1, 1).name == "folded"

    def test_products_of_kernels_are_padded(self):
        """To at least 16 channels, and to powers of two, as `block_channels` has it; thin ones are projected there as well."""
        x = torch.empty(1, 16, 8, 8)
        assert [block.form_of(x, 2, 2, 1, 1, backend).name for backend in ("torch", "triton")] == ["projected", "folded"]
        assert "6144 multiplications, and 11264" in block.form_of(torch.empty(1, 64, 8, 8), 8, 8, 1, 1, "triton").reason
        assert block.form_of(torch.empty(1, 512, 8, 8), 8, 8, 1, 1, "triton").name == "projected"
        assert block.form_of(torch.empty(1, 64, 8, 8), 64, 64, 1, 1, "triton").name == "folded"

    def test_explain_and_refusal(self):
        x = torch.randn(1, 8, 4, 4)
        heads, thin = visattn.SelfAttention2d(8, num_heads=2), visattn.SelfAttention2d(8, qk_channels=1, value_channels=1, out_proj=True)
        assert "each of the 2 heads has queries, keys and values of its own" in visattn.explain(heads, x)
        assert "form is projected: a pixel takes" in visattn.explain(thin, x)
        assert "form is folded: keys and values are the map itself" in visattn.explain(visattn.SelfAttention2d(8, norm_groups=2), x)
        with use_backend("triton"):
            wide = visattn.SelfAttention2d(8, qk_channels=1026, num_heads=2)
            with pytest.raises(RuntimeError, match="heads of at most 512 channels, they have 513 and 4 in values"):
                wide(x)


LAYERS = [
    {}, {"gamma": 0.5, "qk_channels": 2, "scale": 1.0}, {"norm_groups": 4, "out_proj": True, "res_scale": 0.5},
    {"num_heads": 2, "norm_groups": 2, "out_proj": True, "value_channels": 4, "pool": 2, "bias": False, "residual": False},
]  # fmt: skip


class TestModule:
    @pytest.mark.parametrize("options", LAYERS, ids=str)
    def test_copies_compute_the_same(self, options):
        layer, x = visattn.SelfAttention2d(8, **options), torch.randn(2, 8, 5, 6)
        other = visattn.SelfAttention2d(8, **options)
        other.load_state_dict(layer.state_dict(), strict=True)
        for copied in (other, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert torch.equal(copied(x), layer(x))

    def test_names_of_parameters(self):
        everything = visattn.SelfAttention2d(8, **{**LAYERS[3], "gamma": 0.0, "bias": True})
        convolutions = [f"conv_{c}.{p}" for c in ("query", "key", "value", "out") for p in ("weight", "bias")]
        assert set(everything.state_dict()) == {"gamma", "norm.weight", "norm.bias", *convolutions}
        assert everything.gamma.shape == (1,)
        assert set(visattn.SelfAttention2d(8).state_dict()) == set(visattn.Attention(8).state_dict())

    def test_repr_shows_what_differs(self):
        assert repr(visattn.SelfAttention2d(8, num_heads=2, res_scale=0.5)).startswith("SelfAttention2d(\n  num_heads=2, res_scale=0.5\n")

    def test_factory_arguments(self):
        layer = visattn.SelfAttention2d(8, norm_groups=2, gamma=1.0, out_proj=True, device="meta", dtype=torch.bfloat16)
        assert {(p.device.type, p.dtype) for p in layer.parameters()} == {("meta", torch.bfloat16)}

    def test_every_parameter_has_a_gradient(self):
        """Data-parallel training waits for the gradient of every parameter; that of the keys' bias is zero."""
        layer = visattn.SelfAttention2d(8, **{**LAYERS[3], "gamma": 0.5, "bias": True})
        layer(torch.randn(2, 8, 5, 6)).square().sum().backward()
        assert {name for name, p in layer.named_parameters() if not p.grad.any()} == {"conv_key.bias"}

    @pytest.mark.parametrize("options", LAYERS, ids=str)
    def test_rows_are_those_of_the_full_matrix(self, options):
        layer = visattn.SelfAttention2d(8, **{**options, "scale": None}).double()
        x, pixels = torch.randn(2, 8, 5, 6, dtype=torch.float64), torch.tensor([[0, 0], [4, 5], [2, 3]])
        q, k, norm = layer.conv_query, layer.conv_key, layer.norm and GroupNorm(layer.norm.num_groups)
        settings = {"num_heads": layer.num_heads, "pool": layer.pool, "norm": norm}
        expected = reference.attention_rows(x, q.weight, k.weight, pixels, q.bias, k.bias, **settings)
        rows = visattn.attention_rows(layer, x, pixels)
        assert rows.shape == (2, 3, 5 // layer.pool, 6 // layer.pool)
        torch.testing.assert_close(rows, expected, rtol=0, atol=1e-13)

    @pytest.mark.parametrize("options", LAYERS, ids=str)
    def test_projections_are_products(self, options):
        """Convolutions in fp32 on CUDA follow a switch of their own, which permits TF32 unless told otherwise."""
        layer, x = visattn.SelfAttention2d(8, **options), torch.randn(2, 8, 5, 6, requires_grad=True)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            (d_x,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
            d_x.square().sum().backward()
            visattn.attention_rows(layer, x, torch.tensor([[0, 0]]))
        ran = {event.name for event in profile.events()}
        assert "aten::bmm" in ran
        assert not {name for name in ran if "conv" in name}

    def test_function_transforms(self):
        layer, x = visattn.SelfAttention2d(8, num_heads=2, norm_groups=2).double(), torch.randn(2, 8, 5, 6, dtype=torch.float64)
        parameters = dict(layer.named_parameters())

        def loss(parameters):
            return torch.func.functional_call(layer, parameters, (x,)).square().sum()

        for got, want in zip(
            torch.func.grad(loss)(parameters).values(), torch.autograd.grad(loss(parameters), parameters.values()), strict=True
        ):
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


class TestAutocast:
    def test_sum_and_statistics_stay_in_float32(self):
        layer, x = visattn.SelfAttention2d(16, num_heads=4, norm_groups=4, out_proj=True), torch.randn(2, 16, 5, 6) + 100
        expected = layer(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = layer(x)
            layer.residual = False
            branch = layer(x)
        assert (out.dtype, branch.dtype) == (torch.float32, torch.bfloat16)
        torch.testing.assert_close(out - x, expected - x, rtol=2e-2, atol=2e-2)


class TestCompilers:
    @pytest.fixture(autouse=True)
    def _fresh(self):
        torch.compiler.reset()
        torch.use_deterministic_algorithms(False)
        yield
        torch.compiler.reset()

    @pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
    @pytest.mark.parametrize("options", [LAYERS[2], LAYERS[3]], ids=["folded", "projected"])
    def test_compiled_step_is_the_eager_step(self, options, memory_format):
        layer = visattn.SelfAttention2d(8, **options)
        x = torch.randn(2, 8, 6, 5).contiguous(memory_format=memory_format).requires_grad_()
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        results = []
        for module in (layer, compiled):
            out = module(x)
            results.append((out, *torch.autograd.grad(out.square().sum(), [x, *layer.parameters()])))
        assert results[0][0].stride() == results[1][0].stride()
        for want, got in zip(*results, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)

    def test_compiled_with_kernels_of_sdpa(self, monkeypatch):
        """Within the op of a compiled call autograd records nothing, and what SDPA's derivative needs has to be recorded."""
        monkeypatch.setattr(torch_attention, "sdpa_takes", lambda tokens: True)
        problem = make_problem(HEADS, maps=1, size=(3, 4))
        compiled = torch.compile(functional.self_attention_2d, backend="aot_eager", fullgraph=True)
        ours, eager = (run(function, problem) for function in (compiled, functional.self_attention_2d))
        for name, result in ours.items():
            torch.testing.assert_close(result, eager[name], rtol=1e-10, atol=1e-12)

    def test_export_runs_the_op(self):
        layer, x = visattn.SelfAttention2d(8, **LAYERS[3]), torch.randn(2, 8, 6, 5)
        program = torch.export.export(layer, (x,))
        assert "visattn.token_attention" in program.graph_module.code
        torch.testing.assert_close(program.module()(x), layer(x), rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("length", [6, 256], ids=["chunks", "flash"])
    def test_contracts_of_the_ops(self, length):
        q, k, v = (torch.randn(2, 4, n, requires_grad=True) for n in (length, 5, 5))
        torch.library.opcheck(ops.token_attention, (q, k, v, torch.randn(4, requires_grad=True), 0.3, "torch"))
        q, k, v = (t.detach() for t in (q, k, v))
        y, lse = ops.token_attention(q, k, v, None, 0.3, "torch")
        assert lse.shape == (2, length)
        assert lse.any() == (length == 256)
        torch.library.opcheck(ops.token_attention_backward, (torch.randn_like(y), q, k, v, y, lse, 0.3, "torch"))

    def test_second_derivative_of_the_op(self):
        q, k, v = (torch.randn(2, c, n, dtype=torch.float64, requires_grad=True) for c, n in ((3, 4), (3, 2), (2, 2)))
        assert torch.autograd.gradgradcheck(lambda *t: ops.token_attention(*t, None, 0.3, "torch")[0], (q, k, v))
