"""benchmarks/explain_cost.py: what it measures, records, tabulates and draws, on tiny shapes."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

from introkernels.bench import records
from introkernels.cli import TRAIN_EXTRA

for needed in TRAIN_EXTRA:
    pytest.importorskip(needed)

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks/explain_cost.py"
SPEC = importlib.util.spec_from_file_location("explain_cost", SCRIPT)
explain_cost = importlib.util.module_from_spec(SPEC)
# Data classes look their module up.
sys.modules[SPEC.name] = explain_cost
SPEC.loader.exec_module(explain_cost)

TINY = "--classes 3 5 --batch-size 4 --image-size 8 --probes 2 --budget 1e-6 --threads 1".split()
METHODS = ["head", "projection", "sketch", "exact"]


def cost_of(median, contender, classes, samples=20):
    options = explain_cost.Options(classes=(classes,))
    times = explain_cost.Times(median, median, median, median, samples, 1)
    record = explain_cost._record(contender, classes, options, times)
    machine = {"cpu": "Some CPU", "cores": 2, "load": 0.0}
    versions = {"torch": "2.13", "introkernels": "0.1"}
    common = {"format": 1, "run": "now", "suite": explain_cost.SUITE, "machine": machine}
    common |= {"versions": versions, "commit": None, "settings": {"threads": 2}}
    return common | record


@pytest.fixture
def found():
    """Costs of 2 C for exact and 5 for sketch."""
    return [
        cost_of(seconds, name, classes, samples)
        for classes in (10, 100, 1000)
        for name, seconds, samples in (
            ("plain", 0.2, 20),
            ("sketch", 1.0, 20),
            ("exact", 0.4 * classes, 20 if classes == 10 else 1),
        )
    ]


def test_it_measures_records_tabulates_and_draws(tmp_path, capsys):
    out, document, figure = tmp_path / "data/out.jsonl", tmp_path / "doc.md", tmp_path / "cost.svg"
    document.write_text(f"before\n{explain_cost.BEGIN}\nold\n{explain_cost.END}\nafter\n")
    places = ["--out", str(out), "--table", str(document), "--plot", str(figure)]
    threads = torch.get_num_threads()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    assert explain_cost.main([*TINY, *places]) == 0
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_num_threads() == threads

    stored = records.read(out)
    assert [(r["sizes"]["C"], r["contender"]) for r in stored] == [
        (classes, name) for classes in (3, 5) for name in ("plain", *METHODS)
    ]
    for record in stored:
        assert record["seconds"]["samples"] == record["settings"]["fewest"] == 3
        assert record["sizes"] == {"B": 4, "C": record["sizes"]["C"], "D": 192}
        assert record["settings"]["probes"] == 2
        assert record["machine"]["cores"] >= 1
        assert record["versions"]["torch"] == torch.__version__
    assert len({record["run"] for record in stored}) == 1

    text, drawn = document.read_text(), figure.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "old" not in text
    assert "[data/out.jsonl](data/out.jsonl)" in text
    assert drawn.startswith("<?xml")
    assert explain_cost.main(["--from", str(out), *places[2:]]) == 0
    assert (document.read_text(), figure.read_text()) == (text, drawn)
    capsys.readouterr()


def test_costs_are_relative_to_the_plain_step_of_the_same_number_of_classes(found):
    lines = explain_cost.markdown(found, "x.jsonl").splitlines()
    assert lines[2] == "| classes | plain step | sketch | exact | exact over sketch |"
    assert lines[4:7] == [
        "| 10 | 200 ms | 5.00× | 20.0× | 4.00× |",
        "| 100 | 200 ms | 5.00× | 200× | 40.0× |",
        "| 1000 | 200 ms | 5.00× | 2,000× | 400× |",
    ]
    assert lines[8] == "Medians of 20 steps; exact at 100 classes 1, exact at 1000 classes 1."
    for record in found:
        records.check(record)


def test_slow_steps_have_fewer_samples_spread_over_the_rounds(monkeypatch):
    cost = {"plain": 1.0, "slow": 4.0, "slowest": 50.0}
    order = []

    def seconds(name, step):
        order.append(name)
        return cost[name]

    monkeypatch.setattr(explain_cost, "_seconds", seconds)
    times = explain_cost.timed(dict.fromkeys(cost), budget=8.0, fewest=1, most=6)
    assert {name: found.samples for name, found in times.items()} == {
        "plain": 6,
        "slow": 2,
        "slowest": 1,
    }
    # One call of each for warming up; the longest counts, and is not repeated.
    assert order[:3] == ["plain", "slow", "slowest"]
    assert "slowest" not in order[3:]
    first, second = (n for n, name in enumerate(order[3:]) if name == "slow")
    assert second - first > 3
    assert explain_cost.timed(dict.fromkeys(cost), 8.0, 3, 6)["slowest"].samples == 3


def test_steps_start_alike_and_train():
    options = explain_cost.Options(batch_size=4, image_size=8)
    plain, head = (explain_cost.training_step(name, 5, options) for name in (None, "head"))
    again = explain_cost.training_step(None, 5, options)
    losses = [plain().item() for _ in range(5)]
    assert losses[-1] < losses[0]
    assert again().item() == losses[0]
    assert torch.isfinite(head())


def test_a_loss_that_is_not_finite_is_not_timed():
    with pytest.raises(RuntimeError, match="sketch: the loss is nan"):
        explain_cost._seconds("sketch", lambda: torch.tensor(float("nan")))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--classes", "10", "1"], "classes: got 1, expected at least 2"),
        (["--classes", "10", "10"], "none of them twice"),
        (["--methods", "magic"], "magic"),
        (["--budget", "0"], "budget: got 0.0, expected a positive number"),
        (["--threads", "0"], "threads: got 0, expected 1 to"),
        (["--batch-size", "1"], "batch_size: got 1, expected at least 2"),
        (["--from", "missing.jsonl"], "missing.jsonl: can't be read"),
        (["--table", "missing.md"], "missing.md"),
    ],
)
def test_wrong_calls_end_with_2_and_say_why(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr(explain_cost, "measured", lambda options: pytest.fail("it measures"))
    try:
        status = explain_cost.main(arguments)
    except SystemExit as stopped:
        status = stopped.code
    assert status == 2
    shown = capsys.readouterr()
    assert message in " ".join((shown.err + shown.out).replace("│", " ").split())


def test_a_document_without_its_markers_is_refused(tmp_path, found, capsys):
    source, document = tmp_path / "x.jsonl", tmp_path / "doc.md"
    records.write(source, found)
    document.write_text("nothing here")
    assert explain_cost.main(["--from", str(source), "--table", str(document)]) == 2
    assert explain_cost.BEGIN in capsys.readouterr().err
    assert document.read_text() == "nothing here"
    assert json.loads(source.read_text().splitlines()[0])["suite"] == "explain-cost"
