"""A head's gradients, which its forward makes along with a scalar loss, or its backward on its own.

Both are the same numbers to the bit. The first backward takes those of the forward, which then are
the caller's; a second one makes them again.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from helpers.backends import sized
from helpers.bounds import bounds_of
from helpers.cases import Case, linear_case
from helpers.oracle import defined
from helpers.tolerance import assert_accurate, assert_within
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import introkernels as ik

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

# Several tiles, blocks and chunks of rows of a kernel, and none of them whole.
SIZES = (
    (3, 5, 7),
    (sized(300, 140), 77, 65),
    (sized(150, 70), sized(1003, 259), sized(300, 37)),
)


class OperatorCalls(TorchDispatchMode):
    """The introkernels operators that are called, by name, with their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, tuple[Any, ...]]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.namespace.startswith("introkernels"):
            self.calls.append((func.name().split("::")[1], args))
        return func(*args, **(kwargs or {}))

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.calls]


def leaves_of(case: Case) -> dict[str, Tensor]:
    return {name: case[name].detach().clone().requires_grad_() for name in case.differentiable}


def loss_of(case: Case, leaves: dict[str, Tensor]) -> Tensor:
    return ik.linear_introspective_loss(*case.with_tensors(**leaves).arguments(), **case.keywords)


@pytest.fixture
def calls() -> Iterator[OperatorCalls]:
    with OperatorCalls() as mode:
        yield mode


@pytest.mark.parametrize("incoming", [1.0, -0.3, 1e-4, 0.0])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_made_with_the_loss_or_again(
    backend: str, dtype: torch.dtype, size: tuple[int, int, int], reduction: str, incoming: float
) -> None:
    rows, classes, width = size
    case = linear_case(
        rows, classes, dtype, width=width, ignored=1, class_weights=True, reduction=reduction
    )
    leaves = leaves_of(case)
    loss = loss_of(case, leaves)
    grad_loss = torch.tensor(incoming, dtype=loss.dtype)
    with OperatorCalls() as first_calls:
        first = torch.autograd.grad(loss, leaves.values(), grad_loss, retain_graph=True)
    with OperatorCalls() as second_calls:
        second = torch.autograd.grad(loss, leaves.values(), grad_loss)
    assert "linear" not in first_calls.names
    assert "linear" in second_calls.names
    for name, ours, again in zip(leaves, first, second, strict=True):
        assert ours.dtype == case[name].dtype
        assert torch.equal(ours, again)
    if rows * classes * width < 1 << 22:
        expected, bounds = defined(case, grad_loss), bounds_of(case, grad_loss)
        for name, ours in zip(leaves, first, strict=True):
            assert_within(ours, expected.grads[name], bounds.grads[name], name)


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", SIZES[1:], ids=str)
def test_of_each_row_alone_is_that_of_their_sum(
    backend: str, size: tuple[int, int, int], weight_dtype: torch.dtype, center: bool
) -> None:
    rows, classes, width = size
    case = linear_case(
        rows, classes, width=width, weight_dtype=weight_dtype, ignored=2, center=center
    )
    grads = []
    for reduction in ("sum", "none"):
        leaves = leaves_of(case)
        loss_of(case.with_keywords(reduction=reduction), leaves).sum().backward()
        grads.append([leaf.grad for leaf in leaves.values()])
    for of_sum, of_rows in zip(*grads, strict=True):
        assert torch.equal(of_sum, of_rows)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_forward_makes_those_that_a_backward_can_ask_for(
    backend: str, calls: OperatorCalls, reduction: str
) -> None:
    case = linear_case(5, 6, width=7, reduction=reduction)
    for needed in ((), ("weight",), ("features", "bias"), case.differentiable):
        tensors = {name: case[name].requires_grad_(name in needed) for name in case.differentiable}
        for enabled in (False, True):
            calls.calls.clear()
            with torch.set_grad_enabled(enabled):
                loss_of(case, tensors)
            ((name, arguments),) = calls.calls
            assert name == "linear"
            made = enabled and reduction != "none"
            assert arguments[-1][4:7] == [made and n in needed for n in case.differentiable]


def test_what_a_backward_handed_out_may_be_written_to(backend: str) -> None:
    case = linear_case(9, 6, width=7)
    leaves = leaves_of(case)
    loss = loss_of(case, leaves)
    first = torch.autograd.grad(loss, leaves.values(), retain_graph=True)
    before = [grad.clone() for grad in first]
    for grad in first:
        grad.fill_(float("nan"))
    for expected, grad in zip(before, torch.autograd.grad(loss, leaves.values()), strict=True):
        assert torch.equal(grad, expected)


def test_gradients_accumulate_over_two_walks(backend: str) -> None:
    case = linear_case(9, 6, width=7)
    leaves = leaves_of(case)
    loss = loss_of(case, leaves)
    loss.backward(retain_graph=True)
    once = {name: leaf.grad.clone() for name, leaf in leaves.items()}
    loss.backward()
    for name, leaf in leaves.items():
        assert torch.equal(leaf.grad, 2 * once[name])


def test_one_argument_at_a_time(backend: str) -> None:
    case = linear_case(9, 6, width=7)
    leaves = leaves_of(case)
    together = torch.autograd.grad(loss_of(case, leaves), leaves.values())
    loss = loss_of(case, leaves)
    for leaf, expected in zip(leaves.values(), together, strict=True):
        (alone,) = torch.autograd.grad(loss, leaf, retain_graph=True)
        assert torch.equal(alone, expected)


def test_a_batch_of_incoming_gradients(backend: str) -> None:
    case = linear_case(9, 6, width=7)
    leaves = leaves_of(case)
    incoming = torch.tensor([1.0, -2.0, 0.5])
    loss = loss_of(case, leaves)
    batched = torch.autograd.grad(
        loss, leaves.values(), incoming, is_grads_batched=True, retain_graph=True
    )
    for number, grad_loss in enumerate(incoming):
        alone = torch.autograd.grad(loss, leaves.values(), grad_loss, retain_graph=True)
        for grad, expected in zip(batched, alone, strict=True):
            assert torch.equal(grad[number], expected)


@pytest.mark.not_interpreted("the interpreter runs one launch at a time")
def test_walks_of_one_graph_in_several_threads(backend: str) -> None:
    case = linear_case(200, 101, width=33)
    leaves = leaves_of(case)
    expected = torch.autograd.grad(loss_of(case, leaves), leaves.values())
    loss = loss_of(case, leaves)
    start = threading.Barrier(4)

    def walk() -> tuple[Tensor, ...]:
        start.wait()
        return torch.autograd.grad(loss, leaves.values(), retain_graph=True)

    with ThreadPoolExecutor(4) as pool:
        walks = [future.result() for future in [pool.submit(walk) for _ in range(4)]]
    for grads in walks:
        for grad, wanted in zip(grads, expected, strict=True):
            assert torch.equal(grad, wanted)


def test_recomputed_in_a_checkpoint(backend: str) -> None:
    case = linear_case(9, 6, width=7)
    grads = []
    for checkpointed in (False, True):
        leaves = leaves_of(case)
        if checkpointed:
            loss = checkpoint(lambda: loss_of(case, leaves), use_reentrant=False)  # noqa: B023
        else:
            loss = loss_of(case, leaves)
        loss.backward()
        grads.append([leaf.grad for leaf in leaves.values()])
    for plain, again in zip(*grads, strict=True):
        assert torch.equal(plain, again)


@pytest.mark.parametrize("walk", [1, 2])
def test_ignored_rows_reach_no_gradient(backend: str, walk: int) -> None:
    case = linear_case(300, 77, width=65, ignored=5, reduction="sum")
    ignored = case["target"] == -100
    features = case["features"].masked_fill(ignored[:, None], float("nan"))
    leaves = leaves_of(case.with_tensors(features=features))
    loss = loss_of(case, leaves)
    for _ in range(walk):
        grads = torch.autograd.grad(loss, leaves.values(), retain_graph=True)
    assert not grads[0][ignored].any()
    live = case.with_tensors(features=features[~ignored], target=case["target"][~ignored])
    others = leaves_of(live)
    expected = torch.autograd.grad(loss_of(live, others), others.values())
    assert torch.equal(grads[0][~ignored], expected[0])
    for name, grad, alone in zip(leaves, grads[1:], expected[1:], strict=False):
        assert_accurate(grad, alone.double(), name)


@pytest.mark.parametrize("retained", [False, True])
def test_second_differentiation_raises(backend: str, retained: bool) -> None:
    case = linear_case(5, 6, width=7)
    leaves = leaves_of(case)
    loss = loss_of(case, leaves)
    if retained:
        torch.autograd.grad(loss, leaves.values(), retain_graph=True)
    gradient, *_ = torch.autograd.grad(loss, leaves.values(), create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once"):
        torch.autograd.grad(gradient.square().sum(), leaves.values())
