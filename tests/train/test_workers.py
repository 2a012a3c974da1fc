from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time

import pytest

from introkernels.train.workers import WorkerLostError, run_all


def square(number, report):
    report(number)
    return number * number


def fail_on_three(number, report):
    if number == 3:
        raise ArithmeticError("three")
    return number


def vanish(number, report):
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("workers", [1, 2])
def test_every_job_is_done_and_its_progress_passed_on(workers):
    progress = []
    results = run_all(square, range(5), workers=workers, on_progress=progress.append)
    assert sorted(results) == [0, 1, 4, 9, 16]
    assert sorted(progress) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_of_a_job_is_raised_here(workers):
    with pytest.raises(ArithmeticError, match="three"):
        list(run_all(fail_on_three, range(20), workers=workers, on_progress=lambda n: None))


@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
def test_a_killed_worker_is_reported():
    with pytest.raises(WorkerLostError, match="killed from outside.*resume to continue"):
        list(run_all(vanish, range(4), workers=2, on_progress=lambda n: None))


def starts_workers(command, out):
    """Whether both workers are there, which then import for seconds; one child more tracks them."""
    listed = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(command)], capture_output=True, text=True, check=False
    )
    return len(listed.stdout.split()) == 3


def saves_checkpoints(command, out):
    return any(out.rglob("checkpoint.pt"))


@pytest.mark.skipif(os.name != "posix", reason="needs SIGINT")
@pytest.mark.parametrize("moment", [starts_workers, saves_checkpoints])
def test_interrupting_the_command_ends_it_at_once_with_advice(moment, tmp_path):
    command = [sys.executable, "-m", "introkernels", "train", "--out", str(tmp_path / "out")]
    command += ["--epochs", "100000", "--workers", "2", "--no-progress", "--no-tensorboard"]
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # What runs the tests in the background may ignore it, and so would what it starts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        while not moment(process.pid, tmp_path):
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGINT)
        _, messages = process.communicate(timeout=60)
    finally:
        # Workers that did not end would keep all cores busy.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 130
    assert messages == (
        "introkernels train: interrupted; the same command with --resume continues\n"
    )
