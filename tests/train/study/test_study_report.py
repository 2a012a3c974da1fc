from __future__ import annotations

import base64
import json
import re

import made_up
import pytest
from page import Page

from introkernels.train.study import figures, report
from introkernels.train.study.analysis import Results
from introkernels.train.study.claims import judge

SOME = [
    "standard", "label_smoothing", "mixup", "cs_kd", "kd", "kd_ground_truth_only", "kd_permuted",
    "kd_class_average", "introspective_input", "introspective_permuted",
]  # fmt: skip
FIGURES = {
    "paired_differences",
    "paired_differences_by_cell",
    "cost_against_accuracy",
    "accuracy_by_size",
    "component_study",
    "controls",
}


@pytest.fixture(scope="module")
def study():
    accuracies = made_up.drawn(SOME, cells=4, seeds=3)
    accuracies["mixup"][1][2] = None
    return made_up.study(accuracies, synthetic=True)


@pytest.fixture(scope="module")
def written(study, tmp_path_factory):
    out = tmp_path_factory.mktemp("study")
    return out, report.write(study, out)


def test_everything_is_written_and_named(written):
    out, paths = written
    assert {name: path.relative_to(out).as_posix() for name, path in paths.items()} == {
        "html": "report.html",
        "markdown": "report.md",
        **{name: f"{name}.csv" for name in ("overall", "results", "runs", "costs")},
        **{name: f"{name}.png" for name in FIGURES},
    }
    assert set(out.iterdir()) == set(paths.values())


def test_the_page_needs_no_other_file(written):
    out, paths = written
    text = paths["html"].read_text()
    page = Page(text)
    assert all(resource.startswith("data:image/png;base64,") for resource in page.resources)
    assert not re.search(r"url\(|@import|https?://", text)
    embedded = {base64.b64decode(image["src"].split(",", 1)[1]) for image in page.images}
    assert embedded == {path.read_bytes() for path in out.glob("*.png")}
    assert all(len(image["alt"]) > 40 for image in page.images)


def test_the_markdown_shows_the_figures_beside_it_and_the_same_tables(written):
    out, paths = written
    text = paths["markdown"].read_text()
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert {link for link in links if link.endswith(".png")} == {f"{name}.png" for name in FIGURES}
    assert all((out / link).is_file() for link in links)
    shown = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith("|") and not line.startswith("| :--")
    ]
    rows = [row for table in Page(paths["html"].read_text()).tables for row in table]
    # The page has a row for each section's name, the Markdown a column.
    page_rows = [row for row in rows if len(row) > 1]
    assert len(shown) == len(page_rows)
    for markdown, row in zip(shown, page_rows, strict=True):
        assert markdown[-len(row) :] == [" ".join(cell.split()) for cell in row]


def test_every_markdown_table_is_well_formed(written):
    _, paths = written
    widths = [line.count("|") for line in paths["markdown"].read_text().splitlines()]
    tables = "".join(f"{width} " if width else "\n" for width in widths).split("\n")
    found = [line.split() for line in tables if line]
    assert found
    assert all(len(set(table)) == 1 and len(table) > 2 for table in found)


def test_the_overall_table_shows_the_numbers(study, written):
    _, paths = written
    table = Page(paths["html"].read_text()).tables[0]
    rows = {row[0]: row for row in table if len(row) > 1}
    seeds = [
        sum(r["test"]["accuracy"] for r in study["runs"] if r["method"] == "kd" and r["seed"] == s)
        / 4
        for s in range(3)
    ]
    assert rows["kd"][1].startswith(f"{100 * sum(seeds) / 3:.2f} ± ")
    assert rows["kd"][2].startswith(f"{100 * sum(seeds) / 3 + 1:.2f} ± ")
    assert rows["mixup"][-1] == "11 of 12 (1 diverged)"
    assert rows["standard"][5] == "–"
    assert [row[0] for row in table if len(row) == 1] == [
        "standard", "regularisation", "self-teaching", "teacher", "component", "introspective",
        "control",
    ]  # fmt: skip


def test_every_cell_has_a_table_with_hashes(study, written):
    _, paths = written
    tables = Page(paths["html"].read_text()).tables
    for cell in range(4):
        shown = {row[0]: row[-1] for row in tables[1 + cell] if len(row) > 1}
        for one in study["chosen"]:
            if one["cell"] == cell:
                assert shown[one["method"].replace("_", " ")] == one["hash"]


def test_verdicts_command_and_cautions_are_on_both_pages(study, written):
    _, paths = written
    shown = Page(paths["html"].read_text()).text
    markdown = paths["markdown"].read_text()
    for text in (shown, markdown):
        for claim in judge(Results(study)):
            assert claim.statement in text
            assert claim.verdict in text
            assert all(sentence in text for sentence in claim.sentences)
        for phrase in (
            study["command"],
            study["plan_hash"],
            "95 % confidence interval",
            "by chance",
            "arXiv:2009.09140",
            "1 run diverged",
            "Every method had 3 trials in every cell",
            "Times differ from one execution to the next".lower(),
        ):
            assert phrase.lower() in text.replace("\xa0", " ").lower()


def test_verdicts_are_a_line_each(study):
    first, *lines = report.verdicts(study).splitlines()
    assert first == "Synthetic data."
    for line, claim in zip(lines, judge(Results(study)), strict=True):
        assert line.startswith(f"({claim.key}) ")
        assert line.endswith(f": {claim.verdict}.")


def test_the_number_of_intervals_is_counted(study):
    results = Results(study)
    # In each of 4 cells and over all: 9 methods against standard and 9 against label smoothing, of
    # which one pair is the same turned round; then kd and what can be asked of its parts.
    claims = judge(results)
    expected = set()
    for place in (None, 0, 1, 2, 3):
        for reference in ("standard", "label_smoothing"):
            expected |= {(name, reference, place) for name in SOME if name != reference}
        expected |= {
            ("kd_permuted", "kd_ground_truth_only", place),
            ("kd_class_average", "kd_ground_truth_only", place),
            ("kd", "kd_permuted", place),
            ("introspective_input", "introspective_permuted", place),
            ("introspective_input", "mixup", place),
            ("introspective_input", "cs_kd", place),
            ("introspective_input", "kd", place),
        }
    parts = ["kd_ground_truth_only", "kd_permuted", "kd_class_average"]
    for name in ("standard", "kd", *parts):
        expected |= {(name, r, None) for r in ("standard", parts[0], "kd") if r != name}
    assert report.intervals_shown(results, claims) == len(expected)


def test_synthetic_data_is_called_so_everywhere(study, written):
    _, paths = written
    text = paths["html"].read_text()
    markdown = paths["markdown"].read_text()
    captions = re.findall(r"<caption>(.*?)</caption>", text)
    assert captions
    assert all("(synthetic data)" in caption for caption in captions)
    pictures = re.findall(r"<figcaption>(.*?)</figcaption>", text, re.DOTALL)
    assert len(pictures) == len(FIGURES)
    assert all("Synthetic data." in caption for caption in pictures)
    assert re.search(r"<title>Synthetic data: ", text)
    assert markdown.startswith("# Synthetic data: ")
    assert all("True" in row for row in paths["runs"].read_text().splitlines()[1:])
    assert figures.effects(Results(study), [("a", "kd", "standard")])._suptitle.get_text()


def test_real_data_is_not_called_synthetic(tmp_path):
    study = made_up.study(made_up.constant({"standard": 0.8, "introspective_input": 0.8}))
    paths = report.write(study, tmp_path)
    assert "ynthetic" not in Page(paths["html"].read_text()).text
    assert "ynthetic" not in paths["markdown"].read_text()


def test_only_costs_depend_on_times(study, written, tmp_path, monkeypatch):
    _, paths = written
    monkeypatch.setattr(report, "_figures", lambda results: iter(()))
    slower = json.loads(json.dumps(study))
    for run in slower["runs"]:
        if run["test"]:
            run["wall_seconds"] *= 1.7
            run["step_milliseconds"] *= 1.7
    others = report.write(slower, tmp_path)
    for name in ("overall", "results", "runs"):
        assert paths[name].read_bytes() == others[name].read_bytes()
    assert paths["costs"].read_text() != others["costs"].read_text()
    left, right = (Page(p["html"].read_text()).tables for p in (paths, others))
    changed = [a[0] for a, b in zip(left, right, strict=True) if a != b]
    assert len(changed) == 1
    assert "own training (s)" in changed[0]


@pytest.mark.parametrize(
    "accuracies",
    [
        {"standard": [[0.8]]},
        {"introspective_input": [[0.8, 0.9]]},
        {"standard": [[None, None]], "kd": [[0.8, 0.9]]},
        {"standard": [[0.8, 0.9]], "introspective_input": [[None, None]], "kd": [[0.8, 0.8]]},
        {"label_smoothing": [[None]], "standard": [[None]]},
    ],
    ids=["one run", "no standard", "standard diverged", "representative diverged", "all diverged"],
)
def test_poor_studies_have_a_report_too(accuracies, tmp_path):
    paths = report.write(made_up.study(accuracies), tmp_path)
    shown = Page(paths["html"].read_text()).text
    assert not re.search(r"\bnan\b|\bNone\b", shown)
    assert "not part of this study" in shown


def test_names_are_escaped(tmp_path):
    study = made_up.study(made_up.constant({"standard": 0.8}))
    study["cells"][0]["name"] = "a < b | c"
    paths = report.write(study, tmp_path)
    assert "a &lt; b | c" in paths["html"].read_text()
    assert "a < b | c" in paths["markdown"].read_text()


@pytest.mark.parametrize(
    ("heights", "expected"),
    [
        ([1.0, 5.0, 9.0], [1.0, 5.0, 9.0]),
        ([5.0, 5.0], [4.5, 5.5]),
        ([2.0, 2.0, 2.0, 9.0], [1.0, 2.0, 3.0, 9.0]),
        ([9.8, 10.0], [9.0, 10.0]),
        ([0.0, 0.0], [0.0, 1.0]),
    ],
)
def test_labels_keep_apart_and_within_bounds(heights, expected):
    assert figures._apart(heights, 1.0, 0.0, 10.0) == pytest.approx(expected)


def test_far_away_values_do_not_squeeze_a_figure():
    assert figures._fences([-21.0, -1.0, -0.5, 0.0, 0.5, 1.0]) == (-1.0, 1.0)
    assert figures._fences([-2.0, 2.0]) == (-2.0, 2.0)
