"""``torch.compile`` with ``fullgraph=True``: the same results, without recompiling needlessly."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from helpers.cases import BUILDERS, Case, distillation_case, introspective_case, linear_case
from helpers.oracle import evaluate
from torch import Tensor, nn

import introkernels as ik
from introkernels.ops import choice


@pytest.fixture(autouse=True)
def _forget_compiled_code() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class CompiledFunctions:
    """The public functions, compiled: stands in for the package in ``evaluate``."""

    def __init__(self, backend: Any = "inductor", **options: Any) -> None:
        self._options = {"fullgraph": True, "backend": backend, **options}

    def __getattr__(self, name: str) -> Callable[..., Any]:
        compiled = torch.compile(getattr(ik, name), **self._options)
        setattr(self, name, compiled)
        return compiled


def assert_compiled_equals_eager(case: Case, functions: CompiledFunctions) -> None:
    grad_loss = None
    if case.keywords.get("reduction") == "none":
        grad_loss = torch.randn(case["target"].shape)
    eager, compiled = evaluate(case, ik, grad_loss), evaluate(case, functions, grad_loss)
    # The operators are the same, and nothing beside them is computed.
    for part in ("loss", "ce", "kl"):
        assert torch.equal(getattr(compiled, part), getattr(eager, part)), part
    for name, grad in eager.grads.items():
        assert torch.equal(compiled.grads[name], grad), name


@pytest.mark.parametrize("function", BUILDERS)
def test_losses(backend: str, function: str) -> None:
    """With ignored rows, class weights and no reduction, through Inductor."""
    case = BUILDERS[function](
        6, 5, ignored=2, class_weights=True, label_smoothing=0.1, reduction="none"
    )
    assert_compiled_equals_eager(case, CompiledFunctions())


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("function", BUILDERS)
def test_reductions(backend: str, function: str, reduction: str) -> None:
    case = BUILDERS[function](6, 5, torch.bfloat16, ignored=2, reduction=reduction)
    assert_compiled_equals_eager(case, CompiledFunctions("aot_eager"))


@pytest.mark.parametrize("function", BUILDERS)
@torch._dynamo.config.patch(error_on_recompile=True)
def test_batch_size_may_change_without_recompiling(backend: str, function: str) -> None:
    functions = CompiledFunctions("aot_eager", dynamic=True)
    for rows in (4, 7, 33, 5, 130):
        assert_compiled_equals_eager(BUILDERS[function](rows, 6, ignored=2), functions)


@torch._dynamo.config.patch(error_on_recompile=True)
def test_all_sizes_may_change_without_recompiling(backend: str) -> None:
    functions = CompiledFunctions("aot_eager", dynamic=True)
    # Dynamo takes sizes that are equal in its first call to be equal always.
    for rows, classes, shape, explained in (
        (4, 6, (3, 5), 2),
        (7, 9, (4, 2), 5),
        (3, 5, (6, 7), 4),
    ):
        case = introspective_case(rows, classes, shape=shape, explained=explained)
        assert_compiled_equals_eager(case, functions)


@pytest.mark.parametrize("mode", ["no_grad", "constants"])
@pytest.mark.parametrize("function", BUILDERS)
def test_without_gradients(backend: str, function: str, mode: str) -> None:
    """A validation loss, of which nothing is differentiated."""
    case = BUILDERS[function](6, 5, ignored=1)
    if mode == "no_grad":
        case[case.differentiable[0]].requires_grad_()
    compiled = getattr(CompiledFunctions("aot_eager"), function)
    with torch.set_grad_enabled(mode != "no_grad"):
        loss = compiled(*case.arguments(), **case.keywords)
        assert torch.equal(loss, getattr(ik, function)(*case.arguments(), **case.keywords))
    assert not loss.requires_grad


@pytest.mark.parametrize(("rows", "classes"), [(0, 5), (1, 5), (4, 1)])
def test_sizes_that_dynamo_specialises(backend: str, rows: int, classes: int) -> None:
    functions = CompiledFunctions("aot_eager", dynamic=True)
    for build in (distillation_case, linear_case):
        assert_compiled_equals_eager(build(rows, classes, reduction="sum"), functions)


def test_strided_arguments(backend: str) -> None:
    functions = CompiledFunctions()
    case = linear_case(6, 5)
    case = case.with_tensors(
        features=case["features"].t().contiguous().t(), weight=case["weight"].t().contiguous().t()
    )
    assert_compiled_equals_eager(case, functions)
    case = introspective_case(6, 5, shape=(3, 4, 4))
    case = case.with_tensors(
        logits=case["logits"].t().contiguous().t(),
        gradients=case["gradients"].movedim(2, -1).contiguous().movedim(-1, 2),
        inputs=case["inputs"].contiguous(memory_format=torch.channels_last),
    )
    assert_compiled_equals_eager(case, functions)


def test_statistics_soft_labels_and_loss_in_one_graph(backend: str) -> None:
    case = introspective_case(6, 5, shape=(2, 3))
    gradients, inputs, target = case["gradients"], case["inputs"], case["target"]

    def labels_and_loss(logits: Tensor) -> tuple[Tensor, Tensor]:
        stats = ik.explanation_stats(gradients, inputs, target, center=True)
        return ik.soft_labels(stats, target), ik.similarity_loss(logits, target, stats)

    labels, loss = torch.compile(labels_and_loss, fullgraph=True)(case["logits"])
    expected_labels, expected_loss = labels_and_loss(case["logits"])
    # Soft labels are plain PyTorch, which Inductor fuses and rounds as it likes.
    torch.testing.assert_close(labels, expected_labels)
    assert torch.equal(loss, expected_loss)


class Classifier(nn.Module):
    """A small convolutional network with its loss inside."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 8))
        self.head = nn.Linear(8, 5)
        self.loss = ik.LinearIntrospectiveLoss(label_mode="split", return_parts=True)
        self.distil = ik.DistillationLoss(reduction="sum")

    def forward(self, images: Tensor, target: Tensor, teacher: Tensor) -> ik.LossParts:
        features = self.body(images)
        parts = self.loss(features, self.head.weight, target, self.head.bias)
        loss = parts.loss + self.distil(self.head(features), teacher, target)
        # Not parts._replace(loss=loss), which the Dynamo of torch 2.11 cannot trace.
        return ik.LossParts(loss, parts.ce, parts.kl)


def test_training_step_of_a_model(backend: str) -> None:
    model = Classifier()
    twin = copy.deepcopy(model)
    images, teacher = torch.randn(6, 1, 6, 6), torch.randn(6, 5)
    target = torch.tensor([0, 1, -100, 3, 4, -100])

    step = torch.compile(model, fullgraph=True)
    for kl_weight in (0.3, 0.6):
        model.loss.kl_weight = twin.loss.kl_weight = kl_weight
        parts, expected = step(images, target, teacher), twin(images, target, teacher)
        torch.testing.assert_close(parts, expected)
        for module, result in ((model, parts), (twin, expected)):
            module.zero_grad()
            result.loss.backward()
        for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad)
            assert ours.grad.abs().max() > 0


def test_compiled_call_follows_a_change_of_backend(backend: str) -> None:
    case = distillation_case(6, 5)
    functions = CompiledFunctions("aot_eager")
    for name in (backend, "reference", "auto"):
        with ik.use_backend(name):
            assert_compiled_equals_eager(case, functions)


def test_compiled_code_calls_the_backend_chosen_where_it_is_called() -> None:
    case = distillation_case(6, 5)
    called = []

    def remember(graph: torch.fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
        (namespace,) = {
            node.target.namespace
            for node in graph.graph.nodes
            if getattr(node.target, "namespace", "").startswith("introkernels")
        }

        def run(*arguments: Any) -> Any:
            called.append(namespace)
            return graph(*arguments)

        return run

    loss = torch.compile(ik.distillation_loss, fullgraph=True, backend=remember)

    def call() -> str:
        loss(*case.arguments())
        return called.pop()

    with ik.use_backend("reference"), ThreadPoolExecutor(1) as pool:
        for _ in range(3):
            assert call() == "introkernels_reference"
            assert pool.submit(call).result() == "introkernels"
        with ik.use_backend("auto"):
            assert call() == "introkernels"
    assert call() == "introkernels"


def test_choice_within_compiled_code_breaks_its_graph() -> None:
    case = distillation_case(6, 5)

    def loss() -> Tensor:
        with ik.use_backend("reference"):
            return ik.distillation_loss(*case.arguments())

    assert torch.equal(torch.compile(loss, backend="aot_eager")(), loss())
    assert choice.current() == "auto"


@pytest.mark.usefixtures("indices_are_checked")
def test_target_out_of_range_still_raises(backend: str) -> None:
    case = distillation_case(6, 5)
    compiled = torch.compile(ik.distillation_loss, fullgraph=True, backend="aot_eager")
    case["target"][3] = 5
    with pytest.raises(IndexError, match=r"target\[3\] is 5, outside \[0, 5\)"):
        compiled(*case.arguments())


def test_bad_call_is_still_explained() -> None:
    compiled = torch.compile(ik.distillation_loss, backend="aot_eager")
    with pytest.raises(ValueError, match=r"temperature must be in \[0.05, 100\], got -1"):
        compiled(*distillation_case(6, 5).arguments(), temperature=-1)


def test_double_backward_of_compiled_loss_raises(backend: str) -> None:
    case = distillation_case(6, 5)
    logits = case["logits"].requires_grad_()
    loss = torch.compile(ik.distillation_loss, fullgraph=True, backend="aot_eager")(
        *case.arguments()
    )
    (gradient,) = torch.autograd.grad(loss, logits, create_graph=True)
    with pytest.raises(RuntimeError, match="does not currently support double backward"):
        (gradient.square().sum() + logits.sum()).backward()


# Dynamo looks at the ``grad`` of what it is given, and hides the warning from all but this filter.
@pytest.mark.filterwarnings(
    "error",
    "ignore:The .grad attribute of a Tensor",
    "ignore::Warning:triton.runtime.interpreter",
)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("function", BUILDERS)
def test_backward_of_a_plain_call_in_compiled_code(
    backend: str, function: str, reduction: str
) -> None:
    case = BUILDERS[function](6, 5, reduction=reduction)
    leaves = {name: case[name].detach().requires_grad_() for name in case.differentiable}
    loss = getattr(ik, function)(*case.with_tensors(**leaves).arguments(), **case.keywords)
    grad_loss = torch.randn_like(loss)

    @torch.compile(backend="aot_eager")
    def backward(loss: Tensor, grad_loss: Tensor) -> None:
        loss.backward(grad_loss)

    backward(loss, grad_loss)
    for name, grad in evaluate(case, ik, grad_loss).grads.items():
        assert torch.equal(leaves[name].grad, grad), name


@pytest.mark.parametrize("function", BUILDERS)
def test_double_backward_of_a_plain_call_in_compiled_code_raises(
    backend: str, function: str
) -> None:
    case = BUILDERS[function](6, 5)
    leaf = case[case.differentiable[0]].requires_grad_()
    loss = getattr(ik, function)(*case.arguments(), **case.keywords)

    @torch.compile(backend="aot_eager")
    def backward(loss: Tensor, leaf: Tensor) -> None:
        (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
        (gradient.square().sum() + leaf.sum()).backward()

    with pytest.raises(RuntimeError, match=r"differentiated once.*introkernels\.reference"):
        backward(loss, leaf)


@pytest.mark.parametrize("function", BUILDERS)
def test_grad_inside_compiled_code_is_right_or_refused(backend: str, function: str) -> None:
    """Dynamo skips the backward of an autograd.Function here: zeros must not come of it."""
    case = BUILDERS[function](6, 5)
    name = case.differentiable[0]

    def gradient(tensor: Tensor) -> Tensor:
        def loss(leaf: Tensor) -> Tensor:
            arguments = case.with_tensors(**{name: leaf}).arguments()
            return getattr(ik, function)(*arguments, **case.keywords)

        return torch.func.grad(loss)(tensor)

    compiled = torch.compile(gradient, fullgraph=True, backend="aot_eager")
    try:
        actual = compiled(case[name])
    except RuntimeError:
        return
    assert torch.equal(actual, gradient(case[name]))
