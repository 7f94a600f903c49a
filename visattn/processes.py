"""Several processes that train one model together, as `torchrun --nproc-per-node 2 -m visattn train …` starts them.

The only file that asks about process groups. A process that torchrun did not start is a group of one, for which all of this is free.
"""

import os
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


@contextmanager
def group(device: torch.device, timeout: float) -> Iterator[None]:
    """Within the block, the processes that torchrun started are one group: gloo on CPUs, NCCL between GPUs.

    timeout: the seconds for which one waits for the others. One that is killed is mostly noticed at once.
    """
    if not (dist.is_available() and dist.is_torchelastic_launched()):
        yield
        return
    patience = timedelta(seconds=timeout)
    store, own_rank, size = next(dist.rendezvous("env://", timeout=patience))
    # torchrun may keep one store for all its attempts, with the addresses of processes that are gone.
    store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=own_rank, world_size=size, timeout=patience)
    yield
    dist.destroy_process_group()  # not after an error: the others may be gone, and the system tidies up


def count() -> int:
    """How many there are."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Which of them this is, from 0."""
    return dist.get_rank() if count() > 1 else 0


def is_first() -> bool:
    """Whether this is the one that writes and prints."""
    return rank() == 0


def own_device(device: torch.device) -> torch.device:
    """Of GPUs, the one for this process.

    Raises:
        ValueError: one GPU is named, and there are several processes.
    """
    if count() == 1 or device.type != "cuda":
        return device
    if device.index is not None:
        raise ValueError(f"{count()} processes need a GPU each, got --device {device}; give --device cuda")
    return torch.device("cuda", int(os.environ["LOCAL_RANK"]))


def own_seed(seed: int) -> int:
    """For random numbers that each process should draw for itself, such as dropout's; the first has the seed of a single process."""
    return seed if is_first() else random.Random(f"{seed}, process {rank()}").getrandbits(32)


def share(items: Tensor) -> Tensor:
    """This process's part of rows that all of them have; the parts differ by one row at most."""
    return items.tensor_split(count())[rank()]


def with_common_statistics(model: nn.Module, device: torch.device) -> nn.Module:
    """The model, its batch norms over the images of all processes.

    Raises:
        ValueError: it has some, and PyTorch has no such layer for the device.
    """
    if count() == 1 or not any(isinstance(module, _BatchNorm) for module in model.modules()):
        return model
    if device.type != "cuda":
        raise ValueError(
            f"the model has batch norms, which several processes can share on GPUs only, got {device}; train it in one process"
        )
    return nn.SyncBatchNorm.convert_sync_batchnorm(model)


def add_up(tensors: Sequence[Tensor]) -> None:
    """Replaces each tensor by its sum over the processes; one message for each dtype."""
    if count() == 1:
        return
    for dtype in dict.fromkeys(t.dtype for t in tensors):
        some = [t for t in tensors if t.dtype == dtype]
        flat = torch.cat([t.flatten() for t in some])
        with _answered():
            dist.all_reduce(flat)
        for tensor, total in zip(some, flat.split([t.numel() for t in some]), strict=True):
            tensor.copy_(total.view_as(tensor))


def gathered(tensor: Tensor) -> Tensor:
    """What each process has, stacked."""
    if count() == 1:
        return tensor[None]
    every = [torch.empty_like(tensor) for _ in range(count())]
    with _answered():
        dist.all_gather(every, tensor)
    return torch.stack(every)


def first_decides(choice: bool) -> bool:
    """The choice of the first process, in all of them."""
    return bool(gathered(torch.tensor(choice, dtype=torch.uint8))[0])


@contextmanager
def _answered() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        raise RuntimeError(f"another of the {count()} processes has ended or does not answer ({reason})") from None
