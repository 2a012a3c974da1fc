"""Which backend serves a call, and how it is chosen."""

from __future__ import annotations

import asyncio
import itertools
import statistics
import threading
import tomllib
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import backends
from helpers.cases import distillation_case
from torch.utils._python_dispatch import TorchDispatchMode

import introkernels as ik
from introkernels.ops import choice, loader, schema, select

ROOT = Path(__file__).resolve().parents[2]

UNAVAILABLE = [name for name, status in ik.backends.status().items() if status != "loaded"]


class Namespaces(TorchDispatchMode):
    """The namespaces of this package's operators that were called."""

    def __init__(self) -> None:
        super().__init__()
        self.called: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace.startswith("introkernels"):
            self.called.append(func.namespace)
        return func(*args, **(kwargs or {}))


def namespaces_of_a_call() -> list[str]:
    with Namespaces() as log:
        ik.distillation_loss(*distillation_case().arguments())
    return log.called


def chosen() -> str:
    """The choice in force, by its name."""
    return choice.current()


def test_status_names_each_backend_and_says_why_not() -> None:
    status = ik.backends.status()
    assert set(status) == {"cpu", "cuda", "triton"}
    for text in status.values():
        assert text == "loaded" or len(text.split()) > 2
    status["cpu"] = "changed"
    assert ik.backends.status()["cpu"] != "changed"


def test_build_info_agrees_with_the_status() -> None:
    info = ik.build_info()
    assert info["version"] == ik.__version__
    assert info["torch"] == torch.__version__
    assert info["backends"] == ik.backends.status()


@pytest.mark.parametrize("name", ["cpp", "CPU", "", "gpu", None, 3, torch.device("cpu")])
def test_unknown_backend(name: Any) -> None:
    before = chosen()
    with pytest.raises(
        ValueError, match=r"backend must be one of 'auto', 'reference', 'composite'"
    ):
        ik.use_backend(name)
    assert chosen() == before


@pytest.mark.parametrize("name", UNAVAILABLE)
def test_unusable_backend_says_why(name: str) -> None:
    before = chosen()
    with pytest.raises(RuntimeError) as caught:
        ik.use_backend(name)
    assert f"backend {name!r} can't be used: {ik.backends.status()[name]}" in str(caught.value)
    assert chosen() == before


def test_reason_of_a_failed_load_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(loader.STATUS, "cpu", "_cpu.so was built but can't be loaded: no symbol")
    with pytest.raises(RuntimeError, match=r"'cpu' can't be used: _cpu\.so .* no symbol"):
        ik.use_backend("cpu")


@pytest.mark.parametrize("device", select.AUTO)
def test_the_automatic_choice_serves_what_it_tells(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What is missing is told once, to others.
    monkeypatch.setattr(select, "_missing", {})
    told = select.automatic(device)
    assert list(told) == list(schema.SCHEMAS)
    with ik.use_backend("auto"):
        serving = select.operators(torch.device(device))
    for name, (backend, ground) in told.items():
        with ik.use_backend(backend):
            assert getattr(serving, name) is getattr(select.operators(torch.device(device)), name)
        assert ground


GPU_STATES = {
    ("loaded", "loaded"): ("triton", "predicted ahead of cuda from machine code, "),
    ("loaded", "no nvcc"): ("triton", "predicted ahead of cuda from machine code, "),
    ("not installed", "loaded"): ("cuda", "triton: not installed"),
    ("not installed", "no nvcc"): ("composite", "triton: not installed; cuda: no nvcc"),
}


@pytest.mark.parametrize("states", GPU_STATES)
def test_the_first_that_is_loaded_is_taken(
    states: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, state in zip(("triton", "cuda"), states, strict=True):
        monkeypatch.setitem(loader.STATUS, name, state)
    backend, ground = GPU_STATES[states]
    told = select.automatic("cuda")
    assert told.pop("teacher_logits") == ("composite", "has no kernels on a GPU")
    assert {taken for taken, _ in told.values()} == {backend}
    assert told["row_loss_forward"][1].startswith(ground)
    assert told["explanation_stats"][1].startswith(ground)


def test_operators_that_share_a_state_come_from_one_backend() -> None:
    for orders in select.AUTO.values():
        sharing = ("row_loss_forward", "row_loss_backward", "introspective_forward", "linear")
        assert len({orders[name].backends for name in sharing}) == 1


@pytest.mark.parametrize(
    "kernels",
    [("row_loss_forward", "row_loss_backward", "introspective_forward"), ("explanation_stats",)],
)
def test_what_is_taken_on_a_gpu_is_what_is_predicted_to_be_ahead(kernels: tuple[str, ...]) -> None:
    predicted = tomllib.loads((ROOT / "benchmarks/predicted.toml").read_text())["kernels"]
    shares: dict[str, dict[tuple[Any, ...], float]] = {}
    for case in predicted:
        if case["kernel"] in kernels:
            what = (case["kernel"], *case["shape"], case["dtype"])
            shares.setdefault(case["backend"], {})[what] = case["H200"]["predicted"]
    first, second = select.AUTO["cuda"][kernels[0]].backends
    both = shares[first].keys() & shares[second].keys()
    ratios = [shares[first][case] / shares[second][case] for case in both]
    assert statistics.geometric_mean(ratios) > 1


def test_choice_holds_until_the_next_one() -> None:
    with ik.use_backend("auto"):
        ik.use_backend("reference")
        assert chosen() == "reference"
        assert set(namespaces_of_a_call()) == {"introkernels_reference"}
        ik.use_backend("auto")
        assert set(namespaces_of_a_call()) == {"introkernels"}
        ik.use_backend("reference")
    # Leaving the block brings back what held before it.
    assert chosen() == "auto"


def test_blocks_nest(backend: str) -> None:
    assert chosen() == backend
    with ik.use_backend("reference"):
        with ik.use_backend("auto"):
            assert chosen() == "auto"
        assert chosen() == "reference"
    assert chosen() == backend


def test_choice_comes_back_after_an_exception(backend: str) -> None:
    with pytest.raises(KeyError), ik.use_backend("reference"):
        raise KeyError
    assert chosen() == backend


def test_block_whose_backend_is_unusable_changes_nothing() -> None:
    before = chosen()
    with pytest.raises(ValueError, match="backend must be one of"), ik.use_backend("none"):
        pass
    assert chosen() == before


def test_backward_uses_the_backend_of_its_forward(backend: str) -> None:
    case = distillation_case()
    logits = case["logits"].requires_grad_()
    loss = ik.distillation_loss(*case.arguments())
    other = "auto" if backend == "reference" else "reference"
    with ik.use_backend(other), Namespaces() as log:
        loss.backward()
    assert log.called == [backends.namespace(backend)]
    assert logits.grad is not None


def test_statistics_and_losses_use_the_chosen_backend(backend: str) -> None:
    gradients, inputs = torch.randn(4, 5, 6), torch.randn(4, 6)
    logits, target = torch.randn(4, 5), torch.arange(4)
    with Namespaces() as log:
        stats = ik.explanation_stats(gradients, inputs, target)
        ik.similarity_loss(logits, target, stats)
        ik.introspective_loss(logits, target, gradients, inputs)
        ik.linear_introspective_loss(inputs, gradients[0], target)
        ik.distillation_loss(logits, logits, target)
    # Teacher logits, and four losses beside the statistics.
    assert log.called == [backends.namespace(backend)] * 6


def test_forced_backend_refuses_tensors_elsewhere(backend: str) -> None:
    logits = torch.empty(4, 5, device="meta")
    target = torch.empty(4, dtype=torch.int64, device="meta")
    if backend in ("reference", "composite"):
        assert ik.distillation_loss(logits, logits, target).device.type == "meta"
        return
    with pytest.raises(ValueError, match=f"backend '{backend}' .*got a tensor on meta"):
        ik.distillation_loss(logits, logits, target)
    with pytest.raises(ValueError, match="introkernels.use_backend"):
        ik.explanation_stats(logits[..., None], logits[:, :1], target)


@pytest.mark.not_emulated("indices are checked as on a GPU")
@pytest.mark.on_cpu("what the variable does on a GPU is asked in tests/gpu")
def test_check_variable_is_not_needed_on_the_cpu(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = distillation_case(4, 5)
    bad = case.with_tensors(target=torch.tensor([0, 5, 1, 2]))
    for value in (None, "0", "1"):
        if value is None:
            monkeypatch.delenv("INTROKERNELS_CHECK", raising=False)
        else:
            monkeypatch.setenv("INTROKERNELS_CHECK", value)
        with pytest.raises(IndexError, match=r"target\[1\] is 5"):
            ik.distillation_loss(*bad.arguments())
        assert torch.isfinite(ik.distillation_loss(*case.arguments()))


def test_a_choice_may_be_entered_again_and_nested() -> None:
    reference = ik.use_backend("reference")
    with reference:
        assert chosen() == "reference"
    assert chosen() == "auto"
    with reference:
        with reference:
            assert chosen() == "reference"
        assert chosen() == "reference"
    assert chosen() == "auto"


def blocks_in_a_generator(*names: str) -> Iterator[str]:
    """Yields the choice in force within one block after another."""
    for name in names:
        with ik.use_backend(name):
            yield chosen()


@pytest.mark.parametrize("order", [*itertools.permutations(range(3))])
def test_generators_may_be_left_in_any_order(order: tuple[int, ...]) -> None:
    with ik.use_backend("auto"):
        generators = [blocks_in_a_generator(name) for name in ("reference", "auto", "reference")]
        assert [next(generator) for generator in generators] == ["reference", "auto", "reference"]
        for position in order:
            generators[position].close()
        assert chosen() == "auto"
    assert chosen() == "auto"


def test_a_block_within_a_generator_that_ends_first_stays_in_force() -> None:
    outer = blocks_in_a_generator("auto")
    next(outer)
    with ik.use_backend("reference"):
        outer.close()
        assert chosen() == "reference"
    assert chosen() == "auto"


def test_given_kernels_and_blocks_may_be_left_in_any_order() -> None:
    kernels = object()
    served, block = select.served_by(kernels), ik.use_backend("reference")
    served.__enter__()
    with block:
        served.__exit__(None, None, None)
        assert chosen() == "reference"
    assert chosen() == "auto"
    with select.served_by(kernels):
        assert select.operators(torch.device("meta")) is kernels
    assert chosen() == "auto"


def test_threads_choose_for_themselves() -> None:
    both = threading.Barrier(2, timeout=10)

    def choose(name: str) -> list[str]:
        seen = [chosen()]
        both.wait()
        for use in (ik.use_backend, lambda name: ik.use_backend(name).__enter__()):
            use(name)
            both.wait()
            seen.append(chosen())
            both.wait()
        return seen

    with ik.use_backend("reference"), ThreadPoolExecutor(2) as pool:
        first, second = pool.map(choose, ("auto", "reference"))
        assert chosen() == "reference"
    assert first == ["auto"] * 3
    assert second == ["auto", "reference", "reference"]


def test_tasks_choose_for_themselves() -> None:
    async def choose(name: str, use: Callable[[str], Any], started: asyncio.Barrier) -> list[str]:
        seen = [chosen()]
        with use(name):
            await started.wait()
            seen.append(chosen())
            await started.wait()
        return [*seen, chosen()]

    @contextmanager
    def setter(name: str) -> Iterator[None]:
        ik.use_backend(name)
        yield

    async def interleave() -> list[list[str]]:
        with ik.use_backend("reference"):
            started = asyncio.Barrier(3)
            seen = await asyncio.gather(
                choose("auto", ik.use_backend, started),
                choose("reference", ik.use_backend, started),
                choose("auto", setter, started),
            )
            assert chosen() == "reference"
        return seen

    inside, same, left = asyncio.run(interleave())
    assert inside == ["reference", "auto", "reference"]
    assert same == ["reference"] * 3
    assert left == ["reference", "auto", "auto"]
    assert chosen() == "auto"


def test_a_block_ends_wherever_it_is_left() -> None:
    """An event loop finishes an async generator in a task of its own, a pool in another thread."""

    async def numbers() -> AsyncIterator[int]:
        with ik.use_backend("reference"):
            yield 0
            yield 1

    async def stop_early() -> str:
        async for _ in numbers():
            assert chosen() == "reference"
            break
        for _ in range(5):
            await asyncio.sleep(0)
        return chosen()

    assert asyncio.run(stop_early()) == "auto"

    generator = blocks_in_a_generator("reference")
    next(generator)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(generator.close).result()
    assert chosen() == "auto"


def test_one_object_may_be_entered_by_several_threads() -> None:
    reference = ik.use_backend("reference")
    entered, left = threading.Event(), threading.Event()

    def outlive() -> str:
        with reference:
            entered.set()
            left.wait(10)
            return chosen()

    with ThreadPoolExecutor(1) as pool:
        with reference:
            seen = pool.submit(outlive)
            entered.wait(10)
        left.set()
        assert seen.result() == "reference"
    assert chosen() == "auto"


def test_a_choice_made_after_a_setter_outlives_its_block() -> None:
    with ik.use_backend("auto"):
        earlier = ik.use_backend("auto")
        ik.use_backend("reference")
        with earlier:
            assert chosen() == "auto"
        assert chosen() == "reference"
