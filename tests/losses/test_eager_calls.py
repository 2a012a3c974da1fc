"""A plain call takes a short way to its kernel: little Python around it, and nothing different."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from helpers import backends
from helpers.cases import BUILDERS, HEADS, Case, distillation_case, linear_case
from helpers.oracle import evaluate
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import introkernels as ik


def call(case: Case, **keywords: Any) -> Any:
    return getattr(ik, case.function)(*case.arguments(), **case.keywords, **keywords)


def with_leaves(case: Case) -> Case:
    """The same call, of tensors to differentiate by."""
    return case.with_tensors(
        **{name: case[name].detach().requires_grad_() for name in case.differentiable}
    )


def backward(case: Case) -> tuple[Tensor, ...]:
    leaves = [case[name] for name in case.differentiable]
    return torch.autograd.grad(call(case), leaves)


class Operators(TorchDispatchMode):
    """The operators called while it is active, without views."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if not operator.is_view:
            self.names.append(operator.name().split("::")[1])
        return operator(*args, **(kwargs or {}))


def operators_of(work: Callable[[], object]) -> list[str]:
    with Operators() as operators:
        work()
    return operators.names


def operators_of_backward(stem: str) -> list[str]:
    """One operator, or what it takes to scale a head's gradients, which came with its loss."""
    if not stem.startswith("linear"):
        return ["row_loss_backward"]
    # A look whether there is something to multiply would stall a GPU's stream.
    return ["_local_scalar_dense"] if backends.device() == "cpu" else ["mul_"] * 3


@pytest.mark.parametrize("function", BUILDERS)
def test_a_forward_and_a_backward_are_few_operators(backend: str, function: str) -> None:
    case = BUILDERS[function](6, 5, class_weights=True)
    stem = function.removesuffix("_loss").removesuffix("_introspective")
    forward = {
        "distillation": ["row_loss_forward"],
        "similarity": ["teacher_logits", "row_loss_forward"],
        "introspective": ["introspective_forward"],
        "linear": ["linear"],
        "linear_distillation": ["linear_distillation"],
    }[stem]
    assert operators_of(lambda: call(case)) == forward
    leaves = with_leaves(case)
    with torch.no_grad():
        assert operators_of(lambda: call(leaves)) == forward
    assert operators_of(lambda: call(leaves)) == forward
    # The engine itself makes the first gradient, of ones.
    both = [*forward, "ones_like", *operators_of_backward(stem)]
    assert operators_of(lambda: backward(leaves)) == both


# From torch 2.14 on no way to apply a Function goes without a look at the signature of its forward.
ALWAYS_BINDS = hasattr(torch.autograd.function, "_bind_default_args")


def python_calls(work: Callable[[], object]) -> int:
    """How many Python functions are entered during ``work``, ours and PyTorch's."""
    calls = 0

    def count(frame: FrameType, event: str, argument: object) -> None:
        nonlocal calls
        binds = Path(frame.f_code.co_filename).name in ("inspect.py", "enum.py")
        calls += event == "call" and not (ALWAYS_BINDS and binds)

    work()
    before = sys.getprofile()
    sys.setprofile(count)
    try:
        work()
    finally:
        sys.setprofile(before)
    return calls


@pytest.mark.not_interpreted("the interpreter's kernels are Python functions themselves")
@pytest.mark.not_emulated("a head is made of Python functions itself")
@pytest.mark.on_cpu("Triton starts its kernels by Python functions of its own")
@pytest.mark.parametrize(
    "function", [name for name in BUILDERS if name != "linear_distillation_loss"]
)
def test_few_python_functions_stand_around_a_kernel(compiled_backend: str, function: str) -> None:
    """Their number stands for the time of a small call, which no busy machine can blur.

    Today it is 59 to 72 without a gradient, 96 to 133 with one, forward and backward together. One
    ``inspect.signature`` is some hundred.
    """
    case = BUILDERS[function](6, 5)
    assert python_calls(lambda: call(case)) <= 72
    leaves = with_leaves(case)
    assert python_calls(lambda: backward(leaves)) <= 134


@pytest.mark.parametrize("function", BUILDERS)
def test_same_bits_with_and_without_a_graph(backend: str, function: str) -> None:
    case = BUILDERS[function](6, 5, ignored=1, label_smoothing=0.1)
    differentiated = call(with_leaves(case), return_parts=True)
    assert differentiated.loss.requires_grad
    with torch.no_grad():
        unwatched = call(with_leaves(case), return_parts=True)
    with torch.inference_mode():
        inference = call(case, return_parts=True)
    for parts in (unwatched, inference, call(case, return_parts=True)):
        assert not parts.loss.requires_grad
        for part, expected in zip(parts, differentiated, strict=True):
            assert torch.equal(part, expected)
    assert not differentiated.ce.requires_grad
    assert not differentiated.kl.requires_grad


@pytest.mark.parametrize("kept", [("features",), ("weight",), ("bias",), ("features", "bias")])
def test_any_tensor_of_a_head_may_be_the_one_that_is_trained(
    backend: str, kept: tuple[str, ...]
) -> None:
    case = linear_case(6, 5)
    expected = evaluate(case).grads
    leaves = {name: case[name].detach().requires_grad_() for name in kept}
    grads = torch.autograd.grad(call(case.with_tensors(**leaves)), list(leaves.values()))
    for name, grad in zip(kept, grads, strict=True):
        assert torch.equal(grad, expected[name])


@pytest.mark.parametrize("function", BUILDERS)
def test_class_weights_are_constants(backend: str, function: str) -> None:
    case = BUILDERS[function](6, 5, class_weights=True)
    name = "class_weight" if function.startswith("linear") else "weight"
    weight = case[name].detach().requires_grad_()
    loss = call(case.with_keywords(**{name: weight}))
    assert torch.equal(loss, call(case))
    assert not loss.requires_grad


@pytest.mark.parametrize("grad_mode", [True, False])
@pytest.mark.parametrize("function", BUILDERS)
def test_forward_mode_raises_outside_of_a_transform(
    backend: str, function: str, grad_mode: bool
) -> None:
    """Also where no gradient is asked for: a tangent must not be dropped in silence."""
    case = BUILDERS[function](4, 5)
    name = case.differentiable[0]
    with forward_ad.dual_level(), torch.set_grad_enabled(grad_mode):
        dual = forward_ad.make_dual(case[name], torch.ones_like(case[name]))
        with pytest.raises(NotImplementedError, match="forward mode AD"):
            call(case.with_tensors(**{name: dual}))


@pytest.mark.parametrize("function", BUILDERS)
def test_a_tensor_that_left_its_transform_is_a_plain_one(backend: str, function: str) -> None:
    case = BUILDERS[function](4, 5)
    name = case.differentiable[0]
    leaked: list[Tensor] = []

    def leak(tensor: Tensor) -> Tensor:
        leaked.append(tensor)
        return tensor.sum()

    torch.func.grad(leak)(case[name])
    loss = call(case.with_tensors(**{name: leaked[0]}))
    assert torch.equal(loss, call(case))
    assert not loss.requires_grad


@pytest.mark.parametrize("function", BUILDERS)
def test_a_backward_after_a_write_to_its_inputs_raises(backend: str, function: str) -> None:
    case = with_leaves(BUILDERS[function](4, 5))
    loss = call(case)
    case["target"].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint(backend: str, reentrant: bool) -> None:
    case = with_leaves(distillation_case(6, 5))
    logits = case["logits"]
    checkpoint(
        lambda z: call(case.with_tensors(logits=z)), logits, use_reentrant=reentrant
    ).backward()
    assert torch.equal(logits.grad, evaluate(case).grads["logits"])


def test_tensors_saved_elsewhere(backend: str) -> None:
    case = with_leaves(distillation_case(6, 5))
    with torch.autograd.graph.save_on_cpu():
        loss = call(case)
    (gradient,) = torch.autograd.grad(loss, case["logits"])
    assert torch.equal(gradient, evaluate(case).grads["logits"])


@pytest.mark.parametrize("function", BUILDERS)
def test_compiled_autograd_walks_the_graph_of_a_plain_call(backend: str, function: str) -> None:
    case = with_leaves(BUILDERS[function](6, 5))
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager")):
        call(case).backward()
    for name, expected in evaluate(case).grads.items():
        assert torch.equal(case[name].grad, expected)


@pytest.mark.parametrize("function", BUILDERS)
def test_a_graph_shows_what_it_differentiates(backend: str, function: str) -> None:
    loss = call(with_leaves(BUILDERS[function](4, 5)))
    stem = {"introspective_loss": "Introspective"} | dict.fromkeys(HEADS, "Linear")
    assert loss.grad_fn.name() == f"{stem.get(function, 'RowLoss')}FunctionBackward"
