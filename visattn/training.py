"""Training one step at a time, in a way that can be stopped after any step and continued with the same bits.

Several processes share each batch: their gradients and losses are added up, so that a step is that of one process up to rounding.
"""

import random
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import processes
from .data import Images, Normalization, batches

PRECISIONS = ("fp32", "tf32", "bf16", "fp16")


class Options(NamedTuple):
    """How a model is trained. `compile` runs the step through torch.compile; the rest is as in `recipes.Recipe`."""

    normalization: Normalization
    batch_size: int
    learning_rate: float
    betas: tuple[float, float] = (0.9, 0.999)
    drop_last: bool = False
    seed: int = 0
    precision: str = "fp32"
    compile: bool = False


class Trainer:
    """A model in training with Adam and cross-entropy: `steps()` trains on, `state()` and `restore()` carry it across processes.

    The order of images is a function of the seed and the epoch alone, so that a position in training is two numbers.
    All that is public is done by all processes together; `batch_size` is that of all of them.
    """

    def __init__(self, model: nn.Module, images: Images, options: Options, device: torch.device) -> None:
        self.model = model.to(device)
        self.images = images.to(device)
        self.options = options
        self.device = device
        self.optimizer = torch.optim.Adam(model.parameters(), lr=options.learning_rate, betas=options.betas)
        self.scaler = torch.amp.GradScaler(device.type, enabled=options.precision == "fp16")
        self.epoch = 0
        self.step = 0
        self.seconds_for_data = 0.0
        self._forward: Callable[[Tensor], Tensor] = torch.compile(model) if options.compile else model

    @property
    def steps_an_epoch(self) -> int:
        whole, rest = divmod(len(self.images.labels), self.options.batch_size)
        return whole + (rest > 0 and not self.options.drop_last)

    def steps(self) -> Iterator[float]:
        """The loss of each step from here to the end of the epoch, after which the next epoch is at its beginning."""
        self.model.train()
        data_asked_for = time.perf_counter()
        for share, images, labels in self._batches():
            self.seconds_for_data += time.perf_counter() - data_asked_for
            loss = self._step(share, images, labels)
            self.step += 1
            yield loss
            self.model.train()
            data_asked_for = time.perf_counter()
        self.epoch, self.step = self.epoch + 1, 0

    def _batches(self) -> Iterator[tuple[float, Tensor, Tensor]]:
        """This process's part of every batch that the epoch has left: what share of the batch it is, images, labels."""
        rest = self._order()[self.step * self.options.batch_size :]
        if not len(rest):
            return  # gone on with from a checkpoint between an epoch's last step and its end
        whole = rest.split(self.options.batch_size)
        parts = [processes.share(batch) for batch in whole]
        every = batches(self.images, self.options.normalization, [len(part) for part in parts], torch.cat(parts))
        for batch, (images, labels) in zip(whole, every, strict=True):
            yield len(labels) / len(batch), images, labels

    def _step(self, share: float, images: Tensor, labels: Tensor) -> float:
        """The mean loss over a batch, of which this process has a share."""
        self.optimizer.zero_grad()
        with _autocast(self.device, self.options.precision):
            loss = share * nn.functional.cross_entropy(self._forward(images), labels)
        self.scaler.scale(loss).backward()
        loss = loss.detach()
        processes.add_up([loss, *(p.grad for p in self.model.parameters() if p.grad is not None)])
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return loss.item()

    def _order(self) -> Tensor:
        # PyTorch's generator on the CPU looks at 32 bits of a seed only, so seed and epoch are mixed first.
        mixed = random.Random(f"{self.options.seed}, {self.epoch}").getrandbits(32)
        order = torch.randperm(len(self.images.labels), generator=torch.Generator().manual_seed(mixed))
        return order[: self.steps_an_epoch * self.options.batch_size]

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Every tensor, by name, and every number that the trainer goes on from."""
        tensors = {f"model.{name}": t for name, t in self.model.state_dict().items()}
        for index, moments in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": t for name, t in moments.items()}
        tensors["rng.cpu"] = processes.gathered(torch.get_rng_state())
        if self.device.type == "cuda":
            tensors["rng.cuda"] = processes.gathered(torch.cuda.get_rng_state(self.device))
        numbers = {"epoch": self.epoch, "step": self.step, "seconds_for_data": self.seconds_for_data, "scaler": self.scaler.state_dict()}
        return tensors, numbers

    def restore(self, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
        """Puts back what `state` gave."""
        self.model.load_state_dict(part_of(tensors, "model."))
        optimizer: dict[int, dict[str, Tensor]] = {}
        for name, tensor in part_of(tensors, "optimizer.").items():
            index, moment = name.split(".", 1)
            optimizer.setdefault(int(index), {})[moment] = tensor
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": optimizer})
        torch.set_rng_state(tensors["rng.cpu"][processes.rank()].clone())  # of a part of a tensor PyTorch reads the wrong bytes
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(tensors["rng.cuda"][processes.rank()].clone(), self.device)
        self.epoch, self.step, self.seconds_for_data = numbers["epoch"], numbers["step"], numbers["seconds_for_data"]
        self.scaler.load_state_dict(numbers["scaler"])


def part_of(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Those whose names begin with the prefix, without it."""
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


@torch.no_grad()
def confusion_matrix(
    model: nn.Module, images: Images, normalization: Normalization, *, num_classes: int, device: torch.device, precision: str = "fp32"
) -> Tensor:
    """int64 (num_classes, width): how many images of each class, a row, the model takes for each class, a column.

    `width` is that of the classifier's output, which may be wider than there are classes.
    """
    model.eval()
    matrix = torch.zeros((0,), dtype=torch.int64)
    for pixels, labels in zip(images.pixels.split(256), images.labels.cpu().split(256), strict=True):
        with _autocast(device, precision):
            scores = model(normalization.apply(pixels.to(device)))
        if not matrix.numel():
            matrix = torch.zeros((num_classes, scores.shape[1]), dtype=torch.int64)
        matrix.view(-1).index_add_(0, labels * matrix.shape[1] + scores.argmax(1).cpu(), torch.ones_like(labels))
    return matrix


@torch.no_grad()
def input_of(model: nn.Module, module: nn.Module, images: Tensor) -> Tensor:
    """What reaches `module` when the model sees the images (N, C, H, W) in fp32."""
    seen: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        model(images)
    finally:
        handle.remove()
    return seen[0]


def accuracy(matrix: Tensor) -> float:
    """The share of images on the diagonal of a confusion matrix."""
    return int(matrix.diagonal().sum()) / int(matrix.sum())


def peak_memory_mib(device: torch.device) -> float:
    """The most memory used so far, MiB: allocated on a GPU, else resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    unit = 1 if sys.platform == "darwin" else 2**10  # ru_maxrss is in bytes there, in KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def _autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16}
    return torch.autocast(device.type, dtypes[precision]) if precision in dtypes else nullcontext()
