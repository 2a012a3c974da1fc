"""``torch.compile`` of code that explains: graph breaks, no warnings, and the numbers of eager."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from explain_models import CLASSES, cnn, images
from torch import Tensor, nn

import introkernels as ik
from introkernels.explain import METHODS, class_explanation_stats, compare_methods, policy

# PyTorch's own, most of which it hides or Python's filters ignore: Dynamo looks at the ``grad`` of
# what it is given, instantiates functions and imports scripted modules; forward mode scripts.
pytestmark = [
    pytest.mark.filterwarnings("error"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),
    pytest.mark.filterwarnings("ignore:.torch.jit.script:FutureWarning"),
]

NOT_TRACED = r"Explaining a model .* which torch\.compile can't trace: leave fullgraph=True out"


@pytest.fixture(autouse=True)
def _forget_compiled_code() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(function: Any) -> Any:
    return torch.compile(function, backend="eager")


Step = Callable[[Tensor, Tensor], Tensor]


def step_of_objective(model: nn.Module, method: Any, compiles: frozenset[str]) -> Step:
    """A training step; ``compiles`` says what of it is compiled."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    objective = ik.IntrospectiveObjective(
        compiled(model) if "model" in compiles else model, method=method, probes=2, every=2
    )
    if "objective" in compiles:
        objective = compiled(objective)

    def step(inputs: Tensor, target: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = objective(inputs, target)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return compiled(step) if "step" in compiles else step


def step_of_statistics(model: nn.Module, method: Any, compiles: frozenset[str]) -> Step:
    """The same of a user's own loss, which calls `class_explanation_stats`."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    generator = torch.Generator()
    similarity = "projection" if method == "projection" else "cosine"

    def loss_of(inputs: Tensor, target: Tensor) -> Tensor:
        logits, stats = class_explanation_stats(
            model, inputs * 2, target, method=method, generator=generator
        )
        return ik.similarity_loss(logits.tanh(), target, stats, similarity=similarity)

    if "loss" in compiles:
        loss_of = compiled(loss_of)

    def step(inputs: Tensor, target: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(inputs, target)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def trained(
    make: Callable[..., Step], method: Any, *compiles: str
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """The losses of ten steps, and the model's state after them."""
    model = cnn(torch.float32)
    torch.manual_seed(1)
    step = make(model, method, frozenset(compiles))
    losses = []
    for _ in range(10):
        inputs = torch.randn(6, 2, 6, 6)
        losses.append(step(inputs, torch.randint(CLASSES, (6,))))
    return losses, model.state_dict()


def assert_ten_steps_are_those_of_eager(
    make: Callable[..., Step], method: Any, *compiles: str
) -> None:
    expected, expected_state = trained(make, method)
    losses, state = trained(make, method, *compiles)
    # Compiled, SGD's own update is rounded otherwise by torch 2.10 and 2.11.
    tolerance = 1e-5 if "step" in compiles else 0.0
    torch.testing.assert_close(losses, expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(state, expected_state, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("compiles", ["objective", "step"])
def test_steps_of_an_objective(method: Any, compiles: str) -> None:
    assert_ten_steps_are_those_of_eager(step_of_objective, method, compiles)


def test_a_compiled_step_of_a_compiled_model() -> None:
    assert_ten_steps_are_those_of_eager(step_of_objective, "sketch", "step", "model")


@pytest.mark.parametrize("method", METHODS)
def test_steps_of_a_loss_that_calls_for_statistics(method: Any) -> None:
    assert_ten_steps_are_those_of_eager(step_of_statistics, method, "loss")


def test_nothing_is_compiled_again_for_another_model() -> None:
    inputs, target = images()

    @compiled
    def loss_of(objective: ik.IntrospectiveObjective) -> Tensor | ik.LossParts:
        return objective(inputs, target)

    loss_of(ik.IntrospectiveObjective(cnn()))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(2):
            objective = ik.IntrospectiveObjective(nn.Sequential(cnn(), nn.Identity()))
            loss_of(objective)
            loss_of(objective)
            assert objective.step == 2


def test_compare_methods_in_compiled_code() -> None:
    inputs, target = images()
    model = cnn()
    found = compiled(compare_methods)(model, inputs, target, methods=["head"], repeats=1)
    expected = compare_methods(model, inputs, target, methods=["head"], repeats=1)
    assert found.rows[1].correlation == expected.rows[1].correlation


@pytest.mark.parametrize("explains", ["objective", "step", "statistics", "comparison"])
def test_fullgraph_says_why_not(explains: str) -> None:
    if explains == "objective" and torch.__version__ < (2, 11):
        pytest.skip("torch 2.10 runs a module uncompiled in silence if it leaves the trace at once")
    inputs, target = images()
    model = cnn()
    objective = ik.IntrospectiveObjective(model)
    function = {
        "objective": objective,
        "step": lambda *batch: objective(*batch).backward(),
        "statistics": lambda *batch: class_explanation_stats(model, *batch)[1].dots,
        "comparison": lambda *batch: compare_methods(model, *batch).recommended,
    }[explains]
    with pytest.raises(RuntimeError, match=NOT_TRACED):
        torch.compile(function, backend="eager", fullgraph=True)(inputs, target)
    # The same once it has run outside of a graph.
    torch._dynamo.reset()
    compiled(function)(inputs, target)
    torch._dynamo.reset()
    with pytest.raises(RuntimeError, match=NOT_TRACED):
        torch.compile(function, backend="eager", fullgraph=True)(inputs, target)


def test_what_is_not_traced_runs_uncompiled_from_its_first_call_on() -> None:
    @policy.untraced
    def untraced(inputs: Tensor) -> Tensor:
        assert not torch.compiler.is_compiling()
        return inputs + 1

    graphs = []

    def backend(graph: torch.fx.GraphModule, example_inputs: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    @torch.compile(backend=backend)
    def function(inputs: Tensor) -> Tensor:
        return untraced(inputs * 2) * 3

    for _ in range(3):
        assert function(torch.ones(3)).tolist() == [9, 9, 9]
    # What is before and after it.
    assert len(graphs) == 2


def test_explaining_without_a_compiler_does_not_import_it() -> None:
    """It takes a second."""
    code = """
import sys, torch, introkernels as ik
objective = ik.IntrospectiveObjective(torch.nn.Linear(3, 2), method="exact")
objective(torch.randn(4, 3), torch.zeros(4, dtype=torch.int64)).backward()
assert "torch._dynamo" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
