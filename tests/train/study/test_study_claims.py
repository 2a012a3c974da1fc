from __future__ import annotations

import math

import made_up
import pytest

from introkernels.train.study import claims
from introkernels.train.study.analysis import Results

SUPPORTED, PARTLY = "supported here", "partly supported here"
NOT_SUPPORTED, NOT_STUDIED = "not supported here", "not part of this study"

TEACHER = {
    "standard": 0.80,
    "kd": 0.84,
    "kd_ground_truth_only": 0.81,
    "kd_permuted": 0.82,
    "kd_class_average": 0.83,
}
INTROSPECTIVE = {
    "standard": 0.80,
    "label_smoothing": 0.81,
    "mixup": 0.82,
    "cs_kd": 0.85,
    "introspective_input": 0.84,
}
RIVALS = {
    "introspective_input": 0.84,
    "kd": 0.843,
    "born_again": 0.842,
    "deep_mutual_learning": 0.81,
}


def judged(accuracies, **changed):
    """Claims by their key, of accuracies that hardly differ between seeds."""
    return {c.key: c for c in claims.judge(Results(made_up.study(accuracies, **changed)))}


def without(values, *names):
    return {name: value for name, value in values.items() if name not in names}


def text(claim):
    return " ".join(claim.sentences)


@pytest.mark.parametrize(
    ("changed", "verdict"),
    [
        ({}, SUPPORTED),
        ({"kd_permuted": 0.81}, PARTLY),
        ({"kd_permuted": 0.80}, PARTLY),
        # Class similarity shows twice: added to even responses, and destroyed by permuting.
        ({"kd_class_average": 0.81}, PARTLY),
        ({"kd_permuted": 0.84}, PARTLY),
        ({"kd_permuted": 0.81, "kd_class_average": 0.81}, NOT_SUPPORTED),
        ({"kd": 0.80}, NOT_SUPPORTED),
        ({"kd": 0.79}, NOT_SUPPORTED),
    ],
)
def test_what_makes_a_teacher_work(changed, verdict):
    claim = judged(made_up.constant(TEACHER | changed))["a"]
    assert claim.verdict == verdict


@pytest.mark.parametrize(
    ("left_out", "verdict", "missing"),
    [
        (["kd"], NOT_STUDIED, None),
        (["standard"], NOT_STUDIED, None),
        (["kd_ground_truth_only"], NOT_STUDIED, None),
        (["kd_permuted", "kd_class_average"], NOT_STUDIED, None),
        (["kd_permuted"], NOT_STUDIED, None),
        (["kd_class_average"], PARTLY, "the whole effect of class similarity"),
    ],
)
def test_what_makes_a_teacher_work_needs_the_component_study(left_out, verdict, missing):
    claim = judged(made_up.constant(without(TEACHER, *left_out)))["a"]
    assert claim.verdict == verdict
    if missing:
        assert f"Not part of this study: {missing}." in claim.sentences
    else:
        assert len(claim.sentences) == 1
        assert "needs kd, standard training and the component study" in claim.sentences[0]


@pytest.mark.parametrize(
    ("own", "verdict", "said"),
    [
        (0.84, SUPPORTED, "introspective input − mixup +2.0"),
        (0.815, PARTLY, "Shown against standard and label smoothing; not against mixup."),
        (0.805, PARTLY, "Shown against standard; not against label smoothing and mixup."),
        (0.80, NOT_SUPPORTED, "no clear difference"),
        (0.79, NOT_SUPPORTED, "worse"),
    ],
)
def test_better_than_regularisation(own, verdict, said):
    claim = judged(made_up.constant(INTROSPECTIVE | {"introspective_input": own}))["b"]
    assert claim.verdict == verdict
    assert said in text(claim)


def test_methods_that_teach_themselves_are_told_but_do_not_count():
    claim = judged(made_up.constant(INTROSPECTIVE))["b"]
    assert claim.verdict == SUPPORTED
    beside = [one for one in claim.evidence if not one.counts]
    assert [(one.difference.reference, one.holds) for one in beside] == [("cs_kd", False)]
    assert "Self-teaching: introspective input − cs kd −1.0" in text(claim)


@pytest.mark.parametrize(
    ("mean", "inverted", "conclusion"),
    [
        (0.81, 0.80, "Class similarity has a part in what it gains: it is better than each"),
        (0.84, 0.80, "isn’t shown to be better than introspective mean, with soft labels"),
        (0.85, 0.84, "better than introspective mean and introspective inverted, with soft labels"),
    ],
)
def test_what_class_similarity_has_to_do_with_it_is_told(mean, inverted, conclusion):
    controls = {"introspective_mean": mean, "introspective_inverted": inverted}
    claim = judged(made_up.constant(INTROSPECTIVE | controls))["b"]
    # The verdict is about methods that someone would use.
    assert claim.verdict == SUPPORTED
    assert conclusion in claim.sentences[-1]
    assert text(claim).count("Control: introspective input −") == 2


@pytest.mark.parametrize(
    ("left_out", "missing"),
    [
        (["standard"], "standard training"),
        (["label_smoothing", "mixup"], "regularisation methods"),
    ],
)
def test_what_was_not_compared_is_not_claimed(left_out, missing):
    claim = judged(made_up.constant(without(INTROSPECTIVE, *left_out)))["b"]
    assert claim.verdict == PARTLY
    assert f"Not part of this study: {missing}." in claim.sentences


def test_the_representative_is_that_of_the_plan():
    accuracies = made_up.constant(INTROSPECTIVE | {"introspective_head": 0.70})
    assert judged(accuracies)["b"].verdict == SUPPORTED
    assert judged(accuracies, representative="introspective_head")["b"].verdict == NOT_SUPPORTED


@pytest.mark.parametrize(
    ("changed", "verdict", "said"),
    [
        ({}, SUPPORTED, "worse, within the margin"),
        ({"kd": 0.86}, PARTLY, "not against kd."),
        ({"kd": 0.80}, SUPPORTED, "introspective input − kd +4.0"),
        ({"introspective_input": 0.70}, NOT_SUPPORTED, "not shown to be within the margin"),
    ],
)
def test_keeping_up_with_teachers_and_peers(changed, verdict, said):
    claim = judged(made_up.constant(RIVALS | changed))["c"]
    assert claim.verdict == verdict
    assert said in text(claim)


def test_keeping_up_takes_all_of_them():
    claim = judged(made_up.constant(without(RIVALS, "born_again")))["c"]
    assert claim.verdict == PARTLY
    assert "Not part of this study: born again." in claim.sentences


def test_the_margin_is_that_of_the_plan():
    for margin, verdict in ((0.5, SUPPORTED), (0.1, PARTLY)):
        assert judged(made_up.constant(RIVALS), margin=margin)["c"].verdict == verdict


@pytest.mark.parametrize(("beyond", "verdict"), [(1e-4, SUPPORTED), (-1e-4, NOT_SUPPORTED)])
def test_the_lower_bound_decides_and_not_the_mean(beyond, verdict):
    # Differences 0, 1 and 2 points: mean 1, deviation 1, half width t(2) / √3 = 2.484.
    half = 4.302653 / math.sqrt(3)
    accuracies = {"introspective_input": [[0.80, 0.81, 0.82]], "kd": [[0.80, 0.80, 0.80]]}
    evidence = judged(accuracies, margin=half - 1 + beyond)["c"].evidence[0]
    assert 100 * evidence.difference.low == pytest.approx(1 - half, abs=1e-5)
    assert evidence.holds is (verdict == SUPPORTED)


@pytest.mark.parametrize(
    ("diverging", "verdict"), [("introspective_input", NOT_SUPPORTED), ("mixup", SUPPORTED)]
)
def test_who_diverges_gains_nothing_by_it(diverging, verdict):
    accuracies = made_up.constant(INTROSPECTIVE)
    accuracies[diverging][0][1] = None
    claim = judged(accuracies)["b"]
    assert claim.verdict == verdict
    assert ("did not finish with 1 of the seeds" in text(claim)) is (verdict == NOT_SUPPORTED)


def test_one_seed_supports_nothing():
    accuracies = {name: [[value]] for name, value in (TEACHER | INTROSPECTIVE | RIVALS).items()}
    found = judged(accuracies)
    assert {claim.verdict for claim in found.values()} == {NOT_SUPPORTED}
    assert "can't be told from 1 seed" in text(found["b"])


def test_nothing_of_the_claims_is_studied():
    found = judged(made_up.constant({"standard": 0.8, "mixup": 0.8}))
    assert {claim.verdict for claim in found.values()} == {NOT_STUDIED}
    assert all(claim.sentences[0].startswith("Not part of this study") for claim in found.values())


def test_cells_are_judged_by_the_same_rule_and_the_verdict_is_over_all():
    high, low = (
        made_up.constant(INTROSPECTIVE),
        made_up.constant(INTROSPECTIVE | {"introspective_input": 0.79}),
    )
    accuracies = {name: [high[name][0], high[name][0], low[name][0]] for name in INTROSPECTIVE}
    claim = judged(accuracies)["b"]
    assert [judgement.verdict for judgement in claim.by_cell.values()] == [
        SUPPORTED,
        SUPPORTED,
        NOT_SUPPORTED,
    ]
    assert (
        "By the same rule in each of the 3 cells alone: supported in 2, not supported in 1."
        in claim.sentences
    )
    # (0.84 + 0.84 + 0.79) / 3 = 0.8233 is still more than mixup's 0.82.
    assert claim.verdict == SUPPORTED


def test_sentences_hold_the_figures():
    accuracies = {
        "introspective_input": [[0.82, 0.83, 0.84]],
        "standard": [[0.80, 0.80, 0.83]],
    }
    # Differences 2, 3 and 1 points: mean 2, deviation 1, half width 4.303 / √3 = 2.48.
    assert judged(accuracies)["b"].sentences[0] == (
        "Standard: introspective input − standard +2.00 points (95 % interval −0.48 to +4.48, "
        "3 seeds): no clear difference."
    )
