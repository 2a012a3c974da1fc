"""INTROKERNELS_CUDA_STATISTICS, where the device lacks the kernels or the name is wrong."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import introkernels as ik

VARIABLE = "INTROKERNELS_CUDA_STATISTICS"
TESTS = Path(__file__).resolve().parents[1]
# Both operators that find statistics, twice: a choice that failed is not forgotten.
CALLS = """
import torch
import introkernels as ik
from helpers import emulated_backend

emulated_backend.serve()
gradients, inputs, target = torch.randn(3, 5, 16), torch.randn(3, 16), torch.arange(3)
for call in 2 * (
    lambda: ik.explanation_stats(gradients, inputs, target),
    lambda: ik.introspective_loss(torch.randn(3, 5), target, gradients, inputs),
):
    with ik.use_backend("cuda"):
        try:
            call()
            print("done")
        except ValueError as error:
            print(error)
"""


def outcomes(choice: str) -> list[str]:
    """What came of each call in a process that made that choice."""
    paths = [str(TESTS), str(Path(ik.__file__).resolve().parents[1])]
    result = subprocess.run(
        [sys.executable, "-c", CALLS],
        env=os.environ | {VARIABLE: choice, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


@pytest.mark.parametrize("choice", ["auto", "portable"])
def test_kernels_of_every_gpu(choice: str) -> None:
    assert outcomes(choice) == 4 * ["done"]


def test_kernels_that_this_device_lacks() -> None:
    told = f"introkernels: {VARIABLE}=bulk needs a GPU of compute capability 9.0 or later"
    assert outcomes("bulk") == 4 * [f"{told}, this one has 8.0"]


@pytest.mark.parametrize("choice", ["Bulk", "bulk ", ""])
def test_kernels_that_nobody_knows(choice: str) -> None:
    told = f"introkernels: {VARIABLE} must be auto, portable or bulk, got '{choice}'"
    assert outcomes(choice) == 4 * [told]
