"""The plots of `introkernels bench`: what they show, and when there are none."""

from __future__ import annotations

import re
import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from bench_records import record

from introkernels import cli
from introkernels.bench import records
from introkernels.bench.stale import Age, fresh

pytest.importorskip("matplotlib")

from introkernels.bench import plots
from introkernels.plotting import COLOURS, styled

PLACE = "cpu-some-cpu-2-cores-1-thread"
MEGABYTE = 1e6


@pytest.fixture(autouse=True)
def _style() -> Iterator[None]:
    with styled():
        yield


def sweep(*classes: int, added: float | None = 3.0, **fields: Any) -> list[Any]:
    """Eager, compiled and our code at each number of classes C: 30·C, 20·C and 10·C µs."""
    memory = {"peak": 0, "handed_out": 0, "reason": None}
    return [
        record(
            name,
            microseconds * C * 1e-6,
            role,
            **{
                "sizes": {"B": 8, "C": C},
                "percent_of_read": 600 / microseconds,
                "memory": None if added is None else {**memory, "added": added * C * MEGABYTE},
                **fields,
            },
        )
        for C in classes
        for name, microseconds, role in (
            ("eager", 30, "other"),
            ("compile", 20, "other"),
            ("cpp", 10, "ours"),
        )
    ]


def texts(figure: Any) -> list[str]:
    return [artist.get_text() for artist in figure.findobj(lambda a: hasattr(a, "get_text"))]


def lines(axis: Any) -> list[tuple[list[float], list[float]]]:
    return [(list(line.get_xdata()), list(line.get_ydata())) for line in axis.get_lines()]


def over_dimensions(*dimensions: int) -> list[Any]:
    """A sweep over D: what that over C has at as many classes."""
    return [
        r | {"sizes": {"B": 8, "C": 5, "D": r["sizes"]["C"]}, "case": f"dims-{r['sizes']['C']}"}
        for r in sweep(*dimensions)
    ]


def test_a_sweep_gives_every_plot_and_each_is_svg() -> None:
    made = plots.plots(sweep(10, 100, 1000) + over_dimensions(20, 40, 80), fresh)
    assert not made.skipped
    kinds = ("bandwidth", "time", "time-of-dimensions", "memory")
    assert list(made.made) == [f"{PLACE}-{kind}.svg" for kind in kinds]
    for text in made.made.values():
        assert ET.fromstring(text).tag == "{http://www.w3.org/2000/svg}svg"


def test_the_same_records_give_the_same_text_without_a_date() -> None:
    first, second = (plots.plots(sweep(10, 100, 1000), fresh).made for _ in range(2))
    assert first == second
    assert not any("dc:date" in text for text in first.values())


def test_bars_are_as_long_as_the_percentages_in_the_records() -> None:
    figure = plots.bandwidth_bars(sweep(10), fresh)
    assert figure is not None
    (axis,) = figure.axes
    assert [bar.get_width() for bar in axis.patches] == [60, 20, 30]
    labels = [text.get_text() for text in axis.texts]
    assert labels == ["60 %, 100 µs", "20 %, 300 µs", "30 %, 200 µs"]


def test_a_gpu_is_compared_with_a_copy() -> None:
    found = [
        record("cuda", 1e-3, "ours", percent_of_copy=77.0),
        record("copy", 1e-3, "read", percent_of_copy=100.0),
    ]
    figure = plots.bandwidth_bars(found, fresh)
    assert figure is not None
    assert [bar.get_width() for bar in figure.axes[0].patches] == [77]
    assert any("plain copy" in text for text in texts(figure))


@pytest.mark.parametrize("fields", [{"flops": 7}, {"percent_of_read": None}])
def test_what_memory_does_not_limit_has_no_bars(fields: dict[str, Any]) -> None:
    assert plots.bandwidth_bars(sweep(10, **fields), fresh) is None
    found = sweep(10, 100, 1000, **fields) + over_dimensions(20, 40, 80)
    assert plots.plots(found, fresh).skipped == []
    skipped = plots.plots(sweep(10, **fields), fresh).skipped
    assert skipped[:1] == [f"{PLACE}-bandwidth: needs a case that memory limits, timed in its run"]


def test_training_steps_have_no_bandwidth() -> None:
    steps = [
        record("plain", 1e-3, percent_of_read=3.0),
        record("head", 2e-3, "ours", percent_of_read=2.0),
    ]
    assert plots.bandwidth_bars(steps, fresh) is None


def test_curves_run_through_the_medians_by_rising_classes() -> None:
    figure = plots.time_by_classes(sweep(1000, 10, 100), fresh)
    assert figure is not None
    (axis,) = figure.axes
    # Eager, compiled, ours: those that come last lie on top.
    for microseconds, (classes, times) in zip((30, 20, 10), lines(axis), strict=True):
        assert classes == [10, 100, 1000]
        assert times == pytest.approx([microseconds * C * 1e-3 for C in classes])
    assert axis.get_title(loc="left") == "distillation forward and backward, 8×C, float32"


def test_curves_over_dimensions() -> None:
    found = sweep(1000, 10, 100) + over_dimensions(80, 20, 40)
    figure = plots.time_by_dimensions(found, fresh)
    assert figure is not None
    (axis,) = figure.axes
    for microseconds, (dimensions, times) in zip((30, 20, 10), lines(axis), strict=True):
        assert dimensions == [20, 40, 80]
        assert times == pytest.approx([microseconds * D * 1e-3 for D in dimensions])
    assert axis.get_title(loc="left") == "distillation forward and backward, 8×5×D, float32"
    assert axis.get_xlabel() == "dimensions D"
    # Those of the sweep over D have one number of classes, which makes no curve over it.
    by_classes = plots.time_by_classes(found, fresh)
    assert by_classes is not None
    assert [axis.get_xlabel() for axis in by_classes.axes] == ["classes C"]


def test_memory_below_a_megabyte_is_drawn_as_one() -> None:
    figure = plots.memory_by_classes(sweep(10, 100, 1000, added=0.05), fresh)
    assert figure is not None
    assert lines(figure.axes[0])[0][1] == pytest.approx([1.0, 5.0, 50.0])


@pytest.mark.parametrize(
    ("found", "time", "memory"),
    [
        (sweep(10, 100), False, False),
        (sweep(10, 100, 1000), True, True),
        (sweep(10, 100, 1000, added=None), True, False),
        ([*sweep(10, 100), *sweep(1000, dtype="bfloat16")], False, False),
        ([*sweep(10, 100), *sweep(1000, operator="similarity")], False, False),
        ([r | {"sizes": {"B": r["sizes"]["C"], "C": 10}} for r in sweep(1, 2, 3)], False, False),
    ],
    ids=("two C", "three C", "no memory", "two dtypes", "two operators", "another size"),
)
def test_a_curve_needs_three_numbers_of_classes_and_nothing_else_different(
    found: list[Any], time: bool, memory: bool
) -> None:
    assert (plots.time_by_classes(found, fresh) is not None) == time
    assert (plots.memory_by_classes(found, fresh) is not None) == memory


def test_what_was_not_timed_is_left_out() -> None:
    found = [r for r in sweep(10, 100, 1000) if r["contender"] != "eager"]
    found += [
        record("eager", None, sizes={"B": 8, "C": C}) | {"status": "unavailable"}
        for C in (10, 100, 1000)
    ]
    figure = plots.time_by_classes(found, fresh)
    assert figure is not None
    assert len(lines(figure.axes[0])) == 2
    assert "eager" not in texts(figure)


def test_a_case_under_two_names_is_one_point() -> None:
    found = sweep(10, 100, 1000)
    again = [r | {"case": "distillation/again/float32"} for r in sweep(100)]
    figure = plots.time_by_classes(found + again, fresh)
    assert figure is not None
    assert lines(figure.axes[0])[0][0] == [10, 100, 1000]


def test_each_operator_has_a_panel_and_contenders_keep_their_colours() -> None:
    found = sweep(10, 100, 1000) + sweep(10, 100, 1000, operator="head")
    found += [record("peer", 1.0, sizes={"B": 8, "C": C}) for C in (10, 100, 1000)]
    figure = plots.time_by_classes(found, fresh)
    assert figure is not None
    first, second = figure.axes
    colours = [[line.get_color() for line in axis.get_lines()] for axis in (first, second)]
    assert colours[0][:3] == colours[1]
    assert len(set(colours[0])) == 4
    assert set(colours[0]) <= set(COLOURS)


def test_six_peers_beside_ours_can_be_told_apart() -> None:
    names = ["eager", "compile", *(f"peer {number}" for number in range(6))]
    found = [record(name, 1.0, sizes={"B": 8, "C": C}) for C in (10, 100, 1000) for name in names]
    figure = plots.time_by_classes(found, fresh)
    assert figure is not None
    looks = {(line.get_color(), line.get_marker()) for line in figure.axes[0].get_lines()}
    assert len(looks) == len(names)


@pytest.mark.parametrize(("age", "sign"), [(Age.OLDER, "†"), (Age.UNKNOWN, "‡")])
@pytest.mark.parametrize("make", [plots.bandwidth_bars, plots.time_by_classes])
def test_old_data_are_marked_and_the_mark_explained(make: Any, age: Age, sign: str) -> None:
    found = sweep(10, 100, 1000)
    marked = texts(make(found, lambda record: age))
    assert any(re.search(f"(backward|float32) {sign}", text) for text in marked)
    assert any(f"\n{sign} " in text for text in marked)
    assert not any(sign in text for text in texts(make(found, fresh)))


def test_machines_and_threads_have_plots_of_their_own() -> None:
    other = {"cpu": "Other CPU", "cores": 4, "load": 0.0}
    found = [
        *sweep(10, 100),
        *sweep(1000, settings={"threads": 2}),
        *sweep(316, machine=other),
    ]
    made = plots.plots(found, fresh)
    places = [PLACE, "cpu-some-cpu-2-cores-2-threads", "cpu-other-cpu-4-cores-1-thread"]
    assert list(made.made) == [f"{place}-bandwidth.svg" for place in places]
    assert len(made.skipped) == 9


def test_two_runs_of_one_case_are_not_mixed() -> None:
    with pytest.raises(plots.PlotError, match=r"distillation/8x10/float32 of .* from two runs"):
        plots.plots(sweep(10) + sweep(10, run="another"), fresh)


def test_the_command_writes_plots_of_several_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two, folder = tmp_path / "one.jsonl", tmp_path / "two.jsonl", tmp_path / "new/plots"
    records.write(one, sweep(10, 100, 1000))
    records.write(two, sweep(10, suite="another"))
    assert cli.main(["bench", "--from", str(one), str(two), "--plot", str(folder)]) == 0
    names = {path.name for path in folder.iterdir()}
    ours = {f"{PLACE}-{kind}.svg" for kind in ("bandwidth", "time", "memory")}
    assert names == ours | {"another-some-cpu-2-cores-1-thread-bandwidth.svg"}
    shown = capsys.readouterr().out
    assert "No plot another-some-cpu-2-cores-1-thread-time: needs an operator at 3" in shown
    assert "‡ age unknown" in shown


@pytest.mark.parametrize("option", ["--plot", "--table"])
def test_the_command_refuses_two_files_of_one_suite(
    option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    records.write(one, sweep(10))
    records.write(two, sweep(10, run="another"))
    assert cli.main(["bench", "--from", str(one), str(two), option, str(tmp_path / "x")]) == 2
    said = capsys.readouterr().err
    assert option in said
    assert "two runs" in said or "both have results of suite cpu" in said


def test_without_matplotlib_the_command_says_so_before_it_measures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for loaded in list(sys.modules):
        if loaded.startswith("matplotlib.") or loaded in (
            "introkernels.bench.plots",
            "introkernels.plotting",
        ):
            monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(
        "introkernels.bench.cli.run_suite", lambda *arguments: pytest.fail("it ran")
    )
    assert cli.main(["bench", "--plot", str(tmp_path)]) == 2
    message = capsys.readouterr().err
    assert "--plot needs matplotlib" in message
    assert "pip install 'introkernels[bench]'" in message
