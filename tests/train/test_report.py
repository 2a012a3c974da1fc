from __future__ import annotations

import base64
import dataclasses
import json
import re

import pytest
import torch
from page import Page

import introkernels as ik
from introkernels.train import explanations, findings, report
from introkernels.train.config import TrainConfig
from introkernels.train.data import load_dataset
from introkernels.train.experiment import run_experiment
from introkernels.train.methods import METHODS
from introkernels.train.models import SmallCNN

FIGURES = {
    "idea",
    "explanations",
    "training_curves",
    "paired_differences",
    "class_similarity",
}


@pytest.fixture(scope="module")
def written(finished):
    config, out = finished
    path = report.write(config, out)
    return config, out, json.loads((out / "summary.json").read_text()), path.read_text()


def test_it_is_one_file_that_needs_no_other(written):
    _, out, _, text = written
    page = Page(text)
    assert all(resource.startswith("data:image/png;base64,") for resource in page.resources)
    assert not re.search(r"url\(|@import|https?://", text)
    embedded = {base64.b64decode(image["src"].split(",", 1)[1]) for image in page.images}
    assert {path.stem for path in out.glob("*.png")} == FIGURES
    assert embedded == {path.read_bytes() for path in out.glob("*.png")}
    assert all(content.startswith(b"\x89PNG") for content in embedded)
    assert all(len(image["alt"]) > 40 for image in page.images)


def test_the_table_shows_the_summary(written):
    config, _, summary, text = written
    table = Page(text).tables[0]
    assert [row[0] for row in table[1:]] == [name.replace("_", " ") for name in config.methods]
    for row, method in zip(table[1:], config.methods, strict=True):
        expected = summary["methods"][method]
        shown = [tuple(float(part) for part in cell.split("±")) for cell in row[1:4]]
        for (mean, deviation), (name, scale, digits) in zip(
            shown, [("accuracy", 100, 1), ("nll", 1, 3), ("ece", 100, 1)], strict=True
        ):
            assert mean == round(expected[name]["mean"] * scale, digits)
            assert deviation == round(expected[name]["std"] * scale, digits)
        assert row[5].startswith(f"{expected['wall_seconds']['mean']:.2f}")
        assert row[-1] == "2"


def test_differences_are_those_of_the_summary(written):
    config, _, summary, text = written
    _, standard, smoothing, _ = Page(text).tables
    for table, reference in ((standard, "standard"), (smoothing, "label_smoothing")):
        others = [name for name in config.methods if name != reference]
        for row, method in zip(table[1:], others, strict=True):
            paired = summary["paired"][reference][method]["nll"]
            assert row[2].startswith(
                f"{paired['mean']:+.3f} ± {paired['standard_error']:.3f}".replace("-", "−")
            )
            assert f"won {paired['won']} of 2" in row[2]


def test_it_explains_itself_and_does_not_overclaim(written):
    config, _, _, text = written
    shown = Page(text).text
    for phrase in (
        "gradient × input",
        "arXiv:2009.09140",
        "Only its abstract was available",
        "default settings are our reading",
        "These are not the settings that the package’s defaults were tuned for",
        "introspective head against label smoothing",
    ):
        assert phrase in shown
    assert "as in the paper" not in shown
    for method in config.methods:
        assert METHODS[method].summary in shown


def test_the_choice_of_settings_is_only_claimed_for_them():
    assert TrainConfig(seeds=3, first_seed=50, methods=("standard",)).is_as_chosen
    assert not TrainConfig(train_size=200).is_as_chosen


def paired(mean, error, bound):
    return {
        "mean": mean,
        "standard_error": error,
        "confidence_95": bound,
        "won": 6,
        "tied": 1,
        "lost": 3,
    }


@pytest.mark.parametrize(
    ("metric", "values", "verdict"),
    [
        ("accuracy", (0.03, 0.01, 0.022), "better"),
        ("accuracy", (0.02, 0.01, 0.022), "perhaps better"),
        ("accuracy", (0.009, 0.01, 0.022), "no clear difference"),
        ("accuracy", (-0.03, 0.01, 0.022), "worse"),
        ("nll", (0.03, 0.01, 0.022), "worse"),
        ("nll", (-0.02, 0.01, 0.022), "perhaps better"),
        ("ece", (-0.03, 0.01, 0.022), "better"),
        ("accuracy", (0.03, None, None), "can't tell from one seed"),
    ],
)
def test_verdicts_follow_the_interval(metric, values, verdict):
    assert findings.finding(metric, paired(*values)).verdict == verdict


def test_findings_are_written_from_the_numbers():
    found = findings.finding("accuracy", paired(-0.0123, 0.004, 0.009))
    assert found.difference == "−1.23 ± 0.40"
    assert found.seeds == "won 6 of 10, 1 equal"
    assert findings.number(-0.001, 2) == "0.00"
    row = {"confidence": {"mean": 0.7}, "accuracy": {"mean": 0.9}}
    sure = {"confidence": {"mean": 0.95}, "accuracy": {"mean": 0.9}}
    assert findings.calibration({"methods": {"a_b": row, "c": sure}}) == (
        "Too sure of themselves: c (95% sure, 90% right). "
        "Not sure enough: a b (70% sure, 90% right)."
    )


def test_one_method_and_one_seed_make_a_report_too(tmp_path):
    config = dataclasses.replace(
        TrainConfig(), methods=("label_smoothing",), seeds=1, epochs=1, train_size=30
    )
    run_experiment(config, tmp_path, worker_count=1, tensorboard=False)
    text = report.write(config, tmp_path).read_text()
    assert "± –" in text
    assert "nan" not in Page(text).text.lower()
    assert len(Page(text).images) == len(FIGURES) - 1


def test_maps_and_similarities_agree():
    torch.manual_seed(0)
    data = load_dataset("digits").data
    model = SmallCNN((1, 8, 8), 10).eval()
    images, labels = data.images[:30], data.labels[:30]
    maps = explanations.explanation_maps(model, images).flatten(2)
    own = maps[torch.arange(30), labels][:, None].expand_as(maps)
    expected = torch.cosine_similarity(maps, own, dim=2)
    _, stats = ik.explain.class_explanation_stats(model, images, labels, method="exact")
    torch.testing.assert_close(ik.explain.similarities(stats, labels), expected)

    matrix = explanations.class_similarity(model, data[torch.arange(30)], 10)
    torch.testing.assert_close(matrix[4], expected[labels == 4].mean(dim=0))
    torch.testing.assert_close(matrix.diagonal(), torch.ones(10))


def test_explained_images_are_the_first_of_each_class():
    torch.manual_seed(0)
    data = load_dataset("digits").data
    explained = explanations.explain_first_of_each_class(SmallCNN((1, 8, 8), 10), data, 10, 4.0)
    assert torch.equal(explained.labels, torch.arange(10))
    assert torch.equal(explained.images[3], data.images[data.labels == 3][0])
    assert explained.maps.shape == (10, 10, 1, 8, 8)
    torch.testing.assert_close(explained.soft_labels.sum(dim=1), torch.ones(10))
    assert (explained.most_similar() != explained.labels).all()
