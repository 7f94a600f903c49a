"""Measures the CIFAR models: a forward pass and a whole training step, with each kind of attention."""

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch
from torch import Tensor, nn

from visattn import models
from visattn.device import float32_precision

from . import problems, timing
from .cases import ModelCase
from .layers import How, failure_as_row, of_failure, timed_rows
from .providers import noted_backends
from .rows import CANNOT_RUN, WRONG, Row

SAME_FUNCTION = ("naive", "fused", "sdpa")
"""Kinds of attention that compute the same: what is right for them is the naive one in float64."""

CLASSES = 10
IMAGES_CHECKED = 4


def kinds_of(model: str) -> list[str | None]:
    """The kinds of attention that a model can have, naive first; None alone where it has none."""
    return [*sorted(models.attentions(model), key=lambda kind: kind != "naive")] or [None]


def measure_model(case: ModelCase, names: list[str], how: How) -> Iterator[Row]:
    """The rows of the kinds of attention with these providers' names. naive always runs, to compare with."""
    with float32_precision(case.tf32):
        images, labels = _batch(case, how.device)
        naive_errors: dict[str, float] = {}
        naive_call = None
        for kind in kinds_of(case.model):
            if kind != "naive" and provider(kind) not in names:
                continue
            row = Row(
                case.suite, str(case), provider(kind), how.executions[0], case.model, [case.batch, *images.shape[1:]], case.dtype,
                case.tf32, case.mode, CANNOT_RUN, size=how.size, environment=how.environment,
            )  # fmt: skip
            with failure_as_row(row) as failed:
                model = _model(case, kind).to(how.device)
                with noted_backends() as noted:
                    errors = {"scores": _error(model, case, kind, images[:IMAGES_CHECKED])}
                if kind == "naive":
                    naive_errors, naive_call = errors, _call(copy.deepcopy(model), case, images, labels)
                row = replace(row, backend=", ".join(sorted(set(noted))) or "PyTorch", errors=errors)
                wrong = problems.complaints(errors, naive_errors, case.precision)  # the layers around are the same for every kind
                if wrong and kind != "naive":
                    yield replace(row, state=WRONG, reason="; ".join(wrong))
                elif provider(kind) in names:
                    yield from timed_rows(row, [_call(model, case, images, labels)], naive_call, how)
            yield from of_failure(failed, how)


def provider(kind: str | None) -> str:
    """What a kind of attention is called in a row."""
    return {"fused": "visattn", None: "no attention"}.get(kind) or str(kind)


def call_of(case: ModelCase, kind: str | None, device: torch.device) -> timing.Call:
    """The forward pass or training step that is measured."""
    return _call(_model(case, kind).to(device), case, *_batch(case, device))


def _batch(case: ModelCase, device: torch.device) -> tuple[Tensor, Tensor]:
    """Images and their labels."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(case.batch, *models.input_shape(case.model), generator=generator)
    return images.to(device), torch.randint(CLASSES, (case.batch,), generator=generator).to(device)


def _model(case: ModelCase, kind: str | None) -> nn.Module:
    torch.manual_seed(0)
    model = models.create_model(case.model, CLASSES, attention=kind)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "gamma" in name:
                parameter.fill_(0.7)  # at 0, where it starts, the attention would not be measured
    return model


def _error(model: nn.Module, case: ModelCase, kind: str | None, images: Tensor) -> float:
    """Relative RMS of the scores, against the same weights in float64."""
    truth = _model(case, "naive" if kind in SAME_FUNCTION else kind).double().to(images.device).eval()
    truth.load_state_dict(model.state_dict())
    was_training = model.training
    with torch.no_grad():
        expected = truth(images.double())
        with _autocast(case, images):
            found = model.eval()(images)
    model.train(was_training)
    return float((found.double() - expected).norm() / expected.norm())


def _call(model: nn.Module, case: ModelCase, images: Tensor, labels: Tensor) -> timing.Call:
    if case.mode == "forward":
        model.eval()

        def forward() -> Tensor:
            with torch.no_grad(), _autocast(case, images):
                return model(images)

        return forward
    # A capturable optimizer, so that the same step can be replayed as a graph.
    optimizer = torch.optim.Adam(model.parameters(), capturable=images.is_cuda)

    def step() -> None:
        optimizer.zero_grad()
        with _autocast(case, images):
            loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()

    return step


def _autocast(case: ModelCase, images: Tensor) -> AbstractContextManager[object]:
    return nullcontext() if case.dtype == "float32" else torch.autocast(images.device.type, getattr(torch, case.dtype))
