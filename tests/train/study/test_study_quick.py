"""`introkernels study --preset quick`, from end to end, killed on its way."""

from __future__ import annotations

import csv
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from introkernels.train.study.plan import load_preset


def start(out: Path, *options: str) -> subprocess.Popen[str]:
    words = ["study", "--preset", "quick", "--out", str(out), "--no-progress", *options]
    return subprocess.Popen(
        [sys.executable, "-m", "introkernels", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE"},
        # With its workers, it can be killed as a whole.
        start_new_session=True,
    )


def finish(command: subprocess.Popen[str]) -> str:
    output, _ = command.communicate(timeout=900)
    assert command.returncode == 0, output
    return output


def runs_in(out: Path) -> int:
    return len(list(out.glob("runs/*/*/metrics.json")))


def rows(out: Path, name: str) -> list[dict[str, str]]:
    with (out / name).open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_killed_and_resumed_it_gives_the_table_of_an_undisturbed_one(tmp_path: Path) -> None:
    plan, killed, whole = load_preset("quick"), tmp_path / "killed", tmp_path / "whole"
    moments = random.Random(time.time_ns())
    for least in (4, 40):
        command = start(killed, "--resume", "--workers", "2")
        while command.poll() is None and runs_in(killed) < least:
            time.sleep(0.05)
        time.sleep(moments.random())
        os.killpg(command.pid, signal.SIGKILL)
        assert command.wait() == -signal.SIGKILL
    printed = finish(start(killed, "--resume", "--workers", "2"))
    for claim in ("(a)", "(b)", "(c)"):
        assert claim in printed
    for name in ("report.html", "report.md", "results.csv", "runs.csv", "costs.csv"):
        assert (killed / name).stat().st_size > 500, name
    found = rows(killed, "results.csv")
    assert len(found) == len(plan.list_cells()) * len(plan.methods)

    # Undisturbed, in one process, and of a few methods: their rows are the same.
    chosen = ["standard", "label_smoothing", "born_again"]
    finish(start(whole, "--workers", "1", "--methods", *chosen))
    methods = {*chosen, plan.representative}
    for name in ("results.csv", "runs.csv"):
        expected = rows(whole, name)
        assert {row["method"] for row in expected} == methods
        assert [row for row in rows(killed, name) if row["method"] in methods] == expected
