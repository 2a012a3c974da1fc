"""What the compiled kernels allocate: never the explanations of all classes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.cases import Case, introspective_case, linear_case
from helpers.oracle import evaluate
from torch.profiler import ProfilerActivity, profile

import introkernels as ik
from introkernels.ops.schema import ROW_STATE

pytestmark = [
    pytest.mark.not_interpreted("the interpreter computes in NumPy's memory"),
    pytest.mark.not_emulated("a GPU's memory is measured in tests/gpu"),
    pytest.mark.on_cpu("a GPU's memory is measured in tests/gpu"),
]

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
    if layout == "gaps":
        gradients = gradients.repeat_interleave(2, -1)[..., ::2]
    return case.with_tensors(gradients=gradients)


@pytest.mark.parametrize("peak", PEAKS, ids=lambda peak: peak.__name__)
@pytest.mark.parametrize("layout", ["contiguous", "channels-last", "gaps"])
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


def test_a_head_needs_no_more_memory_for_more_rows(compiled_backend: str) -> None:
    """Beyond the gradient of the features, which the caller gets, and a few numbers of each row."""
    width, classes = 8, 32_000
    peaks = {}
    for rows in (256, 1024):
        case = linear_case(rows, classes, width=width, ignored=1)
        evaluate(case)
        peaks[rows] = peak_of_tensors(lambda case=case: evaluate(case))
    of_each_row = 4 * width + 8 * ROW_STATE + 64
    assert peaks[1024] - peaks[256] < (1024 - 256) * of_each_row
    assert peaks[1024] < 4 * 1024 * classes


HEAD_PEAKS = """
import sys
from pathlib import Path
import torch
import torch.nn.functional as F
import introkernels as ik

torch.set_num_threads(2)
ROWS, CLASSES, WIDTH, TEMPERATURE = 256, 1000, 2048, 4.0


def eager(features, weight, target):
    logits = features @ weight.T
    with torch.no_grad():
        squares = features * features
        dots = (squares * weight[target]) @ weight.T
        sq_norms = squares @ (weight * weight).T
        of_target = sq_norms.gather(1, target[:, None])
        similarity = (dots / (sq_norms.sqrt() * of_target.sqrt())).clamp(-1, 1)
        q = torch.softmax(similarity / TEMPERATURE, 1)
    kl = F.kl_div(F.log_softmax(logits / TEMPERATURE, 1), q, reduction="batchmean")
    return 0.7 * F.cross_entropy(logits, target) + 0.3 * TEMPERATURE**2 * kl


def status(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024


def added(loss_function, gradients_of_forward, rows=ROWS):
    features = torch.randn(rows, WIDTH, requires_grad=True)
    weight = (torch.randn(CLASSES, WIDTH) * 0.07).requires_grad_()
    target = torch.randint(CLASSES, (rows,))
    gradients = 4 * (rows + CLASSES) * WIDTH
    before = status("VmRSS:")
    Path("/proc/self/clear_refs").write_text("5")
    loss = loss_function(features, weight, target)
    peak = status("VmHWM:") - before - gradients * gradients_of_forward
    Path("/proc/self/clear_refs").write_text("5")
    loss.backward()
    return max(peak, status("VmHWM:") - before - gradients)


for name in ("eager", "ours"):
    function = eager if name == "eager" else ik.linear_introspective_loss
    added(function, name == "ours", rows=16)
    print(added(function, name == "ours"))
"""


def test_a_head_adds_less_than_a_quarter_of_what_eager_adds(compiled_backend: str) -> None:
    """Beyond inputs and gradients, at the size of a classifier of images."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pytest.skip("the kernel doesn't let a process reset its peak memory")
    # With a threshold of its own, the allocator gives every large block back at once.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_WAIT_POLICY": "PASSIVE"}
    result = subprocess.run(
        [sys.executable, "-c", HEAD_PEAKS],
        env={**environment, "PYTHONPATH": str(Path(ik.__file__).parent.parent)},
        capture_output=True,
        text=True,
        check=True,
    )
    eager, ours = (int(line) for line in result.stdout.split())
    assert ours < eager / 4


def test_backward_keeps_a_few_numbers_of_each_row(compiled_backend: str) -> None:
    """Between forward and backward a loss holds its arguments and ``C``-free state."""
    logits = torch.randn(512, 1024, requires_grad=True)
    teacher, target = torch.randn(512, 1024), torch.randint(1024, (512,))
    losses = []
    grown = peak_of_tensors(lambda: losses.append(ik.distillation_loss(logits, teacher, target)))
    assert grown < MEGABYTE // 4
    assert losses[0].requires_grad
