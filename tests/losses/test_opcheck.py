"""Every operator keeps the promises of its registration: ``torch.library.opcheck``, fakes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.cases import (
    Case,
    distillation_case,
    introspective_case,
    linear_case,
    linear_distillation_case,
    similarity_case,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import introkernels as ik
from introkernels.ops.schema import SCHEMAS

pytestmark = pytest.mark.on_cpu("these operators are not those of a GPU; see tests/gpu")

NAMESPACES = {
    "introkernels": "auto",
    "introkernels_composite": "composite",
    "introkernels_reference": "reference",
}

# Calls which together reach every operator, in each with both values of whatever it may lack.
CASES: dict[str, Callable[[], Case]] = {
    "distillation": lambda: distillation_case(4, 5),
    "distillation-none": lambda: distillation_case(
        4, 5, torch.bfloat16, reduction="none", class_weights=True, label_smoothing=0.1, ignored=1
    ),
    "similarity": lambda: similarity_case(4, 5, torch.float64, reduction="sum"),
    "similarity-explained": lambda: similarity_case(
        4, 5, explained=3, reduction="none", class_weights=True, label_mode="split", ignored=1
    ),
    "introspective": lambda: introspective_case(4, 5, shape=(2, 3)),
    "introspective-explained": lambda: introspective_case(
        4, 5, explained=3, reduction="none", class_weights=True, center=True, ignored=1
    ),
    "introspective-half-gradients": lambda: introspective_case(
        4, 5, gradients_dtype=torch.bfloat16, similarity="projection", reduction="sum"
    ),
    "linear": lambda: linear_case(4, 5, ignored=1),
    "linear-none": lambda: linear_case(
        4, 5, torch.bfloat16, bias=False, reduction="none", class_weights=True, center=True
    ),
    "linear-weight-only": lambda: without_gradient(linear_case(4, 5), "features"),
    "linear-features-only": lambda: without_gradient(linear_case(4, 5), "weight", "bias"),
    "linear-distillation": lambda: linear_distillation_case(4, 5, ignored=1),
    "linear-distillation-none": lambda: linear_distillation_case(
        4, 5, torch.bfloat16, bias=False, reduction="none", class_weights=True
    ),
    "linear-distillation-features-only": lambda: without_gradient(
        linear_distillation_case(4, 5), "weight", "bias"
    ),
    "distillation-transposed": lambda: transposed(distillation_case(4, 5)),
    "similarity-transposed": lambda: transposed(similarity_case(4, 5, explained=3)),
    "introspective-transposed": lambda: transposed(introspective_case(4, 5, explained=3)),
    "linear-transposed": lambda: transposed(linear_case(4, 5)),
}


def transposed(case: Case) -> Case:
    """The same numbers with the last dimension the outermost in memory."""
    strided = {
        name: tensor.movedim(-1, 0).contiguous().movedim(0, -1)
        for name, tensor in case.tensors.items()
        if tensor is not None
    }
    return case.with_tensors(**strided)


def without_gradient(case: Case, *names: str) -> Case:
    kept = tuple(name for name in case.differentiable if name not in names)
    return Case(case.function, case.tensors, case.keywords, kept)


class Recorder(TorchDispatchMode):
    """Calls of this package's operators, with their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace.startswith("introkernels"):
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


def operator_calls(case: Case, backend: str) -> list[tuple[Any, tuple[Any, ...]]]:
    """The operators that a call, its backward and ``explanation_stats`` run, with arguments."""
    leaves = {name: case[name].requires_grad_() for name in case.differentiable}
    with ik.use_backend(backend), Recorder() as recorder:
        if case.function == "introspective_loss":
            ik.explanation_stats(
                case["gradients"],
                case["inputs"],
                case["target"],
                class_index=case.keywords["class_index"],
            )
        arguments = case.with_tensors(**leaves).arguments()
        getattr(ik, case.function)(*arguments, **case.keywords).sum().backward()
    return [
        (func, tuple(a.detach() if isinstance(a, Tensor) else a for a in args))
        for func, args in recorder.calls
    ]


@pytest.mark.parametrize("namespace", NAMESPACES)
@pytest.mark.parametrize("name", CASES)
def test_opcheck(namespace: str, name: str) -> None:
    for func, arguments in operator_calls(CASES[name](), NAMESPACES[namespace]):
        torch.library.opcheck(func, arguments)


@pytest.mark.parametrize("namespace", NAMESPACES)
def test_cases_reach_every_operator(namespace: str) -> None:
    reached = {
        func.name()
        for make in CASES.values()
        for func, _ in operator_calls(make(), NAMESPACES[namespace])
        if func.namespace == namespace
    }
    assert reached == {f"{namespace}::{name}" for name in SCHEMAS}


@pytest.mark.parametrize("name", CASES)
def test_fakes_give_the_shapes_dtypes_and_strides_of_the_kernels(backend: str, name: str) -> None:
    for func, arguments in operator_calls(CASES[name](), backend):
        real = func(*arguments)
        on_meta = func(*(a.to("meta") if isinstance(a, Tensor) else a for a in arguments))
        pairs = [(real, on_meta)] if isinstance(real, Tensor) else zip(real, on_meta, strict=True)
        for ours, fake in pairs:
            assert fake.device.type == "meta"
            assert (ours.shape, ours.dtype) == (fake.shape, fake.dtype), func
            assert ours.stride() == fake.stride(), func


@pytest.mark.parametrize("name", CASES)
def test_no_output_shares_memory_with_an_input_or_an_output(backend: str, name: str) -> None:
    """What opcheck asks of functional schemas, and whoever writes into a result relies on."""
    for func, arguments in operator_calls(CASES[name](), backend):
        outputs = func(*arguments)
        outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
        tensors = [*outputs, *(a for a in arguments if isinstance(a, Tensor))]
        places = [tensor.untyped_storage().data_ptr() for tensor in tensors if tensor.numel()]
        owned = places[: sum(output.numel() > 0 for output in outputs)]
        assert all(places.count(place) == 1 for place in owned), func


def test_losses_of_meta_tensors_have_shapes_but_no_memory() -> None:
    with torch.device("meta"):
        logits = torch.randn(1 << 20, 1 << 20, requires_grad=True)
        target = torch.zeros(1 << 20, dtype=torch.int64)
    loss = ik.distillation_loss(logits, logits, target, reduction="none")
    loss.sum().backward()
    assert loss.shape == target.shape
    assert logits.grad is not None
    assert logits.grad.shape == logits.shape
