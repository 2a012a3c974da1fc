"""The report: one HTML file that needs no other, made from what an experiment wrote."""

from __future__ import annotations

import json
from collections.abc import Iterator
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
from introkernels.train.data import LabelledImages
from introkernels.train.engine import dataset_of, split_for
from introkernels.train.experiment import SUMMARY, run_directory
from introkernels.train.methods import METHODS
from introkernels.train.runs import load_model

REPORT = "report.html"


def write(config: TrainConfig, out: Path) -> Path:
    """Write `report.html` and its figures as PNG files into the directory of an experiment."""
    summary = json.loads((out / SUMMARY).read_text())
    images = {}
    with styled():
        for name, figure in _figures(config, summary, out):
            images[name] = pages.save_figure(figure, out / f"{name}.png")
    page = pages.template("report.html.j2").render(_content(config, summary, images))
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


def _figures(
    config: TrainConfig, summary: dict[str, Any], out: Path
) -> Iterator[tuple[str, Figure]]:
    methods, seeds = list(config.methods), config.seed_list
    class_names = dataset_of(config).class_names
    classes = len(class_names)
    test = _test_images(config)
    method = explained_method(methods)

    temperature = getattr(config.method(method), "temperature", 4.0)
    explained = explanations.explain_first_of_each_class(
        _model(config, out, method, seeds[0]), test, classes, temperature
    )
    yield "idea", figures.from_explanation_to_label(explained, min(3, classes - 1), class_names)
    yield "explanations", figures.true_and_most_similar(explained, class_names)

    yield (
        "training_curves",
        figures.training_curves(
            {name: [_history(out, name, seed) for seed in seeds] for name in methods}
        ),
    )
    if "standard" in methods and len(methods) > 1:
        yield "paired_differences", figures.paired_differences(summary, "standard")
    compared = dict.fromkeys(name for name in ("standard", method) if name in methods)
    yield (
        "class_similarity",
        figures.class_similarity(
            {name: _mean_similarity(config, out, name, test, classes) for name in compared},
            class_names,
        ),
    )


def _content(
    config: TrainConfig, summary: dict[str, Any], images: dict[str, str]
) -> dict[str, Any]:
    methods = list(config.methods)
    introspective = [name for name in methods if METHODS[name].introspective]
    paired = summary["paired"]
    return {
        "config": config,
        "dataset": dataset_of(config),
        "summary": summary,
        "images": images,
        "rows": {name: cells(row) for name, row in summary["methods"].items()},
        "methods": {name: METHODS[name].summary for name in methods},
        "hyperparameters": summary["config"]["hyperparameters"],
        "introspective": introspective,
        "explained": explained_method(methods),
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
    return load_model(config, method, seed, run_directory(out, method, seed))


def _test_images(config: TrainConfig) -> LabelledImages:
    return split_for(config, config.seed_list[0]).test


def _history(out: Path, method: str, seed: int) -> pd.DataFrame:
    record = json.loads((run_directory(out, method, seed) / "metrics.json").read_text())
    return pd.DataFrame(record["history"])


def _mean_similarity(
    config: TrainConfig, out: Path, method: str, test: LabelledImages, classes: int
) -> Tensor:
    """Class similarity averaged over the models of every seed."""
    return torch.stack(
        [
            explanations.class_similarity(_model(config, out, method, seed), test, classes)
            for seed in config.seed_list
        ]
    ).mean(dim=0)
