"""Losses called from several Python threads at once."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers.cases import BUILDERS, HEADS
from helpers.oracle import Outcome, evaluate
from helpers.tolerance import assert_accurate

import introkernels as ik

pytestmark = pytest.mark.not_interpreted("the interpreter runs one launch at a time")


def run_together(work: Callable[[int], Outcome], workers: int = 4, calls: int = 6) -> list[Outcome]:
    """``work(number)`` in several threads that start at the same moment, on this one's backend."""
    start = threading.Barrier(workers)
    contexts = [contextvars.copy_context() for _ in range(workers)]

    def thread(number: int) -> list[Outcome]:
        start.wait()
        return [work(number) for _ in range(calls)]

    with ThreadPoolExecutor(workers) as pool:
        done = [pool.submit(contexts[number].run, thread, number) for number in range(workers)]
        return [outcome for outcomes in done for outcome in outcomes.result()]


@pytest.mark.parametrize("function", BUILDERS)
def test_concurrent_calls_give_what_single_calls_give(backend: str, function: str) -> None:
    cases = [BUILDERS[function](rows, 211, ignored=1) for rows in (3, 40, 7, 300)]
    expected = [evaluate(case) for case in cases]
    outcomes = run_together(lambda number: evaluate(cases[number]))
    for number, outcome in enumerate(outcomes):
        alone = expected[number // 6]
        same = {"loss": (outcome.loss, alone.loss)}
        same |= {name: (outcome.grads[name], grad) for name, grad in alone.grads.items()}
        for name, (together, single) in same.items():
            if backend in ("reference", "composite") or (backend != "cpu" and function in HEADS):
                # PyTorch's matrix products may round differently while other threads are at work.
                assert_accurate(together, single.double(), name)
            else:
                assert torch.equal(together, single), name


@pytest.mark.usefixtures("indices_are_checked")
def test_errors_in_one_thread_leave_the_others_alone(backend: str) -> None:
    good = BUILDERS["distillation_loss"](40, 211)
    bad = good.with_tensors(target=good["target"] + 300)
    expected = evaluate(good)

    def work(number: int) -> Outcome:
        if number % 2:
            with pytest.raises(IndexError):
                evaluate(bad)
        return evaluate(good)

    for outcome in run_together(work):
        assert torch.equal(outcome.loss, expected.loss)


def test_backward_in_another_thread_than_its_forward(backend: str) -> None:
    case = BUILDERS["linear_introspective_loss"](7, 5)
    leaves = [case[name].requires_grad_() for name in case.differentiable]
    loss = ik.linear_introspective_loss(*case.arguments(), **case.keywords)
    with ThreadPoolExecutor(1) as pool:
        grads = pool.submit(torch.autograd.grad, loss, leaves, retain_graph=True).result()
    for ours, here in zip(grads, torch.autograd.grad(loss, leaves), strict=True):
        assert torch.equal(ours, here)
