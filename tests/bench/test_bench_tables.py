"""Records on disk, and the tables made from them."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
from bench_cases import QUICK, SUITE, TINY, WRONG_SUITE

from introkernels.bench import records, stale, tables
from introkernels.bench.model import Suite
from introkernels.bench.runner import run_suite

ROOT = Path(__file__).resolve().parents[2]
BEGIN, END = tables.markers("tiny")


def measured(suite: Suite) -> list[dict[str, Any]]:
    return [record for case in run_suite(suite, suite.cases, QUICK) for record in case]


@pytest.fixture(scope="module")
def found() -> list[dict[str, Any]]:
    return measured(SUITE)


def with_medians(found: list[dict[str, Any]], **medians: float) -> list[dict[str, Any]]:
    """A copy in which the contenders named take this long in every case."""
    found = copy.deepcopy(found)
    for record in found:
        if record["contender"] in medians:
            record["seconds"]["median"] = medians[record["contender"]]
    return found


def test_what_is_written_is_read_again(found: list[dict[str, Any]], tmp_path: Path) -> None:
    path = tmp_path / "new/results.jsonl"
    records.write(path, found)
    again = records.read(path)
    assert [record["contender"] for record in again] == [r["contender"] for r in found]
    for before, after in zip(found, again, strict=True):
        assert after["sizes"] == before["sizes"]
        assert after["seconds"]["median"] == pytest.approx(before["seconds"]["median"], rel=1e-5)
    assert all(json.loads(line) for line in path.read_text().splitlines())
    records.write(path, again)
    assert records.read(path) == again
    assert [file.name for file in path.parent.iterdir()] == ["results.jsonl"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "format is 2, this version reads 1"),
        ({"status": "guessed"}, "status is 'guessed'"),
        ({"seconds": None}, "if, and only if, it was timed"),
        ({"bytes": "many"}, "bytes is 'many'"),
        ({"bytes": True}, "bytes is True"),
        ({"speed": 3}, "unknown: speed"),
    ],
)
def test_records_of_another_form_are_refused(
    found: list[dict[str, Any]], change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text(f"{json.dumps(found[0])}\n{json.dumps(found[0] | change)}\n")
    with pytest.raises(records.ResultsError, match=f"line 2: not a result: .*{re.escape(message)}"):
        records.read(path)


@pytest.mark.parametrize("text", ["{}", "[1]", "3", "no json", '{"format": 1}'])
def test_other_files_are_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text(text)
    with pytest.raises(records.ResultsError, match=r"results.jsonl, line 1: not a result"):
        records.read(path)


def test_contenders_of_a_case_come_from_one_run(
    found: list[dict[str, Any]], tmp_path: Path
) -> None:
    path = tmp_path / "results.jsonl"
    records.write(path, [found[0], found[1] | {"run": "another"}])
    with pytest.raises(records.ResultsError, match="comes from more than one run"):
        records.read(path)


def test_a_run_replaces_whole_cases_and_keeps_the_others(found: list[dict[str, Any]]) -> None:
    first, second = TINY[0].name, TINY[1].name
    new = [record | {"run": "new"} for record in found if record["case"] == second][:2]
    merged = records.merge(found, new)
    assert [record for record in merged if record["case"] == second] == new
    of_first = [record for record in found if record["case"] == first]
    assert [record for record in merged if record["case"] == first] == of_first
    assert [case[0]["case"] for case in tables.cases(merged)] == [case.name for case in TINY]
    # Another number of threads is another measurement.
    threads = [record | {"settings": record["settings"] | {"threads": 2}} for record in new]
    assert len(records.merge(found, threads)) == len(found) + len(threads)


def test_ratios_need_both_sides(found: list[dict[str, Any]]) -> None:
    case = with_medians(found, eager=0.3, ours=0.1)
    case = [record for record in case if record["case"] == TINY[0].name]
    assert tables.speedup(case, "ours", "eager") == pytest.approx(3.0)
    assert tables.speedup(case, "ours", "compile") is None


def test_the_table_says_what_the_records_say(found: list[dict[str, Any]]) -> None:
    text = tables.markdown(with_medians(found, eager=0.3, ours=0.1), "results.jsonl")
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| ")]
    header, _, *cases = rows
    assert len(cases) == len(TINY)
    (row,) = (row for row in cases if row[0].startswith("| head forward and backward: a tiny case"))
    assert "5×7×33, float32" in row[0]
    assert row[header.index("eager")] == "300 ms"
    assert row[header.index("ours")] == "100 ms"
    assert row[header.index("ours over eager")] == "3.00×"
    assert re.search(r"matmuls .*s \(ours takes [\d.,]+×\)", row[-1])
    assert "einsum" in next(row for row in cases if row[0].startswith("| introspective"))[-1]
    assert "1 thread on" in text
    assert "Data: [results.jsonl](results.jsonl)." in text


@pytest.mark.parametrize(("load", "said"), [(0.9, False), (7.5, True)])
def test_the_table_says_if_the_machine_was_busy(
    found: list[dict[str, Any]], load: float, said: bool
) -> None:
    machine = found[0]["machine"] | {"load": load, "cores": 2}
    text = tables.markdown([record | {"machine": machine} for record in found], "results.jsonl")
    assert ("busy with other work (load up to 7.5)" in text) == said


def test_a_refused_contender_has_no_time_and_no_ratio() -> None:
    text = tables.markdown(measured(WRONG_SUITE), "results.jsonl")
    header, _, row = (line.split(" | ") for line in text.splitlines() if line.startswith("| "))
    assert row[header.index("wrong loss")] == "refused"
    assert row[header.index("wrong loss over eager")] == ""


def test_the_document_round_trip(found: list[dict[str, Any]]) -> None:
    document = f"# Title\n\n{BEGIN}\nold\n{END}\n\nThe end.\n"
    updated = tables.put_into(document, found, "data/results.jsonl")
    assert updated.startswith("# Title\n\n")
    assert updated.endswith("\n\nThe end.\n")
    assert "old" not in updated
    assert tables.put_into(updated, found, "data/results.jsonl") == updated
    assert tables.source_of(updated, "tiny") == "data/results.jsonl"
    assert tables.source_of(document, "tiny") is None


@pytest.mark.parametrize(
    "document", ["", BEGIN, f"{END}\n{BEGIN}", f"{BEGIN}{END}{BEGIN}{END}"], ids=range(4)
)
def test_a_document_without_its_markers_is_refused(
    found: list[dict[str, Any]], document: str
) -> None:
    with pytest.raises(tables.TableError, match=r"needs these two lines once") as raised:
        tables.put_into(document, found, "results.jsonl")
    assert BEGIN in str(raised.value)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (12.345, "12.3 s"),
        (0.9999, "1,000 ms"),
        (0.0123456, "12.3 ms"),
        (1.5e-6, "1.50 µs"),
        (2e-8, "0.02 µs"),
        (250.4, "250 s"),
    ],
)
def test_seconds(value: float, text: str) -> None:
    assert tables.seconds(value) == text


def without_marks(document: str) -> str:
    """A document whose tables have no marks of age, and nothing said about them."""
    for note in stale.NOTES.values():
        document = document.replace(f"{note}\n\n", "")
    return re.sub(r"^(\| [^|]*) [†‡] (?=\|)", r"\1 ", document, flags=re.MULTILINE)


@pytest.mark.parametrize("age", stale.Age)
def test_a_table_without_its_marks_is_the_table_that_never_had_any(
    found: list[dict[str, Any]], age: stale.Age
) -> None:
    document = f"{BEGIN}\n{END}\n"
    marked = tables.put_into(document, found, "results.jsonl", lambda record: age)
    rows = re.findall(r"^\| .*: a tiny case, .*32 [†‡] ", marked, re.MULTILINE)
    assert len(rows) == (0 if age is stale.Age.CURRENT else len(TINY))
    assert without_marks(marked) == tables.put_into(document, found, "results.jsonl")


def test_the_table_of_the_readme_is_made_from_the_committed_results() -> None:
    readme = ROOT / "README.md"
    document = readme.read_text(encoding="utf-8")
    suites = re.findall(r"<!-- bench (\w+):", document)
    assert suites == ["cpu", "step"]
    for suite in suites:
        source = tables.source_of(document, suite)
        assert source is not None, "the README names no data"
        stored = records.read(ROOT / source)
        assert {record["suite"] for record in stored} == {suite}
        # Marks tell of the day when the table was made.
        made = tables.put_into(document, stored, source)
        assert made == without_marks(document), (
            f"run: introkernels bench --from {source} --table README.md"
        )
