"""What the engine adds to a step: parts, averages, schedules, half types, what is kept."""

from __future__ import annotations

import copy
import dataclasses
import math
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from introkernels.train.config import ConfigError, TrainConfig
from introkernels.train.engine import Run, split_for
from introkernels.train.methods import METHODS
from introkernels.train.methods.born_again import BornAgain
from introkernels.train.methods.kd import KnowledgeDistillation
from introkernels.train.runs import epochs_of, fingerprint, load_model, train_run

TINY = TrainConfig(
    methods=("standard",), model="mlp", seeds=1, epochs=3, train_size=60, test_size=200
)


def weights(run: Run) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in run.learner.parameters()])


@pytest.mark.parametrize("name", METHODS)
def test_every_method_learns_the_digits(name: str, tmp_path: Path):
    config = dataclasses.replace(TINY, methods=(name,), epochs=12, train_size=200)
    record = train_run(config, name, 0, tmp_path / "run", teachers=tmp_path / "teachers")
    # A tenth of the digits are right by chance; 200 images teach this network nine tenths.
    assert record["test"]["accuracy"] > 0.8
    assert record["history"][-1]["train_loss"] < record["history"][0]["train_loss"]
    assert record["best"]["epoch"] <= 12
    taught = METHODS[name]().teacher() is not None
    assert (record["teacher_seconds"] > 0) == taught
    assert (tmp_path / "teachers").exists() == taught


def test_a_batch_in_parts_is_the_batch():
    whole, parts = (
        Run(dataclasses.replace(TINY, accumulate=count, batch_size=25), "standard", 0)
        for count in (1, 4)
    )
    for run in (whole, parts):
        run.train_epoch()
    torch.testing.assert_close(weights(parts), weights(whole), rtol=1e-4, atol=1e-5)
    for name, value in whole.history[0].items():
        assert parts.history[0][name] == pytest.approx(value, abs=2e-3), name


def test_averaged_weights_are_those_of_the_definition():
    decay = 0.9
    run = Run(dataclasses.replace(TINY, ema=decay, batch_size=20), "standard", 0)
    averaged = copy.deepcopy(run.learner.model.state_dict())
    first = True

    def observe(*call):
        nonlocal first
        for name, value in run.learner.model.state_dict().items():
            # The first step has nothing to average with.
            averaged[name] = value.clone() if first else averaged[name].lerp(value, 1 - decay)
        first = False

    run.optimizer.register_step_post_hook(observe)
    run.train_epoch()
    found = run.model.state_dict()
    assert run.model is not run.learner.model
    for name, value in averaged.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)
        assert not torch.equal(found[name], run.learner.model.state_dict()[name])
    # It is what is measured.
    batch = run.splits.validation
    nll = F.cross_entropy(run.model(batch.images), batch.labels)
    assert run.history[0]["validation_nll"] == pytest.approx(nll.item(), rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"schedule": "constant"}, [0.1] * 4),
        ({"schedule": "step", "milestones": (1, 3), "decay": 0.5}, [0.1, 0.05, 0.05, 0.025]),
        ({"schedule": "cosine"}, [0.05 * (1 + math.cos(math.pi * e / 4)) for e in range(4)]),
    ],
)
def test_schedules(changes, expected):
    run = Run(dataclasses.replace(TINY, epochs=4, learning_rate=0.1, **changes), "standard", 0)
    for _ in range(4):
        run.train_epoch()
    assert [epoch["learning_rate"] for epoch in run.history] == pytest.approx(expected)


def test_stochastic_gradient_descent_is_nesterovs():
    config = dataclasses.replace(
        TINY, optimizer="sgd", learning_rate=0.1, weight_decay=0.01, batch_size=60
    )
    run = Run(config, "standard", 0)
    before = weights(run)
    data = run.splits.train
    loss = F.cross_entropy(run.learner.model(data.images), data.labels)
    gradients = torch.autograd.grad(loss, list(run.learner.parameters()))
    gradient = torch.cat([g.flatten() for g in gradients]) + 0.01 * before
    run.train_epoch()
    # The first step of Nesterov's momentum: v = g, and g + 0.9 v is subtracted.
    torch.testing.assert_close(weights(run), before - 0.1 * 1.9 * gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["standard", "introspective_input", "introspective_head"])
def test_half_types_learn_too(precision, name, tmp_path):
    config = dataclasses.replace(TINY, precision=precision, methods=(name,), epochs=8)
    kinds = set()
    run = Run(config, name, 0)
    run.learner.model.head.register_forward_hook(lambda *call: kinds.add(call[2].dtype))
    run.train_epoch()
    assert getattr(torch, precision) in kinds
    record = train_run(config, name, 0, tmp_path, teachers=tmp_path)
    assert record["test"]["accuracy"] > 0.6


def test_the_best_epoch_is_chosen_on_validation_images():
    run = Run(dataclasses.replace(TINY, epochs=6, learning_rate=0.05), "standard", 0)
    tested = []
    for _ in range(6):
        run.train_epoch()
        tested.append(run.evaluate(run.model, run.splits.test))
    quality = [(e["validation_accuracy"], -e["validation_nll"]) for e in run.history]
    chosen = quality.index(max(quality))
    assert run.best == {"epoch": chosen + 1, **tested[chosen]}
    assert run.test == tested[-1]


RESUMED = [
    ("online_label_smoothing", {"ema": 0.9}),
    ("introspective_bank", {}),
    ("introspective_ramp", {}),
    ("introspective_sketch", {"precision": "float16"}),
    ("deep_mutual_learning", {"optimizer": "sgd"}),
    ("cs_kd", {"augmentation": "shift"}),
    ("kd_class_average", {"schedule": "step", "milestones": (2,)}),
    ("kd_permuted", {"accumulate": 2}),
    ("mixup", {"label_noise": 0.2}),
    ("born_again", {}),
]


@pytest.mark.parametrize(("name", "changes"), RESUMED)
def test_resumed_after_each_epoch_is_the_same_to_the_bit(name, changes, tmp_path):
    config = dataclasses.replace(TINY, methods=(name,), **changes)

    class StoppedError(Exception):
        pass

    def stop(epochs: int) -> None:
        raise StoppedError

    def outcome(folder: str) -> tuple[dict, dict]:
        record = train_run(config, name, 0, tmp_path / folder, teachers=tmp_path / f"{folder}-t")
        model = load_model(config, name, 0, tmp_path / folder)
        return record, model.state_dict()

    record, expected = outcome("whole")
    for _ in range(epochs_of(config, name) + 4):
        try:
            train_run(
                config,
                name,
                0,
                tmp_path / "parts",
                teachers=tmp_path / "parts-t",
                checkpoint_every=1,
                on_epoch=stop,
            )
        except StoppedError:
            continue
    resumed, found = outcome("parts")
    for part in ("history", "test", "best"):
        assert resumed[part] == record[part]
    assert all(torch.equal(found[key], value) for key, value in expected.items())


def test_teachers_are_trained_once_and_count():
    config = dataclasses.replace(TINY, methods=("born_again",)).with_method(
        BornAgain(generations=3)
    )
    assert epochs_of(config, "born_again") == 4 * config.epochs
    teacher, method = config.teacher_of("born_again")
    assert (method, teacher.method(method)) == ("born_again", BornAgain(generations=2))
    larger = TINY.with_method(KnowledgeDistillation(teacher_model="small_cnn"))
    teacher, method = larger.teacher_of("kd")
    assert (teacher.model, method) == ("small_cnn", "standard")
    # What a teacher is named by does not tell who asked for it.
    other = TINY.with_method(KnowledgeDistillation(teacher_model="small_cnn", temperature=9.0))
    asked = [c.teacher_of("kd")[0].run_identity("standard", 3) for c in (larger, other)]
    assert fingerprint(asked[0]) == fingerprint(asked[1])
    assert fingerprint(asked[0]) != fingerprint(TINY.run_identity("standard", 3))


def test_a_shared_teacher_is_trained_by_the_first_that_asks(tmp_path):
    counts = []
    for name in ("kd", "kd_permuted"):
        config = dataclasses.replace(TINY, methods=(name,))
        epochs = []
        train_run(config, name, 0, tmp_path / name, teachers=tmp_path / "t", on_epoch=epochs.append)
        counts.append(epochs)
    assert counts[0] == [1] * 6
    assert counts[1] == [3, 1, 1, 1]
    assert len(list((tmp_path / "t").iterdir())) == 1


def test_noise_is_in_the_training_labels_alone():
    noisy = split_for(dataclasses.replace(TINY, label_noise=0.5), 0)
    clean = split_for(TINY, 0)
    assert torch.equal(noisy.train.images, clean.train.images)
    assert int((noisy.train.labels != clean.train.labels).sum()) == 30
    for part in ("validation", "test"):
        assert torch.equal(getattr(noisy, part).labels, getattr(clean, part).labels)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schedule": "step"}, r"milestones: got \(\), expected some with schedule step"),
        ({"milestones": (3,)}, r"milestones: got \(3,\), expected none with schedule cosine"),
        ({"schedule": "step", "milestones": (0,)}, "milestones: got 0, expected at least 1"),
        ({"label_noise": 1.0}, r"label_noise: got 1.0, expected in \[0, 1\)"),
        ({"ema": -0.1}, "ema: got -0.1"),
        ({"accumulate": 0}, "accumulate: got 0"),
        ({"augmentation": "twirl"}, "augmentation: got 'twirl', expected one of none, shift"),
        ({"decay": 0.0}, "decay: got 0.0, expected above 0"),
    ],
)
def test_bad_settings_are_named(changes, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(TINY, **changes)
