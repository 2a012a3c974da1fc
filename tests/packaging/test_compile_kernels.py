"""What `make kernels` reports, of kernels made for it; machine code itself is read."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from building import ROOT, environment, run

SCRIPT, TOYS = ROOT / "tests/compile_kernels.py", ROOT / "tests/packaging/toy_kernels.py"
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")

pytest.importorskip("triton")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kernels")


def report(cache: Path, *arguments: str, toys: str = "") -> tuple[int, list[str]]:
    """The exit status and the lines of the script on the toy kernels."""
    env = environment(TRITON_CACHE_DIR=str(cache), TOYS=toys, PYTHONPATH=str(ROOT))
    command = (sys.executable, SCRIPT, "--module", TOYS, "--jobs", "1", *arguments)
    result = run(*command, cwd=ROOT, env=env)
    return result.returncode, result.stdout.splitlines()


def test_good_kernels_are_told_apart_as_at_run_time(cache: Path) -> None:
    status, lines = report(cache)
    assert status == 0, lines
    assert lines[0].startswith("12 kernels to compile with triton ")
    for target in TARGETS:
        wide, narrow, unaligned = ([*line.split()] for line in lines if line.startswith(target))
        # target, kernel, registers, spills, shared, instructions, wide loads, wide stores
        assert wide[:2] == [target, "copy"]
        assert wide[3:5] == ["0", "0"]
        assert int(wide[5]) > 20
        # Eight and four numbers for each of 128 threads; AMD's four warps are 256 threads.
        assert wide[6:8] == (["1", "1"] if target == "gfx942" else ["2", "2"])
        assert narrow[6:8] == (["0", "0"] if target == "gfx942" else ["1", "1"])
        assert unaligned[6:8] == ["0", "0"]
    assert lines[-1] == "12 kernels compiled, 0 of them not as they should be"


def test_in_turn_compiles_each_kernel_for_one_target_and_always_the_same(cache: Path) -> None:
    every = {tuple(line.split()[:2]) for line in report(cache)[1][2:-1] if line}
    status, lines = report(cache, "--in-turn")
    assert status == 0, lines
    assert lines[-1] == "3 kernels compiled, 0 of them not as they should be"
    chosen = [tuple(line.split()[:2]) for line in lines[2:-1] if line]
    assert len(chosen) == 3
    assert set(chosen) < every
    assert report(cache, "--in-turn")[1] == lines


def test_spills_are_named_on_each_target(cache: Path) -> None:
    status, lines = report(cache, "--only", "spill", "--targets", "sm_90", "gfx942", toys="spill")
    assert status == 1
    complaints = [line for line in lines if line.startswith("spill for a toy that should spill")]
    assert ["sm_90 spills" in line for line in complaints] == [True, False]
    assert ["gfx942 spills" in line for line in complaints] == [False, True]


def test_a_kernel_that_does_not_compile_is_named(cache: Path) -> None:
    status, lines = report(cache, "--only", "fail", "--targets", "sm_80", toys="fail")
    assert status == 1
    *_, complaint, verdict = lines
    assert complaint.startswith("fail for a toy that should fail on sm_80 ")
    assert "tl.store(out, tl.load(x) + no_such_name)" in complaint
    assert "no_such_name is not defined" in complaint
    assert verdict == "1 kernels compiled, 1 of them not as they should be"


def test_nothing_to_compile_is_a_failure(cache: Path) -> None:
    status, lines = report(cache, "--only", "no such call")
    assert status == 1
    assert lines[0].startswith("0 kernels")
