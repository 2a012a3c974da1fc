"""The report: one HTML file that needs no other, made from what an experiment wrote."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor

from introkernels.plotting import styled
from introkernels.train import explanations, figures, files, findings, pages
from introkernels.train.classifier import Classifier
from introkernels.train.config import TrainConfig
from introkernels.train.data import Splits
from introkernels.train.engine import dataset_of, split_for
from introkernels.train.experiment import SUMMARY, run_directory
from introkernels.train.methods import METHODS
from introkernels.train.runs import load_model

REPORT = "report.html"


def write(
    config: TrainConfig, out: Path, *, on_progress: Callable[[int, int], None] = lambda *_: None
) -> Path:
    """Write `report.html` and its figures as PNG files into the directory of an experiment.

    `on_progress` is called with how many steps of explaining are done, and of how many.
    """
    summary = json.loads((out / SUMMARY).read_text())
    shown = _shown(config, out)
    images = {}
    with styled():
        for name, figure in _figures(config, summary, out, shown, on_progress):
            images[name] = pages.save_figure(figure, out / f"{name}.png")
    page = pages.template("report.html.j2").render(_content(config, summary, images, shown))
    files.write_text(out / REPORT, page)
    return out / REPORT


def cells(row: dict[str, Any]) -> dict[str, str]:
    """A method's row of the table, as text: mean ± standard deviation."""
    formats = {
        "accuracy": (100, 1),
        "nll": (1, 3),
        "ece": (100, 1),
        "confidence": (100, 1),
        "wall_seconds": (1, 2),
    }
    return {
        name: f"{row[name]['mean'] * scale:.{digits}f} ± "
        + (
            findings.MISSING
            if row[name]["std"] is None
            else f"{row[name]['std'] * scale:.{digits}f}"
        )
        for name, (scale, digits) in formats.items()
    }


def explained_method(methods: list[str]) -> str:
    """The method whose models are explained: one that explains its input, if there is one."""
    introspective = [name for name in methods if METHODS[name].introspective]
    for name in ("introspective_input", *introspective, *methods):
        if name in methods:
            return name
    raise ValueError("methods: got none")


@dataclass(frozen=True)
class _Shown:
    """What the report explains.

    Attributes:
        splits: the images of the first seed.
        classes: ``[K]``, those whose similarity is shown, ascending.
        explained: single images, explained by the first model of the explained method.
        idea: which of these images shows how a soft label is made.
        rival: the class that its class is mixed up with: the two are the most confused pair.
    """

    splits: Splits
    classes: Tensor
    explained: explanations.Explained
    idea: int
    rival: int


def _shown(config: TrainConfig, out: Path) -> _Shown:
    method, seed = explained_method(list(config.methods)), config.first_seed
    splits = split_for(config, seed)
    test = splits.test.to(torch.device(config.device))
    class_count = len(dataset_of(config).class_names)
    model = _model(config, out, method, seed)
    pairs = explanations.confused_pairs(model, test)
    explained = explanations.explain_first_of_each_class(
        model,
        test,
        explanations.chosen_classes(pairs, class_count, explanations.MOST_EXAMPLES),
        getattr(config.method(method), "temperature", 4.0),
    )
    labels, pair = explained.labels.tolist(), pairs[0].tolist()
    idea = next(which for which, label in enumerate(labels) if label in pair)
    return _Shown(
        splits,
        explanations.chosen_classes(pairs, class_count, explanations.MOST_CLASSES),
        explained,
        idea,
        sum(pair) - labels[idea],
    )


def _figures(
    config: TrainConfig,
    summary: dict[str, Any],
    out: Path,
    shown: _Shown,
    on_progress: Callable[[int, int], None],
) -> Iterator[tuple[str, Figure]]:
    methods, seeds = list(config.methods), config.seed_list
    class_names = dataset_of(config).class_names
    yield "idea", figures.from_explanation_to_label(shown.explained, shown.idea, class_names)
    yield "explanations", figures.true_and_most_similar(shown.explained, class_names)

    yield (
        "training_curves",
        figures.training_curves(
            {name: [_history(out, name, seed) for seed in seeds] for name in methods}
        ),
    )
    if "standard" in methods and len(methods) > 1:
        yield "paired_differences", figures.paired_differences(summary, "standard")
    matrices = _similarities(config, out, shown, on_progress)
    yield (
        "class_similarity",
        figures.class_similarity(matrices, [class_names[c] for c in shown.classes.tolist()]),
    )


def _content(
    config: TrainConfig, summary: dict[str, Any], images: dict[str, str], shown: _Shown
) -> dict[str, Any]:
    methods = list(config.methods)
    introspective = [name for name in methods if METHODS[name].introspective]
    paired = summary["paired"]
    dataset = dataset_of(config)
    return {
        "config": config,
        "dataset": dataset,
        "splits": shown.splits,
        "true_class": dataset.class_names[int(shown.explained.labels[shown.idea])],
        "rival_class": dataset.class_names[shown.rival],
        "classes_explained": shown.explained.classes.shape[1],
        "most_examples": explanations.MOST_EXAMPLES,
        "classes_compared": len(shown.classes),
        "most_images": explanations.MOST_IMAGES,
        "classes_without_images": not torch.isin(shown.classes, shown.splits.test.labels).all(),
        "summary": summary,
        "images": images,
        "rows": {name: cells(row) for name, row in summary["methods"].items()},
        "methods": {name: METHODS[name].summary for name in methods},
        "hyperparameters": summary["config"]["hyperparameters"],
        "introspective": introspective,
        "explained": explained_method(methods),
        "headline": findings.headline(summary),
        "answers": [
            findings.sentence(summary, reference, name)
            for reference in paired
            for name in introspective
        ],
        "comparisons": {
            reference: {
                name: findings.compare(summary, reference, name)
                for name in methods
                if name != reference
            }
            for reference in paired
            if len(methods) > 1
        },
        "calibration": findings.calibration(summary),
    }


def _model(config: TrainConfig, out: Path, method: str, seed: int) -> Classifier:
    model = load_model(config, method, seed, run_directory(out, method, seed))
    return model.to(torch.device(config.device))


def _history(out: Path, method: str, seed: int) -> pd.DataFrame:
    record = json.loads((run_directory(out, method, seed) / "metrics.json").read_text())
    return pd.DataFrame(record["history"])


def _similarities(
    config: TrainConfig, out: Path, shown: _Shown, on_progress: Callable[[int, int], None]
) -> dict[str, Tensor]:
    """Class similarity for each method compared, averaged over the models of every seed."""
    methods = list(config.methods)
    compared = dict.fromkeys(
        name for name in ("standard", explained_method(methods)) if name in methods
    )
    test = shown.splits.test.to(torch.device(config.device))
    total = len(compared) * config.seeds * len(shown.classes)
    done = count(1)

    def similarity(name: str, seed: int) -> Tensor:
        return explanations.class_similarity(
            _model(config, out, name, seed),
            test,
            shown.classes,
            on_class=lambda: on_progress(next(done), total),
        )

    return {
        name: torch.stack([similarity(name, seed) for seed in config.seed_list]).mean(dim=0)
        for name in compared
    }
