"""Two processes that train together come to what one comes to."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import weakref
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from introkernels.train.distributed import Processes, started_by_torchrun

# A last batch of 15 in shares of 8 and 7; nothing is drawn for an image.
METHODS = (
    *("standard", "introspective_input", "introspective_bank", "kd", "cs_kd"),
    *("online_label_smoothing", "deep_mutual_learning"),
)
CALL = [
    *"train --model mlp --seeds 1 --epochs 3 --train-size 90 --test-size 200 --ema 0.8".split(),
    *"--no-tensorboard --no-progress --checkpoint-every 1".split(),
]
TORCHRUN = "-m torch.distributed.run --standalone --nproc-per-node 2".split()


def command(out: Path, *options: str, processes: int) -> subprocess.CompletedProcess[str]:
    start = TORCHRUN if processes == 2 else []
    words = [sys.executable, *start, "-m", "introkernels", *CALL, *options, "--out", str(out)]
    env = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
    with subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env
    ) as running:
        try:
            output, errors = running.communicate(timeout=240)
        except subprocess.TimeoutExpired:
            # It ends the processes that it started; a kill would leave them.
            running.terminate()
            raise
    return subprocess.CompletedProcess(words, running.returncode, output, errors)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    folder = tmp_path_factory.mktemp("together")
    for processes in (1, 2):
        done = command(folder / str(processes), "--methods", *METHODS, processes=processes)
        assert done.returncode == 0, done.stderr[-3000:]
    return {processes: folder / str(processes) for processes in (1, 2)}


def same(alone: Path, together: Path) -> None:
    """Whether two runs went alike."""
    one, other = (json.loads((run / "metrics.json").read_text()) for run in (alone, together))
    assert len(other["history"]) == 3
    for first, second in zip(one["history"], other["history"], strict=True):
        for name, value in first.items():
            # One image of 300 may change sides.
            allowed = 0.004 if "accuracy" in name or "ece" in name else 2e-4
            assert second[name] == pytest.approx(value, abs=allowed), name
    expected, found = (
        torch.load(run / "checkpoint.pt", weights_only=True)["model"] for run in (alone, together)
    )
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=2e-3, atol=2e-4)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_two_processes_are_one(outcomes: dict[int, Path], method: str) -> None:
    same(*(outcomes[processes] / "runs" / method / "seed0" for processes in (1, 2)))


def test_gradients_are_averaged_once_for_a_batch_in_parts(
    outcomes: dict[int, Path], tmp_path: Path
) -> None:
    options = ("--methods", "standard", "--accumulate", "2")
    done = command(tmp_path / "out", *options, processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    # One of the two writes and speaks.
    assert done.stdout.count("Report:") == 1
    runs = Path("runs/standard/seed0")
    same(outcomes[1] / runs, tmp_path / "out" / runs)


def train(network: nn.Module, seen: list[weakref.ref[Any]], *, fails: bool) -> None:
    parallel = DistributedDataParallel(network)
    # As users do, by hooks and the like: only the collector ends it.
    parallel.__dict__["itself"] = parallel
    seen.append(weakref.ref(parallel))
    if fails:
        raise ValueError("a loss of nan")


def train_and_explain_failure(network: nn.Module, seen: list[weakref.ref[Any]]) -> None:
    try:
        train(network, seen, fails=True)
    except ValueError as error:
        raise RuntimeError("training failed") from error


@pytest.mark.parametrize("failure", [None, ValueError, RuntimeError])
def test_no_model_outlives_its_group(
    monkeypatch: pytest.MonkeyPatch, failure: type[Exception] | None
) -> None:
    """It could end it only with the interpreter's lock, for which the group's threads may wait."""
    settings = {"TORCHELASTIC_RUN_ID": "none", "RANK": "0", "WORLD_SIZE": "1"}
    for name, value in {**settings, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(name, value)
    seen: list[weakref.ref[Any]] = []
    at_the_end: list[Any] = []
    destroy = dist.destroy_process_group

    def noting() -> None:
        at_the_end.extend(model() for model in seen)
        destroy()

    monkeypatch.setattr(dist, "destroy_process_group", noting)
    with (
        pytest.raises(failure) if failure is not None else nullcontext(),
        started_by_torchrun("cpu") as device,
    ):
        assert device == "cpu"
        if failure is RuntimeError:
            train_and_explain_failure(nn.Linear(2, 3), seen)
        else:
            train(nn.Linear(2, 3), seen, fails=failure is not None)
    assert at_the_end == [None]
    assert not dist.is_initialized()


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("rows", [1, 2, 7, 12])
def test_shares_make_up_the_batch(count: int, rows: int) -> None:
    batch = torch.arange(100, 100 + rows)[:, None]
    values = torch.rand(200)
    mean = 0.0
    seen: list[int] = []
    for rank in range(count):
        processes = Processes()
        processes.count, processes.rank = count, rank
        mine, weight = processes.share(batch)
        mean += weight * float(values[mine].mean()) / count
        if weight:
            seen += mine.flatten().tolist()
    assert seen == batch.flatten().tolist()
    assert mean == pytest.approx(float(values[batch].mean()), rel=1e-5)
