"""Training survives SIGKILL: whatever is left resumes to the result of an undisturbed run."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from outcome import assert_same_outcome

from introkernels.train.config import TrainConfig
from introkernels.train.experiment import run_experiment

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL"),
]

# A fork of a server that has imported everything starts at once, and has started no threads yet.
PROCESSES = multiprocessing.get_context("forkserver") if os.name == "posix" else None
if PROCESSES is not None:
    PROCESSES.set_forkserver_preload(["introkernels.train.experiment"])


def train_there(config: TrainConfig, out: Path) -> None:
    run_experiment(config, out, resume=True, worker_count=1, checkpoint_every=1, tensorboard=False)


def train_and_die_while_writing(config: TrainConfig, out: Path, syncs: int) -> None:
    """Die by SIGKILL in the given call of fsync, of which a write makes two: its file's, before
    that takes its place, and its directory's, after it."""
    left, fsync = syncs, os.fsync

    def count_down(descriptor: int) -> None:
        nonlocal left
        fsync(descriptor)
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    os.fsync = count_down
    train_there(config, out)


@pytest.fixture(scope="module")
def config() -> TrainConfig:
    return dataclasses.replace(
        TrainConfig(),
        methods=("standard", "introspective_input"),
        seeds=2,
        epochs=5,
        train_size=40,
        validation_size=50,
        test_size=50,
    )


@pytest.fixture(scope="module")
def undisturbed(config, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    assert life(train_there, config, out).exitcode == 0
    return out


def life(target, *arguments):
    process = PROCESSES.Process(target=target, args=arguments)
    process.start()
    process.join()
    return process


def progress(out: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in out.rglob("checkpoint.pt")}


def test_killed_at_random_moments(config, undisturbed, tmp_path):
    """Each life sees a few new checkpoints, so that all end, and a random moment after them."""
    out, moments, kills = tmp_path / "out", random.Random(0), 0
    while True:
        process = PROCESSES.Process(target=train_there, args=(config, out))
        process.start()
        for _ in range(moments.randint(1, 4)):
            before = progress(out)
            while process.exitcode is None and progress(out) == before:
                time.sleep(0.0005)
        process.join(moments.uniform(0, 0.03))
        if process.exitcode is not None:
            break
        process.kill()
        process.join()
        kills += 1
    assert process.exitcode == 0
    assert kills >= 3
    assert_same_outcome(out, undisturbed)


def test_killed_inside_writes(config, undisturbed, tmp_path):
    """Odd counts of fsync end before the new file takes its place, even ones after."""
    out, lives, leftovers = tmp_path / "out", random.Random(1), 0
    for kills in range(100):
        syncs = lives.randint(1, 12) + 3 * kills
        process = life(train_and_die_while_writing, config, out, syncs)
        leftovers += len(list(out.rglob("*.tmp")))
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
    assert kills >= 5
    assert leftovers >= 2
    assert not list(out.rglob("*.tmp"))
    assert_same_outcome(out, undisturbed)


def children(pid: int) -> list[int]:
    listed = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True, check=False
    )
    return [int(child) for child in listed.stdout.split()]


@pytest.mark.skipif(not Path("/proc").exists(), reason="needs /proc")
def test_workers_die_with_a_killed_command_and_it_resumes(config, undisturbed, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "introkernels", "train", "--out", str(out)]
    command += "--methods standard introspective_input --seeds 2 --epochs 5 --train-size 40".split()
    command += "--validation-size 50 --test-size 50 --workers 2 --checkpoint-every 1".split()
    command += ["--no-tensorboard", "--resume"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + 120
    while not list(out.rglob("checkpoint.pt")):
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    workers = [pid for pid in children(process.pid) if Path(f"/proc/{pid}").exists()]
    assert workers
    process.kill()
    process.communicate()
    while any(running(pid) for pid in workers):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert life(train_there, config, out).exitcode == 0
    assert_same_outcome(out, undisturbed)


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
