"""How `make gpu-check` runs its parts: limits, failures, deadline and verdict, on quick ones."""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import gpu_check
import gpu_environment
import gpu_sanitize
import gpu_suite
import pytest
import torch

from introkernels.bench import records
from introkernels.bench.contenders import CPP
from introkernels.bench.suites import CPU

ROOT = Path(__file__).resolve().parents[2]


def part(name: str, code: str, seconds: float = 30, **options: object) -> object:
    return gpu_check.Part(name, (sys.executable, "-c", code), seconds, **options)


def silent(text: str) -> None:
    pass


def test_a_failing_part_does_not_stop_the_others(tmp_path: Path) -> None:
    said: list[str] = []
    chosen = [
        part("fails", "print('the reason'); raise SystemExit(3)"),
        part("dies", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"),
        gpu_check.Part("missing", ("no-such-program",), 5),
        part("works", "print('done')"),
    ]
    outcomes = gpu_check.run(chosen, tmp_path / "new/out", say=said.append)
    fails, dies, missing, works = (outcome.verdict for outcome in outcomes)
    assert fails == "failed: exit status 3"
    assert dies == "failed: ended by signal 9"
    assert missing.startswith("did not run: it can't be started: ")
    assert works == gpu_check.PASSED
    assert "    the reason\n" in "\n".join(said)
    assert (tmp_path / "new/out/works.log").read_text() == "done\n"


def test_what_the_dearest_part_said_is_shown_where_it_passed_too(tmp_path: Path) -> None:
    said: list[str] = []
    chosen = [
        part("quiet", "print('unheard')"),
        part("dear", "print(*range(100), sep='\\n')", shown=True),
    ]
    gpu_check.run(chosen, tmp_path, say=said.append)
    text = "\n".join(said)
    assert "unheard" not in text
    assert "".join(f"    {number}\n" for number in range(100)) in text


def test_a_part_is_ended_at_its_limit_with_all_that_it_started(tmp_path: Path) -> None:
    code = (
        "import signal, subprocess, sys, time\n"
        # What runs the tests in the background may ignore it, and so would what it starts.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "sleep = [sys.executable, '-c', 'import time; time.sleep(60)']\n"
        # Its words about being ended would mix with those of the part.
        "child = subprocess.Popen(sleep, stderr=subprocess.DEVNULL)\n"
        "print(child.pid, flush=True)\n"
        "try:\n    time.sleep(60)\nexcept KeyboardInterrupt:\n    print('last words', flush=True)\n"
    )
    start = time.monotonic()
    (outcome,) = gpu_check.run([part("sleeps", code, 3)], tmp_path, say=silent)
    assert time.monotonic() - start < 3 + gpu_check.GRACE_SECONDS + 5
    assert outcome.verdict == "failed: not done after 3 s"
    pid, *rest = (tmp_path / "sleeps.log").read_text().splitlines()
    assert rest == ["last words"]
    for _ in range(100):
        if not alive(int(pid)):
            return
        time.sleep(0.05)
    pytest.fail("what the part started is still running")


def alive(pid: int) -> bool:
    """Whether a process is there and has not ended, waited for or not."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{pid}/stat")
    return not status.exists() or status.read_text().rpartition(")")[2].split()[0] != "Z"


def test_a_part_that_does_not_listen_is_ended_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_check, "GRACE_SECONDS", 0.2)
    code = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)"
    start = time.monotonic()
    (outcome,) = gpu_check.run([part("deaf", code, 2)], tmp_path, say=silent)
    assert not outcome.passed
    assert time.monotonic() - start < 20


def test_parts_share_a_deadline(tmp_path: Path) -> None:
    chosen = [
        part("long", "import time; time.sleep(60)", 30, least=0.1),
        part("late", "", 30, least=0.1),
    ]
    long, late = gpu_check.run(chosen, tmp_path, total=2, say=silent)
    assert long.verdict == "failed: not done after 2 s"
    assert late.verdict == "did not run: 0 s were left"
    assert not (tmp_path / "late.log").exists()


def test_a_part_that_no_longer_fits_is_left_out_and_a_shorter_one_runs(tmp_path: Path) -> None:
    chosen = [part("big", "", least=100), part("small", "", least=1)]
    big, small = gpu_check.run(chosen, tmp_path, total=50, say=silent)
    assert big.verdict.startswith("did not run: ")
    assert small.passed


def test_parts_see_this_checkout_and_their_variables(tmp_path: Path) -> None:
    code = "import os, introkernels; print(introkernels.__file__, os.environ['EXTRA'], os.getcwd())"
    (outcome,) = gpu_check.run(
        [part("sees", code, environment={"EXTRA": "there"})], tmp_path, say=silent
    )
    assert outcome.passed
    module, extra, folder = (tmp_path / "sees.log").read_text().split()
    assert Path(module).resolve() == ROOT / "introkernels/__init__.py"
    assert (extra, Path(folder).resolve()) == ("there", ROOT)


@pytest.mark.parametrize(("code", "status"), [("", 0), ("raise SystemExit(1)", 1)])
def test_status_and_summary_tell_whether_all_passed(
    code: str,
    status: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    chosen = [part("first", ""), part("the-second", code)]
    monkeypatch.setattr(gpu_check, "parts", lambda out: chosen)
    assert gpu_check.main([str(tmp_path)]) == status
    text = (tmp_path / "summary.txt").read_text()
    assert capsys.readouterr().out.endswith(text)
    first, second = text.splitlines()
    assert first.split()[0] == "first"
    assert first.endswith("passed")
    log = tmp_path / "the-second.log"
    assert second.endswith("passed" if status == 0 else f"failed: exit status 1 ({log})")


def test_parts_may_be_chosen_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = [part("first", ""), part("second", "raise SystemExit(1)"), part("third", "")]
    monkeypatch.setattr(gpu_check, "parts", lambda out: chosen)
    assert gpu_check.main([str(tmp_path), "--only", "third", "first"]) == 0
    assert sorted(log.stem for log in tmp_path.glob("*.log")) == ["first", "third"]
    with pytest.raises(SystemExit) as stopped:
        gpu_check.main([str(tmp_path), "--only", "fourth"])
    assert stopped.value.code == 2
    assert "no part is called fourth; there are first, second, third" in capsys.readouterr().err


def test_something_that_did_not_run_is_no_success(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_check, "parts", lambda out: [part("big", "", least=1e9)])
    assert gpu_check.main([str(tmp_path)]) == 1


def test_the_parts_name_what_there_is(tmp_path: Path) -> None:
    chosen = gpu_check.parts(tmp_path)
    names = [each.name for each in chosen]
    assert len(set(names)) == len(names)
    # What is dearest to know comes first, and what takes longest last.
    assert names[:3] == ["build", "environment", "smoke"]
    assert names[-1] == "sanitizer"
    # Ten minutes, with time to start, and to end the last part.
    assert gpu_check.TOTAL_SECONDS + 6 * gpu_check.GRACE_SECONDS <= 10 * 60
    for each in chosen:
        assert each.command[0] == sys.executable
        for argument in each.command[1:]:
            if argument.startswith(("benchmarks/", "tests/")) or argument.endswith(".py"):
                assert (ROOT / argument).exists(), argument


def test_a_part_is_told_its_limit(tmp_path: Path) -> None:
    ask = part("asks", f"import os; print(os.environ['{gpu_check.LIMIT}'])", seconds=17)
    gpu_check.run([ask], tmp_path, say=silent)
    assert (tmp_path / "asks.log").read_text() == "17\n"
    assert gpu_suite.LIMIT == gpu_check.LIMIT


@pytest.mark.parametrize(("seconds", "count"), [(0, 0), (0.1, 1), (9, 2), (11, 3), (100, 5)])
def test_a_case_is_begun_only_where_the_longest_so_far_fits(seconds: float, count: int) -> None:
    now = 0.0

    def cases() -> Iterator[int]:
        nonlocal now
        for number, taken in enumerate((2, 4, 3, 4, 1)):
            now += taken
            yield number

    measured = gpu_suite.within(seconds, cases(), lambda: now)
    assert list(measured) == list(range(count))


def on_this_cpu(monkeypatch: pytest.MonkeyPatch, limit: str) -> None:
    """The script that measures on a GPU, with two small cases of the CPU."""
    small = [case for case in CPU.cases if case.name == "distillation/cifar100/float32"]
    again = dataclasses.replace(small[0], use="again")
    cases = (*small, again)
    monkeypatch.setattr(
        gpu_suite, "SUITE", dataclasses.replace(CPU, cases=cases, contenders=(CPP,))
    )
    monkeypatch.setattr(gpu_suite, "SECONDS_OF_A_CASE", 0.05)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv(gpu_suite.LIMIT, limit)


def test_nothing_waits_for_inductor() -> None:
    names = {contender.name for contender in gpu_suite.SUITE.contenders}
    assert names == {"eager", "cuda", "triton"}


def test_cases_for_which_there_is_no_time_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    on_this_cpu(monkeypatch, "25.001")
    assert gpu_suite.main(tmp_path) == 1
    assert "no time was left for distillation/again/float32\n" in capsys.readouterr().out
    (results,) = tmp_path.glob("cpu-*.jsonl")
    assert {record["case"] for record in records.read(results)} == {"distillation/cifar100/float32"}


def test_where_there_is_time_all_cases_are_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    on_this_cpu(monkeypatch, "500")
    assert gpu_suite.main(tmp_path) == 0
    assert "no time was left" not in capsys.readouterr().out
    (results,) = tmp_path.glob("cpu-*.jsonl")
    assert len({record["case"] for record in records.read(results)}) == 2


def stand_in(folder: Path, name: str, text: str) -> None:
    """A program of that name in a folder."""
    program = folder / name
    program.write_text(f"#!/bin/sh\n{text}\n")
    program.chmod(0o755)


@pytest.mark.parametrize(
    ("answer", "listed"),
    [
        ("echo 9.0; echo 9.0", "9.0a"),
        ("echo 8.6; echo 10.0", "8.6;10.0"),
        ("echo no driver; exit 9", None),
        (None, None),
    ],
)
def test_kernels_are_built_for_the_gpus_at_hand(
    answer: str | None, listed: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if answer is not None:
        stand_in(tmp_path, "nvidia-smi", answer)
    monkeypatch.setenv("PATH", str(tmp_path))
    build, *_ = gpu_check.parts(tmp_path)
    assert build.environment.get("TORCH_CUDA_ARCH_LIST") == listed


SUMMARY = "echo '========= ERROR SUMMARY: 1 error'"
KERNEL = "introkernels::cuda::(anonymous namespace)::row_loss_forward<float>(ForwardCall)+0x150"
REPORT = f"echo '=========     at {KERNEL} in row_loss.cu:38'"


@pytest.mark.parametrize(
    ("watched", "said"),
    [
        (SUMMARY, "nothing found"),
        ("echo '========= RACECHECK SUMMARY: 0 hazards'", "nothing found"),
        # PyTorch's own kernels are not what is asked about.
        (f"echo '=========     at void at::native::fill()+0x8'; {SUMMARY}", "nothing found"),
        (f"{REPORT}; {SUMMARY}", "1 lines about kernels of introkernels"),
        (f"{SUMMARY}; exit 3", "exit status 3"),
        ("echo introkernels::something else", "no summary"),
    ],
)
def test_what_a_sanitizer_says_counts_for_kernels_of_ours(
    watched: str,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    stand_in(tmp_path, "compute-sanitizer", f'echo "tool: $2"; {watched}')
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert gpu_sanitize.main(tmp_path) == (0 if said == "nothing found" else 1)
    told = capsys.readouterr().out
    for tool in ("memcheck", "racecheck", "initcheck", "synccheck"):
        assert f"{tool}: {said}" in told
        assert f"tool: {tool}\n" in (tmp_path / f"sanitizer-{tool}.log").read_text()
    assert ("row_loss_forward" in told) == ("lines about" in said)


def test_a_machine_without_sanitizers_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(gpu_sanitize, "TOOLKIT", str(tmp_path))
    assert gpu_sanitize.main(tmp_path) == 1
    assert capsys.readouterr().out == "compute-sanitizer is not installed: nothing is watched\n"
    stand_in(tmp_path, "compute-sanitizer", SUMMARY)
    assert gpu_sanitize.main(tmp_path) == 0


@pytest.mark.parametrize(
    ("folder", "environment", "said"),
    [
        ("gpu", {"INTROKERNELS_REQUIRE_GPU": "1"}, "sees no GPU, and INTROKERNELS_REQUIRE_GPU=1"),
        (
            "losses",
            {"INTROKERNELS_TEST_DEVICE": "cuda", "INTROKERNELS_TEST_BACKENDS": "cuda"},
            "INTROKERNELS_TEST_BACKENDS names 'cuda', which can't be used: ",
        ),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_tests_that_lack_a_gpu_say_so_once(
    folder: str, environment: dict[str, str], said: str, tmp_path: Path
) -> None:
    command = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"tests/{folder}")
    tests = gpu_check.Part("tests", command, 60, environment=environment)
    (outcome,) = gpu_check.run([tests], tmp_path, say=silent)
    assert outcome.verdict == "failed: exit status 4"
    (line,) = (tmp_path / "tests.log").read_text().split("\n\n")[0].strip().splitlines()
    assert line.startswith("ERROR: ")
    assert said in line


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_scripts_say_that_there_is_no_gpu(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert gpu_suite.main(tmp_path) == 1
    assert "sees no GPU: nothing is measured" in capsys.readouterr().out
    assert not list(tmp_path.glob("*.jsonl"))
    assert gpu_environment.main(tmp_path) == 1
    assert "sees no GPU" in capsys.readouterr().out
    assert (tmp_path / "environment.json").exists()
