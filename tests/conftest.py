"""Fixtures of all tests: the backend under test, and a fixed seed for each test."""

from __future__ import annotations

import gc
import os
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parent))

from helpers import backends

import introkernels as ik

# In which order the emulation of CUDA runs threads; see csrc/emulation/emulation.h.
ORDER_VARIABLE = "INTROKERNELS_EMULATION_ORDER"
TESTS = Path(__file__).resolve().parent
TRITON_TESTS = TESTS / "triton"
CUDA_TESTS = TESTS / "cuda"
EMULATION_TESTS = TESTS / "emulation"

if backends.interpreted():
    from helpers import kernel_lines
    from helpers.interpreter import patch_the_language_once

    patch_the_language_once()
    kernel_lines.watch()

# The same examples every time; HYPOTHESIS_PROFILE=explore searches on.
hypothesis.settings.register_profile(
    "repeatable", deadline=None, derandomize=True, max_examples=200
)
hypothesis.settings.register_profile("explore", deadline=None, max_examples=5000)
# Triton's interpreter takes a thousand times as long as a kernel.
hypothesis.settings.register_profile(
    "interpreted", deadline=None, derandomize=True, max_examples=15
)
# The emulation of a GPU's threads takes ten times as long as a kernel.
hypothesis.settings.register_profile("emulated", deadline=None, derandomize=True, max_examples=40)
# On a GPU nearly every example has kernels of its own to compile.
hypothesis.settings.register_profile("gpu", deadline=None, derandomize=True, max_examples=30)
if backends.interpreted():
    USUAL_PROFILE = "interpreted"
elif backends.emulated():
    USUAL_PROFILE = "emulated"
else:
    USUAL_PROFILE = "gpu" if backends.device() == "cuda" else "repeatable"
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", USUAL_PROFILE))


def pytest_addoption(parser: pytest.Parser) -> None:
    """What only the run of Triton's interpreter asks for."""
    parser.addoption(
        "--all-kernel-lines",
        action="store_true",
        help="fail unless every line of the Triton kernels runs (in Triton's interpreter)",
    )
    parser.addoption(
        "--at-most",
        type=int,
        metavar="CASES",
        help="run at most so many of each test's parametrised cases, spread over all of them",
    )


def pytest_configure() -> None:
    """Say once, and not for each test, that a backend which was asked for can't be tested."""
    try:
        backends.under_test()
    except ValueError as error:
        raise pytest.UsageError(str(error)) from error


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail where lines of kernels never ran; one of several processes tells which ones did."""
    if not (session.config.getoption("--all-kernel-lines") and backends.interpreted()):
        return
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["kernel_lines"] = kernel_lines.ran()
    elif session.exitstatus == pytest.ExitCode.OK and kernel_lines.missing():
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Take in which lines of kernels ran in one of several processes."""
    if "kernel_lines" in getattr(node, "workeroutput", {}):
        kernel_lines.add(node.workeroutput["kernel_lines"])


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Name the lines of kernels that never ran."""
    if config.getoption("--all-kernel-lines") and backends.interpreted():
        gaps = kernel_lines.missing()
        terminalreporter.section("lines of Triton kernels")
        for file, lines in gaps.items():
            terminalreporter.write_line(f"{file.name}: never ran {', '.join(map(str, lines))}")
        if not gaps:
            terminalreporter.write_line("all of them ran")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run every test that asks for ``backend`` once on each backend under test.

    ``compiled_backend`` leaves out those without kernels, which store every explanation.
    """
    names = backends.under_test()
    if "compiled_backend" in metafunc.fixturenames:
        names = [name for name in names if name not in ("reference", "composite")]
    if "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend", names, indirect=True)


def pytest_report_header() -> list[str]:
    """Name the backends under test at the top of the run, and what is left to another run."""
    names = ", ".join(backends.under_test())
    lines = [f"introkernels backends under test: {names}, on {backends.device()}"]
    if backends.interpreted():
        lines.append("Triton's interpreter: tests that take no backend are left to another run")
    elif backends.emulated():
        lines.append(
            "CUDA's emulation: tests that take no backend are left to another run; order: "
            f"{os.environ.get(ORDER_VARIABLE) or 'ascending'}"
        )
    else:
        lines.append(
            "tests/triton is left to a process with TRITON_INTERPRET=1 and "
            f"{backends.ENVIRONMENT_VARIABLE}=triton"
        )
    return lines


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Leave out the tests of how kernels are run where those kernels are not what is tested."""
    if collection_path == TRITON_TESTS:
        return None if backends.interpreted() else True
    if collection_path == CUDA_TESTS:
        return None if backends.emulated() else True
    if collection_path == EMULATION_TESTS:
        return True if backends.interpreted() or backends.device() != "cpu" else None
    return None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Under the interpreter, the emulation and on a GPU, leave out what means nothing there."""
    _keep_together(items)
    at_most = config.getoption("--at-most")
    if at_most:
        _thin_out(config, items, at_most)
    if backends.interpreted():
        out_of_place = "not_interpreted"
    elif backends.emulated():
        out_of_place = "not_emulated"
    elif backends.device() != "cpu":
        out_of_place = "on_cpu"
    else:
        return

    def belongs(item: pytest.Item) -> bool:
        if item.get_closest_marker(out_of_place):
            return False
        # The definition and automatic choices are the same in every process.
        return _is_of_kernels(item) or "backend" in getattr(item, "fixturenames", ())

    left_out = [item for item in items if not belongs(item)]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if belongs(item)]


def _is_of_kernels(item: pytest.Item) -> bool:
    """Whether a test is one of how kernels are run, which asks for no backend."""
    return not {TRITON_TESTS, CUDA_TESTS, EMULATION_TESTS}.isdisjoint(item.path.parents)


# Of these folders only the modules named have fixtures that several tests look at.
SPREAD_FOLDERS = ("losses", "head", "explain")
WHOLE_MODULES = ("test_capability", "test_distributed")


def _keep_together(items: list[pytest.Item]) -> None:
    """Give tests that look at what one fixture built, trained or started to one process.

    Those of tests/packaging share wheels, those of a module all else. Any other test goes to
    whichever process is free (pytest-xdist's ``--dist loadgroup``).
    """
    for item in items:
        folder = item.path.parent.relative_to(TESTS).parts[:1]
        if folder == ("packaging",):
            item.add_marker(pytest.mark.xdist_group("packaging"))
        elif item.path.stem in WHOLE_MODULES or not {*folder} <= {*SPREAD_FOLDERS}:
            item.add_marker(pytest.mark.xdist_group(item.path.stem))


def _thin_out(config: pytest.Config, items: list[pytest.Item], at_most: int) -> None:
    """Keep ``at_most`` cases of each test, no regular pick of them, and others in each order.

    Which ones does not change from run to run.
    """
    order = os.environ.get(ORDER_VARIABLE, "")

    def pick(item: pytest.Item) -> int:
        return zlib.crc32((item.nodeid + order).encode())

    cases: dict[str, list[pytest.Item]] = {}
    for item in items:
        # Tests of the kernels themselves are made for where they run: none is left out.
        whole = _is_of_kernels(item)
        cases.setdefault(item.nodeid if whole else item.nodeid.partition("[")[0], []).append(item)
    kept = {item for group in cases.values() for item in sorted(group, key=pick)[:at_most]}
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = [item for item in items if item in kept]


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The name of a backend that serves all losses during the test.

    Tensors that the test makes lie on the device under test.
    """
    with ik.use_backend(request.param), _default_device(backends.device()):
        yield request.param


@contextmanager
def _default_device(device: str) -> Iterator[None]:
    # Not where it changes nothing: to PyTorch it is a mode that sees every call.
    if device == "cpu":
        yield
        return
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


@pytest.fixture
def compiled_backend(backend: str) -> str:
    """The name of a backend with kernels that serves all losses during the test."""
    return backend


@pytest.fixture
def indices_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bad indices raise, as they do on the CPU, on a GPU too, where it has to be asked for."""
    if backends.device() == "cuda" or backends.emulated():
        monkeypatch.setenv("INTROKERNELS_CHECK", "1")


@pytest.fixture
def process_group() -> Iterator[dist.ProcessGroup]:
    """A group of this process alone.

    It ends after the test's own variables: a model that is the last to hold a group lets go of it
    under the interpreter's lock, and waits for the group's threads, which may wait for that lock.
    """
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    group = dist.group.WORLD
    assert group is not None
    yield group
    gc.collect()
    dist.destroy_process_group()


@pytest.fixture(autouse=True)
def _fixed_seed(request: pytest.FixtureRequest) -> None:
    # Without the name of its group, which pytest-xdist appends.
    name = request.node.nodeid.partition("@")[0]
    torch.manual_seed(zlib.crc32(name.encode()))
