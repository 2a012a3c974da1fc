"""Plans: what a file may say, what is tried, and what of it is the same for every method."""

from __future__ import annotations

import dataclasses

import pytest

from introkernels.train.study import plan as plans
from introkernels.train.study.plan import PlanError, load_preset, parse, presets

TEXT = """
name = "small"
representative = "introspective_head"
margin = 0.5
trials = 4
tuning_seeds = 2
seeds = 3

[train]
dataset = "digits"
model = "mlp"
epochs = 2
milestones = [1]
schedule = "step"
validation_size = 60
test_size = 100

[cells]
train_size = [40, 80]
label_noise = [0.0, 0.2]

[space]
learning_rate = [0.001, 0.003, 0.01, 0.03]

[methods.standard]
[methods.label_smoothing]
amount = [0.1, 0.2, 0.3]
[methods.introspective_head]
temperature = [2.0, 4.0]
center = true
"""


def test_every_method_is_tried_as_often_without_repetition() -> None:
    plan = parse(TEXT)
    for method in plan.methods:
        settings = plan.settings(method)
        assert len(settings) == plan.trials
        assert len({tuple(chosen.items()) for chosen in settings}) == plan.trials
        space = plan.searched(method)
        for chosen in settings:
            assert chosen.keys() == space.keys()
            assert all(value in space[name] for name, value in chosen.items())
    assert [s["learning_rate"] for s in plan.settings("standard")] == [0.001, 0.003, 0.01, 0.03]


def test_what_is_tried_does_not_depend_on_other_methods() -> None:
    whole = parse(TEXT)
    part = whole.only(["label_smoothing"])
    assert list(part.methods) == ["label_smoothing", "introspective_head"]
    assert part.settings("label_smoothing") == whole.settings("label_smoothing")
    assert part.hash != whole.hash


def test_cells_are_the_combinations() -> None:
    plan = parse(TEXT)
    cells = plan.list_cells()
    assert [cell.changes for cell in cells] == [
        {"train_size": size, "label_noise": noise} for size in (40, 80) for noise in (0.0, 0.2)
    ]
    assert [cell.name for cell in cells] == [
        *("digits, 40 images, clean labels", "digits, 40 images, 20% label noise"),
        *("digits, 80 images, clean labels", "digits, 80 images, 20% label noise"),
    ]


def test_settings_reach_the_experiment() -> None:
    plan = parse(TEXT)
    settings = {"learning_rate": 0.03, "introspective_head.temperature": 2.0}
    config = plan.config(plan.list_cells()[3], "introspective_head", settings, device="cpu")
    assert (config.train_size, config.label_noise, config.learning_rate) == (80, 0.2, 0.03)
    assert (config.model, config.epochs, config.milestones) == ("mlp", 2, (1,))
    method = config.method("introspective_head")
    assert (method.temperature, method.center, method.kl_weight) == (2.0, True, 0.3)


def test_a_method_may_take_part_in_several_forms() -> None:
    form = """
[methods.split]
method = "introspective_head"
label_mode = "split"
non_target_mass = [0.1, 0.2]
"""
    plan = parse(TEXT + form)
    assert plan.registered("split") == plan.registered("introspective_head") == "introspective_head"
    settings = plan.settings("split")
    assert {chosen["split.non_target_mass"] for chosen in settings} <= {0.1, 0.2}
    config = plan.config(plan.list_cells()[0], "split", {"split.non_target_mass": 0.2})
    assert config.methods == ("introspective_head",)
    assert config.method("introspective_head").non_target_mass == 0.2
    assert config.method("introspective_head").label_mode == "split"
    with pytest.raises(PlanError, match="methods: got 'magic', expected one of standard"):
        parse(TEXT + form.replace("introspective_head", "magic"))


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ('name = "small"', 'nam = "small"', "plan: got 'nam', expected one of name, "),
        ("margin = 0.5\n", "", "plan: got no margin, expected all of"),
        ("trials = 4", "trials = 5", "methods.standard: got 4 settings, expected at least 5"),
        ("trials = 4", "trials = true", "trials: got True, expected a value of type <class 'int'>"),
        ("seeds = 3", "seeds = 0", "seeds: got 0, expected at least 1"),
        ("train_size =", "train_sizes =", "cells: got 'train_sizes', expected one of"),
        ("epochs = 2", "device = 'cpu'", "train: got 'device', expected one of"),
        ("[40, 80]", "40", "train_size: got 40, expected a list of values"),
        ("amount", "share", r"methods.label_smoothing in digits, 40 .*'share'"),
        ("[0.1, 0.2, 0.3]", "[0.1, 2.0]", r"label_smoothing.amount: got 2.0"),
        ('"mlp"', '"mpl"', "methods.standard in .*: model: got 'mpl', expected one of mlp"),
        ("methods.standard", "methods.magic", "methods: got 'magic', expected one of standard"),
        (
            'representative = "introspective_head"',
            'representative = "standard"',
            "representative: got 'standard', expected an introspective one of the methods",
        ),
        ("[space]", "[space", "plan: not valid TOML"),
    ],
)
def test_mistakes_are_named(before: str, after: str, message: str) -> None:
    assert before in TEXT
    with pytest.raises(PlanError, match=message):
        parse(TEXT.replace(before, after))


def test_unknown_methods_and_presets_are_named() -> None:
    with pytest.raises(PlanError, match="methods: got 'kd', expected one of standard, "):
        parse(TEXT).only(["kd"])
    with pytest.raises(PlanError, match="preset: got 'digit', expected one of cifar100, digits, "):
        load_preset("digit")


@pytest.mark.parametrize("name", presets())
def test_presets_are_plans(name: str) -> None:
    plan = load_preset(name)
    assert plan.name == name
    assert {"standard", "label_smoothing", plan.representative} <= set(plan.methods)
    # A method of the same kind is searched as widely.
    assert dataclasses.asdict(plan) == plan.to_dict()


def test_the_digits_preset_is_what_the_report_says_of_it() -> None:
    plan = load_preset("digits")
    assert plan.seeds >= 20
    assert len(plan.cells["train_size"]) >= 3
    assert plan.cells["label_noise"] == [0.0, 0.2]
    assert set(plans.GROUPS) <= set(plan.methods)
