"""Carrying a study out: what is chosen by, what is trained again, what a diverged run becomes."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import pytest

from introkernels.train.files import DirectoryError
from introkernels.train.runs import train_run
from introkernels.train.study.plan import Plan, parse
from introkernels.train.study.runner import FIRST_TUNING_SEED, run_study

TEXT = """
name = "tiny"
representative = "introspective_head"
margin = 0.5
trials = 2
tuning_seeds = 2
seeds = 2

[train]
model = "mlp"
epochs = 3
validation_size = 60
test_size = 100

[cells]
train_size = [40]
label_noise = [0.0, 0.2]

[space]
learning_rate = [0.0001, 0.01]

[methods.standard]
[methods.born_again]
generations = 1
[methods.introspective_head]
"""


@pytest.fixture(scope="module")
def plan() -> Plan:
    return parse(TEXT)


@pytest.fixture(scope="module")
def study(plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("study")
    return run_study(plan, out, command="introkernels study", worker_count=1)


def test_the_best_validation_accuracy_is_chosen(study: dict[str, Any]) -> None:
    assert len(study["trials"]) == 2 * 3 * 2
    for chosen in study["chosen"]:
        tried = [
            trial
            for trial in study["trials"]
            if (trial["cell"], trial["method"]) == (chosen["cell"], chosen["method"])
        ]
        best = max(trial["validation"]["accuracy"] for trial in tried)
        assert [t["validation"]["accuracy"] for t in tried if t["hash"] == chosen["hash"]] == [best]
        # A rate of one in ten thousand learns nothing in so few steps.
        assert chosen["settings"] == {"learning_rate": 0.01}


def test_trials_are_means_over_tuning_seeds(plan: Plan, study: dict[str, Any], tmp_path: Path):
    trial = next(t for t in study["trials"] if t["method"] == "introspective_head")
    config = plan.config(plan.list_cells()[0], "introspective_head", trial["settings"])
    seeds = [FIRST_TUNING_SEED, FIRST_TUNING_SEED + 1]
    records = [
        train_run(config, "introspective_head", seed, tmp_path / str(seed), teachers=tmp_path)
        for seed in seeds
    ]
    for name, value in trial["validation"].items():
        last = [record["history"][-1][f"validation_{name}"] for record in records]
        assert value == pytest.approx(statistics.fmean(last), rel=1e-12)


def test_runs_are_those_of_fresh_seeds(plan: Plan, study: dict[str, Any], tmp_path: Path) -> None:
    assert study["seeds"] == [0, 1]
    assert not set(study["seeds"]) & set(study["tuning_seeds"])
    assert len(study["runs"]) == 2 * 3 * 2
    for run in study["runs"]:
        assert (run["teacher_seconds"] > 0) == (run["method"] == "born_again")
    cell = plan.list_cells()[1]
    run = next(r for r in study["runs"] if (r["cell"], r["method"]) == (1, "standard"))
    config = plan.config(cell, "standard", {"learning_rate": 0.01})
    record = train_run(config, "standard", run["seed"], tmp_path / "run", teachers=tmp_path)
    assert run["test"] == record["test"]
    assert run["best"] == record["best"]
    assert run["validation"]["nll"] == record["history"][-1]["validation_nll"]


def test_a_study_is_told_apart_from_another(plan: Plan, tmp_path: Path) -> None:
    other = parse(TEXT.replace("seeds = 2", "seeds = 1"))
    small = other.only(["standard"])
    run_study(small, tmp_path, command="", worker_count=1)
    with pytest.raises(DirectoryError, match="already holds a study. Continue it with --resume"):
        run_study(small, tmp_path, command="", worker_count=1)
    with pytest.raises(DirectoryError, match="seeds: 1 there, 2 asked for"):
        run_study(plan.only(["standard"]), tmp_path, command="", resume=True)
    (tmp_path / "plan.json").unlink()
    with pytest.raises(DirectoryError, match=r"holds runs but no plan.json"):
        run_study(small, tmp_path, command="", resume=True)


def test_a_finished_study_trains_nothing_again(plan: Plan, tmp_path: Path) -> None:
    small = plan.only(["standard"])
    first = run_study(small, tmp_path, command="", worker_count=1)
    files = {path: path.stat().st_mtime_ns for path in tmp_path.glob("runs/*/*/metrics.json")}
    again = run_study(small, tmp_path, command="", resume=True, worker_count=1)
    assert again == first
    assert {path: path.stat().st_mtime_ns for path in files} == files
    # Nobody asks for the weights of thousands of runs.
    assert not list(tmp_path.glob("runs/*/*/checkpoint.pt"))
    damaged = min(files)
    damaged.write_bytes(damaged.read_bytes()[:-20])
    with pytest.raises(DirectoryError, match=r"metrics.json can't be read .*Delete it and resume"):
        run_study(small, tmp_path, command="", resume=True, worker_count=1)


def test_a_diverged_run_is_told_and_not_chosen(tmp_path: Path) -> None:
    wild = parse(
        TEXT.replace("[0.0001, 0.01]", "[0.01, 1e30]")
        .replace("[methods.born_again]", "")
        .replace("generations = 1", "")
    )
    study = run_study(wild, tmp_path, command="", worker_count=1)
    lost = [t for t in study["trials"] if t["settings"]["learning_rate"] == 1e30]
    assert lost
    assert all(trial["validation"] is None for trial in lost)
    assert all(chosen["settings"]["learning_rate"] == 0.01 for chosen in study["chosen"])
    again = run_study(wild, tmp_path, command="", resume=True, worker_count=1)
    assert again == study


def test_where_all_trials_diverge_so_do_the_runs(tmp_path: Path) -> None:
    wild = parse(TEXT.replace("[0.0001, 0.01]", "[1e29, 1e30]")).only(["standard"])
    study = run_study(wild, tmp_path, command="", worker_count=1)
    assert all(run["test"] is None for run in study["runs"])
    assert all("training loss of epoch" in run["failure"] for run in study["runs"])
