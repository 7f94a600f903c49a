"""What `patch_model` sees of a block, and what it leaves behind: nothing."""

import copy
from collections import deque

import pytest
import torch
from torch import nn
from torch.nn.functional import avg_pool2d, relu
from torch.utils.checkpoint import checkpoint

import visattn

from .foreign_blocks import C, CrissCross, Edm, Fastai, GuidedDiffusion, NonLocal, Sagan, Vqgan, attend, pointwise


def make_map(*shape: int) -> torch.Tensor:
    return torch.randn(shape or (2, C, 6, 4), generator=torch.Generator().manual_seed(1))


def reason_of(block: nn.Module) -> str:
    """Why the block is left; the good one beside it is not."""
    report = visattn.patch_model(nn.ModuleDict({"good": Sagan(C), "bad": block}))
    assert report.replaced == ["good"], str(report)
    return dict(report.skipped)["bad"]


class Recording(Sagan):
    """Keeps its matrices, in whatever an attribute may be."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.maps, self.recent, self.nested, self.shapes = [], deque(maxlen=3), {"maps": ([], {})}, {(6, 4)}
        self.count = torch.zeros(())

    def branch(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        branch, weights = super().branch(x)
        self.maps.append(weights)
        self.recent.append(weights)
        self.nested["maps"][0].append(weights)
        self.nested["maps"][1]["last"] = weights
        self.shapes.add(tuple(weights.shape))
        self.count += 1
        return branch, weights


def everything(block: nn.Module) -> list:
    """What each module of the block holds under which name, tensors with their contents."""
    held = []
    for name, module in block.named_modules(remove_duplicate=False):
        for key, value in (module.__dict__ | module._parameters | module._buffers | module._modules).items():
            held.append((name, key, id(value), value.tolist() if isinstance(value, torch.Tensor) else repr(value)))
    return held


def sharing(block: nn.Module) -> nn.Module:
    block.key_conv = block.query_conv
    return block


BLOCKS_THAT_REMEMBER = {
    "a sub-module under two names": lambda: sharing(Sagan(C)),
    "one with spectral norm": lambda: copy_query(Fastai(C)),
    "under two names, and left": lambda: sharing(Sagan(C, matrix=True)),
    "containers": lambda: Recording(C),
}


def copy_query(block: Fastai) -> Fastai:
    block.key = block.query
    return block


@pytest.mark.parametrize("name", BLOCKS_THAT_REMEMBER)
def test_a_block_is_left_as_it_was(name):
    """To the bit and to the object, whether it is replaced or not."""
    block = BLOCKS_THAT_REMEMBER[name]()
    before = everything(block)
    visattn.patch_model(block)
    visattn.unpatch_model(block)
    assert everything(block) == before


def test_a_sub_module_under_two_names_is_read_twice():
    block, x = sharing(Sagan(C)), make_map()
    expected = block(x)
    assert visattn.patch_model(block).replaced == [""]
    torch.testing.assert_close(block(x), expected)


class Storing(Vqgan):
    def forward(self, x):
        out = super().forward(x)
        self.last = out.detach()
        return out


class Counting(Vqgan):
    def forward(self, x):
        self.q.calls = getattr(self.q, "calls", 0) + 1
        return super().forward(x)


class Remembering(Vqgan):
    """Once, what does not change afterwards."""

    def forward(self, x):
        self.scale = x.shape[1] ** -0.5
        self.cache = getattr(self, "cache", None) or [self.scale]
        return super().forward(x)


@pytest.mark.parametrize(("make", "attributes"), [(Storing, "last"), (Counting, "q.calls"), (Recording, "maps, nested, recent")])
def test_what_a_forward_pass_sets_would_stay_as_it_is(make, attributes):
    assert f"sets {attributes}, which" in reason_of(make(C))


def test_what_is_set_to_the_same_is_no_reason():
    assert visattn.patch_model(Remembering(C)).replaced == [""]


class PositiveGain(Sagan):
    def forward(self, x):
        return x + relu(self.gamma) * self.branch(x)[0].view_as(x)


class PooledWhereLarge(Sagan):
    def branch(self, x):
        small = x if x.shape[2:].numel() <= 1024 else avg_pool2d(x, 2)
        return attend(self.query_conv(x).flatten(2), self.key_conv(small).flatten(2), self.value_conv(small).flatten(2))


@pytest.mark.parametrize("make", [PositiveGain, PooledWhereLarge])
def test_what_shows_under_other_signs_and_sizes_only(make):
    assert "something else" in reason_of(make(C))


class SwitchedOff(Sagan):
    def forward(self, x):
        return x


def without_gain(block: Sagan) -> Sagan:
    del block.gamma
    block.register_buffer("gamma", torch.zeros(1))
    return block


@pytest.mark.parametrize("make", [lambda: SwitchedOff(C), lambda: without_gain(CrissCross(C))], ids=["switched off", "no gain"])
def test_a_block_that_does_nothing_shows_nothing(make):
    """A factor that is no parameter is what it is, and may change later."""
    assert "no attention shows" in reason_of(make())


class DetachedBranch(Sagan):
    def branch(self, x):
        return super().branch(x.detach())


class DetachedWeights(Sagan):
    def branch(self, x):
        weights = super().branch(x)[1].detach()
        return self.value_conv(x).flatten(2) @ weights.mT, weights


class DetachedGain(Sagan):
    def forward(self, x):
        return x + self.gamma.detach() * self.branch(x)[0].view_as(x)


class WithoutGradient(Sagan):
    @torch.no_grad()
    def forward(self, x):
        return super().forward(x)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("make", [DetachedBranch, DetachedWeights, DetachedGain, WithoutGradient])
def test_another_gradient_is_a_reason(make, frozen):
    assert "another gradient" in reason_of(make(C).requires_grad_(not frozen))


class Checkpointed(GuidedDiffusion):
    """Computes once more in the backward pass, when nobody but the block knows its parameters."""

    use_reentrant = False

    def forward(self, x):
        return checkpoint(super().forward, x, use_reentrant=self.use_reentrant)


class CheckpointedAtOnce(Checkpointed):
    use_reentrant = True


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
@pytest.mark.parametrize("make", [Checkpointed, CheckpointedAtOnce])
def test_a_checkpoint_has_the_same_gradient(make):
    assert visattn.patch_model(make(C)).replaced == [""]


def test_hooks_that_look_at_gradients_see_none_of_the_probe():
    block, seen = NonLocal(C), []
    for module in (block, block.W[1]):
        module.register_full_backward_hook(lambda *_: seen.append("gradient"))
        module.register_full_backward_pre_hook(lambda *_: seen.append("gradient"))
    next(block.parameters()).register_hook(lambda _: seen.append("parameter"))
    assert visattn.patch_model(block).replaced == [""]
    assert not seen
    assert all(parameter.grad is None for parameter in block.parameters())


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_gradients_are_seen_wherever_a_model_is_patched(context):
    block = DetachedBranch(C)
    with context():
        assert visattn.patch_model(Sagan(C)).replaced == [""]
        assert "another gradient" in reason_of(block)


class Normed(Vqgan):
    """VQGAN's, with whatever in the place of its norm."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__(C)
        self.norm = norm


class OwnLayerNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.g = nn.Parameter(torch.ones(C, 1, 1))

    def forward(self, x):
        return self.g * (x - x.mean(1, keepdim=True))


class NormAndMore(nn.GroupNorm):
    def forward(self, x):
        return relu(super().forward(x))


class SingleNorm(nn.GroupNorm):
    """Computes in fp32 whatever it is given."""

    def forward(self, x):
        return super().forward(x.float()).type(x.dtype)


NORMS = {
    "norm is a BatchNorm2d": lambda: nn.BatchNorm2d(C),
    "norm is a InstanceNorm2d": lambda: nn.InstanceNorm2d(C),
    "norm is a SyncBatchNorm": lambda: nn.SyncBatchNorm(C),
    "norm is a Identity": nn.Identity,
    "norm is a OwnLayerNorm": OwnLayerNorm,
    "norm is a LayerNorm": lambda: nn.LayerNorm(10),
    "norm is a Sequential": lambda: nn.Sequential(nn.GroupNorm(4, C)),
    "something else": lambda: NormAndMore(4, C),
}


@pytest.mark.parametrize("reason", NORMS)
def test_another_norm_is_a_reason(reason):
    """Once all of the model was left with an error."""
    assert reason in reason_of(Normed(NORMS[reason]()))


@pytest.mark.parametrize("affine", [False, True])
def test_group_norms_of_any_kind_are_known(affine):
    assert visattn.patch_model(Normed(SingleNorm(4, C, affine=affine))).replaced == [""]


@pytest.mark.parametrize("heads", [0, None, "2", -1, 2.0, 3, 64])
def test_numbers_of_heads_that_are_none(heads):
    block = Edm(C)
    block.num_heads = heads
    assert f"its num_heads is {heads!r}" in reason_of(block)


@pytest.mark.parametrize("name", ["skip_scale", "in_channels"])
def test_a_larger_block_without_what_is_known_of_it(name):
    block = Edm(C)
    delattr(block, name)
    assert f"its {name} is None" in reason_of(block)


def test_a_larger_block_whose_vector_goes_through_something_else():
    block = Edm(C)
    block.affine = nn.Sequential(nn.Linear(5, C))
    assert "its affine is a Sequential" in reason_of(block)


def test_quantised_layers_are_named_with_their_module():
    qat = pytest.importorskip("torch.ao.nn.qat", reason="needs torch.ao")
    block = Sagan(C)
    block.query_conv = qat.Conv2d(C, 2, 1, qconfig=torch.ao.quantization.get_default_qat_qconfig("fbgemm"))
    assert "query_conv is a torch.ao.nn.qat.modules.conv.Conv2d, which computes in a way of its own" in reason_of(block)


class Standardised(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight - weight.mean(), bias)


def test_a_convolution_that_computes_in_a_method_of_its_own():
    block = Sagan(C)
    block.query_conv = Standardised(C, 2, 1)
    assert "query_conv is a Standardised, which computes in a way of its own" in reason_of(block)


def test_wide_blocks_are_seen_as_well():
    """Logits of a large spread, and sums of many numbers."""
    model = nn.Sequential(Sagan(256), Vqgan(512))
    assert visattn.patch_model(copy.deepcopy(model)).replaced == ["0", "1"]


def test_a_gain_of_any_shape():
    block = Sagan(C)
    block.gamma = nn.Parameter(torch.full((1, 1, 1, 1), 0.6))
    assert visattn.patch_model(block).replaced == [""]
    block.query_conv = pointwise(C, 2, bias=False)
    assert block(make_map()).shape == (2, C, 6, 4)
