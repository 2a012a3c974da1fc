"""The build itself, on a tiny kernel: failures, switches, stale files, other ways to install."""

from __future__ import annotations

import hashlib
import json
import shlex
import shutil
import sys
import tarfile
import venv
from pathlib import Path

import pytest
from building import (
    NO_CUDA,
    ROOT,
    STATUS_FILE,
    CleanEnvironment,
    build_in_place,
    build_wheel,
    environment,
    member_text,
    members,
    run,
    write_tiny_kernel,
)

pytestmark = pytest.mark.slow

READ_NUMBER = """
import sys, torch
torch.ops.load_library(sys.argv[1])
print(torch.ops.introkernels_tiny.number(torch.ones(1)))
"""


def number_of(library: Path) -> int:
    """The constant that was compiled into a tiny library."""
    # Not in the package's folder: its types.py would hide the standard library's.
    result = run(sys.executable, "-c", READ_NUMBER, library, cwd=Path("/"))
    assert result.returncode == 0, result.stdout
    return int(result.stdout)


def test_source_that_does_not_compile(tiny_tree: Path, tmp_path: Path) -> None:
    build_wheel(tiny_tree, tmp_path / "good", INTROKERNELS_CPP="1")
    (tiny_tree / "csrc/cpu/tiny.cpp").write_text("int broken( {\n")
    # The same folder still holds the library that was built a moment ago.
    wheel = build_wheel(tiny_tree, tmp_path / "auto")
    assert "introkernels/_cpu.so" not in members(wheel)
    status = json.loads(member_text(wheel, STATUS_FILE))
    assert "its build failed" in status["cpu"]
    assert "build" not in status

    assert build_in_place(tiny_tree, INTROKERNELS_CPP="1").returncode != 0


def test_undefined_symbol_fails_the_build(tiny_tree: Path) -> None:
    with (tiny_tree / "csrc/cpu/tiny.cpp").open("a") as source:
        source.write("void nowhere();\nvoid call_it() { nowhere(); }\n")
    result = build_in_place(tiny_tree, INTROKERNELS_CPP="1")
    assert result.returncode != 0
    assert "undefined reference to `nowhere()'" in result.stdout


def test_in_place_follows_headers_and_the_switch(tiny_tree: Path) -> None:
    package = tiny_tree / "introkernels"
    assert build_in_place(tiny_tree, INTROKERNELS_CPP="1").returncode == 0
    assert number_of(package / "_cpu.so") == 1

    write_tiny_kernel(tiny_tree, number=2)
    assert build_in_place(tiny_tree, INTROKERNELS_CPP="1").returncode == 0
    assert number_of(package / "_cpu.so") == 2

    assert build_in_place(tiny_tree, INTROKERNELS_CPP="0").returncode == 0
    assert not list(package.glob("*.so"))
    assert "INTROKERNELS_CPP=0" in json.loads((tiny_tree / STATUS_FILE).read_text())["cpu"]


def test_pure_wheel_after_a_native_build_holds_no_library(tiny_tree: Path, tmp_path: Path) -> None:
    assert build_in_place(tiny_tree, INTROKERNELS_CPP="1").returncode == 0
    assert (tiny_tree / "introkernels/_cpu.so").exists()
    wheel = build_wheel(tiny_tree, tmp_path / "out", INTROKERNELS_CPP="0")
    assert not [name for name in members(wheel) if name.endswith(".so")]
    assert "INTROKERNELS_CPP=0" in json.loads(member_text(wheel, STATUS_FILE))["cpu"]


@pytest.mark.parametrize("mode", ["lenient", "strict"])
def test_editable_install(tiny_tree: Path, tmp_path: Path, mode: str) -> None:
    venv.create(tmp_path / "env", with_pip=False)
    clean = CleanEnvironment(tmp_path / "env")
    clean.see_dependencies()  # here the build needs them: setuptools, torch
    result = run(
        *(sys.executable, "-m", "pip", "--python", clean.python, "install", "--no-deps"),
        *("--no-build-isolation", "--config-settings", f"editable_mode={mode}"),
        *("--editable", tiny_tree),
        cwd=tmp_path,
        env=environment(INTROKERNELS_CPP="1"),
    )
    assert result.returncode == 0, result.stdout
    folder = Path(
        clean.run_python(
            "from importlib.util import find_spec; print(find_spec('introkernels').origin)"
        )
    ).parent
    assert folder.is_relative_to(tiny_tree)
    status = json.loads((folder / Path(STATUS_FILE).name).read_text())
    assert status | {"cpu": "built", "cuda": NO_CUDA} == status
    digest = hashlib.sha256((folder / "_cpu.so").read_bytes()).hexdigest()
    assert status["sha256"] == {"cpu": digest}
    assert number_of(folder / "_cpu.so") == 1


def test_source_distribution_holds_everything_a_build_needs(
    tiny_tree: Path, tmp_path: Path
) -> None:
    result = run(
        *(sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", tmp_path / "out"),
        cwd=tiny_tree,
        env=environment(INTROKERNELS_CPP="1", CXX="/nonexistent/c++"),
    )
    assert result.returncode == 0, result.stdout
    (archive,) = (tmp_path / "out").glob("*.tar.gz")
    with tarfile.open(archive) as sources:
        names = {name.partition("/")[2] for name in sources.getnames()}
    assert {"csrc/cpu/tiny.cpp", "csrc/common/number.h", "csrc/flags.txt"} <= names
    assert {"csrc/cuda/tiny.cu", "csrc/cuda/tiny.cpp", "setup_cuda.py"} <= names
    assert {"setup.py", "pyproject.toml", "LICENSE", "introkernels/py.typed"} <= names


@pytest.mark.skipif(shutil.which("cmake") is None, reason="needs cmake")
def test_cmake_compiles_with_the_flags_of_setup(tiny_tree: Path, tmp_path: Path) -> None:
    write_tiny_kernel(tiny_tree, number=3)  # so that both really compile
    shutil.copy(ROOT / "CMakeLists.txt", tiny_tree)
    folder = tmp_path / "cmake"
    python = f"-DPython_EXECUTABLE={sys.executable}"
    for step in (
        ("-S", tiny_tree, "-B", folder, python),
        ("--build", folder, "--target", "introkernels_cpu"),
    ):
        result = run("cmake", *step, cwd=tmp_path)
        assert result.returncode == 0, result.stdout
    assert number_of(folder / "_cpu.so") == 3

    commands = json.loads((folder / "compile_commands.json").read_text())
    (by_cmake,) = (item["command"] for item in commands if item["file"].endswith("tiny.cpp"))
    log = build_in_place(tiny_tree, INTROKERNELS_CPP="1").stdout.splitlines()
    (by_setup,) = (line for line in log if " -c " in line and "tiny.cpp" in line)

    def decisive(command: str) -> set[str]:
        kinds = ("-f", "-O", "-std", "-W", "-DTORCH_TARGET", "-DNDEBUG", "-m")
        flags = {flag for flag in shlex.split(command) if flag.startswith(kinds)}
        return {flag for flag in flags if "prefix-map" not in flag}

    # setuptools puts CPython's own flags first: they may be more, and none of ours may be missing.
    assert decisive(by_cmake) <= decisive(by_setup)
    ours = by_setup[by_setup.rindex("tiny.o") :]
    assert decisive(ours) <= decisive(by_cmake)
