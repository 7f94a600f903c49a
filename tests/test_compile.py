"""torch.compile, torch.export and the contracts of the library ops."""

import functools

import pytest
import torch
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import visattn
from visattn import functional, ops, torch_attention, use_backend

from .conftest import HAS_GPU, INTERPRETING
from .oracle import make_problem, recorded_backends

LAYOUTS = [torch.contiguous_format, torch.channels_last]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    # The compiler's own buffers come from torch.empty too; filling them is no part of these tests.
    torch.use_deterministic_algorithms(False)
    yield
    torch.compiler.reset()


def step(module, x):
    out = module(x)
    return out, torch.autograd.grad(out.square().sum(), [x, *module.parameters()])


@pytest.mark.parametrize("memory_format", LAYOUTS, ids=str)
@pytest.mark.parametrize("compiler", ["inductor", "aot_eager"])
def test_compiled_step_is_the_eager_step(compiler, memory_format, backend, place):
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 3, padding=1), visattn.Attention(16), torch.nn.ReLU()).to(place)
    x = torch.randn(2, 3, 6, 5, device=place).contiguous(memory_format=memory_format).requires_grad_()
    with use_backend(backend):
        expected_out, expected = step(module, x)
        with recorded_backends() as ran:
            out, gradients = step(torch.compile(module, fullgraph=True, backend=compiler), x)
    assert ran == [backend, backend]
    assert out.stride() == expected_out.stride()
    torch.testing.assert_close(out, expected_out, rtol=1e-5, atol=1e-5)
    for got, want in zip(gradients, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "make_layer", [functools.partial(visattn.Attention, normalize="queries"), visattn.ChannelAttention], ids=["queries", "channels"]
)
@pytest.mark.parametrize("memory_format", LAYOUTS, ids=str)
def test_compiled_and_exported_layers_without_kernel(make_layer, memory_format):
    module = make_layer(16)
    x = torch.randn(2, 16, 6, 5).contiguous(memory_format=memory_format).requires_grad_()
    expected_out, expected = step(module, x)
    for compiler in ("inductor", "aot_eager"):
        out, gradients = step(torch.compile(module, fullgraph=True, backend=compiler), x)
        assert out.stride() == expected_out.stride()
        torch.testing.assert_close(out, expected_out, rtol=1e-5, atol=1e-5)
        for got, want in zip(gradients, expected, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    exported = torch.export.export(module, (x.detach(),)).module()
    torch.testing.assert_close(exported(x), expected_out, rtol=1e-5, atol=1e-5)


def test_compiled_without_gradient(backend, place):
    module, x = visattn.Attention(16).to(place), torch.randn(2, 16, 6, 5, device=place)
    with use_backend(backend), torch.no_grad(), recorded_backends() as ran:
        out = torch.compile(module, fullgraph=True, backend="aot_eager")(x)
        assert ran == [backend]
        torch.testing.assert_close(out, module(x), rtol=1e-5, atol=1e-5)


def test_compiled_with_dynamic_shapes():
    module = visattn.Attention(8)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)
    for shape in ((2, 8, 6, 5), (3, 8, 7, 9), (1, 8, 4, 4)):
        x = torch.randn(shape, requires_grad=True)
        torch.testing.assert_close(compiled(x), module(x), rtol=1e-5, atol=1e-5)


def test_compiled_code_notices_another_request():
    """The choice of backend is made when the code is traced; asking for another must not find the old one."""
    place = "cuda" if HAS_GPU else "cpu"
    module, x = visattn.Attention(8).to(place), torch.randn(2, 8, 6, 5, device=place)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    with use_backend("torch"):
        compiled(x)
    if HAS_GPU or INTERPRETING:
        with use_backend("triton"), recorded_backends() as ran:
            compiled(x)
        assert ran == ["triton"]
    else:
        with use_backend("triton"), pytest.raises(Exception, match="backend 'triton' cannot run"):
            compiled(x)


def test_compiled_under_autocast():
    module, x = visattn.Attention(8), torch.randn(2, 8, 6, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = module(x)
        out = torch.compile(module, fullgraph=True, backend="aot_eager")(x)
    assert out.dtype == expected.dtype
    torch.testing.assert_close(out, expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("training", [True, False])
def test_export_runs_the_op(training, backend, place):
    module, x = visattn.Attention(8).to(place).train(training), torch.randn(2, 8, 6, 5, device=place)
    with use_backend(backend):
        program = torch.export.export(module, (x,))
        assert "visattn.self_attention_2d" in program.graph_module.code
        torch.testing.assert_close(program.module()(x), module(x), rtol=1e-5, atol=1e-5)


EXPORTED = {
    "plain": {},
    "thin queries": {"qk_channels": 2, "gamma": 0.5},
    "norm and output projection": {"norm_groups": 2, "out_proj": True},
    "heads": {"num_heads": 2},
    "pooled": {"qk_channels": 2, "value_channels": 4, "pool": 2, "out_proj": True},
}


def exported_for_any_size(module, argument):
    dim = torch.export.Dim
    sizes = {0: dim("maps", min=1, max=64), 2: dim("height", min=4, max=64), 3: dim("width", min=4, max=64)}
    return torch.export.export(module, (torch.randn(3, 8, 6, 5),), dynamic_shapes={argument: sizes})


def exports_for_any_size(module, argument):
    try:
        exported_for_any_size(module, argument)
    except torch._dynamo.exc.UserError:
        return False
    return True


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", EXPORTED.values(), ids=EXPORTED)
def test_exported_program_takes_maps_of_any_size_and_can_be_trained(options, training):
    """From 256 pixels on PyTorch's kernel computes and another tensor is kept: one program does both, exported for training or not."""
    layer = visattn.SelfAttention2d(8, **options)
    if layer.pool > 1 and not exports_for_any_size(torch.nn.MaxPool2d(layer.pool), "input"):
        pytest.skip("this PyTorch exports its own pooling for sizes of one remainder only")
    with torch.set_grad_enabled(training):
        program = exported_for_any_size(layer, "x").module()
    for shape in ((1, 8, 5, 7), (2, 8, 20, 21)):
        x = torch.randn(shape, requires_grad=True)
        got, wanted = program(x), layer(x)
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)
        (d_got,), (d_wanted,) = (torch.autograd.grad(out.square().sum(), x) for out in (got, wanted))
        torch.testing.assert_close(d_got, d_wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", EXPORTED.values(), ids=EXPORTED)
class TestForwardMode:
    """A library op would lose tangents without a word."""

    def test_within_compiled_code(self, options):
        layer, x = visattn.SelfAttention2d(8, **options), torch.randn(1, 8, 4, 4)
        compiled = torch.compile(lambda x: torch.func.jvp(layer, (x,), (x,)), backend="eager")
        with pytest.raises(NotImplementedError, match="forward-mode derivatives"):
            compiled(x)

    def test_around_compiled_code(self, options):
        layer, x = visattn.SelfAttention2d(8, **options), torch.randn(1, 8, 4, 4)
        compiled = torch.compile(layer, backend="eager")
        compiled(x)
        with pytest.raises(NotImplementedError, match="forward-mode derivatives"):
            torch.func.jvp(compiled, (x,), (x,))


@pytest.mark.kernels
@pytest.mark.parametrize("options", EXPORTED.values(), ids=EXPORTED)
class TestTensorsWithoutNumbers:
    """They look like a device's own, and a kernel that was started with their addresses would read from nowhere."""

    def test_fake_tensors(self, options, place):
        layer = visattn.SelfAttention2d(8, **options, device=place)
        with use_backend("triton"), FakeTensorMode(allow_non_fake_inputs=True) as mode, recorded_backends() as ran:
            out = layer(mode.from_tensor(torch.randn(2, 8, 6, 5, device=place)))
        assert isinstance(out, FakeTensor)
        assert out.shape == (2, 8, 6, 5)
        assert ran == []

    def test_make_fx_records_the_op(self, options, place):
        layer, x = visattn.SelfAttention2d(8, **options, device=place), torch.randn(2, 8, 6, 5, device=place)
        with use_backend("triton"), torch.no_grad():
            graph = make_fx(layer)(x)
            assert "visattn." in graph.code
            y = torch.randn_like(x)
            torch.testing.assert_close(graph(y), layer(y), rtol=1e-4, atol=1e-5)


def op_arguments(place, memory_format, *, optional: bool, requires_grad: bool) -> tuple:
    p = make_problem((2, 8, 4, 3), bias=optional, gamma=optional).to(place)
    x = p.x.contiguous(memory_format=memory_format)
    tensors = (x, p.w_q, p.b_q, p.w_k, p.b_k, p.w_v, p.b_v, p.gamma)
    return tuple(t if t is None else t.detach().requires_grad_(requires_grad) for t in tensors)


@pytest.mark.parametrize("options", [{}, {"qk_channels": 1}, {"num_heads": 2}, {"norm_groups": 2, "out_proj": True}], ids=str)
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.trace.*:DeprecationWarning")
def test_traced_layer_is_the_eager_layer(options, backend, place):
    """On maps of any size and number, and in training: a trace would not see what runs outside of PyTorch's operators."""
    layer = visattn.SelfAttention2d(8, **options, device=place)
    x = torch.randn(3, 8, 2, 5, device=place, requires_grad=True)
    with use_backend(backend):
        traced = torch.jit.trace(layer, (torch.randn(1, 8, 3, 3, device=place),))
        got, wanted = traced(x), layer(x)
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)
        leaves = [x, layer.conv_query.weight, layer.conv_value.bias]
        for a, b in zip(torch.autograd.grad(got.sum(), leaves), torch.autograd.grad(wanted.sum(), leaves), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("memory_format", LAYOUTS, ids=str)
@pytest.mark.parametrize("optional", [True, False], ids=["all parameters", "weights only"])
@pytest.mark.parametrize("normalize", ["keys", "queries"])
class TestOpcheck:
    @pytest.fixture(autouse=True)
    def _only_what_there_is(self, normalize, backend):
        if (normalize, backend) == ("queries", "triton"):
            pytest.skip("softmax over the queries has no kernel")

    def test_forward(self, memory_format, optional, normalize, backend, place):
        arguments = op_arguments(place, memory_format, optional=optional, requires_grad=True)
        torch.library.opcheck(ops.self_attention_2d, (*arguments, 0.3, True, normalize, backend, True))

    def test_forward_that_saves_nothing(self, memory_format, optional, normalize, backend, place):
        arguments = op_arguments(place, memory_format, optional=optional, requires_grad=False)
        torch.library.opcheck(ops.self_attention_2d, (*arguments, 0.3, False, normalize, backend, False))

    @pytest.mark.parametrize("need", [(True, True), (True, False), (False, True)])
    def test_backward(self, need, memory_format, optional, normalize, backend, place):
        x, *weights = op_arguments(place, memory_format, optional=optional, requires_grad=False)
        _, y, lse = ops.self_attention_2d(x, *weights, 0.3, True, normalize, backend, True)
        tensors = (torch.randn_like(x), x, *weights, y, lse)
        torch.library.opcheck(ops.self_attention_2d_backward, (*tensors, 0.3, True, normalize, backend, *need))


@pytest.mark.parametrize("normalize", ["keys", "queries"])
def test_second_derivative_of_the_op(normalize):
    p = make_problem((2, 3, 3, 2), torch.float64, regime="peaked")
    leaves = [t.requires_grad_() for t in (p.x, p.w_q, p.b_q, p.w_k, p.b_k, p.w_v, p.b_v, p.gamma)]

    def op(x, *weights):
        return ops.self_attention_2d(x, *weights, 0.5, True, normalize, "torch", True)[0]

    assert torch.autograd.gradcheck(op, leaves)
    assert torch.autograd.gradgradcheck(op, leaves)


def test_op_and_eager_give_the_same_bits():
    p = make_problem((2, 8, 4, 3))
    leaves = [t.requires_grad_() for t in (p.x, p.w_q, p.b_q, p.w_k, p.b_k, p.w_v, p.b_v, p.gamma)]
    x, *weights = leaves
    op = ops.self_attention_2d(x, *weights, 8**-0.5, True, "keys", "torch", True)[0]
    eager = functional.self_attention_2d(x, p.w_q, p.w_k, p.w_v, p.b_q, p.b_k, p.b_v, gamma=p.gamma, backend="torch")
    assert torch.equal(op, eager)
    for a, b in zip(torch.autograd.grad(op, leaves, p.d_out), torch.autograd.grad(eager, leaves, p.d_out), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("sdpa", [False, True])
def test_ops_do_not_heed_autocast(sdpa, monkeypatch):
    """Their operands have the dtype they are to be computed in; autocast would round the sums inside (pytorch#87979).

    It heeds `scaled_dot_product_attention`, which a GPU takes, but not products into a buffer.
    """
    monkeypatch.setattr(torch_attention, "sdpa_takes", lambda tokens: sdpa)
    x, *weights = op_arguments("cpu", torch.contiguous_format, optional=True, requires_grad=False)
    q, k, v, g = (torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(seed)) for seed in range(4))

    def everything():
        out, y, lse = ops.self_attention_2d(x, *weights, 0.3, True, "keys", "torch", True)
        y_of_tokens, lse_of_tokens = ops.token_attention(q, k, v, None, 0.3, "torch")
        gradients = ops.self_attention_2d_backward(torch.ones_like(x), x, *weights, y, lse, 0.3, True, "keys", "torch", True, True)
        return out, y_of_tokens, *gradients, *ops.token_attention_backward(g, q, k, v, y_of_tokens, lse_of_tokens, 0.3, "torch")

    expected = everything()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = everything()
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
def test_cuda_graph_replays_the_layer():
    assert HAS_GPU
    module, x = visattn.Attention(64).cuda().half(), torch.randn(4, 64, 16, 16, device="cuda", dtype=torch.half)
    with use_backend("triton"), torch.no_grad():
        module(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = module(x)
        x.copy_(torch.randn_like(x))
        graph.replay()
        assert torch.equal(out, module(x))
