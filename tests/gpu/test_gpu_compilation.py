"""What is compiled: nothing more for another batch, and whole training steps by torch.compile."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from gpu_cases import CASES, assert_same, case_of, leaves_of, on_gpu, results
from helpers.cases import BUILDERS, Case
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import introkernels as ik

pytestmark = pytest.mark.gpu


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels that Triton gets ready, by compiling or from its cache on disk."""
    from triton.runtime.jit import JITFunction

    names: list[str] = []
    get_ready = JITFunction._do_compile

    def noting(kernel: Any, *arguments: Any, **keywords: Any) -> Any:
        names.append(kernel.__name__)
        return get_ready(kernel, *arguments, **keywords)

    monkeypatch.setattr(JITFunction, "_do_compile", noting)
    return names


OF_ANY_BATCH: dict[str, Callable[[int], Case]] = {
    "distillation": lambda rows: BUILDERS["distillation_loss"](rows, 33),
    "similarity": lambda rows: BUILDERS["similarity_loss"](rows, 33),
    "similarity-explained": lambda rows: BUILDERS["similarity_loss"](rows, 33, explained=4),
    "introspective": lambda rows: BUILDERS["introspective_loss"](rows, 33, shape=(3, 5)),
    "introspective-long": lambda rows: BUILDERS["introspective_loss"](rows, 7, shape=(5003,)),
    "head": lambda rows: BUILDERS["linear_introspective_loss"](rows, 33, width=40),
}


@pytest.mark.of_triton
@pytest.mark.parametrize("name", OF_ANY_BATCH)
def test_another_batch_compiles_nothing(name: str, compiled: list[str]) -> None:
    build = OF_ANY_BATCH[name]
    results(leaves_of(on_gpu(lambda: build(48))))
    first = len(compiled)
    assert first > 0
    # Odd, divisible by 16, and 1: what Triton would tell apart if it were asked to.
    for rows in (47, 64, 3, 16, 1, 130, 1000):
        results(leaves_of(on_gpu(lambda rows=rows: build(rows))))
        assert compiled[first:] == [], f"for {rows} rows"


@pytest.mark.of_triton
def test_warm_up_leaves_nothing_to_compile(compiled: list[str]) -> None:
    case = leaves_of(on_gpu(lambda: BUILDERS["distillation_loss"](31, 771, torch.float16)))
    ik.backends.warm_up(ik.distillation_loss, *case.arguments(), progress=lambda *told: None)
    assert compiled
    ready = len(compiled)
    results(case)
    assert compiled[ready:] == []


@pytest.fixture
def _forget_compiled_code() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# One of each loss: these tests take seconds each.
one_of_each = pytest.mark.parametrize(
    "name", ["distillation", "similarity-explained", "introspective", "head"]
)


@pytest.mark.usefixtures("_forget_compiled_code")
@one_of_each
def test_torch_compile_of_each_loss(name: str) -> None:
    case = leaves_of(case_of(name))
    function = torch.compile(getattr(ik, case.function), fullgraph=True)
    loss = function(*case.arguments(), **case.keywords)
    leaves = [case[argument] for argument in case.differentiable]
    grads = torch.autograd.grad(loss, leaves, torch.ones_like(loss))
    expected = results(case)
    assert_same([loss.detach(), *grads], [expected[0], *expected[3:]])


# Where the operators of a backend are defined: those in C++ share a namespace.
NAMESPACES = {"cuda": "introkernels", "triton": "introkernels_triton"}


class Recorder(TorchDispatchMode):
    """Calls of the operators in a namespace, with their arguments."""

    def __init__(self, namespace: str) -> None:
        super().__init__()
        self.namespace = namespace
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == self.namespace:
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


@one_of_each
def test_opcheck(name: str, gpu_backend: str) -> None:
    """Fakes, schemas and autograd registration of the operators, on tensors of the GPU."""
    with Recorder(NAMESPACES[gpu_backend]) as recorder:
        results(leaves_of(case_of(name)))
    assert recorder.calls
    for func, arguments in recorder.calls:
        constants = [a.detach() if isinstance(a, Tensor) else a for a in arguments]
        torch.library.opcheck(func, tuple(constants))


class Classifier(nn.Module):
    """A body, a head, and the losses of both."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(24, 32), nn.ReLU())
        self.head = nn.Linear(32, 7)

    def forward(self, inputs: Tensor, target: Tensor) -> Tensor:
        features = self.body(inputs)
        at_features = ik.linear_introspective_loss(
            features, self.head.weight, target, self.head.bias
        )
        logits = self.head(features)
        return at_features + ik.distillation_loss(logits, logits.detach(), target)


def task() -> tuple[Classifier, Tensor, Tensor]:
    inputs = torch.randn(256, 24, device="cuda")
    target = (inputs @ torch.randn(24, 7, device="cuda")).argmax(1)
    return Classifier().cuda(), inputs, target


@pytest.mark.usefixtures("_forget_compiled_code")
def test_a_compiled_model_learns() -> None:
    model, inputs, target = task()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    step = torch.compile(model, fullgraph=True)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = step(inputs, target)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    assert losses[-1] < 0.6 * losses[0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_and_scaled_gradients(dtype: torch.dtype) -> None:
    model, inputs, target = task()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**10)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        with torch.autocast("cuda", dtype=dtype):
            loss = model(inputs, target)
        assert loss.dtype == torch.float32
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.detach())
    assert scaler.get_scale() == 2.0**10
    assert losses[-1] < 0.6 * losses[0]


@pytest.mark.parametrize("name", CASES)
def test_autocast_changes_no_bit(name: str) -> None:
    case = leaves_of(case_of(name))
    expected = results(case)
    for dtype in (torch.float16, torch.bfloat16):
        with torch.autocast("cuda", dtype=dtype):
            actual = results(case)
        assert_same(actual, expected)
