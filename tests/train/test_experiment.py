from __future__ import annotations

import csv
import dataclasses
import json
import math
import random
import shutil
import statistics

import pytest
import torch
from outcome import assert_same_outcome, without_times

from introkernels.train import checkpoint, files
from introkernels.train.config import ConfigError, TrainConfig
from introkernels.train.engine import DivergedError, Run
from introkernels.train.experiment import run_directory, run_experiment
from introkernels.train.files import DirectoryError
from introkernels.train.methods.label_smoothing import LabelSmoothing
from introkernels.train.runs import load_model


def change(config, **fields):
    return dataclasses.replace(config, **fields)


def test_layout_and_records(tiny, train, tmp_path):
    epochs = []
    summary = train(tiny, on_epoch=epochs.append)
    out = tmp_path / "out"
    assert sum(epochs) == 2 * 2 * 3
    assert json.loads((out / "summary.json").read_text()) == summary
    assert json.loads((out / "config.json").read_text()) == tiny.to_dict()
    assert [(run["method"], run["seed"]) for run in summary["runs"]] == [
        (method, seed) for method in tiny.methods for seed in (0, 1)
    ]
    for run in summary["runs"]:
        directory = run_directory(out, run["method"], run["seed"])
        record = json.loads((directory / "metrics.json").read_text())
        assert record["finished"]
        assert record["test"]["accuracy"] == run["accuracy"]
        assert [epoch["epoch"] for epoch in record["history"]] == [1, 2, 3]
        with (directory / "metrics.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert [float(row["validation_nll"]) for row in rows] == [
            epoch["validation_nll"] for epoch in record["history"]
        ]
    assert not list(out.rglob("*.tmp"))


def test_summary_is_mean_deviation_and_paired_difference(tiny, train):
    summary = train(change(tiny, seeds=3))
    values = {
        method: [run["nll"] for run in summary["runs"] if run["method"] == method]
        for method in tiny.methods
    }
    for method, row in summary["methods"].items():
        assert row["runs"] == 3
        assert row["nll"]["mean"] == pytest.approx(statistics.mean(values[method]))
        assert row["nll"]["std"] == pytest.approx(statistics.stdev(values[method]))
    difference = [b - a for a, b in zip(*values.values(), strict=True)]
    paired = summary["paired"]["standard"]["introspective_head"]["nll"]
    error = statistics.stdev(difference) / math.sqrt(3)
    assert paired["mean"] == pytest.approx(statistics.mean(difference))
    assert paired["standard_error"] == pytest.approx(error)
    assert paired["confidence_95"] == pytest.approx(4.302653 * error, rel=1e-6)  # t, 2 degrees
    assert paired["won"] == sum(d < 0 for d in difference)
    assert paired["won"] + paired["tied"] + paired["lost"] == 3


def test_one_seed_has_no_deviation(tiny, train, tmp_path):
    summary = train(change(tiny, seeds=1))
    assert summary["methods"]["standard"]["accuracy"]["std"] is None
    assert summary["paired"]["standard"]["introspective_head"]["nll"]["standard_error"] is None
    assert "NaN" not in (tmp_path / "out" / "summary.json").read_text()


def test_a_seed_fixes_everything_and_another_changes_it(tiny, train, tmp_path):
    train(tiny, "first")
    torch.manual_seed(77)
    before = torch.get_rng_state()
    train(tiny, "second")
    assert torch.equal(torch.get_rng_state(), before)
    assert_same_outcome(tmp_path / "first", tmp_path / "second")
    runs = [run["nll"] for run in json.loads((tmp_path / "first/summary.json").read_text())["runs"]]
    assert len(set(runs)) == len(runs)


def test_methods_of_a_seed_share_weights_images_and_order(tiny):
    one, other = (Run(tiny, method, 1) for method in tiny.methods)
    assert torch.equal(one.splits.train.images, other.splits.train.images)
    assert torch.equal(one.order.get_state(), other.order.get_state())
    for left, right in zip(one.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_learning_rate_follows_the_schedule(tiny, schedule):
    run = Run(change(tiny, schedule=schedule, epochs=4), "standard", 0)
    while not run.finished:
        run.train_epoch()
    rates = [epoch["learning_rate"] / tiny.learning_rate for epoch in run.history]
    cosine = [(1 + math.cos(math.pi * k / 4)) / 2 for k in range(4)]
    assert rates == pytest.approx(cosine if schedule == "cosine" else [1] * 4)


def test_workers_do_not_change_results(tiny, train, tmp_path):
    epochs = []
    train(tiny, "one", worker_count=1)
    train(tiny, "two", worker_count=2, on_epoch=epochs.append)
    assert sum(epochs) == 2 * 2 * 3
    assert_same_outcome(tmp_path / "one", tmp_path / "two")


def test_a_directory_with_runs_is_not_touched_without_resume(tiny, train, tmp_path):
    train(tiny)
    before = {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    with pytest.raises(DirectoryError, match="already holds an experiment.*--resume"):
        train(tiny)
    assert before == {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()}


def test_resuming_what_is_finished_changes_nothing_and_what_is_not_there_starts(
    tiny, train, tmp_path
):
    first = train(tiny, resume=True)
    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("checkpoint.pt")}
    assert train(tiny, resume=True) == first
    assert stamps == {p: p.stat().st_mtime_ns for p in stamps}


def test_seeds_and_methods_can_be_added_but_not_dropped(tiny, train, tmp_path):
    small = change(tiny, methods=("standard",), seeds=1)
    train(small)
    train(tiny, resume=True)
    train(tiny, "at_once")
    assert_same_outcome(tmp_path / "out", tmp_path / "at_once")
    with pytest.raises(DirectoryError, match=r"methods: introspective_head there.*seeds: 1 there"):
        train(small, resume=True)


def test_another_configuration_is_refused_by_the_names_of_its_fields(tiny, train):
    train(tiny)
    smoothed = dataclasses.replace(tiny.hyperparameters, label_smoothing=LabelSmoothing(0.4))
    train(change(tiny, hyperparameters=smoothed), resume=True)  # not trained: no difference
    head = dataclasses.replace(tiny.hyperparameters.introspective_head, temperature=2.0)
    other = change(
        tiny,
        epochs=4,
        hyperparameters=dataclasses.replace(tiny.hyperparameters, introspective_head=head),
    )
    with pytest.raises(DirectoryError) as error:
        train(other, resume=True)
    assert "epochs: 3 there, 4 asked for" in str(error.value)
    assert "hyperparameters.introspective_head.temperature: 4.0 there" in str(error.value)
    assert "train_size" not in str(error.value)


def test_a_damaged_checkpoint_is_named_and_deleting_it_helps(tiny, train, tmp_path):
    train(tiny)
    train(tiny, "whole")
    path = run_directory(tmp_path / "out", "standard", 1) / "checkpoint.pt"
    for content in (b"", path.read_bytes()[:5000], b"not a checkpoint"):
        path.write_bytes(content)
        with pytest.raises(
            checkpoint.CheckpointError, match=r"standard/seed1.*can't be read.*Delete"
        ):
            train(tiny, resume=True)
    path.unlink()
    train(tiny, resume=True)
    assert_same_outcome(tmp_path / "out", tmp_path / "whole")


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory):
    """A finished experiment of one run."""
    out = tmp_path_factory.mktemp("trained") / "out"
    config = change(tiny, methods=("standard",), seeds=1)
    run_experiment(config, out, worker_count=1, tensorboard=False)
    return config, out


@pytest.fixture
def one_run(trained, tmp_path):
    """A copy of that experiment to be damaged, and where its run is."""
    config, out = trained
    shutil.copytree(out, tmp_path / "out")
    return config, run_directory(tmp_path / "out", "standard", 0)


def test_a_checkpoint_with_a_flipped_bit_is_refused(one_run):
    config, directory = one_run
    path = directory / "checkpoint.pt"
    whole = path.read_bytes()
    drawn = random.Random(0)
    for bit in drawn.sample(range(8 * len(whole)), 400):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        with pytest.raises(
            checkpoint.CheckpointError, match=r"checkpoint.pt can't be read.*Delete"
        ):
            load_model(config, "standard", 0, directory)


def drop(state, *names):
    """Delete a field of a field."""
    for name in names[:-1]:
        state = state[name]
    del state[names[-1]]


def double(state, *names):
    """Make a tensor twice as long."""
    for name in names[:-1]:
        state = state[name]
    state[names[-1]] = torch.cat([state[names[-1]]] * 2)


def rewrite(path, edit, names):
    state = torch.load(path, weights_only=True)
    edit(state, *names)
    checkpoint.save(path, state)


@pytest.mark.parametrize(
    ("edit", "names", "message"),
    [
        (drop, ["identity"], "is of another run"),
        (drop, ["learner"], "state.learner is missing"),
        (drop, ["model"], "state.model is missing"),
        (drop, ["rng", "order"], "state.rng.order is missing"),
        (drop, ["scheduler", "last_epoch"], "state.scheduler.last_epoch is missing"),
        (drop, ["optimizer", "param_groups", 0, "lr"], "param_groups.0.lr is missing"),
        (drop, ["optimizer", "state", 1, "exp_avg"], "lacks a field of some parameters"),
        (drop, ["learner", "model.head.bias"], "state.learner.model.head.bias is missing"),
        (double, ["learner", "model.head.bias"], r"bias has shape .20., expected .10."),
        (double, ["model", "head.bias"], r"bias has shape .20., expected .10."),
        (double, ["optimizer", "state", 1, "exp_avg"], "exp_avg of a parameter has shape"),
        (double, ["rng", "torch"], "state.rng.torch has shape"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_named_with_what_is_wrong(
    edit, names, message, one_run, train
):
    config, directory = one_run
    rewrite(directory / "checkpoint.pt", edit, names)
    with pytest.raises(checkpoint.CheckpointError, match=rf"checkpoint.pt .*{message}.*Delete"):
        train(config, resume=True)


@pytest.mark.parametrize(
    ("edit", "names"),
    [(drop, ["model"]), (drop, ["model", "head.bias"]), (double, ["model", "head.bias"])],
)
def test_a_model_that_does_not_fit_is_not_loaded(edit, names, one_run):
    config, directory = one_run
    rewrite(directory / "checkpoint.pt", edit, names)
    with pytest.raises(
        checkpoint.CheckpointError, match=r"pt doesn't fit this run .*Delete"
    ) as error:
        load_model(config, "standard", 0, directory)
    assert "\n" not in str(error.value)


def test_a_checkpoint_of_another_run_is_not_continued(tiny, train, tmp_path):
    train(tiny)
    here = run_directory(tmp_path / "out", "standard", 0) / "checkpoint.pt"
    there = run_directory(tmp_path / "out", "standard", 1) / "checkpoint.pt"
    there.write_bytes(here.read_bytes())
    with pytest.raises(checkpoint.CheckpointError, match="of another run .seed: 0 there, 1 asked"):
        train(tiny, resume=True)


def test_runs_without_configuration_are_not_adopted(tiny, train, tmp_path):
    train(tiny)
    (tmp_path / "out" / "config.json").unlink()
    with pytest.raises(DirectoryError, match=r"holds runs but no config.json"):
        train(tiny, resume=True)


def test_a_sketch_resumes_in_the_middle_with_the_same_probes(tiny, train, tmp_path, monkeypatch):
    config = change(tiny, methods=("introspective_sketch",), seeds=1)
    train(config, "whole", checkpoint_every=1)
    train_epoch = Run.train_epoch

    def stop_in_the_second(run):
        if run.epoch == 1:
            raise KeyboardInterrupt
        train_epoch(run)

    with monkeypatch.context() as patched:
        patched.setattr(Run, "train_epoch", stop_in_the_second)
        with pytest.raises(KeyboardInterrupt):
            train(config, checkpoint_every=1)
    torch.manual_seed(5)
    train(config, resume=True, checkpoint_every=1)
    assert_same_outcome(tmp_path / "out", tmp_path / "whole")


def test_explanations_replace_the_introspective_methods_alone(tiny):
    config = tiny.explained_by(("sketch", "exact"))
    assert config.methods == ("standard", "introspective_sketch", "introspective_input")
    assert change(config, methods=tiny.methods) == tiny
    assert config.explained_by(("head",)).methods == tiny.methods


@pytest.mark.parametrize(
    ("explanations", "message"),
    [
        (("exact", "magic"), "explain: got 'magic', expected one of exact, sketch, projection, h"),
        (("head", "head"), "explain: got .'head', 'head'., expected .* none of them twice"),
        ((), "explain: got .., expected at least one"),
    ],
)
def test_unknown_explanations_are_refused(tiny, explanations, message):
    with pytest.raises(ConfigError, match=message):
        tiny.explained_by(explanations)


def test_only_one_process_trains_in_a_directory(tiny, train, tmp_path):
    with (
        files.only_writer(tmp_path / "out"),
        pytest.raises(files.DirectoryBusyError, match="another process is training there"),
    ):
        train(tiny)


def test_the_trained_model_can_be_loaded(tiny, train, tmp_path):
    summary = train(tiny)
    model = load_model(tiny, "standard", 0, run_directory(tmp_path / "out", "standard", 0))
    test = Run(tiny, "standard", 0).splits.test
    right = (model(test.images).argmax(dim=1) == test.labels).float().mean().item()
    assert right == pytest.approx(summary["runs"][0]["accuracy"])
    with pytest.raises(checkpoint.CheckpointError, match="does not exist"):
        load_model(tiny, "standard", 9, run_directory(tmp_path / "out", "standard", 9))


def test_divergence_is_an_error_with_a_remedy(tiny, train):
    with pytest.raises(DivergedError, match="training loss of epoch .* lower learning_rate"):
        train(change(tiny, learning_rate=1e30))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dataset": "mnist"}, "dataset: got 'mnist', expected one of digits"),
        ({"model": "vgg"}, "model: got 'vgg', expected one of mlp, small_cnn, resnet20"),
        ({"methods": ("standard", "magic")}, "methods: got 'magic', expected one of standard, "),
        ({"methods": ("standard", "standard")}, "none of them twice"),
        ({"methods": ()}, "at least one"),
        ({"epochs": 0}, "epochs: got 0, expected at least 1"),
        ({"learning_rate": -1.0}, "learning_rate: got -1.0, expected above 0"),
        ({"weight_decay": -0.1}, "weight_decay: got -0.1"),
        ({"device": "quantum"}, "device: quantum can't be used here"),
    ],
)
def test_bad_configurations_name_field_value_and_choice(fields, message):
    with pytest.raises(ConfigError, match=message):
        TrainConfig(**fields)


def test_tensorboard_files_hold_every_epoch_once(tiny, train, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    summary = train(change(tiny, methods=("standard",), seeds=1), tensorboard=True)
    directory = run_directory(tmp_path / "out", "standard", 0)
    events = EventAccumulator(str(directory / "tensorboard")).Reload()
    logged = events.Scalars("validation/nll")
    history = json.loads((directory / "metrics.json").read_text())["history"]
    assert [scalar.step for scalar in logged] == [1, 2, 3]
    assert [scalar.value for scalar in logged] == pytest.approx(
        [epoch["validation_nll"] for epoch in history]
    )
    train(change(tiny, methods=("standard",), seeds=1), "without")
    assert without_times(summary)["runs"]
    assert not (run_directory(tmp_path / "without", "standard", 0) / "tensorboard").exists()
