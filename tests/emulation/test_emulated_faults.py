"""What is wrong with a kernel is caught, and said of the thread and the line that did it."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import emulation

KERNELS = Path(__file__).with_name("kernels")
SOURCE = KERNELS / "faults.cu"


def line_of(kernel: str) -> int:
    """The line of a kernel's fault, which ends in its name; 0 where no line is at fault."""
    lines = enumerate(SOURCE.read_text().splitlines(), 1)
    return next((number for number, text in lines if text.endswith(f"// {kernel}")), 0)


def place_of(kernel: str) -> str:
    """How a report names that line, as a regular expression."""
    return re.escape(f"{SOURCE.relative_to(emulation.ROOT)}:{line_of(kernel)}")


def report_of(library, kernel: str) -> str:
    """What a launch of the kernel throws."""
    with pytest.raises(RuntimeError) as caught:
        getattr(library, kernel)(torch.zeros(64, dtype=torch.int32))
    return str(caught.value)


def results(library, monkeypatch: pytest.MonkeyPatch, kernel: str, size: int) -> list[torch.Tensor]:
    """What a kernel of 128 threads gives in each order."""
    found = []
    for order in emulation.ORDERS:
        monkeypatch.setenv(emulation.ORDER_VARIABLE, order)
        out = torch.zeros(size, dtype=torch.int32)
        getattr(library, kernel)(out)
        found.append(out)
    return found


def test_missing_barrier_is_seen_in_every_order(library, monkeypatch: pytest.MonkeyPatch) -> None:
    thread = torch.arange(128, dtype=torch.int32)
    right = torch.stack([(thread + 32) % 128, (thread + 96) % 128], 1).flatten()
    for out in results(library, monkeypatch, "missing_barrier", 256):
        assert not torch.equal(out, right)


def test_missing_second_barrier_is_seen(library, monkeypatch: pytest.MonkeyPatch) -> None:
    thread = torch.arange(128, dtype=torch.int32)
    right = 2 * ((thread + 32) % 128) + 2 * ((thread + 96) % 128) + 2000
    for out in results(library, monkeypatch, "missing_second_barrier", 128):
        assert not torch.equal(out, right)


def test_missing_barrier_of_a_warp_is_seen(library, monkeypatch: pytest.MonkeyPatch) -> None:
    thread = torch.arange(128, dtype=torch.int32)
    for out in results(library, monkeypatch, "missing_warp_barrier", 256):
        assert not torch.equal(out[::2], thread ^ 1)


WRONG_CALLS = {
    "mask_without_caller": (
        r"__shfl_xor_sync at PLACE: its mask 0x0000ffff leaves out the calling lane \d+"
    ),
    "mask_of_exited_lanes": (
        "__shfl_xor_sync at PLACE: its mask 0xffffffff names lane 3, which ended"
    ),
    "mask_of_missing_lanes": (
        "__syncwarp at PLACE: its mask 0xffffffff names lanes 16, 17, 18, .*, 30, 31, which the "
        "block does not have"
    ),
    "different_masks": (
        r"__syncwarp at PLACE: its mask is 0x\w+, while lane \d+ of it waits in __syncwarp at "
        r"PLACE with the mask 0x\w+"
    ),
    "different_places": (
        r"__shfl_xor_sync at .*: lane \d+ of its mask 0xffffffff waits in another place, in "
        "__shfl_xor_sync"
    ),
    "source_outside_mask": (
        r"__shfl_xor_sync at PLACE: it takes the value of lane \d+, which its mask 0x0000ffff "
        "leaves out"
    ),
    "crossed_masks": (
        r"__syncwarp at PLACE: its mask is 0x0000000\d, while lane \d of it waits in __syncwarp at "
        r"PLACE with the mask 0x0000000\d"
    ),
}


@pytest.mark.parametrize("kernel", WRONG_CALLS)
def test_wrong_calls_of_a_warp(library, order: str, kernel: str) -> None:
    what = WRONG_CALLS[kernel].replace("PLACE", place_of(kernel))
    report = report_of(library, kernel)
    assert re.match(rf"kernel {kernel}, block \(0,0,0\), thread \(\d+,0,0\): {what}", report), (
        report
    )
    assert re.search(place_of(kernel), report), report


@pytest.mark.parametrize("kernel", ["divergent_barrier", "barrier_after_exit", "barrier_in_a_loop"])
def test_barriers_that_not_all_threads_reach(library, order: str, kernel: str) -> None:
    report = report_of(library, kernel)
    assert re.match(
        rf"kernel {kernel}, block \(0,0,0\), thread \(\d+,0,0\): .*divergent barrier: ", report
    ), report
    assert re.search(place_of(kernel), report), report


def test_both_places_of_a_divergent_barrier_are_named(library) -> None:
    line = line_of("divergent_barrier")
    assert re.search(
        rf"thread \(40,0,0\): __syncthreads at \S+:{line}: divergent barrier: 40 threads, the "
        rf"first of them thread \(0,0,0\), wait in __syncthreads at \S+:{line - 2}",
        report_of(library, "divergent_barrier"),
    )


def test_deadlock(library, order: str) -> None:
    report = report_of(library, "deadlock")
    line = line_of("deadlock")
    assert re.match(
        r"kernel deadlock, block \(0,0,0\): deadlock: 62 threads, the first of them thread "
        rf"\(0,0,0\), wait in __syncwarp at \S+:{line} for lane 3; 2 threads, the first of them "
        rf"thread \(3,0,0\), wait in __syncthreads at \S+:{line - 2}",
        report,
    ), report


def test_unwritten_shared_memory_is_not_a_number(library, order: str) -> None:
    out = torch.zeros(64)
    library.unwritten_shared_memory(out)
    assert out.isnan().all()


OVERRUNS = {
    "overrun": (
        r"\d+,0,0\): __syncthreads at PLACE: written to behind the end of the dynamic shared "
        "memory of 256 bytes, in bytes 0 to 7 behind it, before this call"
    ),
    "underrun": (
        r"\d+,0,0\): __syncwarp at PLACE: written to before the start of the dynamic shared "
        "memory, in bytes 1 to 8 before it, before this call"
    ),
    "overrun_at_the_end": (
        r"5,0,0\): written to behind the end of the dynamic shared memory of 256 bytes, in bytes 0 "
        "to 7 behind it, when this thread ended"
    ),
}


@pytest.mark.skipif(emulation.SANITIZED, reason="AddressSanitizer ends the process")
@pytest.mark.parametrize("kernel", OVERRUNS)
def test_writes_next_to_shared_memory(library, order: str, kernel: str) -> None:
    what = OVERRUNS[kernel].replace("PLACE", place_of(kernel))
    report = report_of(library, kernel)
    assert re.match(rf"kernel {kernel}, block \(0,0,0\), thread \({what}", report), report


# A process of its own, which AddressSanitizer ends.
CALL = """
import ctypes, sys, torch
library = ctypes.CDLL(sys.argv[1])
out = torch.zeros(64, dtype=torch.int32)
library[f"run_{sys.argv[2]}"](ctypes.c_void_p(out.data_ptr()))
"""


@pytest.mark.skipif(not emulation.SANITIZED, reason="AddressSanitizer does not watch")
@pytest.mark.parametrize("kernel", ["overrun", "overread"])
def test_sanitizer_sees_the_end_of_shared_memory(library, kernel: str) -> None:
    command = [sys.executable, "-c", CALL, str(library.path), kernel]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == -signal.SIGABRT
    assert "AddressSanitizer: heap-buffer-overflow" in result.stderr
    line = line_of("sanitized overrun" if kernel == "overrun" else kernel)
    assert f"{SOURCE.name}:{line}" in result.stderr


@pytest.mark.skipif(emulation.SANITIZED, reason="AddressSanitizer ends the process")
def test_what_lies_behind_shared_memory_is_not_a_number(library) -> None:
    out = torch.zeros(64, dtype=torch.int32)
    library.overread(out)
    behind = out[63:]
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert behind.view(dtype).isnan().all()


def test_block_and_thread_of_several_dimensions_are_named(library) -> None:
    report = report_of(library, "fault_in_block_2")
    assert re.match(
        r"kernel fault_in_block_2, block \(0,1,0\), thread \(0,1,1\): divergent barrier: this "
        r"thread ended, while 40 threads, the first of them thread \(0,0,0\), wait in "
        rf"__syncthreads at \S+:{line_of('fault_in_block_2')}",
        report,
    ), report


def test_kernels_run_on_after_a_report(library, order: str) -> None:
    x = torch.ones(9, 100)
    for kernel in ("deadlock", "different_places", "barrier_after_exit"):
        report_of(library, kernel)
        out = torch.zeros(9)
        library.row_sums(x, 9, 100, 256, out)
        assert torch.equal(out, x.sum(1))


def test_static_shared_memory_does_not_compile() -> None:
    with pytest.raises(RuntimeError, match=r"__shared__ is not emulated: use dynamic_shared\(\)"):
        emulation.build("static_shared", [KERNELS / "static_shared.cu"])
