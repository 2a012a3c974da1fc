"""The command `introkernels bench`."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path

import pytest
from bench_cases import SUITE, WRONG_SUITE

from introkernels import checkout, cli
from introkernels.bench import cli as bench_cli
from introkernels.bench import records, stale, tables


@pytest.fixture(autouse=True)
def _tiny_suite(monkeypatch: pytest.MonkeyPatch) -> None:
    suites = {"cpu": SUITE, "wrong": WRONG_SUITE}
    monkeypatch.setattr(bench_cli, "SUITES", suites)
    monkeypatch.setenv("COLUMNS", "200")


def bench(*arguments: object) -> int:
    return cli.main(["bench", *map(str, arguments)])


QUICK = ("--budget", 0.01, "--no-memory")


def test_runs_writes_shows_and_fills_in_the_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, document = tmp_path / "results/cpu.jsonl", tmp_path / "README.md"
    begin, end = tables.markers("tiny")
    document.write_text(f"before\n{begin}\n{end}\nafter\n")
    (tmp_path / "other.md").write_text("\n".join(tables.markers("tiny")))
    arguments = ("--only", "head", *QUICK, "--threads", 1, "--out", out)
    assert bench(*arguments, "--table", document) == 0
    shown = capsys.readouterr().out
    assert "head forward and backward: a tiny case, 5×7×33, float32" in shown
    assert "matmuls, floor" in shown
    assert str(out) in shown
    stored = records.read(out)
    assert {record["case"] for record in stored} == {"head/tiny/float32"}
    assert {record["memory"] for record in stored} == {None}
    assert {record["settings"]["threads"] for record in stored} == {1}
    table = document.read_text()
    age_of = stale.ages(checkout.root())
    assert table == tables.put_into(table, stored, "results/cpu.jsonl", age_of)

    assert bench("--only", "distillation/*", *QUICK, "--out", out) == 0
    cases = {record["case"] for record in records.read(out)}
    assert cases == {"head/tiny/float32", "distillation/tiny/float32"}

    capsys.readouterr()
    before = out.read_bytes()
    assert bench("--from", out, "--table", document) == 0
    shown = capsys.readouterr().out
    assert "head forward" in shown
    assert "distillation forward" in shown
    assert out.read_bytes() == before
    assert "distillation" in document.read_text()


def test_a_wrong_result_is_a_failure_with_its_error_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "results.jsonl"
    assert bench("--suite", "wrong", *QUICK, "--out", out) == 1
    captured = capsys.readouterr()
    assert "loss is off by 1.0e-03 where 1.0e-05 is allowed" in captured.out
    assert "1 refused for a wrong result" in captured.err
    assert {record["status"] for record in records.read(out)} == {"timed", "refused"}


@pytest.mark.parametrize(("load", "said"), [(7.5, True), (0.0, False)])
def test_a_busy_machine_is_pointed_out(
    load: float,
    said: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0))
    out = tmp_path / "results.jsonl"
    assert bench("--only", "similarity", *QUICK, "--out", out) == 0
    assert ("This machine is busy (load 7.5" in capsys.readouterr().out) == said
    assert {record["machine"]["load"] for record in records.read(out)} == {load}


def test_results_are_named_for_suite_and_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert bench("--only", "similarity", *QUICK) == 0
    (path,) = tmp_path.rglob("*.jsonl")
    assert path.parent == tmp_path / "benchmarks/results"
    assert path.name.startswith("tiny-")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--suite", "gpu"], "--suite: got 'gpu', expected one of cpu, wrong"),
        (["--only", "nothing"], "no case fits --only nothing; suite tiny has"),
        (["--dtype", "int8"], "--dtype: got 'int8', expected one of float64"),
        (["--dtype", "float16"], "no case fits --dtype float16"),
        (["--threads", "0"], "--threads: got 0, expected 1 to"),
        (["--budget", "0"], "--budget: got 0.0, expected a positive number"),
        (["--budget", "nan"], "--budget: got nan"),
        (["--from", "missing.jsonl"], "missing.jsonl: can't be read"),
        (["--from", "x.jsonl", "--only", "head"], "--from measures nothing: leave out --only"),
        (["--from"], "--from: got no file, expected one or more"),
        (["--from", "x.jsonl", "--against", "HEAD"], "measures nothing: leave out --against"),
        (["--against", "HEAD", "--out", "x"], "--against keeps no results: leave out --out"),
        (["--against", "HEAD", "--plot", "x"], "--against keeps no results: leave out --plot"),
        (["--against", "HEAD", "--no-memory"], "measures times only: leave out --no-memory"),
        (["--against", "HEAD", "--only", "nothing"], "no case fits --only nothing"),
        (["--table", "missing.md"], "--table: missing.md: "),
        (["--table", "empty.md"], "empty.md: needs these two lines once"),
        (["--out", "broken.jsonl"], "broken.jsonl, line 1: not a result"),
        (["--from", "empty.md"], "empty.md holds no results"),
        (["--out", os.curdir], "--out: . is no file"),
        (["--out", "empty.md/x.jsonl"], "--out: empty.md/x.jsonl can't be written: [Errno 17]"),
    ],
)
def test_wrong_calls_are_explained_before_anything_runs(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench_cli, "run_suite", lambda *arguments: pytest.fail("it ran"))
    Path("empty.md").write_text("")
    Path("broken.jsonl").write_text("no json\n")
    assert bench(*arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("introkernels bench: ")
    assert message in error


@pytest.mark.parametrize("arguments", [["--onyl", "head"], ["--budget", "long"]])
def test_mistyped_options_are_refused(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        bench(*arguments)
    assert stopped.value.code == 2
    captured = capsys.readouterr()
    assert arguments[0] in captured.out + captured.err


def test_an_interruption_keeps_what_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = bench_cli.run_suite

    def interrupted(*arguments: object) -> object:
        yield next(whole(*arguments))
        raise KeyboardInterrupt

    monkeypatch.setattr(bench_cli, "run_suite", interrupted)
    out = tmp_path / "results.jsonl"
    assert bench(*QUICK, "--out", out) == 130
    assert f"interrupted; the cases measured so far are in {out}" in capsys.readouterr().err
    assert len(tables.cases(records.read(out))) == 1


def test_a_full_disk_is_told_with_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_arguments: object, **_keywords: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", full)
    out = tmp_path / "results.jsonl"
    assert bench("--only", "distillation/*", *QUICK, "--out", out) == 1
    assert f"No space left on device: '{out}'" in capsys.readouterr().err


def test_help_lists_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        bench("--help")
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    options = (
        *("suite", "only", "dtype", "threads", "budget", "memory", "out", "table", "plot"),
        *("from", "against"),
    )
    assert all(f"--{option}" in shown for option in options)


@pytest.mark.parametrize("module", cli.BENCH_EXTRA)
def test_without_the_extra_the_command_says_so(
    module: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(sys.modules, "introkernels.bench.cli")
    monkeypatch.setitem(sys.modules, module, None)
    for loaded in list(sys.modules):
        if loaded.startswith(f"{module}.") or loaded == "introkernels.bench.display":
            monkeypatch.delitem(sys.modules, loaded)
    assert bench() == 2
    message = capsys.readouterr().err
    assert f"introkernels bench needs {module}" in message
    assert "pip install 'introkernels[bench]'" in message
