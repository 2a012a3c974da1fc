"""The report in docs/ is what this code makes of the data beside it."""

from __future__ import annotations

import json
from pathlib import Path

from introkernels.train.study import report
from introkernels.train.study.plan import load_preset

FOLDER = Path(__file__).parents[3] / "docs" / "digits-study"


def test_tables_and_verdicts_follow_from_the_committed_runs(tmp_path: Path) -> None:
    study = json.loads((FOLDER / "study.json").read_text())
    report.write(study, tmp_path)
    for name in ("report.md", "results.csv", "overall.csv", "runs.csv", "costs.csv"):
        assert (FOLDER / name).read_text() == (tmp_path / name).read_text(), name


def test_it_is_of_the_preset() -> None:
    study = json.loads((FOLDER / "study.json").read_text())
    assert study["plan"] == load_preset("digits").to_dict()
    assert not study["environment"]["commit"]["changed"]
    assert len(study["runs"]) == len(study["cells"]) * len(study["methods"]) * len(study["seeds"])
