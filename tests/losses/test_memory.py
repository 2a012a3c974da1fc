"""What the compiled kernels allocate: never the explanations of all classes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.cases import Case, introspective_case, linear_case
from helpers.oracle import evaluate
from torch.profiler import ProfilerActivity, profile

import introkernels as ik

MEGABYTE = 1 << 20


def peak_of_tensors(work: Callable[[], object]) -> int:
    """The most bytes that PyTorch had allocated at any time during ``work``, beyond before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    held = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def peak_of_process(work: Callable[[], object]) -> int:
    """By how many bytes the process grew at most, whoever allocated them."""
    reset = Path("/proc/self/clear_refs")
    try:
        reset.write_text("5")
    except OSError:
        pytest.skip("the kernel doesn't let a process reset its peak memory")

    def status(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024

    before = status("VmRSS:")
    work()
    return status("VmHWM:") - before


PEAKS = (peak_of_tensors, peak_of_process)


def explained(dtype: torch.dtype, layout: str) -> Case:
    """Explanations of 64 MB in float32."""
    case = introspective_case(16, 64, shape=(16, 32, 32), ignored=1)
    gradients = case["gradients"].to(dtype)
    if layout == "channels-last":
        gradients = gradients.movedim(2, -1).contiguous().movedim(-1, 2)
    return case.with_tensors(gradients=gradients)


@pytest.mark.parametrize("peak", PEAKS, ids=lambda peak: peak.__name__)
@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_explanations_are_never_stored(
    compiled_backend: str, dtype: torch.dtype, layout: str, peak: Callable[..., int]
) -> None:
    case = explained(dtype, layout)
    stats = lambda: ik.explanation_stats(  # noqa: E731
        case["gradients"], case["inputs"], case["target"], center=True
    )
    evaluate(case)
    stats()
    of_explanations = case["gradients"].numel() * case["gradients"].element_size()
    assert peak(lambda: evaluate(case)) < of_explanations // 8
    assert peak(stats) < of_explanations // 8


def test_logits_of_a_head_are_never_stored_as_a_whole(compiled_backend: str) -> None:
    rows, classes = 2048, 32_000
    case = linear_case(rows, classes, width=8, ignored=1)
    of_logits = 4 * rows * classes
    tensors: list[int] = []
    process = peak_of_process(lambda: tensors.append(peak_of_tensors(lambda: evaluate(case))))
    assert tensors[0] < of_logits // 4
    # The process has matrix products' own buffers and the allocator's holes on top.
    assert process < of_logits


def test_backward_keeps_a_few_numbers_of_each_row(compiled_backend: str) -> None:
    """Between forward and backward a loss holds its arguments and ``C``-free state."""
    logits = torch.randn(512, 1024, requires_grad=True)
    teacher, target = torch.randn(512, 1024), torch.randint(1024, (512,))
    losses = []
    grown = peak_of_tensors(lambda: losses.append(ik.distillation_loss(logits, teacher, target)))
    assert grown < MEGABYTE // 4
    assert losses[0].requires_grad


def test_more_elements_than_32_bits_count(compiled_backend: str) -> None:
    """Pages that are only read cost no memory, so these 4 GiB of gradients are mostly virtual."""
    size = (1 << 29) + 9
    gradients = torch.empty(2, 2, size, dtype=torch.bfloat16)
    inputs = torch.empty(2, size, dtype=torch.bfloat16)
    assert gradients.numel() > 1 << 31
    gradients[0, :, :4], inputs[0, :4] = 1.0, 1.0
    gradients[1, 0, -4:], gradients[1, 1, -4:], inputs[1, -4:] = 1.0, -2.0, 3.0
    stats = ik.explanation_stats(gradients, inputs, torch.tensor([0, 1]))
    assert stats.dots.tolist() == [[4.0, 4.0], [-72.0, 144.0]]
    assert stats.sq_norms.tolist() == [[4.0, 4.0], [36.0, 144.0]]
