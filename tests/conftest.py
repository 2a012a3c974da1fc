"""Fixtures of all tests: the backend under test, and a fixed seed for each test."""

from __future__ import annotations

import os
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from helpers import backends

import introkernels as ik

# The same examples every time; HYPOTHESIS_PROFILE=explore searches on.
hypothesis.settings.register_profile(
    "repeatable", deadline=None, derandomize=True, max_examples=200
)
hypothesis.settings.register_profile("explore", deadline=None, max_examples=5000)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run every test that asks for ``backend`` once on each backend under test.

    ``compiled_backend`` leaves out the definition, which stores every explanation by design.
    """
    names = backends.under_test()
    if "compiled_backend" in metafunc.fixturenames:
        names = [name for name in names if name != "reference"]
    if "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend", names, indirect=True)


def pytest_report_header() -> str:
    """Name the backends under test at the top of the run."""
    return f"introkernels backends under test: {', '.join(backends.under_test())}"


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The name of a backend that serves all losses during the test."""
    with ik.use_backend(request.param):
        yield request.param


@pytest.fixture
def compiled_backend(backend: str) -> str:
    """The name of a backend other than the definition that serves all losses during the test."""
    return backend


@pytest.fixture(autouse=True)
def _fixed_seed(request: pytest.FixtureRequest) -> None:
    torch.manual_seed(zlib.crc32(request.node.nodeid.encode()))
