"""The CUDA backend serves all of these tests, under the emulation."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import introkernels as ik


@pytest.fixture(autouse=True)
def _on_cuda() -> Iterator[None]:
    with ik.use_backend("cuda"):
        yield
