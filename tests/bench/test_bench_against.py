"""Comparison of two revisions: the statistics, the turns, the trees, and the whole command."""

from __future__ import annotations

import math
import os
import random
import statistics
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from scipy import stats

import introkernels as ik
from introkernels import checkout, cli
from introkernels.bench import against, against_tree, display
from introkernels.bench import cli as bench_cli
from introkernels.bench.against import Comparison, Ratio, WorkerError

CASE = "head/imagenet/float32"


@pytest.mark.parametrize("count", [6, 7, 8, 9, 10, 25, 80, 200])
def test_the_interval_of_the_median_is_that_of_a_sign_test(count: int) -> None:
    rank = against.rank_of_interval(count)
    below = stats.binom(count, 0.5)
    # Below the interval's lower end lies the true median if fewer than `rank` values are below it.
    assert 2 * below.cdf(rank - 1) <= 0.05
    assert 2 * below.cdf(rank) > 0.05


@pytest.mark.parametrize("count", range(1, 6))
def test_too_few_values_have_no_interval(count: int) -> None:
    with pytest.raises(ValueError, match=f"count: got {count}, expected 6 or more"):
        against.rank_of_interval(count)


def test_the_interval_covers_the_true_ratio_as_often_as_it_says() -> None:
    generator = random.Random(0)
    # The median of these ratios is 1.1; a third of them come from a machine busy with other work.
    covered = 0
    for _ in range(1000):
        noise = [generator.gauss(0, generator.choice([0.1, 0.1, 1.0])) for _ in range(20)]
        ratios = [1.1 * math.exp(value) for value in noise]
        found = Ratio.of([1.0] * 20, ratios)
        covered += found.low <= 1.1 <= found.high
    assert covered >= 940


def test_pairs_cancel_what_hits_both() -> None:
    weather = [1.0, 5.0, 2.0, 9.0, 1.5, 30.0, 1.1, 4.0, 2.5]
    found = Ratio.of(weather, [0.8 * factor for factor in weather])
    assert (found.low, found.median, found.high) == pytest.approx((0.8, 0.8, 0.8))
    assert found.pairs == 9


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (0.80, 0.90, "faster"),
        (0.80, 0.99, "no clear difference"),
        (0.95, 1.05, "no clear difference"),
        (0.985, 0.995, "no clear difference"),
        (1.01, 1.30, "no clear difference"),
        (1.03, 1.30, "slower"),
    ],
)
def test_the_verdict_needs_the_whole_interval(low: float, high: float, verdict: str) -> None:
    assert Ratio((low + high) / 2, low, high, 9).verdict == verdict


@dataclass
class FakeWorker:
    """Answers as a process would; its times are those of a list, over and over."""

    name: str
    log: list[str]
    times: Sequence[float] = (1.0,)
    contenders: dict[str, str | None] = field(default_factory=lambda: {"cpp": None})
    shape: Sequence[int] = (2, 3)
    failed: str | None = None
    requests: list[dict[str, Any]] = field(default_factory=list)

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        self.requests.append(request)
        if self.failed is not None:
            return {"failed": self.failed}
        if request["ask"] == "prepare":
            return {"shape": list(self.shape), "sets": 5, "contenders": self.contenders}
        self.log.append(self.name)
        turn = self.log.count(self.name) - 1
        median = self.times[turn % len(self.times)]
        # What one sample of a turn suffers must not move its median.
        return {"seconds": [median, median, 100 * median]}


def pair(**after: Any) -> tuple[FakeWorker, FakeWorker, list[str]]:
    log: list[str] = []
    return FakeWorker("A", log), FakeWorker("B", log, **after), log


@pytest.mark.parametrize(
    ("times", "verdict"),
    [((0.5, 0.6), "faster"), ((2.0, 3.0), "slower"), ((0.7, 1.4), "no clear difference")],
)
def test_a_case_is_judged_by_the_medians_of_turns(times: Sequence[float], verdict: str) -> None:
    before, after, _ = pair(times=times)
    (found,) = against.compare(before, after, CASE, 0.001)
    assert (found.case, found.contender, found.reason) == (CASE, "cpp", None)
    assert found.before == 1.0
    assert found.after == statistics.median([times[i % 2] for i in range(found.ratio.pairs)])
    assert found.ratio.verdict == verdict


def test_the_two_take_turns_and_each_goes_first_as_often() -> None:
    before, after, log = pair()
    (found,) = against.compare(before, after, CASE, 1e-9)
    assert found.ratio.pairs == against.FEWEST_PAIRS
    assert "".join(log).startswith("ABBAABBAABBA")
    assert log.count("A") == log.count("B") == against.FEWEST_PAIRS


def test_both_get_the_same_sets_of_inputs_and_the_same_time() -> None:
    before, after, _ = pair()
    against.compare(before, after, CASE, 0.09)
    assert after.requests[0] == {"ask": "prepare", "case": CASE, "sets": None}
    assert before.requests[0] == {"ask": "prepare", "case": CASE, "sets": 5}
    seconds = [r["seconds"] for w in (before, after) for r in w.requests[1:]]
    assert seconds == pytest.approx([0.09 / (2 * against.FEWEST_PAIRS)] * len(seconds))


def test_a_larger_budget_gives_more_pairs_up_to_a_limit() -> None:
    before, after, _ = pair()
    shares: list[float] = []
    (found,) = against.compare(before, after, CASE, 5.0, shares.append)
    assert found.ratio.pairs == against.MOST_PAIRS
    assert shares[-1] == 1.0


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ({"failed": "no such case"}, {}, "before: no such case"),
        ({}, {"failed": "no memory"}, "no memory"),
        ({"shape": (2, 4)}, {}, "its shape was 2×4, and is 2×3"),
        ({"contenders": {}}, {}, "before: did not exist"),
        ({"contenders": {"cpp": "not built"}}, {}, "before: not built"),
        ({}, {"contenders": {"cpp": "wrong result"}}, "wrong result"),
    ],
)
def test_what_cannot_be_compared_is_told(
    old: dict[str, Any], new: dict[str, Any], reason: str
) -> None:
    log: list[str] = []
    before, after = FakeWorker("A", log, **old), FakeWorker("B", log, **new)
    (found,) = against.compare(before, after, CASE, 0.01)
    assert found.reason == reason
    assert found.ratio is None
    assert not log


def spaced_once(line: str) -> str:
    return " ".join(line.split())


def test_the_table_has_times_ratio_interval_and_verdict() -> None:
    console = Console(width=140, record=True)
    found = [
        Comparison(CASE, "cpp", 0.010, 0.008, Ratio(0.8, 0.75, 0.85, 12)),
        Comparison("statistics/new/float32", "", reason="before: no such case"),
    ]
    display.show_comparisons(found, "main~2", "0123456789abcdef", console)
    first, second = (
        spaced_once(line) for line in console.export_text().splitlines() if "/float32" in line
    )
    assert first == f"{CASE} cpp 10.0 ms 8.00 ms 0.800 0.750–0.850 12 faster"
    assert second == "statistics/new/float32 before: no such case"


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project of one commit, with libraries that were built from it."""
    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    root = tmp_path / "repository"
    build = "import os; open('introkernels/_cpu.so', 'w').write(str(dict(os.environ)))\n"
    files = {
        "introkernels/bench/suites.py": "",
        "introkernels/a.py": "old = True\n",
        "csrc/cpu/kernel.cpp": "",
        "csrc/cuda/kernel.cu": "",
        "setup.py": build,
        ".gitignore": "*.so\n_build_status.json\n",
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    git(root, "init", "--quiet")
    git(root, "add", "--all")
    git(root, "commit", "--quiet", "--message", "a commit")
    (root / "introkernels/_cpu.so").write_text("built here")
    (root / "introkernels/a.py").write_text("old = False\n")
    return root


def git(root: Path, *arguments: str) -> str:
    who = ("-c", "user.name=T", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false")
    answer = subprocess.run(
        ["git", *who, *arguments], cwd=root, check=True, capture_output=True, text=True
    )
    return answer.stdout


def tree_of(root: Path, device: str = "cpu") -> Any:
    return against_tree.tree_of(root, against_tree.commit_of(root, "HEAD"), device)


def assert_gone(root: Path, tree: Path) -> None:
    assert not tree.exists()
    assert not tree.parent.exists()
    assert len(git(root, "worktree", "list").splitlines()) == 1


def test_a_tree_has_the_files_of_its_commit_and_the_libraries_from_here(repository: Path) -> None:
    with tree_of(repository) as tree:
        assert (tree / "introkernels/a.py").read_text() == "old = True\n"
        assert (tree / "introkernels/_cpu.so").read_text() == "built here"
    assert_gone(repository, tree)
    assert (repository / "introkernels/a.py").read_text() == "old = False\n"


@pytest.mark.parametrize(
    ("changed", "device", "is_built"),
    [
        ("csrc/cpu/kernel.cpp", "cpu", True),
        ("csrc/cpu/new.cpp", "cpu", True),
        ("csrc/cuda/kernel.cu", "cpu", False),
        ("csrc/cuda/kernel.cu", "cuda", True),
    ],
)
def test_libraries_are_built_where_their_sources_differ(
    repository: Path, changed: str, device: str, is_built: bool
) -> None:
    (repository / changed).write_text("changed")
    with tree_of(repository, device) as tree:
        library = (tree / "introkernels/_cpu.so").read_text()
    assert (library != "built here") == is_built
    if is_built:
        assert "'INTROKERNELS_CPP': '1'" in library
        assert f"'INTROKERNELS_CUDA': '{1 if device == 'cuda' else 0}'" in library
    assert_gone(repository, tree)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_a_tree_is_cleared_away_whatever_happens(
    repository: Path, error: type[BaseException]
) -> None:
    with pytest.raises(error), tree_of(repository) as tree:
        (tree / "left.txt").write_text("behind")
        raise error
    assert_gone(repository, tree)


def test_a_failed_build_is_told_with_its_last_words(repository: Path) -> None:
    (repository / "setup.py").write_text('raise SystemExit("no compiler")\n')
    git(repository, "commit", "--quiet", "--all", "--message", "broken")
    (repository / "csrc/cpu/kernel.cpp").write_text("changed")
    error = pytest.raises(against_tree.TreeError, match="can't be built: no compiler")
    with error, tree_of(repository):
        pytest.fail("there is no tree")
    assert len(git(repository, "worktree", "list").splitlines()) == 1


def test_a_library_older_than_its_sources_is_refused(repository: Path) -> None:
    library = repository / "introkernels/_cpu.so"
    built = library.stat().st_mtime
    os.utime(library, (built + 10, built + 10))
    against_tree.check_library(repository, "cpu")
    os.utime(repository / "csrc/cuda/kernel.cu", (built + 20, built + 20))
    against_tree.check_library(repository, "cpu")
    os.utime(repository / "csrc/cpu/kernel.cpp", (built + 20, built + 20))
    with pytest.raises(against_tree.TreeError, match=r"_cpu.so is older than csrc/cpu/kernel.cpp"):
        against_tree.check_library(repository, "cpu")


@pytest.mark.parametrize("revision", ["nowhere", "--help", ""])
def test_a_revision_has_to_be_a_commit(repository: Path, revision: str) -> None:
    with pytest.raises(against_tree.TreeError, match="names no commit"):
        against_tree.commit_of(repository, revision)


def test_a_revision_has_to_have_a_benchmark(repository: Path) -> None:
    git(repository, "rm", "--quiet", "introkernels/bench/suites.py")
    git(repository, "commit", "--quiet", "--message", "without")
    with pytest.raises(against_tree.TreeError, match="HEAD has no introkernels bench"):
        against_tree.commit_of(repository, "HEAD")


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ('print(\'{"failed": "no suite cpu"}\')', "old can't be measured: no suite cpu"),
        ('print(\'{"package": "/elsewhere"}\')', "old: Python found /elsewhere instead of"),
        ("import sys; sys.exit('out of luck')", "ended with status 1: out of luck"),
        ("", "ended with status 0: it said nothing"),
    ],
)
def test_a_process_that_cannot_measure_says_why(
    script: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = tmp_path / "worker.py"
    worker.write_text(script)
    monkeypatch.setattr(against_tree, "WORKER", worker)
    process = against_tree.Process(tmp_path, "cpu", 1, "old")
    with pytest.raises(WorkerError, match=message), process:
        pytest.fail("it began")


def test_a_process_imports_from_its_tree_and_may_die_between_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker, package = tmp_path / "worker/worker.py", tmp_path / "tree/introkernels"
    worker.parent.mkdir()
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("import os\nhere = os.path.dirname(__file__)\n")
    worker.write_text(
        "import json, sys, introkernels\n"
        'print(json.dumps({"package": introkernels.here}), flush=True)\n'
        'print(json.dumps({"heard": json.loads(input())}), flush=True)\n'
        "input()\n"
    )
    monkeypatch.setattr(against_tree, "WORKER", worker)
    with against_tree.Process(package.parent, "cpu", 1, "old") as process:
        assert process.ask({"ask": 1}) == {"heard": {"ask": 1}}
        with pytest.raises(WorkerError, match="old: the measuring process ended"):
            process.ask({"ask": 2})


def comparable() -> Path:
    """The checkout, where HEAD's libraries are those that were built here."""
    root = checkout.root()
    if root is None:
        pytest.skip("the package does not run from a checkout")
    if ik.backends.status()["cpu"] != "loaded":
        pytest.skip("the C++ kernels are not built")
    commit = against_tree.commit_of(root, "HEAD")
    if not against_tree.shares_libraries(root, commit, "cpu"):
        pytest.skip("HEAD's libraries would have to be built")
    try:
        against_tree.check_library(root, "cpu")
    except against_tree.TreeError as error:
        pytest.skip(str(error))
    return root


def test_this_tree_against_head(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = comparable()
    monkeypatch.setenv("COLUMNS", "160")
    arguments = ("--against", "HEAD", "--only", "distillation/cifar100/float32")
    worktrees = git(root, "worktree", "list")
    status = cli.main(["bench", *arguments, "--budget", "0.05", "--threads", "1"])
    captured = capsys.readouterr()
    assert (status, captured.err) == (0, "")
    (row,) = (line for line in captured.out.splitlines() if "distillation/cifar100" in line)
    assert " cpp " in row
    assert any(verdict in row for verdict in ("faster", "slower", "no clear difference"))
    assert git(root, "worktree", "list") == worktrees


def test_the_command_refuses_an_unknown_revision(capsys: pytest.CaptureFixture[str]) -> None:
    if checkout.root() is None:
        pytest.skip("the package does not run from a checkout")
    assert cli.main(["bench", "--against", "no-such-commit"]) == 2
    assert "--against: 'no-such-commit' names no commit" in capsys.readouterr().err


def test_the_command_needs_a_checkout(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_cli.checkout, "root", lambda: None)
    assert cli.main(["bench", "--against", "HEAD"]) == 2
    assert "compares commits of a checkout" in capsys.readouterr().err


def test_the_worker_checks_and_measures_and_tells_what_it_cannot() -> None:
    with against_tree.Process(comparable(), "cpu", 1, "this tree") as process:
        prepared = process.ask(
            {"ask": "prepare", "case": "distillation/cifar100/float32", "sets": 2}
        )
        assert prepared == {"shape": [64, 100], "sets": 2, "contenders": {"cpp": None}}
        measured = process.ask({"ask": "measure", "contender": "cpp", "seconds": 0.01})
        assert all(0 < seconds < 1 for seconds in measured["seconds"])
        missing = process.ask({"ask": "prepare", "case": "nothing", "sets": 2})
        assert missing == {"failed": "suite cpu has no such case"}
