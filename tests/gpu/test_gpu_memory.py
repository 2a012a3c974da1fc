"""What is allocated on the GPU, and how a benchmark measures it there."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch
from gpu_cases import leaves_of, on_gpu, results
from helpers.cases import introspective_case, linear_case

from introkernels.bench.contenders import CUDA, TRITON
from introkernels.bench.devices import COPY, Gpu
from introkernels.bench.model import Case, Contender, Suite
from introkernels.bench.operators.distillation import DISTILLATION
from introkernels.bench.operators.row_losses import DISTILLATION_BACKWARD
from introkernels.bench.runner import Settings, run_suite
from introkernels.ops.head.chunks import CHUNK_BYTES

pytestmark = pytest.mark.gpu

MEGABYTE = 1 << 20


def peak(work: Callable[[], object]) -> int:
    """The most bytes that PyTorch had allocated during the second of two calls, beyond before."""
    work()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def test_a_head_stores_no_logits_of_all_rows() -> None:
    rows, classes = 16_384, 32_000
    case = leaves_of(on_gpu(lambda: linear_case(rows, classes, width=16)))
    of_chunk = CHUNK_BYTES["others"] + 16 * MEGABYTE
    assert of_chunk < 4 * rows * classes
    assert peak(lambda: results(case)) < of_chunk


def test_a_head_needs_no_more_memory_for_more_rows() -> None:
    width, classes = 16, 32_000
    peaks = {}
    for rows in (2048, 8192):
        case = leaves_of(on_gpu(lambda rows=rows: linear_case(rows, classes, width=width)))
        peaks[rows] = peak(lambda case=case: results(case))
    # The gradient of the features, which the caller gets, and some numbers of each row.
    of_each_row = 4 * width + 4 * width + 256
    assert peaks[8192] - peaks[2048] < (8192 - 2048) * of_each_row + MEGABYTE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_explanations_are_never_stored(dtype: torch.dtype) -> None:
    case = leaves_of(on_gpu(lambda: introspective_case(32, 64, dtype, shape=(16, 32, 32))))
    assert peak(lambda: results(case)) < case["gradients"].nbytes // 8
    strided = case["gradients"].movedim(2, -1).contiguous().movedim(-1, 2)
    case = case.with_tensors(gradients=strided)
    assert peak(lambda: results(case)) < case["gradients"].nbytes // 8


CASE = Case(DISTILLATION, "small", "a small case", (512, 1024))
BACKWARD = Case(DISTILLATION_BACKWARD, "small", "a small case", (512, 1024))


def held(size: int) -> Callable[..., torch.Tensor]:
    def function(*tensors: torch.Tensor) -> torch.Tensor:
        torch.empty(size, dtype=torch.uint8, device="cuda")
        return tensors[0].sum()

    return function


def prepare_nothing(operator: object) -> object:
    raise AssertionError("what was prepared is handed over")


def test_a_benchmark_finds_known_sizes() -> None:
    tensors = CASE.draw(0, "cuda")
    gradient = tensors["logits"].nbytes
    contender = Contender("held", prepare_nothing)
    found = Gpu(1).peak(CASE, contender, held(64 * MEGABYTE), tensors)
    assert 64 * MEGABYTE <= found <= 64 * MEGABYTE + gradient + MEGABYTE


def test_a_benchmark_times_the_gpu_not_the_host() -> None:
    cycles = 20_000_000
    torch.cuda._sleep(cycles)
    torch.cuda.synchronize()
    start = time.perf_counter()
    torch.cuda._sleep(cycles)
    torch.cuda.synchronize()
    by_hand = time.perf_counter() - start
    # Starting it takes microseconds; how long it takes depends on what else the GPU does.
    assert Gpu(1).clock(lambda: torch.cuda._sleep(cycles), 3) > by_hand / 4


@pytest.mark.parametrize("device", ["cuda", "cuda-graphs"])
@pytest.mark.parametrize("case", [CASE, BACKWARD], ids=lambda case: case.operator.name)
def test_a_suite_runs_on_the_gpu(gpu_backend: str, case: Case, device: str) -> None:
    ours = {"cuda": CUDA, "triton": TRITON}[gpu_backend]
    suite = Suite("gpu", (case,), (ours,), device=device)
    settings = Settings(threads=1, budget=0.2, read_bytes=64 * MEGABYTE)
    (found,) = run_suite(suite, suite.cases, settings)
    by_name = {record["contender"]: record for record in found}
    assert set(by_name) == {ours.name, "sum", COPY}
    record = by_name[ours.name]
    assert record["status"] == "timed", record["reason"]
    assert record["percent_of_copy"] > 0
    assert record["memory"]["added"] < MEGABYTE
    assert record["machine"]["gpu"]["name"] == torch.cuda.get_device_name()
    assert record["versions"]["cuda"] == torch.version.cuda
