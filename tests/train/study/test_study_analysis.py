from __future__ import annotations

import csv
import io
import json
import math

import made_up
import pytest

from introkernels.train.study import analysis, costs, csv_tables, tuning

# Quantiles of Student's t at 97.5 %, from the printed table (Gosset's, as in any textbook).
T = {1: 12.706, 2: 4.303, 3: 3.182}


def read(text):
    return list(csv.DictReader(io.StringIO(text)))


def results_of(accuracies, **changed):
    return analysis.Results(made_up.study(accuracies, **changed))


@pytest.fixture
def two_cells():
    return {
        "kd": [[0.82, 0.84, 0.83], [0.61, 0.66, 0.64]],
        "standard": [[0.80, 0.81, 0.82], [0.60, 0.63, 0.62]],
        "label_smoothing": [[0.81, None, 0.82], [0.60, 0.62, 0.61]],
    }


@pytest.mark.parametrize(
    ("cell", "differences"),
    [
        (0, (0.02, 0.03, 0.01)),
        (1, (0.01, 0.03, 0.02)),
        (None, (0.015, 0.03, 0.015)),
    ],
)
def test_a_difference_is_paired_by_seed_with_students_interval(two_cells, cell, differences):
    found = results_of(two_cells).difference("kd", "standard", cell)
    mean = sum(differences) / 3
    deviation = math.sqrt(sum((d - mean) ** 2 for d in differences) / 2)
    half = T[2] * deviation / math.sqrt(3)
    assert list(found.by_seed.values()) == pytest.approx(differences)
    assert found.mean == pytest.approx(mean)
    assert (found.low, found.high) == pytest.approx((mean - half, mean + half), abs=1e-5)
    assert (found.unfinished, found.left_out) == (0, 0)


def test_pairing_takes_a_seeds_luck_out():
    luck = (0.1, -0.1, 0.05, -0.05)
    results = results_of(
        {
            "standard": [[0.7 + x for x in luck]],
            "kd": [[0.71 + x + e for x, e in zip(luck, (0.001, -0.001, 0, 0), strict=True)]],
        }
    )
    found = results.difference("kd", "standard", 0)
    half = T[3] * math.sqrt(2e-6 / 3) / 2
    assert (found.low, found.high) == pytest.approx((0.01 - half, 0.01 + half), abs=1e-6)


def test_a_diverged_run_is_counted_and_its_seed_left_out(two_cells):
    results = results_of(two_cells)
    here = results.difference("label_smoothing", "standard", 0)
    assert list(here.by_seed) == [0, 2]
    assert here.by_seed == pytest.approx({0: 0.01, 2: 0.0})
    assert (here.unfinished, here.left_out) == (1, 1)
    # Seed 1 is whole in cell 1 alone: a mean over cells without cell 0 would compare other data.
    assert list(results.difference("label_smoothing", "standard", None).by_seed) == [0, 2]
    assert results.difference("label_smoothing", "standard", 1).left_out == 0
    against = results.difference("standard", "label_smoothing", 0)
    assert (against.unfinished, against.left_out) == (0, 1)
    assert results.row("label_smoothing", 0).runs == "2 of 3 (1 diverged)"
    assert results.row("label_smoothing", None).runs == "5 of 6 (1 diverged)"
    assert results.row("label_smoothing", 1).runs == "3"


def test_a_run_that_is_not_there_is_not_hidden(two_cells):
    study = made_up.study(two_cells)
    study["runs"] = [r for r in study["runs"] if (r["method"], r["cell"]) != ("kd", 1)]
    results = analysis.Results(study)
    assert results.row("kd", 1).runs == "0 of 3 (3 not run)"
    assert results.row("kd", None).mean["accuracy"] is None
    assert results.difference("kd", "standard", None).outcome == "can't be told from 0 seeds"


@pytest.mark.parametrize(
    ("own", "outcome"),
    [
        ((0.82, 0.83, 0.84), "better"),
        ((0.76, 0.77, 0.78), "worse"),
        ((0.80, 0.83, 0.80), "no clear difference"),
    ],
)
def test_outcomes_follow_the_interval(own, outcome):
    accuracies = {"standard": [[0.79, 0.801, 0.81]], "kd": [list(own)]}
    assert results_of(accuracies).difference("kd", "standard", 0).outcome == outcome


def test_one_seed_has_no_interval():
    found = results_of({"standard": [[0.8]], "kd": [[0.9]]}).difference("kd", "standard", 0)
    assert (found.low, found.high) == (None, None)
    assert found.points == "+10.00"
    assert found.outcome == "can't be told from 1 seed"


def test_equal_differences_have_an_interval_of_no_width():
    results = results_of({"standard": [[0.5, 0.75]], "kd": [[0.75, 1.0]]})
    found = results.difference("kd", "standard", 0)
    assert (found.mean, found.low, found.high) == (0.25, 0.25, 0.25)


def test_a_row_has_means_and_deviations_of_the_last_and_best_epoch(two_cells):
    row = results_of(two_cells).row("kd", 0)
    assert row.mean["accuracy"] == pytest.approx(0.83)
    assert row.std["accuracy"] == pytest.approx(0.01)
    assert row.mean["best_accuracy"] == pytest.approx(0.84)
    assert row.mean["nll"] == pytest.approx(0.17)
    assert row.mean["ece"] == pytest.approx(0.017)
    assert set(row.versus) == {"standard", "label_smoothing"}
    assert row.settings == {"learning_rate": 0.03, "momentum": 0.9}


def test_over_all_cells_seeds_are_averaged_before_they_are_compared(two_cells):
    row = results_of(two_cells).row("kd", None)
    seeds = [(0.82 + 0.61) / 2, (0.84 + 0.66) / 2, (0.83 + 0.64) / 2]
    mean = sum(seeds) / 3
    assert row.mean["accuracy"] == pytest.approx(mean)
    assert row.std["accuracy"] == pytest.approx(math.sqrt(sum((s - mean) ** 2 for s in seeds) / 2))


def test_methods_are_in_the_order_of_groups():
    names = ["introspective_mean", "kd", "mixup", "introspective_input", "standard", "cs_kd"]
    results = results_of(made_up.constant(dict.fromkeys(names, 0.5)))
    assert results.methods == [
        "standard", "mixup", "cs_kd", "kd", "introspective_input", "introspective_mean",
    ]  # fmt: skip
    assert results.places == [0]


def test_an_unknown_method_is_named(two_cells):
    with pytest.raises(KeyError, match="got 'cs_kd', the study has standard, label_smoothing, kd"):
        results_of(two_cells).difference("cs_kd", "standard", 0)


def test_results_csv_has_a_row_for_each_cell_and_method(two_cells):
    rows = read(csv_tables.results_csv(results_of(two_cells), [0, 1]))
    assert [(r["cell"], r["method"]) for r in rows] == [
        (f"shapes, 100 images, {noise} label noise", method)
        for noise in ("0 %", "20 %")
        for method in ("standard", "label_smoothing", "kd")
    ]
    kd = rows[2]
    assert float(kd["minus_standard_mean"]) == pytest.approx(0.02)
    assert (kd["minus_standard_pairs"], kd["minus_label_smoothing_pairs"]) == ("3", "2")
    assert rows[0]["minus_standard_mean"] == ""
    assert (rows[1]["finished"], rows[1]["diverged"]) == ("2", "1")
    assert json.loads(kd["settings"]) == {"learning_rate": 0.03, "momentum": 0.9}
    assert len({r["hash"] for r in rows}) == 6


def test_runs_csv_has_every_run_also_those_that_diverged(two_cells):
    rows = read(csv_tables.runs_csv(results_of(two_cells)))
    assert len(rows) == 18
    lost = [r for r in rows if r["outcome"] == "diverged"]
    assert [(r["method"], r["seed"], r["accuracy"]) for r in lost] == [("label_smoothing", "1", "")]
    assert lost[0]["failure"] == "loss is not finite in epoch 3"
    assert rows[0]["best_epoch"] == "17"
    assert not [name for name in rows[0] if "second" in name]


def test_costs_count_teachers_and_are_multiples_of_standard(two_cells):
    results = results_of(two_cells)
    found = {cost.method: cost for cost in costs.costs(results, 0)}
    kd = found["kd"]
    assert (kd.own_seconds, kd.teacher_seconds, kd.total_seconds) == (2.5, 4.0, 6.5)
    assert kd.multiple == pytest.approx(3.25)
    assert found["standard"].multiple == 1.0
    assert found["label_smoothing"].multiple == 1.25
    rows = read(costs.costs_csv(results))
    assert len(rows) == 6
    assert {r["method"]: float(r["multiple_of_standard"]) for r in rows}["kd"] == 3.25


def test_costs_over_all_cells_are_of_the_mean_times(two_cells):
    study = made_up.study(two_cells)
    for run in study["runs"]:
        if run["cell"] == 1 and run["test"]:
            run["wall_seconds"] *= 10
    found = {cost.method: cost for cost in costs.costs(analysis.Results(study), None)}
    assert found["kd"].own_seconds == pytest.approx((2.5 + 25) / 2)
    assert found["kd"].multiple == pytest.approx((2.5 + 25 + 8) / (2 + 20))


def test_costs_of_what_never_finished_are_unknown():
    results = results_of({"standard": [[None, None]], "kd": [[0.8, 0.9]]})
    standard, kd = costs.costs(results, 0)
    assert standard.total_seconds is None
    assert (kd.total_seconds, kd.multiple) == (6.5, None)


def test_tuning_shows_the_trials(two_cells):
    study = made_up.study(two_cells)
    trial = next(t for t in study["trials"] if t["method"] == "kd" and t["trial"] == 1)
    results = analysis.Results(study)
    found = tuning.tunings(results, 0)[results.methods.index("kd")]
    assert (found.best, found.median, found.worst) == pytest.approx((0.82, 0.81, 0.78))
    trial["validation"] = None
    found = tuning.tunings(analysis.Results(study), 0)[results.methods.index("kd")]
    assert (found.trials, found.diverged) == (3, 1)
    assert (found.median, found.worst) == pytest.approx((0.815, 0.81))
    assert found.on_edge == {"momentum": "highest"}


@pytest.mark.parametrize(
    ("value", "values", "edge"),
    [
        (0.01, [0.1, 0.01, 0.03], "lowest"),
        (0.1, [0.1, 0.01, 0.03], "highest"),
        (0.03, [0.1, 0.01, 0.03], None),
        (0.03, [0.03], None),
        (True, [False, True], None),
        ("wide", ["narrow", "wide"], None),
        (None, [None, 3], None),
    ],
)
def test_values_on_the_edge_of_their_range(value, values, edge):
    expected = {} if edge is None else {"a": edge}
    assert tuning.on_edge({"a": value, "fixed": 1}, {"a": values, "absent": [1, 2]}) == expected


def test_unequal_numbers_of_trials_are_noticed(two_cells):
    study = made_up.study(two_cells)
    assert tuning.same_number_of_trials(analysis.Results(study))
    study["trials"].pop()
    assert not tuning.same_number_of_trials(analysis.Results(study))
