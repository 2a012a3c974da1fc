"""The two builds, with sanitizers too, take their flags from the same files."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
from pathlib import Path

import pytest
from building import ROOT, run


@pytest.mark.skipif(shutil.which("cmake") is None, reason="needs cmake")
def test_cmake_compiles_and_links_with_the_flags_of_the_files(
    tiny_tree: Path, tmp_path: Path
) -> None:
    shutil.copy(ROOT / "CMakeLists.txt", tiny_tree)
    folder = tmp_path / "cmake"
    for step in (
        ("-S", tiny_tree, "-B", folder, f"-DPython_EXECUTABLE={sys.executable}"),
        ("-S", tiny_tree, "-B", folder, "-DINTROKERNELS_SANITIZE=ON"),
        ("--build", folder, "--target", "introkernels_cpu"),
    ):
        result = run("cmake", *step, cwd=tmp_path)
        assert result.returncode == 0, result.stdout
    flags, sanitizers = (
        set((tiny_tree / "csrc" / name).read_text().split())
        for name in ("flags.txt", "sanitizers.txt")
    )
    assert "-ffp-contract=off" in flags
    assert any(flag.startswith("-fsanitize=") for flag in sanitizers)
    commands = json.loads((folder / "compile_commands.json").read_text())
    (command,) = (item["command"] for item in commands if item["file"].endswith("tiny.cpp"))
    assert flags | sanitizers <= set(shlex.split(command))
    assert b"__asan_init" in (folder / "_cpu.so").read_bytes()
