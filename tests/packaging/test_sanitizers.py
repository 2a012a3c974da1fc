"""The two builds with sanitizers take their flags from one file."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
from pathlib import Path

import pytest
from building import ROOT, run


@pytest.mark.skipif(shutil.which("cmake") is None, reason="needs cmake")
def test_cmake_compiles_and_links_with_the_flags_of_the_file(
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
    flags = set((tiny_tree / "csrc/sanitizers.txt").read_text().split())
    assert any(flag.startswith("-fsanitize=") for flag in flags)
    commands = json.loads((folder / "compile_commands.json").read_text())
    (command,) = (item["command"] for item in commands if item["file"].endswith("tiny.cpp"))
    assert flags <= set(shlex.split(command))
    assert b"__asan_init" in (folder / "_cpu.so").read_bytes()
