"""The same bits, run after run, whatever the threads and whatever lay in memory before."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from helpers.backends import sized
from helpers.cases import (
    HEADS,
    Case,
    distillation_case,
    introspective_case,
    linear_case,
    similarity_case,
)
from helpers.oracle import evaluate
from torch import Tensor

import introkernels as ik

# A row, a few rows that are long, many rows that are short: each splits work its own way.
CASES: dict[str, Callable[[], Case]] = {
    "distillation-row": lambda: distillation_case(1, sized(70_001, 4_501)),
    "distillation-few": lambda: distillation_case(
        3, sized(20_011, 2_051), torch.bfloat16, reduction="none"
    ),
    "distillation-many": lambda: distillation_case(
        sized(5_000, 300), 11, ignored=70, class_weights=True
    ),
    "similarity-row": lambda: similarity_case(1, sized(30_001, 4_501)),
    "similarity-many": lambda: similarity_case(
        sized(3_001, 131), 13, explained=5, label_mode="split"
    ),
    "introspective-row": lambda: introspective_case(1, 7, shape=(sized(200_003, 9_001),)),
    "introspective-few": lambda: introspective_case(
        3, 10, shape=(3, sized(111, 31), 112), center=True
    ),
    "introspective-half": lambda: introspective_case(
        2, 5, torch.bfloat16, shape=(sized(70_001, 9_001),)
    ),
    "introspective-many": lambda: introspective_case(sized(2_000, 60), 10, shape=(37,), ignored=50),
    "linear-row": lambda: linear_case(1, sized(3_001, 1_001), width=301),
    "linear-few": lambda: linear_case(5, sized(2_003, 503), width=129, center=True),
    "linear-many": lambda: linear_case(
        sized(1_500, 140), 101, width=65, ignored=30, class_weights=True
    ),
    "linear-half": lambda: linear_case(
        sized(300, 70), 501, torch.bfloat16, width=33, reduction="none"
    ),
    "linear-float64": lambda: linear_case(sized(300, 70), 101, torch.float64, width=33),
}


def results(case: Case) -> dict[str, Tensor]:
    """The loss, its terms, its gradients, and the statistics where there are explanations."""
    grad_loss = None
    if case.keywords.get("reduction") == "none":
        grad_loss = torch.linspace(-1, 2, case.rows)
    outcome = evaluate(case, ik, grad_loss)
    tensors = {"loss": outcome.loss, "ce": outcome.ce, "kl": outcome.kl, **outcome.grads}
    if case.function == "introspective_loss":
        stats = ik.explanation_stats(
            case["gradients"],
            case["inputs"],
            case["target"],
            center=case.keywords.get("center", False),
            class_index=case.keywords["class_index"],
        )
        tensors |= {"dots": stats.dots, "sq_norms": stats.sq_norms}
    return tensors


def assert_same_bits(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        differing = int((actual[name] != tensor).sum())
        assert differing == 0, f"{name} differs in {differing} of {tensor.numel()} places"


@pytest.fixture
def _threads_restored() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("_threads_restored")
@pytest.mark.parametrize("name", CASES)
def test_repeats_and_any_number_of_threads(backend: str, name: str) -> None:
    case = CASES[name]()
    torch.set_num_threads(2)
    expected = results(case)
    # PyTorch's own operations, which GPU backends take for a head, round by the number of threads.
    on_pytorch = backend in ("reference", "composite") or (
        backend in ("cuda", "triton") and case.function in HEADS
    )
    any_number = not on_pytorch
    for threads in (2, 1, 3) if any_number else (2, 2):
        torch.set_num_threads(threads)
        assert_same_bits(results(case), expected)


@pytest.mark.parametrize("name", CASES)
def test_copies_elsewhere_in_memory_give_the_same(backend: str, name: str) -> None:
    case = CASES[name]()
    expected = results(case)
    kept = [torch.empty(size) for size in (7, 1_000, 300_001)]
    clones = {key: tensor.clone() for key, tensor in case.tensors.items() if tensor is not None}
    assert_same_bits(results(case.with_tensors(**clones)), expected)
    del kept


@pytest.fixture
def _nan_in_fresh_memory() -> Iterator[None]:
    """PyTorch's allocations come filled with NaN (and the largest integer)."""
    enabled = torch.are_deterministic_algorithms_enabled()
    filling = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = filling
    torch.use_deterministic_algorithms(enabled)


def spoil_freed_memory(sizes: set[int]) -> None:
    """Fill blocks of these sizes with NaN and free them, for the next allocations to find."""
    for size in sizes:
        spoiled = [torch.full((size // 4,), float("nan")) for _ in range(6)]
        del spoiled


SMALL: dict[str, Callable[[], Case]] = {
    "distillation": lambda: distillation_case(6, 37, ignored=2),
    "distillation-none": lambda: distillation_case(6, 37, ignored=2, reduction="none"),
    "similarity": lambda: similarity_case(6, 37, explained=5, ignored=2),
    "introspective": lambda: introspective_case(6, 37, shape=(41,), ignored=2, center=True),
    "introspective-explained": lambda: introspective_case(
        6, 37, shape=(3, 7), explained=5, ignored=2, reduction="none"
    ),
    "linear": lambda: linear_case(6, 37, ignored=2, center=True),
    "linear-half": lambda: linear_case(6, 37, torch.bfloat16, ignored=2, reduction="none"),
    "no-rows": lambda: linear_case(0, 5, reduction="sum"),
    "all-ignored": lambda: linear_case(4, 5, ignored=4, reduction="sum"),
    "no-dimensions": lambda: introspective_case(4, 5, shape=(0,)),
    "no-width": lambda: linear_case(4, 5, width=0),
}


@pytest.mark.parametrize("name", SMALL)
def test_results_do_not_depend_on_uninitialised_memory(
    backend: str, name: str, request: pytest.FixtureRequest
) -> None:
    case = SMALL[name]()
    expected = results(case)
    sizes = {tensor.nbytes for tensor in expected.values()}
    sizes |= {8 * tensor.numel() for tensor in case.tensors.values() if tensor is not None}
    sizes |= {8 * 8 * case.rows, 8 * case.rows, 16, 8}
    request.getfixturevalue("_nan_in_fresh_memory")
    assert torch.empty(5).isnan().all()
    for _ in range(3):
        spoil_freed_memory(sizes)
        assert_same_bits(results(case), expected)


def test_head_does_not_depend_on_where_its_inputs_lie(compiled_backend: str) -> None:
    values, target = torch.randn(40, 33), torch.randint(21, (40,))
    head = torch.randn(21, 33)

    def loss_and_gradients(offset: int) -> list[torch.Tensor]:
        placed = []
        for tensor in (values, head):
            memory = torch.empty(tensor.numel() + 16)
            view = memory[offset : offset + tensor.numel()].view_as(tensor)
            placed.append(view.copy_(tensor).requires_grad_())
        loss = ik.linear_introspective_loss(*placed, target)
        return [loss.detach(), *torch.autograd.grad(loss, placed)]

    expected = loss_and_gradients(0)
    for offset in range(1, 16):
        for got, want in zip(loss_and_gradients(offset), expected, strict=True):
            assert torch.equal(got, want)
