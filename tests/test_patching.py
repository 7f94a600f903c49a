"""Other people's attention blocks, patched in place: the same results, and nothing else changed."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

import visattn
from visattn import use_backend

from .foreign_blocks import (
    BLOCKS,
    BigGAN,
    C,
    CCNet,
    ChannelGram,
    CrissCross,
    DotProduct,
    Edm,
    Fastai,
    LinearAttention,
    Lucidrains,
    NonLocal,
    Sagan,
    TimmAttention,
    Vqgan,
    pointwise,
)
from .oracle import recorded_backends

SHAPE = (2, C, 6, 4)


def make(name: str, seed: int = 0) -> nn.Module:
    """A block whose estimates of spectral norms have come near."""
    torch.manual_seed(seed)
    block = BLOCKS[name]().double()
    with torch.no_grad():
        for _ in range(5):
            block(make_map())
    return block


def make_map(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape or SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def results(module: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """The output, and what a pass forward and back leaves behind, by name."""
    x = x.clone().requires_grad_()
    out = module(x)
    module.zero_grad()
    out.backward(make_map(*out.shape, seed=2))
    found = {"out": out.detach(), "x": x.grad} | {f"gradient of {name}": p.grad for name, p in module.named_parameters() if p.requires_grad}
    return found | {name: buffer.clone() for name, buffer in module.named_buffers()}


def assert_same(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Sums that cancel to zero, such as the gradient of a bias before BatchNorm, are judged by what was summed: the largest number here."""
    assert actual.keys() == expected.keys()
    atol = 1e-13 * max(t.abs().max().item() for t in expected.values() if t.is_floating_point() and t.numel())
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, rtol=1e-11, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


def patched(module: nn.Module, **options: str) -> visattn.PatchReport:
    """Patches a module that is a block itself, and makes sure that it was replaced."""
    report = visattn.patch_model(module, **options)
    assert report.replaced == [""], str(report)
    return report


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("name", BLOCKS)
def test_output_and_every_gradient_are_the_blocks_own(name, training):
    """Running statistics and the vectors of spectral norm move alike, too."""
    block = make(name).train(training)
    original = copy.deepcopy(block)
    patched(block)
    for seed in (1, 3):
        x = make_map(seed=seed)
        assert_same(results(block, x), results(original, x))


@pytest.mark.parametrize("odd", [(2, C, 5, 7), (1, C, 1, 3), (0, C, 4, 4)])
def test_other_sizes(odd):
    block = make("non-local, plain")
    original, x = copy.deepcopy(block), make_map(*odd)
    patched(block)
    torch.testing.assert_close(block(x), original(x))


@pytest.mark.parametrize("shape", [(2, C, 7), (2, C, 3, 2, 2)])
def test_tokens_that_are_no_map(shape):
    block = make("guided-diffusion")
    original, x = copy.deepcopy(block), make_map(*shape)
    patched(block)
    torch.testing.assert_close(block(x), original(x))


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_attention_at_the_end_of_a_larger_block(training):
    """The rest of the block is its own, dropout with the same random numbers included."""
    torch.manual_seed(0)
    block = Edm(C).double().train(training)
    original, x, emb = copy.deepcopy(block), make_map(2, C // 2, 5, 4), make_map(2, 5)
    patched(block)
    for other in (block, pickle.loads(pickle.dumps(block)), copy.deepcopy(block)):
        found = []
        for model in (other, original):
            torch.manual_seed(1)
            out = model(x, emb)
            found.append([out, *torch.autograd.grad(out.square().sum(), list(model.parameters()))])
        torch.testing.assert_close(*found, rtol=1e-10, atol=1e-11)
    seen: list = []
    block.conv0.register_forward_hook(lambda module, inputs, out: seen.append(out))  # it is still called
    block(x, emb)
    assert len(seen) == 1
    assert visattn.unpatch_model(block) == [""]
    assert (type(block), block.num_heads) == (Edm, 2)


def test_blocks_that_are_copied_in_a_way_of_their_own():
    """As classes that keep their source code in pickles."""
    block, x = OwnReduction(C).double(), make_map()
    patched(block)
    expected = block(x)
    for other in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        torch.testing.assert_close(other(x), expected)
        assert visattn.unpatch_model(other) == [""]
        assert type(other) is OwnReduction


class OwnReduction(Sagan):
    def __reduce__(self):
        return _remade, (C, self.__dict__)


def _remade(channels: int, attributes: dict) -> nn.Module:
    block = OwnReduction(channels)
    block.__dict__.update(attributes)
    return block


@pytest.mark.parametrize("name", ["SAGAN", "guided-diffusion", "non-local", "fastai"])
def test_where_a_patched_block_looks(name):
    """Row by row what the block's own matrix says; asking moves no estimate of a spectral norm."""
    block = Sagan(C, matrix=True).double() if name == "SAGAN" else make(name)
    x, pixels = make_map(), torch.tensor([[0, 0], [5, 3], [2, 1]])
    patched(block, attention_maps="skip")
    before = {key: tensor.clone() for key, tensor in block.state_dict().items()}
    rows = visattn.attention_rows(block, x, pixels)
    torch.testing.assert_close(rows.sum((2, 3)), torch.ones(2, 3, dtype=torch.float64))
    assert "runs on the PyTorch path" in visattn.explain(block, x)
    assert block.training
    assert all(torch.equal(tensor, before[key]) for key, tensor in block.state_dict().items())
    if name == "SAGAN":
        matrix = Sagan.branch(block, x)[1]
        torch.testing.assert_close(rows.flatten(2), matrix[:, pixels[:, 0] * 4 + pixels[:, 1]])


@pytest.mark.parametrize("name", ["DANet", "CCNet"])
def test_runs_on_the_backend_that_is_asked_for(name, backend, place):
    """The probe does not: it is PyTorch on the CPU wherever the model is going to run."""
    block = make(name).float().eval()
    original, x = copy.deepcopy(block).double(), make_map()
    with use_backend(backend), recorded_backends() as ran:
        patched(block)
        ran.clear()
        block.to(place)
        if name == "CCNet" and backend == "triton":
            with pytest.raises(RuntimeError, match="softmax over the queries has no kernel"):
                block(x.float().to(place))
            return
        out = block(x.float().to(place))
    assert ran == [backend]
    torch.testing.assert_close(out.cpu().double(), original(x), rtol=1e-5, atol=1e-5)


LOOKALIKES = {
    "criss-cross": (lambda: CrissCross(C), "criss-cross attention has the same parameters"),
    "dot product": (lambda: DotProduct(C), "no softmax"),
    "linear attention": (lambda: LinearAttention(C), "linear attention"),
    "memory": (lambda: Lucidrains(C, memory=True), "further parameters: mem_kv"),
    "channels": (ChannelGram, "attends over channels"),
    "dropout": (lambda: TimmAttention(C, dropout=0.1), "attn_drop drops attention weights at random"),
    "3×3 convolution": (lambda: replaced("key_conv", nn.Conv2d(C, 2, 3, padding=1)), "key_conv is not a 1×1 convolution"),
    "groups": (lambda: replaced("value_conv", nn.Conv2d(C, C, 1, groups=2)), "value_conv is not a 1×1 convolution"),
    "own layer": (lambda: replaced("query_conv", type("Odd", (nn.Conv2d,), {"forward": lambda s, x: -x})(C, 2, 1)), "query_conv is a Odd"),
    "norm inside": (lambda: replaced("key_conv", nn.Sequential(pointwise(C, 2), nn.BatchNorm2d(2))), "key_conv holds a BatchNorm2d"),
    "activation": (lambda: replaced("key_conv", nn.Sequential(pointwise(C, 2), nn.ReLU())), "key_conv holds a ReLU"),
}


def replaced(name: str, module: nn.Module) -> nn.Module:
    block = Sagan(C)
    setattr(block, name, module)
    return block


@pytest.mark.parametrize("name", LOOKALIKES)
def test_lookalikes_stay_with_the_reason(name):
    make_block, reason = LOOKALIKES[name]
    model = nn.Sequential(make_block())
    forward = type(model[0]).forward
    report = visattn.patch_model(model)
    assert not report.replaced
    assert reason in dict(report.skipped)["0"]
    assert type(model[0]).forward is forward


def test_softmax_over_the_queries_is_found_out():
    """CCNet's block has DANet's parameters."""
    same, other = Sagan(C), CCNet(C)
    assert "queries" not in patched(same).notes[""]
    assert "softmax over the queries" in patched(other).notes[""]


def test_a_query_called_key_is_found_out():
    assert "query and key exchanged" in patched(Fastai(C)).notes[""]


def test_blocks_that_show_nothing_at_first_are_told_apart():
    """γ = 0, or zeros in the last projection: the block's own parameters would hide any difference."""
    block, other = Sagan(C), CrissCross(C)
    block.gamma.data.zero_()
    other.gamma.data.zero_()
    model = nn.Sequential(block, other)
    assert visattn.patch_model(model).replaced == ["0"]
    assert model[0].gamma.item() == 0


def test_attention_matrix_is_kept_unless_told_otherwise():
    block = Sagan(C, matrix=True).double()
    original, x = copy.deepcopy(block), make_map()
    report = visattn.patch_model(block)
    assert report.replaced == []
    assert 'attention_maps="skip"' in dict(report.skipped)[""]
    patched(block, attention_maps="skip")
    out, matrix = block(x)
    assert matrix is None
    torch.testing.assert_close(out, original(x)[0])


def test_further_arguments_are_refused_unless_they_ask_for_nothing():
    block = NonLocal(C).double()
    patched(block)
    block(make_map(), return_matrix=False)
    with pytest.raises(TypeError, match="takes a map alone"):
        block(make_map(), return_matrix=True)


class NamedInput(Sagan):
    def forward(self, input):
        return super().forward(input)


def test_the_map_goes_by_the_name_that_it_had():
    block, x = NamedInput(C).double(), make_map()
    expected = block(input=x)
    patched(block)
    for other in (block, copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        torch.testing.assert_close(other(input=x), expected)
        torch.testing.assert_close(other(x), expected)
        with pytest.raises(TypeError, match=r"takes a map alone, got 0 positional arguments and \['y'\]"):
            other(y=x)
        with pytest.raises(TypeError, match=r"takes a map alone, got 1 positional arguments and \['input'\]"):
            other(x, input=x)


def test_a_larger_block_takes_its_inputs_by_their_names():
    block, x, emb = Edm(C).double().eval(), make_map(2, C // 2, 5, 4), make_map(2, 5)
    expected = block(x, emb)
    patched(block)
    torch.testing.assert_close(block(emb=emb, x=x), expected)


def memory_of(module: nn.Module) -> list:
    """Everything a module and its sub-modules hold, with the tensors' contents."""
    return [
        (
            name,
            type(m),
            {k: (v, v.clone() if isinstance(v, torch.Tensor) else v) for k, v in (m.__dict__ | m._parameters | m._buffers).items()},
        )
        for name, m in module.named_modules()
    ]


@pytest.mark.parametrize("name", ["DANet", "fastai", "BigGAN", "non-local", "guided-diffusion"])
def test_patching_and_unpatching_leave_everything_bit_for_bit(name):
    model = nn.Sequential(make(name), nn.Dropout(0.5))
    model[0](make_map()).sum().backward()  # running statistics, hooks' own weights, gradients
    model[0].eval()
    before, generator = memory_of(model), torch.get_rng_state()
    visattn.patch_model(model)
    assert torch.equal(torch.get_rng_state(), generator)
    assert visattn.unpatch_model(model) == ["0"]
    after = memory_of(model)
    for (_, kind, attributes), (_, kind_after, attributes_after) in zip(before, after, strict=True):
        assert kind is kind_after
        assert attributes.keys() == attributes_after.keys()
        for key, (value, copied) in attributes.items():
            assert attributes_after[key][0] is value
            assert not isinstance(value, torch.Tensor) or torch.equal(value, copied), key


def test_context_manager_patches_within_its_block_only():
    model = nn.Sequential(Sagan(C), nn.ReLU(), BigGAN(C))
    with visattn.patch_model(model) as report:
        assert report.replaced == ["0", "2"]
        assert dict(visattn.patch_model(model).skipped) == {"0": "it runs on visattn already", "2": "it runs on visattn already"}
        assert isinstance(model[0], Sagan)
        assert type(model[0]) is not Sagan
    assert type(model[0]) is Sagan
    assert visattn.unpatch_model(model) == []


def test_report_reads_well():
    text = str(visattn.patch_model(nn.Sequential(Sagan(C), CrissCross(C))))
    assert text.startswith(
        "1 attention block on visattn, 1 left as before\n  0: SAGAN / DANet / CCNet, 1 head, scale 1\n  1 left: it computes"
    )


def test_visattns_own_layers_are_not_its_business():
    report = visattn.patch_model(nn.Sequential(visattn.Attention(4), nn.MultiheadAttention(8, 2)))
    assert (report.replaced, report.skipped) == ([], [])


@pytest.mark.parametrize(("model", "maps", "error"), [(object(), "keep", TypeError), (nn.ReLU(), "drop", ValueError)])
def test_bad_arguments(model, maps, error):
    with pytest.raises(error):
        visattn.patch_model(model, attention_maps=maps)


@pytest.mark.parametrize("name", ["DANet", "fastai", "VQGAN"])
def test_copies_and_pickles_are_patched_too(name):
    block, x = make(name), make_map()
    patched(block)
    expected = copy.deepcopy(block)(x)
    for other in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        assert type(other) is type(block)
        assert visattn.unpatch_model(copy.deepcopy(other)) == [""]
        torch.testing.assert_close(other(x), expected)
        for (_, mine), (_, theirs) in zip(block.named_parameters(), other.named_parameters(), strict=True):
            assert mine is not theirs
        with torch.no_grad():
            next(other.parameters()).mul_(2.0)  # a copy reads its own parameters
        assert not torch.allclose(other(x), expected)


def replica_of(model: nn.Module) -> nn.Module:
    """As `torch.nn.parallel.replicate` makes them: parameters and buffers are plain attributes of copies of the modules."""
    replicas = {module: module._replicate_for_data_parallel() for module in model.modules()}
    for module, replica in replicas.items():
        for name, child in module._modules.items():
            setattr(replica, name, replicas[child])
        for held, of_replica in ((module._parameters, replica._parameters), (module._buffers, replica._buffers)):
            of_replica.update({name: None for name, tensor in held.items() if tensor is None})
            replica.__dict__.update({name: tensor.clone() for name, tensor in held.items() if tensor is not None})
    return replicas[model]


@pytest.mark.parametrize("name", [*BLOCKS, "EDM"])
def test_replicas_read_their_own_parameters(name):
    """`nn.DataParallel` copies attributes and keeps classes: a forward attribute would read the first device's parameters."""
    block, inputs = (make(name), (make_map(),)) if name != "EDM" else (Edm(C).double(), (make_map(2, C // 2, 5, 4), make_map(2, 5)))
    block.eval()
    original = copy.deepcopy(block)
    patched(block)
    replica, expected = replica_of(block), replica_of(original)
    torch.testing.assert_close(replica(*inputs), expected(*inputs))
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.zero_()
    torch.testing.assert_close(replica(*inputs), expected(*inputs))


def test_state_dicts_go_in_and_out():
    block, other = make("non-local"), make("non-local", seed=5)
    keys = list(block.state_dict())
    patched(block)
    assert list(block.state_dict()) == keys
    block.load_state_dict(other.state_dict())
    torch.testing.assert_close(block.eval()(make_map()), other.eval()(make_map()))


def test_hooks_on_a_block_stay():
    block, seen = make("DANet"), []
    block.register_forward_hook(lambda module, inputs, out: seen.append(out))
    patched(block)
    assert not seen
    out = block(make_map())
    assert seen == [out]


@pytest.mark.parametrize("name", ["key_conv", "softmax"])
def test_hooks_that_would_see_nothing_are_no_secret(name):
    block = Sagan(C).double()
    block.softmax = nn.Softmax(-1)
    handle = block.get_submodule(name).register_forward_hook(lambda *_: None)
    assert f"{name} has hooks" in dict(visattn.patch_model(block).skipped)[""]
    handle.remove()
    patched(block)
    block.get_submodule(name).register_forward_hook(lambda *_: None)
    with pytest.raises(RuntimeError, match=f"{name} has hooks"):
        block(make_map())


def test_hooks_behind_the_output_projection_run():
    block, seen = make("non-local"), []
    block.W[1].register_forward_hook(lambda module, inputs, out: seen.append(out))
    patched(block)
    assert not seen
    block(make_map())
    assert len(seen) == 1


def test_a_layer_that_is_replaced_later_raises():
    """As when low-rank adapters are put around a patched block's projections."""
    block = Sagan(C).double()
    patched(block)
    block.query_conv = type("Adapter", (nn.Conv2d,), {"forward": lambda self, x: super().forward(x) + 1})(C, 2, 1)
    with pytest.raises(RuntimeError, match="query_conv is a Adapter"):
        block(make_map())


def test_a_wrapper_that_passes_questions_on_is_no_block():
    model = nn.Sequential(torch.compile(Sagan(C).double(), backend="eager"))
    inner, x = model[0]._orig_mod, make_map()
    expected = model(x)
    assert visattn.patch_model(model).replaced == ["0._orig_mod"]
    assert visattn.explain(inner, x)
    torch.testing.assert_close(model(x), expected)


def test_half_precision_with_a_norm_in_single():
    """Those who compute in half precision keep the norm's weights in fp32."""
    block = make("VQGAN").to(torch.bfloat16)
    block.norm.float()
    patched(block)
    out = block(make_map().to(torch.bfloat16))
    assert out.dtype == torch.bfloat16
    original = make("VQGAN")
    patched(original)
    torch.testing.assert_close(out.double(), original(make_map()), rtol=0.1, atol=0.1)


def test_parametrising_a_patched_block_itself_has_to_be_undone_first():
    block = Sagan(C)
    patched(block)
    torch.nn.utils.parametrize.register_parametrization(block, "gamma", nn.Identity())
    with pytest.raises(RuntimeError, match="changed its class"):
        visattn.unpatch_model(block)
    torch.nn.utils.parametrize.remove_parametrizations(block, "gamma")
    assert visattn.unpatch_model(block) == [""]


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("normalise", [spectral_norm, weight_norm, parametrizations.spectral_norm, parametrizations.weight_norm])
def test_weights_that_are_made_in_every_pass(normalise):
    def make_block() -> nn.Module:
        torch.manual_seed(0)
        block = Vqgan(C)
        for name in ("q", "k", "v", "proj_out"):
            normalise(getattr(block, name))
        return block.double()

    block, original, x = make_block(), make_block(), make_map()
    patched(block)
    for _ in range(2):
        assert_same(results(block, x), results(original, x))


def test_pruned_norms():
    block, original = make("VQGAN"), make("VQGAN")
    for module in (block, original):
        prune.l1_unstructured(module.norm, "weight", 0.5)
    patched(block)
    for module in (block, original):
        module.norm.weight_orig.data.mul_(2.0)  # as a step of an optimiser would
    assert_same(results(block, make_map()), results(original, make_map()))


class Discriminator(nn.Module):
    """SAGAN's in small."""

    def __init__(self, normalise) -> None:
        super().__init__()
        self.before = normalise(nn.Conv2d(3, C, 4, 2, 1))
        self.attention = Sagan(C, matrix=True)
        for name in ("query_conv", "key_conv", "value_conv"):
            normalise(getattr(self.attention, name))
        self.after = normalise(nn.Conv2d(C, 1, 4))

    def forward(self, x):
        out, _ = self.attention(torch.tanh(self.before(x)))
        return self.after(out).flatten()


@pytest.mark.parametrize("normalise", [spectral_norm, parametrizations.spectral_norm])
def test_gradient_penalty_of_a_discriminator(normalise):
    torch.manual_seed(0)
    ours = Discriminator(normalise).double()
    theirs = copy.deepcopy(ours)
    assert visattn.patch_model(ours, attention_maps="skip").replaced == ["attention"]
    images = make_map(2, 3, 12, 12)
    for _ in range(2):
        found = []
        for model in (ours, theirs):
            x = images.clone().requires_grad_()
            (gradient,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
            penalty = 10 * ((gradient.flatten(1).norm(dim=1) - 1) ** 2).mean()
            penalty.backward()
            found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None} | dict(model.named_buffers()))
            found[-1]["penalty"] = penalty.detach()
        ours_found, theirs_found = found
        assert_same({name: ours_found.get(name, torch.zeros_like(t)) for name, t in theirs_found.items()}, theirs_found)


@pytest.mark.parametrize("name", ["fastai", "non-local", "guided-diffusion"])
def test_compiles_without_a_graph_break(name):
    block = make(name).eval()
    x = make_map()
    expected = block(x)
    patched(block)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected)
