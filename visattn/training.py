"""Training one step at a time, and what it costs."""

import resource
import sys
import time
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .data import Split


class Step(NamedTuple):
    """One step of training: its loss, and the seconds it took from the batch to the updated weights."""

    loss: float
    seconds: float


def batches(split: Split, batch_size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches in random order, every image once an epoch; the last, smaller batch of an epoch is left out."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(split.labels), generator=generator)
        for chosen in order.split(batch_size)[: len(order) // batch_size]:
            yield split.images[chosen], split.labels[chosen]


def train(model: nn.Module, split: Split, *, learning_rate: float, batch_size: int, seed: int, device: torch.device) -> Iterator[Step]:
    """Trains with Adam and cross-entropy for as many steps as are asked for."""
    model.to(device).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate)
    for images, labels in batches(split, batch_size, seed):
        start = _now(device)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images.to(device)), labels.to(device))
        loss.backward()
        optimizer.step()
        yield Step(loss.item(), _now(device) - start)


@torch.no_grad()
def accuracy(model: nn.Module, split: Split, *, batch_size: int, device: torch.device) -> float:
    """The share of images whose class the model finds."""
    model.eval()
    right = 0
    for images, labels in zip(split.images.split(batch_size), split.labels.split(batch_size), strict=True):
        right += int((model(images.to(device)).argmax(1).cpu() == labels).sum())
    return right / len(split.labels)


def peak_memory_mib(device: torch.device) -> float:
    """The most memory used so far, MiB: allocated on a GPU, else resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    unit = 1 if sys.platform == "darwin" else 2**10  # ru_maxrss is in bytes there, in KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
