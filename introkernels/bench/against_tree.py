"""Another revision of the project beside this one: its files, its libraries, its process."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from introkernels.bench.against import WorkerError
from introkernels.checkout import GitError, git

PACKAGE = "introkernels"
WORKER = Path(__file__).with_name("against_worker.py")
_STATUS = "_build_status.json"
# What the libraries of a device are built from, as git takes it.
_SOURCES = {
    "cpu": (
        "setup.py",
        "introkernels/ops/schema.py",
        "csrc",
        ":(exclude)csrc/cuda",
        ":(exclude)csrc/emulation",
    ),
    "cuda": (
        "setup.py",
        "introkernels/ops/schema.py",
        "setup_cuda.py",
        "csrc",
        ":(exclude)csrc/emulation",
    ),
}
_LIBRARIES = {"cpu": "_cpu.so", "cuda": "_cuda.so"}
# Of what a failed build or process said.
_LAST_LINES = 12
_SECONDS_TO_END = 10


class TreeError(RuntimeError):
    """A revision can't be measured; says why, and what to do where something can be done."""


def commit_of(root: Path, revision: str) -> str:
    """The full name of the commit that ``revision`` means.

    Raises:
        TreeError: there is none, or it has no benchmark.
    """
    try:
        commit = git(root, "rev-parse", "--verify", "--end-of-options", f"{revision}^{{commit}}")
    except GitError as error:
        raise TreeError(f"--against: {revision!r} names no commit of {root}") from error
    try:
        git(root, "cat-file", "-e", f"{commit}:./{PACKAGE}/bench/suites.py")
    except GitError as error:
        raise TreeError(f"--against: {revision} has no {PACKAGE} bench to measure it") from error
    return commit


def check_library(root: Path, device: str) -> None:
    """Raise TreeError if this tree's library was built before its sources were changed."""
    library = root / PACKAGE / _LIBRARIES[device]
    if not library.exists():
        return
    built = library.stat().st_mtime
    for name in git(root, "ls-files", "--cached", "--others", "--", *_SOURCES[device]).splitlines():
        source = root / name
        if source.exists() and source.stat().st_mtime > built:
            raise TreeError(
                f"--against: {PACKAGE}/{library.name} is older than {name}: `make build` first"
            )


def shares_libraries(root: Path, commit: str, device: str) -> bool:
    """Whether this tree's libraries are those of ``commit`` too: their sources are the same."""
    changed = git(root, "diff", "--name-only", commit, "--", *_SOURCES[device])
    added = git(root, "ls-files", "--others", "--exclude-standard", "--", *_SOURCES[device])
    return not changed and not added


@contextmanager
def tree_of(
    root: Path, commit: str, device: str, on_stage: Callable[[str], None] = lambda stage: None
) -> Iterator[Path]:
    """The project's folder at ``commit``, with its libraries; gone again afterwards.

    It is a worktree of the checkout in a temporary folder. Libraries whose sources are the same in
    ``root`` as it lies there are copied, others are built.

    Args:
        root: the project's folder in the checkout.
        device: ``"cpu"`` or ``"cuda"``: CUDA's library is built for the latter only.
        on_stage: told what is being done.

    Raises:
        TreeError: the worktree can't be made, or its libraries not be built.
    """
    with tempfile.TemporaryDirectory(prefix=f"{PACKAGE}-against-") as folder:
        worktree = Path(folder, "tree")
        prefix = git(root, "rev-parse", "--show-prefix")
        try:
            on_stage(f"checking out {commit[:10]}")
            # Hooks of the checkout are for people.
            quiet = ("-c", f"core.hooksPath={os.devnull}")
            git(root, *quiet, "worktree", "add", "--quiet", "--detach", str(worktree), commit)
            tree = worktree / prefix
            if shares_libraries(root, commit, device):
                _copy_libraries(root, tree)
            else:
                on_stage(f"building {commit[:10]}")
                _build(tree, device)
            yield tree
        except GitError as error:
            raise TreeError(f"--against: {error}") from error
        finally:
            with suppress(GitError):
                git(root, "worktree", "remove", "--force", "--force", str(worktree))
            shutil.rmtree(worktree, ignore_errors=True)
            with suppress(GitError):
                git(root, "worktree", "prune")


class Process:
    """A process that measures the package in ``tree``; a context manager, ready once entered."""

    def __init__(self, tree: Path, suite: str, threads: int, label: str) -> None:
        self._tree, self._label = tree, label
        self._arguments = (suite, str(threads))

    def __enter__(self) -> Process:
        path = os.pathsep.join(filter(None, (str(self._tree), os.environ.get("PYTHONPATH"))))
        self._said = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")
        # -P: the worker's own folder, that of the other revision, is no place to import from.
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(WORKER), *self._arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            text=True,
            encoding="utf-8",
            env=os.environ | {"PYTHONPATH": path},
        )
        try:
            self._greet()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._end()

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """What the process answers; see `introkernels.bench.against.Worker`."""
        assert self._process.stdin is not None
        try:
            print(json.dumps(request), file=self._process.stdin, flush=True)
        except OSError as error:
            raise self._ended() from error
        return self._answer()

    def _greet(self) -> None:
        greeting = self._answer()
        if "failed" in greeting:
            raise WorkerError(f"{self._label} can't be measured: {greeting['failed']}")
        expected = (self._tree / PACKAGE).resolve()
        if Path(greeting["package"]) != expected:
            raise WorkerError(
                f"{self._label}: Python found {greeting['package']} instead of {expected}"
            )

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise self._ended()
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _ended(self) -> WorkerError:
        self._process.wait(_SECONDS_TO_END)
        self._said.seek(0)
        said = _last_lines(self._said.read()) or "it said nothing; out of memory?"
        return WorkerError(
            f"{self._label}: the measuring process ended with status "
            f"{self._process.returncode}: {said}"
        )

    def _end(self) -> None:
        with suppress(OSError), self._process:
            assert self._process.stdin is not None
            self._process.stdin.close()
            try:
                self._process.wait(_SECONDS_TO_END)
            except subprocess.TimeoutExpired:
                self._process.kill()
        self._said.close()


def _copy_libraries(root: Path, tree: Path) -> None:
    for path in (root / PACKAGE).glob("*.so"):
        shutil.copy2(path, tree / PACKAGE)
    if (root / PACKAGE / _STATUS).exists():
        shutil.copy2(root / PACKAGE / _STATUS, tree / PACKAGE)


def _build(tree: Path, device: str) -> None:
    switches = {"INTROKERNELS_CPP": "1", "INTROKERNELS_CUDA": "1" if device == "cuda" else "0"}
    answer = subprocess.run(
        [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"],
        cwd=tree,
        env=os.environ | switches,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
    )
    if answer.returncode:
        raise TreeError(f"--against: its libraries can't be built: {_last_lines(answer.stdout)}")


def _last_lines(text: str) -> str:
    return "\n".join(text.strip().splitlines()[-_LAST_LINES:])
