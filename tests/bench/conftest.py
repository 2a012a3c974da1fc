from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from introkernels.cli import BENCH_EXTRA

sys.path.insert(0, str(Path(__file__).resolve().parent))
# The scripts that are tested.
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

try:
    from introkernels.bench import cli as _needs_the_whole_extra  # noqa: F401
except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] not in BENCH_EXTRA:
        raise
    # Without the extra `bench` there is nothing to test here.
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    """Small tensors on several threads of a busy machine mostly wait."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
