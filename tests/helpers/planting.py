"""Tests run where a fault was planted: on copies of the package, or of a library of its kernels.

A run is a process of its own. What takes long, importing torch and Triton, is done once: a process
that has imported them forks for each run.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

TESTS = Path(__file__).resolve().parent.parent
KERNELS = Path("ops", "triton", "kernels")
# Two at a time: each keeps one core busy.
AT_A_TIME = 2
TIME_LIMIT = 900
ENDED_EARLY = -1


class Work(NamedTuple):
    """Tests to run.

    Attributes:
        folder: an empty one, or that of the copy, for what is found.
        root: what holds the package.
        tests: their ids below tests/.
        environment: variables of their process.
    """

    folder: Path
    root: Path
    tests: Sequence[str]
    environment: Mapping[str, str]


class Run(NamedTuple):
    """What came of the tests of one process.

    Attributes:
        status: pytest's exit status, or ``ENDED_EARLY`` where the process died.
        passed: the tests that passed.
        failed: the tests that failed, each with the failure's type and its first line.
        output: what was printed.
    """

    status: int
    passed: list[str]
    failed: dict[str, list[str]]
    output: str


def copy(package: Path, folder: Path) -> Path:
    """Copy ``package`` into ``folder``, without compiled libraries; returns the copy."""
    return shutil.copytree(package, folder / package.name, ignore=shutil.ignore_patterns("*.so"))


def plant(package: Path, folder: Path, file: str, line: str, replacement: str) -> None:
    """Copy ``package`` into ``folder``, with ``line`` of one of its kernel files replaced.

    Raises:
        ValueError: the file does not have the line exactly once.
    """
    path = copy(package, folder) / KERNELS / file
    source = path.read_text()
    if source.count(line) != 1:
        raise ValueError(f"{file} has {line!r} {source.count(line)} times")
    path.write_text(source.replace(line, replacement))


def run_all(
    work: Sequence[Work], environment: Mapping[str, str], modules: Sequence[str] = ()
) -> list[Run]:
    """Do the work, a process each, under variables that all of them share.

    ``modules`` are imported before the others, once.
    """
    usual = {
        name: value
        for name, value in os.environ.items()
        # Nobody asks how much of a copy was reached.
        if not name.startswith(("COV_CORE_", "COVERAGE_", "PYTEST_"))
    }
    process = subprocess.run(
        [sys.executable, "-m", "helpers.planting", *modules],
        input=json.dumps(work, default=str),
        capture_output=True,
        text=True,
        cwd=TESTS,
        env={**usual, **environment},
        timeout=TIME_LIMIT,
    )
    if process.returncode:
        raise RuntimeError(process.stdout + process.stderr)
    runs = []
    for folder, *_ in work:
        output = (folder / "output").read_text()
        found = folder / "found.json"
        if found.exists():
            runs.append(Run(**json.loads(found.read_text()), output=output))
        else:
            runs.append(Run(ENDED_EARLY, [], {}, output))
    return runs


class _Recorder:
    """Takes down which tests passed, and how others failed."""

    def __init__(self) -> None:
        self.passed: list[str] = []
        self.failed: dict[str, list[str]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" and report.passed:
            self.passed.append(report.nodeid)

    def pytest_exception_interact(self, node: Any, call: pytest.CallInfo[Any]) -> None:
        assert call.excinfo is not None
        is_wrong = call.when == "call" and call.excinfo.errisinstance(AssertionError)
        kind = "AssertionError" if is_wrong else f"{call.when}: {call.excinfo.typename}"
        first_line = (str(call.excinfo.value).splitlines() or [""])[0]
        self.failed[node.nodeid] = [kind, first_line]


def _run_in_this_process(folder: Path, root: Path, tests: list[str]) -> None:
    """Run tests on the package in ``root``, and leave in ``folder`` what was found."""
    output = os.open(folder / "output", os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.chdir(folder)
    sys.path.insert(0, str(root))
    recorder = _Recorder()
    repository = TESTS.parent
    status = pytest.main(
        [
            *("-q", "--tb=native", "-p", "no:cacheprovider", "--rootdir", str(repository)),
            *("-c", str(repository / "pyproject.toml")),
            # Of hypothesis, which is here already.
            *("-W", "ignore::pytest.PytestAssertRewriteWarning"),
            *(str(TESTS / test) for test in tests),
        ],
        plugins=[recorder],
    )
    import introkernels

    if Path(introkernels.__file__).parent.parent != root.resolve():
        raise RuntimeError(f"the tests ran on {introkernels.__file__}")
    found = {"status": int(status), "passed": recorder.passed, "failed": recorder.failed}
    (folder / "found.json").write_text(json.dumps(found))


def _main() -> None:
    # Shared by all forks.
    for name in ("hypothesis", "mpmath", "torch", *sys.argv[1:]):
        importlib.import_module(name)
    running = 0
    for folder, root, tests, environment in json.load(sys.stdin):
        if running == AT_A_TIME:
            os.wait()
            running -= 1
        if os.fork() == 0:
            try:
                os.environ.update(environment)
                _run_in_this_process(Path(folder), Path(root), tests)
            except BaseException:
                traceback.print_exc()
            finally:
                # Neither this process's own exit nor the loop is the fork's.
                sys.stdout.flush()
                os._exit(0)
        running += 1
    while running:
        os.wait()
        running -= 1


if __name__ == "__main__":
    _main()
