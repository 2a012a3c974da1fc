from __future__ import annotations

import json

import pytest
import torch

import introkernels as ik
from introkernels.train import audit
from introkernels.train.checkpoint import CheckpointError
from introkernels.train.engine import Run
from introkernels.train.experiment import run_directory
from introkernels.train.runs import load_model


def without_costs(rows):
    return [
        {name: value for name, value in row.items() if name not in ("seconds", "memory_bytes")}
        for row in rows
    ]


def test_it_compares_the_methods_before_and_after_training(tiny, train, tmp_path):
    train(tiny)
    torch.manual_seed(77)
    before = torch.get_rng_state()
    audited = audit.write(tiny, tmp_path / "out")
    assert torch.equal(torch.get_rng_state(), before)
    assert (audited.method, audited.seed, audited.images) == ("introspective_head", 0, 100)

    written = json.loads((tmp_path / "out" / audit.AUDIT).read_text())
    for state, comparison in (("untrained", audited.untrained), ("trained", audited.trained)):
        rows = {row["method"]: row for row in written[state]["rows"]}
        assert set(rows) == set(ik.explain.METHODS)
        assert rows["exact"]["correlation"] == pytest.approx(1)
        assert rows["exact"]["mean_absolute_error"] == 0
        assert rows["sketch"]["correlation"] > 0.9 > rows["head"]["correlation"]
        assert all(row["seconds"] > 0 for row in rows.values())
        assert written[state]["recommended"] == comparison.recommended

    audit.write(tiny, tmp_path / "out")
    again = json.loads((tmp_path / "out" / audit.AUDIT).read_text())
    for state in ("untrained", "trained"):
        assert without_costs(again[state]["rows"]) == without_costs(written[state]["rows"])


def test_the_models_are_those_of_the_run(tiny, train, tmp_path, monkeypatch):
    train(tiny)
    seen = []
    compare = ik.explain.compare_methods

    def spy(model, images, labels, **keywords):
        seen.append(([p.clone() for p in model.parameters()], images.clone(), model.training))
        return compare(model, images, labels, repeats=1, **keywords)

    monkeypatch.setattr(ik.explain, "compare_methods", spy)
    audit.write(tiny, tmp_path / "out")
    initial = Run(tiny, "introspective_head", 0)
    trained = load_model(
        tiny, "introspective_head", 0, run_directory(tmp_path / "out", "introspective_head", 0)
    )
    for (weights, images, training), model in zip(seen, (initial.model, trained), strict=True):
        assert all(map(torch.equal, weights, model.parameters()))
        assert torch.equal(images, initial.splits.validation.images[:100])
        assert training


def test_a_run_that_is_not_there_is_named(tiny, tmp_path):
    with pytest.raises(CheckpointError, match="introspective_head/seed0.*does not exist"):
        audit.write(tiny, tmp_path / "out")
