"""Data-parallel training by several processes, as `torchrun` starts them; alone without it."""

from __future__ import annotations

import gc
import os
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from introkernels.train.methods import Learner, LossOutput

Value = TypeVar("Value")

# Far apart, so that no process draws what another one does under a neighbouring seed.
_SEEDS_APART = 1_000_003


class Processes:
    """The processes that train one network together: how many there are, and which this one is.

    Each trains on its share of every batch, and gradients are averaged: with the same batch size
    the results are those of one process, but for rounding, for random numbers that are drawn for
    images (augmentation, dropout, probes), and for BatchNorm, whose statistics are those of a
    process's share.
    """

    def __init__(self) -> None:
        together = dist.is_available() and dist.is_initialized()
        self.count = dist.get_world_size() if together else 1
        self.rank = dist.get_rank() if together else 0

    @property
    def first(self) -> bool:
        """Whether this is the one that writes files and speaks."""
        return self.rank == 0

    def seed(self, seed: int) -> int:
        """A seed for what each process draws for itself; the first keeps the one given."""
        return seed + self.rank * _SEEDS_APART

    def wrap(self, learner: Learner) -> Callable[[Tensor, Tensor], LossOutput]:
        """The learner, or one whose gradients are averaged over processes."""
        if self.count == 1:
            return learner
        return DistributedDataParallel(learner)

    def share(self, rows: Tensor) -> tuple[Tensor, float]:
        """This process's part of a batch of row numbers, and what its mean loss counts.

        Averaged over processes, losses times their weights are the mean over the batch. A process
        without a row takes the first one, with weight 0: all have to take part.
        """
        mine = rows.tensor_split(self.count)[self.rank]
        weight = self.count * len(mine) / len(rows)
        return (mine, weight) if len(mine) else (rows[:1], 0.0)

    def without_averaging(self, trained: Any, *, wanted: bool) -> AbstractContextManager[Any]:
        """Context of a backward pass after which another one adds to the same gradients."""
        context: AbstractContextManager[Any] = (
            trained.no_sync() if wanted and self.count > 1 else nullcontext()
        )
        return context

    def total(self, values: Tensor) -> Tensor:
        """The sum of a tensor over processes."""
        if self.count > 1:
            dist.all_reduce(values)
        return values

    def from_first(self, compute: Callable[[], Value]) -> Value:
        """What the first process computes, in all of them."""
        if self.count == 1:
            return compute()
        holder = [compute() if self.first else None]
        dist.broadcast_object_list(holder)
        return holder[0]  # type: ignore[return-value]

    def wait(self) -> None:
        """Until all processes have come here."""
        if self.count > 1:
            dist.barrier()


def _forget_variables(error: BaseException) -> None:
    """Clear the frames that an error holds, and those it arose from."""
    pending: list[BaseException | None] = [error]
    seen: set[int] = set()
    while pending:
        found = pending.pop()
        if found is not None and id(found) not in seen:
            seen.add(id(found))
            traceback.clear_frames(found.__traceback__)
            pending += [found.__cause__, found.__context__]


@contextmanager
def started_by_torchrun(device: str) -> Iterator[str]:
    """Join the processes that `torchrun` started, if it did; gives the device to train on.

    NCCL connects GPUs, one for each process of a machine, and gloo all else.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        yield device
        return
    if torch.device(device).type == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
        dist.init_process_group("nccl")
    else:
        dist.init_process_group("gloo")
    try:
        yield device
    except BaseException as error:
        _forget_variables(error)
        raise
    finally:
        # A model that is the last to hold the group lets go of it under the interpreter's lock,
        # and waits for the group's threads, which may wait for that lock: no model may outlive it.
        gc.collect()
        dist.destroy_process_group()
