"""Studies that nobody trained, with the accuracies a test asks for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

GROUPS = {
    "standard": ["standard"],
    "regularisation": ["label_smoothing", "confidence_penalty", "dropout", "mixup"],
    "self-teaching": ["online_label_smoothing", "cs_kd", "tf_kd_self", "tf_kd_reg"],
    "teacher": ["kd", "born_again"],
    "peers": ["deep_mutual_learning"],
    "component": [
        "kd_ground_truth_only",
        "kd_permuted",
        "kd_class_average",
        "kd_non_target",
        "kd_cwtm",
        "kd_dkpp",
    ],
    "introspective": [
        "introspective_input",
        "introspective_sketch",
        "introspective_projection",
        "introspective_head",
        "introspective_bank",
    ],
    "control": ["introspective_permuted", "introspective_mean", "introspective_inverted"],
}
GROUP_OF = {name: group for group, names in GROUPS.items() for name in names}

Accuracies = Mapping[str, Sequence[Sequence["float | None"]]]


def study(accuracies: Accuracies, **changed: Any) -> dict[str, Any]:
    """A study with test accuracies ``accuracies[method][cell][seed]``; None: the run diverged.

    Everything else follows from them by plain rules: NLL is 1 − accuracy, ECE a tenth of that,
    the best epoch's accuracy 0.01 more. Keywords replace entries of the study.
    """
    cells = len(next(iter(accuracies.values())))
    seeds = len(next(iter(accuracies.values()))[0])
    return {
        "name": "made up",
        "command": "introkernels study --preset made-up --out somewhere",
        "plan_hash": "0123456789ab",
        "plan": {"epochs": 20, "trials": 3},
        "environment": {"introkernels": "0.1", "torch": "2.10", "cores": 2, "commit": None},
        "synthetic": False,
        "dataset_description": "Images that nobody saw.",
        "representative": "introspective_input",
        "margin": 0.5,
        "trials_per_method": 3,
        "tuning_seeds": [1000, 1001],
        "seeds": list(range(seeds)),
        "cells": [_cell(c) for c in range(cells)],
        "methods": [_method(name) for name in accuracies],
        "trials": [
            trial
            for name in accuracies
            for c in range(cells)
            for trial in _trials(name, c, accuracies[name][c])
        ],
        "chosen": [
            {
                "cell": c,
                "method": name,
                "settings": {"learning_rate": 0.03, "momentum": 0.9},
                "hash": _hash(name, c),
            }
            for name in accuracies
            for c in range(cells)
        ],
        "runs": [
            _run(name, c, seed, accuracies[name][c][seed])
            for name in accuracies
            for c in range(cells)
            for seed in range(seeds)
        ],
        **changed,
    }


def constant(values: Mapping[str, float], *, cells: int = 1) -> dict[str, list[list[float]]]:
    """Accuracies by method that hardly differ between seeds: every interval is narrow."""
    wiggle = (-0.0001, 0.0, 0.0001, 0.0)
    return {
        # Methods wiggle differently, so that no difference has a variance of exactly 0.
        name: [[value + w * (1 + 0.1 * i) for w in wiggle] for _ in range(cells)]
        for i, (name, value) in enumerate(values.items())
    }


def drawn(names: Sequence[str], *, cells: int, seeds: int) -> dict[str, list[list[float | None]]]:
    """Accuracies drawn at random, the same ones every time, with a seed's luck in common."""
    generator = np.random.default_rng(0)
    luck = generator.normal(0, 0.01, (cells, seeds))
    level = np.linspace(0.75, 0.93, cells)
    effects = generator.normal(0.008, 0.01, len(names))
    return {
        name: [
            [
                float(level[c] + luck[c, s] + effect + generator.normal(0, 0.006))
                for s in range(seeds)
            ]
            for c in range(cells)
        ]
        for name, effect in zip(names, effects, strict=True)
    }


def _cell(index: int) -> dict[str, Any]:
    size, noise = (100, 300, 1000)[index // 2 % 3], (0.0, 0.2)[index % 2]
    return {
        "name": f"shapes, {size} images, {noise:.0%} label noise".replace("%", " %"),
        "dataset": "shapes",
        "train_size": size,
        "label_noise": noise,
        "model": "mlp",
    }


def _method(name: str) -> dict[str, Any]:
    return {
        "name": name,
        "group": GROUP_OF[name],
        "summary": f"what {name} minimises",
        "source": "" if name == "standard" else "Somebody, Some title, 2020",
        "space": {"learning_rate": [0.01, 0.03, 0.1], "momentum": [0.0, 0.9]},
    }


def _trials(name: str, cell: int, accuracies: Sequence[float | None]) -> list[dict[str, Any]]:
    level = next((value for value in accuracies if value is not None), 0.5)
    return [
        {
            "cell": cell,
            "method": name,
            "trial": trial,
            "settings": {"learning_rate": rate, "momentum": 0.9},
            "validation": None if below is None else _measured(level - below),
            "hash": _hash(name, cell),
        }
        for trial, (rate, below) in enumerate([(0.03, 0.0), (0.1, 0.04), (0.01, 0.01)])
    ]


def _run(name: str, cell: int, seed: int, accuracy: float | None) -> dict[str, Any]:
    run = {"cell": cell, "method": name, "seed": seed, "hash": _hash(name, cell)}
    if accuracy is None:
        return run | {"test": None, "failure": "loss is not finite in epoch 3"}
    taught = GROUP_OF[name] in ("teacher", "component")
    return run | {
        "test": _measured(accuracy),
        "best": {"epoch": 17, **_measured(accuracy + 0.01)},
        "validation": _measured(accuracy - 0.01),
        "wall_seconds": 2.0 + 0.5 * (name != "standard"),
        "teacher_seconds": 4.0 if taught else 0.0,
        "step_milliseconds": 3.0,
    }


def _measured(accuracy: float) -> dict[str, float]:
    return {
        "accuracy": accuracy,
        "nll": 1 - accuracy,
        "ece": (1 - accuracy) / 10,
        "confidence": accuracy + 0.02,
    }


def _hash(name: str, cell: int) -> str:
    return f"{sum(map(ord, name)) * 1000 + cell:012x}"
