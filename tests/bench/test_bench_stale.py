"""Which measurements are older than the code that they measured, told by a repository of a test."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bench_records import record

from introkernels import checkout
from introkernels.bench import stale, tables
from introkernels.bench.stale import Age

KERNEL = "csrc/cpu/kernel.cpp"
FILES = (
    *(KERNEL, "csrc/cuda/kernel.cu", "introkernels/ops/schema.py", "introkernels/reference.py"),
    *("introkernels/ops/triton/launch.py", "introkernels/explain/exact.py", "README.md"),
    *("introkernels/bench/runner.py", "introkernels/bench/operators/head.py"),
)
GPU = {"machine": {"cpu": "Some CPU", "cores": 2, "load": 0.0, "gpu": {"name": "Some GPU"}}}


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    root = tmp_path / "repository"
    for name in FILES:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("before\n")
    git(root, "init", "--quiet")
    commit(root)
    return root


def git(root: Path, *arguments: str) -> str:
    who = ("-c", "user.name=T", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false")
    answer = subprocess.run(
        ["git", *who, *arguments], cwd=root, check=True, capture_output=True, text=True
    )
    return answer.stdout.strip()


def commit(root: Path) -> None:
    git(root, "add", "--all")
    git(root, "commit", "--quiet", "--message", "a commit")


def age(root: Path | None, revision: str, **fields: Any) -> Age:
    commit = {"revision": revision, "changed": False}
    return stale.ages(root)(record("cpp", 1.0, **{"commit": commit, **fields}))


@pytest.mark.parametrize("committed", [True, False])
@pytest.mark.parametrize(
    ("changed", "fields", "expected"),
    [
        (KERNEL, {}, Age.OLDER),
        (KERNEL, GPU, Age.CURRENT),
        ("csrc/cuda/kernel.cu", {}, Age.CURRENT),
        ("csrc/cuda/kernel.cu", GPU, Age.OLDER),
        ("introkernels/ops/triton/launch.py", {}, Age.CURRENT),
        ("introkernels/ops/triton/launch.py", GPU, Age.OLDER),
        ("introkernels/ops/schema.py", {}, Age.OLDER),
        ("introkernels/reference.py", {"operator": "head"}, Age.OLDER),
        ("introkernels/explain/exact.py", {"operator": "head"}, Age.CURRENT),
        ("introkernels/explain/exact.py", {"operator": "step-resnet20"}, Age.OLDER),
        ("introkernels/bench/operators/head.py", {}, Age.OLDER),
        ("introkernels/bench/runner.py", {}, Age.CURRENT),
        ("README.md", {}, Age.CURRENT),
    ],
)
def test_a_case_is_older_if_a_file_of_its_operator_changed(
    repository: Path, changed: str, fields: dict[str, Any], expected: Age, committed: bool
) -> None:
    revision = git(repository, "rev-parse", "HEAD")
    assert age(repository, revision, **fields) is Age.CURRENT
    (repository / changed).write_text("after\n")
    if committed:
        commit(repository)
    assert age(repository, revision, **fields) is expected


def test_a_removed_file_counts_and_an_added_one_does_not(repository: Path) -> None:
    revision = git(repository, "rev-parse", "HEAD")
    (repository / "csrc/cpu/another.cpp").write_text("new\n")
    commit(repository)
    assert age(repository, revision) is Age.CURRENT
    (repository / KERNEL).unlink()
    assert age(repository, revision) is Age.OLDER


def test_a_change_that_was_taken_back_leaves_nothing(repository: Path) -> None:
    revision = git(repository, "rev-parse", "HEAD")
    for text in ("after\n", "before\n"):
        (repository / KERNEL).write_text(text)
        commit(repository)
    assert age(repository, revision) is Age.CURRENT


@pytest.mark.parametrize(
    "why",
    ["no commit", "changed when measured", "commit of elsewhere", "no checkout", "no repository"],
)
def test_the_age_is_unknown_without_the_commit(repository: Path, why: str, tmp_path: Path) -> None:
    revision = git(repository, "rev-parse", "HEAD")
    changed = {"revision": revision, "changed": True}
    found = {
        "no commit": lambda: age(repository, revision, commit=None),
        "changed when measured": lambda: age(repository, revision, commit=changed),
        "commit of elsewhere": lambda: age(repository, "f" * 40),
        "no checkout": lambda: age(None, revision),
        "no repository": lambda: age(tmp_path, revision),
    }
    assert found[why]() is Age.UNKNOWN


def test_git_is_asked_once_for_records_of_one_kind(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, ...]] = []

    def counted(folder: Path, *arguments: str) -> str:
        asked.append(arguments)
        return checkout.git(folder, *arguments)

    monkeypatch.setattr(stale, "git", counted)
    revision = {"revision": git(repository, "rev-parse", "HEAD"), "changed": False}
    age_of = stale.ages(repository)
    for contender in ("cpp", "eager", "compile"):
        age_of(record(contender, 1.0, commit=revision))
    assert [arguments[0] for arguments in asked] == ["cat-file", "diff"]


def one_of_each(found: Any) -> Age:
    return {8: Age.CURRENT, 16: Age.OLDER, 32: Age.UNKNOWN}[found["sizes"]["B"]]


def test_rows_are_marked_and_the_marks_explained() -> None:
    found = [
        record(name, 1.0, role, sizes={"B": rows, "C": 10})
        for rows in (8, 16, 32)
        for name, role in (("eager", "other"), ("cpp", "ours"))
    ]
    text = tables.markdown(found, "results.jsonl", one_of_each)
    rows = {line.split(" | ")[0] for line in text.splitlines() if line.startswith("| dist")}
    words = "| distillation forward and backward: a case, {}×10, float32"
    assert rows == {words.format(8), f"{words.format(16)} †", f"{words.format(32)} ‡"}
    assert text.count("† older than the code") == text.count("‡ age unknown") == 1
    assert text.index("† older") < text.index("‡ age unknown") < text.index("Data:")


@pytest.mark.parametrize(
    ("age_of", "signs"),
    [(lambda found: Age.CURRENT, ""), (lambda found: Age.OLDER, "†"), (one_of_each, "†‡")],
)
def test_only_marks_that_are_there_are_explained(age_of: Callable[[Any], Age], signs: str) -> None:
    found = [record("cpp", 1.0, "ours", sizes={"B": rows, "C": 10}) for rows in (8, 16, 32)]
    assert [note[0] for note in stale.notes(found, age_of)] == list(signs)


def test_the_checkout_is_the_one_with_this_package() -> None:
    root = checkout.root()
    if root is None:
        pytest.skip("the package does not run from a checkout")
    assert (root / "introkernels/checkout.py").samefile(checkout.__file__)
