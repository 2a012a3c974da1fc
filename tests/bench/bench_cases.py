"""Tiny cases, and contenders that misbehave; a module of its own so that processes can share it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

import introkernels as ik
from introkernels.bench.contenders import EAGER, REFERENCE
from introkernels.bench.devices import COPY, Cpu
from introkernels.bench.model import Case, Contender, Suite, Tensors
from introkernels.bench.operators.distillation import (
    DISTILLATION,
    SIMILARITY,
    distillation_eager,
)
from introkernels.bench.operators.head import HEAD
from introkernels.bench.operators.introspective import INTROSPECTIVE, STATISTICS
from introkernels.bench.runner import Settings

MEGABYTE = 1 << 20
QUICK = Settings(threads=1, budget=0.05, memory=False, read_bytes=MEGABYTE)

TINY = (
    Case(INTROSPECTIVE, "tiny", "a tiny case", (5, 7, 33)),
    Case(STATISTICS, "tiny", "a tiny case", (5, 7, 33)),
    # Without the peers, which are there or not.
    Case(replace(DISTILLATION, contenders=()), "tiny", "a tiny case", (5, 7)),
    Case(SIMILARITY, "tiny", "a tiny case", (5, 7)),
    Case(HEAD, "tiny", "a tiny case", (5, 7, 33)),
)
DISTILLATION_CASE = TINY[2]


class WrongGradient(torch.autograd.Function):
    """A loss whose value is right, and whose gradient is 1 % too large."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, teacher_logits: Tensor, target: Tensor) -> Tensor:
        with torch.enable_grad():
            leaf = logits.detach().requires_grad_()
            loss = distillation_eager(leaf, teacher_logits, target)
        ctx.grad = torch.autograd.grad(loss, leaf)[0]
        return loss.detach()

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor, None, None]:
        return 1.01 * grad_loss * ctx.grad, None, None


def wrong_loss(*tensors: Tensor) -> Tensor:
    return 1.001 * distillation_eager(*tensors)


def nan_loss(*tensors: Tensor) -> Tensor:
    return float("nan") * distillation_eager(*tensors)


def loss_of_each_row(logits: Tensor, teacher_logits: Tensor, target: Tensor) -> Tensor:
    """The mean comes out right where it is wanted, but only after a shape that is not."""
    return distillation_eager(logits, teacher_logits, target).reshape(1)


def raising(*tensors: Tensor) -> Tensor:
    raise RuntimeError("out of order\nand more of it")


def slow(*tensors: Tensor) -> Tensor:
    time.sleep(0.1)
    return distillation_eager(*tensors)


def prepare_wrong_loss(operator: object) -> object:
    return wrong_loss


def prepare_wrong_gradient(operator: object) -> object:
    return WrongGradient.apply


def prepare_nan(operator: object) -> object:
    return nan_loss


def prepare_misshapen(operator: object) -> object:
    return loss_of_each_row


def prepare_raising(operator: object) -> object:
    return raising


def prepare_slow(operator: object) -> object:
    return slow


def never_there() -> str:
    return "not installed"


WRONG_LOSS = Contender("wrong loss", prepare_wrong_loss, role="ours")
WRONG_GRADIENT = Contender("wrong gradient", prepare_wrong_gradient)
NAN = Contender("nan", prepare_nan)
MISSHAPEN = Contender("misshapen", prepare_misshapen)
RAISING = Contender("raising", prepare_raising)
ABSENT = Contender("absent", prepare_raising, missing=never_there)
SLOW = Contender("slow", prepare_slow)
OURS = Contender("ours", REFERENCE.prepare, role="ours")

SUITE = Suite("tiny", TINY, (EAGER, OURS))
WRONG_SUITE = Suite("tiny", (DISTILLATION_CASE,), (EAGER, WRONG_LOSS))


def hold_in_torch(*tensors: Tensor) -> tuple[Tensor, ...]:
    torch.ones(64 * MEGABYTE, dtype=torch.uint8)
    return ik.explanation_stats(*tensors)[:2]


def hold_outside_of_torch(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Memory that PyTorch knows nothing of, from the allocator that C++ vectors use."""
    np.ones(64 * MEGABYTE, dtype=np.uint8)
    return ik.explanation_stats(*tensors)[:2]


def hold_twice(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Two blocks one after the other: the peak is one of them."""
    for _ in range(2):
        torch.ones(24 * MEGABYTE, dtype=torch.uint8)
    return ik.explanation_stats(*tensors)[:2]


def hold_nothing(*tensors: Tensor) -> tuple[Tensor, ...]:
    return ik.explanation_stats(*tensors)[:2]


def die(*tensors: Tensor) -> tuple[Tensor, ...]:
    os._exit(1)


def prepare_hold_in_torch(operator: object) -> object:
    return hold_in_torch


def prepare_hold_outside_of_torch(operator: object) -> object:
    return hold_outside_of_torch


def prepare_hold_twice(operator: object) -> object:
    return hold_twice


def prepare_hold_nothing(operator: object) -> object:
    return hold_nothing


def prepare_die(operator: object) -> object:
    return die


HOLDERS = {
    "torch": (Contender("torch", prepare_hold_in_torch), 64 * MEGABYTE),
    "outside of torch": (Contender("outside", prepare_hold_outside_of_torch), 64 * MEGABYTE),
    "one after the other": (Contender("twice", prepare_hold_twice), 24 * MEGABYTE),
    "nothing": (Contender("nothing", prepare_hold_nothing), 0),
}
DYING = Contender("dying", prepare_die)


def in_dtype(case: Case, dtype: str) -> Case:
    return replace(case, dtype=dtype)


class Copying(Cpu):
    """A CPU that is measured as a GPU is: against copies, with memory told by the call itself."""

    yardstick = COPY

    def __init__(self, threads: int) -> None:
        super().__init__(threads)
        self.timed = 0
        self.closed = False
        made.append(self)

    def clock(self, call: Callable[[], object], calls: int) -> float:
        self.timed += calls
        return super().clock(call, calls)

    def yardstick_call(self, size: int) -> tuple[Callable[[], object], int]:
        source, destination = torch.ones(size // 4), torch.empty(size // 4)
        return lambda: destination.copy_(source), 2 * size

    def peak(
        self, case: Case, contender: Contender, function: Callable[..., Any], tensors: Tensors
    ) -> int:
        result = case.operator.run(function, tensors)
        return 1000 + sum(t.nbytes for t in case.operator.outcome(result, tensors).values())

    def close(self) -> None:
        self.closed = True
        super().close()


made: list[Copying] = []
