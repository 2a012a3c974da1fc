"""What small calls launch and allocate, held to the table in benchmarks/README.md."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from helpers import emulated_backend
from helpers.small_calls import CASES, Count, assert_in_table, directions

from introkernels.ops import composite, select
from introkernels.ops.head.operators import chunk_loss_of, chunked_linear
from introkernels.options import Options

ROWS, CLASSES, DIMS = 128, 10, 784


def counted(work: Callable[[], object]) -> Count:
    """Launches as the emulation counts them, allocations as PyTorch's profiler sees them."""
    library = ctypes.CDLL(str(emulated_backend.library()))

    def given() -> tuple[int, int]:
        return library.introkernels_emulated_launches(), library.introkernels_emulated_memsets()

    before = given()
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        work()
    launches, memsets = (after - then for after, then in zip(given(), before, strict=True))
    events = profiler.profiler.kineto_results.events()
    allocated = [e for e in events if e.name() == "[memory]" and e.nbytes() > 0]
    return Count(launches, memsets, len(allocated))


@pytest.fixture(scope="module")
def of_operator() -> dict[str, Count]:
    """What each operator amounts to that is one call into the library."""
    operators = select.SERVING["cuda"].operators
    options = Options(4.0, 0.7, 0.3, 0.0, -100, 1)
    numbers = options.floats, options.ints
    logits, teacher = torch.randn(2, ROWS, CLASSES)
    target = torch.randint(CLASSES, (ROWS,))
    gradients, inputs = torch.randn(ROWS, CLASSES, DIMS), torch.randn(ROWS, DIMS)
    row_loss = logits, teacher, target, None
    state = operators.row_loss_forward(*row_loss, *numbers)[-1]
    explained = logits, target, gradients, inputs, None, None
    incoming = torch.ones(())
    return {
        "row_loss_forward": counted(lambda: operators.row_loss_forward(*row_loss, *numbers)),
        "row_loss_backward": counted(
            lambda: operators.row_loss_backward(incoming, *row_loss, state, *numbers)
        ),
        "introspective_forward": counted(
            lambda: operators.introspective_forward(*explained, *numbers)
        ),
    }


@pytest.mark.parametrize("name", CASES)
def test_small_calls_are_those_of_the_table(name: str, of_operator: dict[str, Count]) -> None:
    operators = select.SERVING["cuda"].operators
    row_losses = operators.row_loss_forward, operators.row_loss_backward
    # Functions for what the library does not have, so that their operations are seen.
    kernels = SimpleNamespace(**vars(operators))
    kernels.teacher_logits = composite.teacher_logits
    kernels.linear = chunked_linear(chunk_loss_of(*row_losses))
    assert_in_table(name, "CUDA", *directions(name, kernels, of_operator))
