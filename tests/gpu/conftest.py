"""Tests that only a GPU can answer: `pytest -m gpu tests/gpu`, or `make gpu-check OUT=folder`.

Each runs on every backend of GPUs (`-k cuda` chooses one), and is skipped where its backend is not
loaded or there is no GPU; with INTROKERNELS_REQUIRE_GPU=1 it fails there.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

import introkernels as ik

REQUIRED = "INTROKERNELS_REQUIRE_GPU"
BACKENDS = ("cuda", "triton")


def pytest_configure() -> None:
    """Say once, and not for each test, that there is no GPU."""
    if os.environ.get(REQUIRED) == "1" and not torch.cuda.is_available():
        raise pytest.UsageError(f"torch {torch.__version__} sees no GPU, and {REQUIRED}=1")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every test on each backend; what is Triton's alone on Triton."""
    only = metafunc.definition.get_closest_marker("of_triton")
    metafunc.parametrize("gpu_backend", ("triton",) if only else BACKENDS, indirect=True)


@pytest.fixture(autouse=True)
def gpu_backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The backend of all losses during the test, which leaves nothing running."""
    name: str = request.param
    status = ik.backends.status()[name]
    if not torch.cuda.is_available() or status != "loaded":
        reason = f"needs a GPU and {name}: torch's CUDA {torch.version.cuda}, {name}: {status}"
        if os.environ.get(REQUIRED) == "1":
            pytest.fail(f"{reason}, and {REQUIRED}=1")
        pytest.skip(reason)
    with ik.use_backend(name):
        yield name
    torch.cuda.synchronize()
