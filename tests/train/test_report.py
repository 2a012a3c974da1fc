from __future__ import annotations

import base64
import dataclasses
import json
import re

import numpy as np
import pytest
import torch
from page import Page
from PIL import Image
from torch import nn

import introkernels as ik
from introkernels.train import explanations, figures, findings, pages, report
from introkernels.train.classifier import Classifier
from introkernels.train.config import TrainConfig
from introkernels.train.data import LabelledImages, load_dataset
from introkernels.train.engine import split_for
from introkernels.train.experiment import run_experiment
from introkernels.train.methods import METHODS
from introkernels.train.models import MLP, SmallCNN

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


def test_a_table_too_wide_for_the_window_scrolls_in_its_frame(written):
    _, _, _, text = written
    frames = re.findall(r'<div class="scroll" tabindex="0"[^>]*>\s*<table', text)
    assert len(frames) == len(Page(text).tables)
    assert "local right" in text  # what covers the shadow moves with the table


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


@pytest.fixture(scope="module")
def imbalanced(tmp_path_factory):
    """A trained experiment on a folder of colour images, with a class that has no test image."""
    folder = tmp_path_factory.mktemp("imbalanced")
    random = np.random.default_rng(0)
    for c, (name, count) in enumerate({"moss": 80, "stone": 40, "rare": 2}.items()):
        (folder / name).mkdir()
        for i in range(count):
            pixels = random.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            pixels[:, :, c] = 255
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    config = TrainConfig(
        dataset="image_folder", data_dir=str(folder), model="mlp",
        train_size=40, validation_size=20, test_size=20,
        methods=("standard", "introspective_head"), seeds=2, epochs=2,
    )  # fmt: skip
    out = tmp_path_factory.mktemp("imbalanced_out")
    run_experiment(config, out, worker_count=1, tensorboard=False)
    return config, out


def test_a_class_without_test_images_is_no_trouble(imbalanced):
    config, out = imbalanced
    assert 1 not in split_for(config, 0).test.labels  # "rare"
    calls = []
    text = report.write(config, out, on_progress=lambda *counts: calls.append(counts)).read_text()
    shown = Page(text).text
    assert "All 3 classes." in shown
    assert "An empty row: no test image is of that class." in shown
    assert calls == [(done, 12) for done in range(1, 13)]


def test_the_prose_is_of_the_data_at_hand(imbalanced):
    config, out = imbalanced
    shown = Page(report.write(config, out).read_text()).text
    assert not re.search(r"digit|\b\ds\b|\ban? \d", shown)
    assert re.search("“(moss|rare|stone), and nothing else”", shown)
    assert "data set image_folder · 3 classes · 40 training images" in shown
    summary = json.loads((out / "summary.json").read_text())
    assert shown.index(findings.headline(summary)) < shown.index("What was done")


def test_all_that_are_left_are_counted(tmp_path):
    config = TrainConfig(
        train_size=None, methods=("standard",), model="mlp", seeds=1, epochs=1, batch_size=500
    )
    run_experiment(config, tmp_path, worker_count=1, tensorboard=False)
    shown = Page(report.write(config, tmp_path).read_text()).text
    assert "700 training images" in shown
    assert "700 images to train on" in shown


def summary_of(**accuracies):
    """A summary with the accuracy of methods against ``standard``: mean, error and bound."""
    return {"paired": {"standard": {m: {"accuracy": paired(*v)} for m, v in accuracies.items()}}}


def test_one_sentence_says_what_came_out():
    assert findings.headline(
        summary_of(
            mixup=(-0.03, 0.01, 0.022),
            introspective_sketch=(0.03, 0.01, 0.022),
            introspective_head=(0.025, 0.01, 0.022),
            kd=(0.02, 0.01, 0.022),
            cs_kd=(-0.009, 0.01, 0.022),
        )
    ) == (
        "In accuracy against standard, introspective sketch (+3.0 points) and introspective head "
        "(+2.5 points) are better; kd (+2.0 points) is perhaps better; there is no clear "
        "difference for cs kd (−0.9 points); mixup (−3.0 points) is worse."
    )
    assert findings.headline(summary_of(kd=(0.012, None, None))) == (
        "In accuracy against standard, one seed can't tell what is better: kd (+1.2 points)."
    )
    methods = {"kd": {"accuracy": {"mean": 0.912}}, "mixup": {"accuracy": {"mean": 0.9}}}
    assert findings.headline({"methods": methods, "paired": {}}) == (
        "Accuracy on the test images: kd 91.2 % and mixup 90.0 %."
    )


class Given(Classifier):
    """A network whose images ``[B, C, 1, 1]`` are its logits."""

    def __init__(self, classes):
        super().__init__()
        self.head = nn.Linear(classes, classes, bias=False)
        nn.init.eye_(self.head.weight)

    def features(self, inputs):
        return inputs.flatten(1)


def given(probabilities, labels):
    logits = torch.tensor(probabilities).log().clamp_min(-100)
    return LabelledImages(logits[:, :, None, None], torch.tensor(labels))


def test_the_most_confused_pairs_come_first():
    data = given(
        [
            [0.6, 0.1, 0.3, 0.0],  # of 0, then 2
            [0.1, 0.9, 0.0, 0.0],  # of 1, then 0
            [0.4, 0.0, 0.6, 0.0],  # of 2, then 0
            [0.0, 0.5, 0.5, 0.0],  # of 1, then 2
        ],
        [0, 1, 2, 1],
    )
    pairs = explanations.confused_pairs(Given(4), data)
    assert pairs.tolist() == [[0, 2], [1, 2], [0, 1]]


def test_the_choice_of_classes_is_bounded():
    torch.manual_seed(0)
    classes = 300
    data = LabelledImages(torch.randn(2500, classes, 1, 1), torch.randint(classes, (2500,)))
    pairs = explanations.confused_pairs(Given(classes), data)
    assert torch.equal(pairs, explanations.confused_pairs(Given(classes), data))
    chosen = explanations.chosen_classes(pairs, classes, 20)
    assert len(chosen) == len(chosen.unique()) == 20
    assert torch.isin(pairs[:10], chosen).all()
    assert explanations.chosen_classes(pairs, 20, 20).tolist() == list(range(20))
    assert explanations.chosen_classes(torch.tensor([[3, 7]]), classes, 20).tolist() == [3, 7]

    rows = []
    explained = explanations.class_similarity(
        Given(classes), data, chosen, on_class=lambda: rows.append(1)
    )
    assert explained.shape == (20, 20)
    assert len(rows) == 20
    single = explanations.explain_first_of_each_class(Given(classes), data, chosen[:7], 4.0)
    assert single.maps.shape == (7, explanations.MOST_EXAMPLES, classes, 1, 1)


def test_maps_and_similarities_agree():
    torch.manual_seed(0)
    data = load_dataset("digits").data
    model = SmallCNN((1, 8, 8), 10).eval()
    explained = explanations.explain_first_of_each_class(model, data, torch.arange(10), 4.0)
    maps = explained.maps.flatten(2)
    expected = torch.cosine_similarity(maps, maps[:, :1], dim=2)
    torch.testing.assert_close(explained.similarity, expected)

    some = data[torch.arange(30)]
    matrix = explanations.class_similarity(model, some, torch.tensor([2, 4, 9]))
    _, stats = ik.explain.class_explanation_stats(model, some.images, some.labels, method="exact")
    cosines = ik.explain.similarities(stats, some.labels)[some.labels == 4]
    torch.testing.assert_close(matrix[1], cosines[:, [2, 4, 9]].mean(dim=0))
    torch.testing.assert_close(matrix.diagonal(), torch.ones(3))
    assert (
        explanations.class_similarity(model, some.part(some.labels != 4), torch.tensor([2, 4]))[1]
        .isnan()
        .all()
    )


def test_explained_images_are_the_first_of_each_class():
    torch.manual_seed(0)
    data = load_dataset("digits").data
    data = data.part(data.labels != 5)
    model = SmallCNN((1, 8, 8), 10)
    explained = explanations.explain_first_of_each_class(model, data, torch.arange(10), 4.0)
    assert explained.labels.tolist() == [0, 1, 2, 3, 4, 6, 7, 8, 9]
    first = data.images[data.labels == 3][0]
    torch.testing.assert_close(explained.pictures[3], first / first.amax())
    assert explained.maps.shape == (9, 10, 1, 8, 8)
    assert torch.equal(explained.classes.sort(dim=1).values, torch.arange(10).expand(9, 10))
    logits = model(first[None])[0, explained.classes[3, 1:]]
    assert torch.equal(logits, logits.sort(descending=True).values)
    torch.testing.assert_close(explained.soft_labels.sum(dim=1), torch.ones(9))
    assert (explained.most_similar() > 0).all()


def test_colour_images_are_drawn_in_colour(imbalanced):
    config, _ = imbalanced
    test = split_for(config, 0).test
    explained = explanations.explain_first_of_each_class(
        MLP((3, 8, 8), 3), test, torch.arange(3), 4.0
    )
    assert explained.labels.tolist() == [0, 2]
    figure = figures.true_and_most_similar(explained, ["moss", "rare", "stone"])
    drawn = [axis.images[0].get_array() for axis in figure.axes]
    pixels = test.stored[test.labels == 0][0].permute(1, 2, 0) / 255
    np.testing.assert_allclose(drawn[0], pixels)
    # The maps are signed: channels added up.
    np.testing.assert_allclose(drawn[2], explained.maps[0, 0].sum(dim=0))


def test_a_similarity_map_of_many_classes_has_no_numbers():
    matrix = torch.eye(13)
    matrix[4] = torch.nan
    figure = figures.class_similarity({"standard": matrix}, [f"a long name {c}" for c in range(13)])
    assert not figure.axes[0].texts
    few = figures.class_similarity({"standard": matrix[:5, :5]}, list("abcde"))
    assert len(few.axes[0].texts) == 16


def test_names_of_classes_are_not_read_as_formulas(tmp_path):
    figure = figures.class_similarity({"standard": torch.eye(2)}, [r"$\wrong$", "5 $ or 6 $"])
    pages.save_figure(figure, tmp_path / "figure.png")
    assert figure.axes[0].get_xticklabels()[0].get_text() == r"$\wrong$"
