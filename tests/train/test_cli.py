from __future__ import annotations

import errno
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from outcome import assert_same_outcome

from introkernels import cli
from introkernels.train import cli as train_cli
from introkernels.train.study import cli as study_cli

QUICK = "train --methods standard label_smoothing --seeds 1 --epochs 2 --train-size 30".split()
QUICK += "--validation-size 30 --test-size 40 --workers 1 --no-tensorboard --no-progress".split()
STUDY = ["study", "--preset", "quick", "--no-progress"]


def run(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "introkernels", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"COLUMNS": "100"} | environment,
    )


def test_trains_and_reports_then_refuses_then_resumes(tmp_path, capsys):
    out = str(tmp_path / "out")
    done = run(*QUICK, "--out", out)
    assert done.returncode == 0, done.stderr
    assert "label_smoothing" in done.stdout
    assert f"Report: {out}/report.html" in done.stdout
    assert (Path(out) / "report.html").exists()

    assert cli.main([*QUICK, "--out", out]) == 2
    assert "already holds an experiment. Continue it with --resume" in capsys.readouterr().err
    assert cli.main([*QUICK, "--out", out, "--resume", "--learning-rate", "0.5"]) == 2
    assert "learning_rate: 0.01 there, 0.5 asked for" in capsys.readouterr().err
    assert cli.main([*QUICK, "--out", out, "--resume"]) == 0
    assert "afresh" not in capsys.readouterr().out

    (Path(out) / "runs/standard/seed0/checkpoint.pt").write_bytes(b"broken")
    assert cli.main([*QUICK, "--out", out, "--resume"]) == 1
    message = capsys.readouterr().err
    assert "runs/standard/seed0/checkpoint.pt can't be read" in message
    assert "Traceback" not in message


def test_resume_needs_no_option_repeated_and_takes_more_seeds(tmp_path, capsys):
    out = tmp_path / "out"
    custom = [*QUICK, "--label-smoothing.amount", "0.3", "--learning-rate", "0.02"]
    assert cli.main([*custom, "--out", str(out)]) == 0
    before = json.loads((out / "summary.json").read_text())

    resume = ["train", "--out", str(out), "--resume", "--no-progress"]
    assert cli.main(resume) == 0
    assert json.loads((out / "summary.json").read_text()) == before
    assert cli.main([*resume, "--seeds", "2", "--workers", "1"]) == 0
    after = json.loads((out / "summary.json").read_text())
    assert after["config"] == before["config"] | {"seeds": [0, 1]}

    (out / "config.json").write_text('{"methods": ["standard"]}')
    capsys.readouterr()
    assert cli.main(resume) == 2
    assert "config.json does not describe an experiment" in capsys.readouterr().err


def test_explanations_are_chosen_and_audited(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    out = tmp_path / "out"
    chosen = [*QUICK, "--methods", "standard", "introspective_input", "--out", str(out)]
    assert cli.main([*chosen, "--explain", "sketch", "head", "--explain-audit"]) == 0
    summary = json.loads((out / "summary.json").read_text())
    assert list(summary["methods"]) == ["standard", "introspective_sketch", "introspective_head"]
    audit = json.loads((out / "explain_audit.json").read_text())
    assert (audit["method"], audit["seed"], audit["images"]) == ("introspective_sketch", 0, 30)
    shown = capsys.readouterr().out
    for state in ("untrained", "trained"):
        title = f"Explanations, {state} (introspective sketch, seed 0, 30 validation images)"
        table = shown.partition(title)[2].partition("Recommended: ")
        assert table[2].startswith(audit[state]["recommended"])
        rows = {line.split()[0]: line.split() for line in table[0].splitlines() if line.strip()}
        for row in audit[state]["rows"]:
            assert rows[row["method"]][1] == f"{row['correlation']:.3f}"
            assert rows[row["method"]][5] == f"{1000 * row['seconds']:.1f}"

    resumed = ["train", "--out", str(out), "--resume", "--no-progress", "--workers", "1"]
    assert cli.main([*resumed, "--explain", "exact"]) == 2
    assert "methods: introspective_sketch introspective_head there" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epoch", "3"], "--epochs"),
        (["--epochs", "many"], "many"),
        (["--epochs", "0"], "epochs: got 0, expected at least 1"),
        (["--workers", "0"], "workers: got 0, expected at least 1"),
        (["--methods", "magic"], "methods: got 'magic', expected one of standard"),
        (["--train-size", "5000"], "the data set has 1797 images"),
        (["--label-smoothing.amount", "2"], "label_smoothing.amount: got 2.0"),
        (["--introspective-head.temperature", "-1"], "temperature"),
        (["--introspective-sketch.probes", "0"], "introspective_sketch.probes: got 0"),
        (["--explain", "magic"], "explain: got 'magic', expected one of exact, sketch"),
        (["--device", "quantum"], "quantum can't be used here"),
    ],
)
def test_wrong_calls_end_with_2_and_say_why(arguments, message, tmp_path, capsys):
    try:
        status = cli.main(["train", "--out", str(tmp_path / "out"), *arguments])
    except SystemExit as stopped:
        status = stopped.code
    assert status == 2
    shown = capsys.readouterr()
    assert message in " ".join((shown.err + shown.out).replace("│", " ").split())
    assert not (tmp_path / "out").exists()


@pytest.fixture
def interrupted(monkeypatch):
    """Training and studies are interrupted as soon as they begin."""

    def interrupt(*_arguments, **_keywords):
        raise KeyboardInterrupt

    monkeypatch.setattr(train_cli, "run_experiment", interrupt)
    monkeypatch.setattr(study_cli, "run_study", interrupt)


@pytest.mark.parametrize("command", [QUICK, STUDY])
@pytest.mark.usefixtures("interrupted")
def test_interruption_says_how_to_go_on(command, tmp_path, capsys):
    assert cli.main([*command, "--out", str(tmp_path)]) == 130
    told = f"introkernels {command[0]}: interrupted; the same command with --resume continues\n"
    assert capsys.readouterr().err == told


@pytest.mark.parametrize("command", [QUICK, STUDY])
@pytest.mark.usefixtures("interrupted")
def test_resuming_nothing_says_that_it_starts_afresh(command, tmp_path, capsys):
    for out in (tmp_path, tmp_path / "new"):
        cli.main([*command, "--out", str(out), "--resume"])
        afresh = f"{out} holds nothing to resume: starting afresh\n"
        assert capsys.readouterr().out == afresh
        cli.main([*command, "--out", str(out)])
        assert capsys.readouterr().out == ""


def test_interruption_while_a_command_is_imported_is_told_too(capsys, monkeypatch):
    def interrupt(name):
        raise KeyboardInterrupt

    monkeypatch.setattr(importlib, "import_module", interrupt)
    assert cli.main(["study"]) == 130
    assert capsys.readouterr().err == "introkernels study: interrupted\n"


def test_a_full_disk_is_told_and_nothing_is_lost(tmp_path, capsys, monkeypatch):
    fsync, writes = os.fsync, 0

    def fill_up(descriptor):
        nonlocal writes
        writes += 1
        if writes > 20:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    command = [*QUICK, "--checkpoint-every", "1", "--out"]
    out = tmp_path / "full"
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", fill_up)
        assert cli.main([*command, str(out)]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"No space left on device: '{out}/runs/" in error
    assert "the same command with --resume continues" in error
    assert list(out.rglob("checkpoint.pt"))
    assert not list(out.rglob("*.tmp"))
    assert cli.main([*command, str(out), "--resume"]) == 0
    assert cli.main([*command, str(tmp_path / "whole")]) == 0
    assert_same_outcome(out, tmp_path / "whole")


def test_a_full_disk_is_told_by_tensorboard_without_a_traceback(tmp_path, capsys, monkeypatch):
    record_writer = pytest.importorskip("tensorboard.summary.writer.record_writer")

    def fail(_writer):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(record_writer.RecordWriter, "flush", fail)
    command = [argument for argument in QUICK if argument != "--no-tensorboard"]
    assert cli.main([*command, "--out", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"No space left on device: '{tmp_path}/out/runs/standard/seed0/tensorboard'" in error


@pytest.mark.parametrize("command", [QUICK, STUDY])
@pytest.mark.parametrize("below", ["", "below"])
def test_an_unusable_out_is_a_wrong_call(command, below, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    out = tmp_path / "file" / below
    assert cli.main([*command, "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"{out} can't be written to" in error
    assert "Choose another --out" in error
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(("command", "file"), [(QUICK, "config.json"), (STUDY, "plan.json")])
def test_an_unreadable_description_is_named(command, file, tmp_path, capsys):
    for content in ("{", "[]"):
        (tmp_path / file).write_text(content)
        assert cli.main([*command, "--out", str(tmp_path), "--resume"]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert f"{file} can't be read" in error


def test_help_lists_every_option_with_its_default():
    text = run("train", "--help").stdout
    for expected in (
        "--out",
        "runs/digits",
        "--resume",
        "--seeds",
        "--device",
        "--checkpoint-every",
        "--label-smoothing.amount",
        "--introspective-input.temperature",
        "--introspective-sketch.probes",
        "--explain",
        "--explain-audit",
        "(default: 4.0)",
    ):
        assert expected in text


def test_alone_it_shows_help_and_knows_its_version(capsys):
    assert cli.main([]) == 0
    shown = capsys.readouterr().out
    assert "train" in shown
    assert "doctor" in shown
    with pytest.raises(SystemExit) as stopped:
        cli.main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out.startswith("introkernels 0.")


def test_an_unknown_command_is_refused(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["trian"])
    assert stopped.value.code == 2
    assert "trian" in capsys.readouterr().err


@pytest.mark.parametrize("module", cli.TRAIN_EXTRA)
def test_a_missing_extra_is_named_with_its_remedy(module, capsys, monkeypatch):
    for loaded in list(sys.modules):
        if loaded.startswith("introkernels.train"):
            monkeypatch.delitem(sys.modules, loaded)

    class Absent:
        @staticmethod
        def find_spec(name, path=None, target=None):
            if name == "introkernels.train":
                raise ModuleNotFoundError(f"No module named {module!r}", name=module)

    monkeypatch.setattr(sys, "meta_path", [Absent, *sys.meta_path])
    assert cli.main(["train"]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert f"needs {module}" in message
    assert "pip install 'introkernels[train]'" in message


def test_without_the_extra_the_command_says_so(tmp_path):
    """For real: an installation in which tyro can't be imported."""
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['tyro'] = None\n")
    paths = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = run("train", PYTHONPATH=paths)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == (
        "introkernels train needs tyro, which is not installed: pip install 'introkernels[train]'"
    )
    assert "Traceback" not in done.stderr
