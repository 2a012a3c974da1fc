"""What the chunked heads of all GPU backends share."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest
import torch

from introkernels.ops.head import chunks
from introkernels.ops.head.precision import full_float32


@pytest.mark.parametrize("classes", [10, 32_000, 1_000_000])
def test_chunks_are_bounded_and_whole_tiles(classes: int) -> None:
    rows = chunks.chunk_rows(1 << 30, classes, 64, 4)
    assert rows % chunks.TILE_ROWS == 0
    if rows > chunks.FEWEST_ROWS:
        assert 3 * (classes + 64) * 4 * rows <= chunks.CHUNK_BYTES
    assert chunks.chunk_rows(5, classes, 64, 4) == 5


def test_full_float32_for_a_while() -> None:
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32"
    try:
        inside, leave = threading.Event(), threading.Event()

        def another() -> None:
            with full_float32():
                inside.set()
                leave.wait()

        with full_float32():
            thread = threading.Thread(target=another)
            thread.start()
            inside.wait()
            assert matmul.fp32_precision == "ieee"
        # Another thread still counts on it.
        assert matmul.fp32_precision == "ieee"
        leave.set()
        thread.join()
        assert matmul.fp32_precision == "tf32"
    finally:
        matmul.fp32_precision = before


def test_the_cuda_head_needs_no_triton() -> None:
    program = "import sys; sys.modules['triton'] = None; import introkernels.ops.cuda.head"
    subprocess.run([sys.executable, "-c", program], check=True)
