"""The build of the CUDA library, on a tiny kernel: switches, compilers, targets, stale files."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from building import (
    ROOT,
    STATUS_FILE,
    build_in_place,
    build_wheel,
    member_text,
    members,
    run,
    setup_py,
    write_tiny_kernel,
)

NEEDS_NVCC = pytest.mark.skipif(
    shutil.which("nvcc") is None and not Path("/usr/local/cuda/bin/nvcc").exists(),
    reason="needs nvcc",
)
LIBRARY = "introkernels/_cuda.so"
# What the tiny operators ask of a torch for CUDA.
STREAM = "aoti_torch_get_current_cuda_stream"

# An nvcc of any version and talent.
FAKE_NVCC = """#!/bin/sh
case "$*" in
  --version) echo "Cuda compilation tools, release {release}, V{version}" ;;
  *--dryrun*) echo "#$ TOP={home}" >&2 ;;
  *) echo "nvcc warning : of no importance"; echo "{complaint}" >&2; exit 1 ;;
esac
"""
# A torch that says it is another: a package ahead of the real one on the path.
OTHER_TORCH = """
import importlib.util, sys
from pathlib import Path
sys.path.remove({folder!r})
del sys.modules["torch"]
import torch
torch.version.{name} = {version!r}
sys.modules["torch"] = torch
"""


def fake_nvcc(
    home: Path, version: str = "13.0.88", complaint: str = "error: unsupported GNU version!"
) -> str:
    """The folder of a toolkit whose nvcc is a stand-in."""
    program = home / "bin/nvcc"
    program.parent.mkdir(parents=True)
    release = version.rpartition(".")[0]
    program.write_text(
        FAKE_NVCC.format(release=release, version=version, home=home, complaint=complaint)
    )
    program.chmod(0o755)
    return str(home)


def other_torch(folder: Path, name: str, version: str) -> str:
    """A path on which torch is built for something else: ``name`` is ``"cuda"`` or ``"hip"``."""
    folder.mkdir()
    (folder / "torch.py").write_text(
        OTHER_TORCH.format(folder=str(folder), name=name, version=version)
    )
    return str(folder)


def status_of(tree: Path) -> dict[str, str]:
    told: dict[str, str] = json.loads((tree / STATUS_FILE).read_text())
    return told


def only_cuda(tree: Path, **env: str) -> subprocess.CompletedProcess[str]:
    return build_in_place(tree, **({"INTROKERNELS_CPP": "0", "TORCH_CUDA_ARCH_LIST": "8.0"} | env))


def undefined_symbols(library: Path) -> list[str]:
    """What the loader would not find in the libraries of a torch without CUDA."""
    libraries = str(Path(torch.__file__).parent / "lib")
    report = run("ldd", "-r", library, cwd=ROOT, env={"LD_LIBRARY_PATH": libraries}).stdout
    return [line.split()[2] for line in report.splitlines() if "undefined symbol" in line]


@NEEDS_NVCC
@pytest.mark.slow
def test_builds_without_a_torch_for_cuda_and_needs_nothing_else(
    tiny_tree: Path, tmp_path: Path
) -> None:
    wheel = build_wheel(
        tiny_tree,
        tmp_path / "out",
        INTROKERNELS_CPP="0",
        INTROKERNELS_CUDA="1",
        TORCH_CUDA_ARCH_LIST="8.0;9.0a+PTX",
        NVCC_THREADS="2",
    )
    status = json.loads(member_text(wheel, STATUS_FILE))
    assert status["cuda"] == "built"
    assert status["build"]["libraries"] == ["cuda"]
    assert re.fullmatch(r"nvcc [\d.]+", status["build"]["cuda_compiler"])
    assert status["build"]["cuda_architectures"] == ["sm_80", "sm_90a", "compute_90a"]
    assert "INTROKERNELS_CPP=0" in status["cpu"]
    assert "introkernels/_cpu.so" not in members(wheel)
    with zipfile.ZipFile(wheel) as archive:
        library = Path(archive.extract(LIBRARY, tmp_path))

    assert set(undefined_symbols(library)) <= {STREAM}
    exported = run("nm", "--dynamic", "--defined-only", library, cwd=ROOT).stdout
    functions = {line.split()[-1] for line in exported.splitlines() if " T " in line}
    assert functions == {"tiny_number"}
    needed = run("readelf", "--dynamic", library, cwd=ROOT).stdout
    assert "[libtorch.so]" in needed
    assert "libcudart" not in needed
    assert str(tiny_tree).encode() not in library.read_bytes()


@pytest.mark.skipif(not (ROOT / LIBRARY).exists(), reason="needs the CUDA kernels, built in place")
def test_library_of_this_checkout_is_complete() -> None:
    """Nothing of it is undefined but what a torch for CUDA has, and it exports nothing."""
    unknown = undefined_symbols(ROOT / LIBRARY)
    assert [name for name in unknown if not re.fullmatch(r"aoti_torch_\w*cuda\w*", name)] == []
    exported = run("nm", "--dynamic", "--defined-only", ROOT / LIBRARY, cwd=ROOT).stdout
    assert [line for line in exported.splitlines() if " T " in line] == []


@NEEDS_NVCC
@pytest.mark.slow
def test_kernels_follow_their_headers(tiny_tree: Path) -> None:
    read = "import ctypes, sys, torch; print(ctypes.CDLL(sys.argv[1]).tiny_number())"
    for number in (1, 2):
        write_tiny_kernel(tiny_tree, number)
        # Without what a torch for CUDA alone has, the library can be loaded anywhere.
        (tiny_tree / "csrc/cuda/tiny.cpp").write_text("")
        result = only_cuda(tiny_tree, INTROKERNELS_CUDA="1")
        assert result.returncode == 0, result.stdout
        assert "registers" in result.stdout, "what ptxas says of each kernel is in the log"
        printed = run(sys.executable, "-c", read, tiny_tree / LIBRARY, cwd=Path("/")).stdout
        assert printed.split() == [str(number)]


@NEEDS_NVCC
@pytest.mark.slow
def test_kernel_that_does_not_compile(tiny_tree: Path, tmp_path: Path) -> None:
    (tiny_tree / "csrc/cuda/tiny.cu").write_text("__global__ void broken( {\n")
    assert only_cuda(tiny_tree, INTROKERNELS_CUDA="1").returncode != 0
    cuda = other_torch(tmp_path / "torch", "cuda", torch.version.cuda or "13.0")
    result = only_cuda(tiny_tree, INTROKERNELS_CUDA="auto", PYTHONPATH=cuda)
    assert result.returncode == 0, result.stdout
    assert "its build failed (compiling or linking)" in status_of(tiny_tree)["cuda"]
    assert not (tiny_tree / LIBRARY).exists()


@pytest.mark.skipif(torch.version.cuda is not None, reason="needs a torch without CUDA")
def test_auto_builds_nothing_that_this_torch_could_not_load(tiny_tree: Path) -> None:
    result = only_cuda(tiny_tree, INTROKERNELS_CUDA="auto")
    assert result.returncode == 0, result.stdout
    assert "built incompletely, no CUDA kernels" not in result.stdout
    assert status_of(tiny_tree)["cuda"] == (
        f"torch {torch.__version__} at build time has no CUDA (INTROKERNELS_CUDA=1 builds the "
        "kernels all the same)"
    )


def test_auto_without_nvcc_goes_on_and_says_so(tiny_tree: Path, tmp_path: Path) -> None:
    cuda = other_torch(tmp_path / "torch", "cuda", "13.0")
    result = only_cuda(
        tiny_tree, INTROKERNELS_CUDA="auto", PYTHONPATH=cuda, CUDA_HOME="/nonexistent"
    )
    assert result.returncode == 0, result.stdout
    reason = "CUDA_HOME was '/nonexistent' at build time, without a bin/nvcc"
    assert f"built incompletely, no CUDA kernels: {reason}" in result.stdout
    assert status_of(tiny_tree)["cuda"] == reason


REFUSALS: dict[str, tuple[dict[str, Any], dict[str, str], str]] = {
    "old": (
        {"version": "11.8.89"},
        {},
        "nvcc 11.8.89 at build time is older than 12.0, the first that knows C++20",
    ),
    "host compiler": (
        {},
        {},
        "could not compile a small kernel at build time (error: unsupported GNU version!)",
    ),
    "architectures": (
        {},
        {"TORCH_CUDA_ARCH_LIST": "8.0;Voodoo"},
        "PyTorch does not understand TORCH_CUDA_ARCH_LIST='8.0;Voodoo' at build time",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_compiler_that_will_not_do(case: str, tiny_tree: Path, tmp_path: Path) -> None:
    talents, env, reason = REFUSALS[case]
    home = fake_nvcc(tmp_path / "toolkit", **talents)
    cuda = other_torch(tmp_path / "torch", "cuda", f"{talents.get('version', '13.0.88')[:4]}")
    result = only_cuda(tiny_tree, INTROKERNELS_CUDA="auto", CUDA_HOME=home, PYTHONPATH=cuda, **env)
    assert result.returncode == 0, result.stdout
    assert reason in status_of(tiny_tree)["cuda"]
    result = only_cuda(tiny_tree, INTROKERNELS_CUDA="1", CUDA_HOME=home, **env)
    assert result.returncode != 0
    assert reason in result.stdout


def test_compiler_of_another_cuda_than_torch(tiny_tree: Path, tmp_path: Path) -> None:
    home = fake_nvcc(tmp_path / "toolkit", "13.0.88")
    cuda = other_torch(tmp_path / "torch", "cuda", "12.8")
    result = only_cuda(tiny_tree, INTROKERNELS_CUDA="1", CUDA_HOME=home, PYTHONPATH=cuda)
    assert result.returncode != 0
    assert "nvcc 13.0.88 at build time does not fit torch " in result.stdout
    assert "which is built for CUDA 12.8; CUDA_HOME chooses another nvcc" in result.stdout


def test_torch_for_amd(tiny_tree: Path, tmp_path: Path) -> None:
    rocm = other_torch(tmp_path / "torch", "hip", "7.0")
    result = only_cuda(tiny_tree, INTROKERNELS_CUDA="auto", PYTHONPATH=rocm)
    assert result.returncode == 0, result.stdout
    assert status_of(tiny_tree)["cuda"].endswith("at build time is for AMD's GPUs")


def test_wanted_without_nvcc_is_an_error(tiny_tree: Path) -> None:
    result = setup_py(tiny_tree, "bdist_wheel", INTROKERNELS_CUDA="1", CUDA_HOME="/nonexistent")
    assert result.returncode != 0
    assert (
        "INTROKERNELS_CUDA=1, but CUDA_HOME was '/nonexistent' at build time, without a bin/nvcc"
    ) in result.stdout


def test_unknown_value_of_the_switch(tiny_tree: Path) -> None:
    result = setup_py(tiny_tree, "bdist_wheel", INTROKERNELS_CUDA="yes")
    assert result.returncode != 0
    assert "INTROKERNELS_CUDA is 'yes'; allowed are 'auto', '0' and '1'" in result.stdout


@NEEDS_NVCC
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("cmake") is None, reason="needs cmake")
def test_cmake_compiles_kernels_with_the_flags_of_setup(tiny_tree: Path, tmp_path: Path) -> None:
    write_tiny_kernel(tiny_tree, number=4)  # so that both really compile
    shutil.copy(ROOT / "CMakeLists.txt", tiny_tree)
    folder = tmp_path / "cmake"
    options = (
        *(f"-DPython_EXECUTABLE={sys.executable}", "-DINTROKERNELS_CUDA=ON"),
        "-DCMAKE_CUDA_ARCHITECTURES=80-real",
    )
    for step in (
        ("-S", tiny_tree, "-B", folder, *options),
        ("--build", folder, "--target", "introkernels_cuda"),
    ):
        result = run("cmake", *step, cwd=tmp_path)
        assert result.returncode == 0, result.stdout
    assert set(undefined_symbols(folder / "_cuda.so")) <= {STREAM}

    commands = json.loads((folder / "compile_commands.json").read_text())
    (by_cmake,) = (item["command"] for item in commands if item["file"].endswith("tiny.cu"))
    log = only_cuda(tiny_tree, INTROKERNELS_CUDA="1").stdout.splitlines()
    (by_setup,) = (line for line in log if " -c " in line and "tiny.cu " in line)

    def decisive(command: str) -> set[str]:
        kinds = ("-O", "-std", "-D", "--expt", "-Xptxas", "-W")
        # What each says in one word, the other may say in two or several.
        words = command.replace("-Xcompiler=", " ").replace(",", " ")
        flags = {flag for flag in shlex.split(words) if flag.startswith(kinds)}
        ours = ("TORCH_API_INCLUDE", "TORCH_EXTENSION", "INTROKERNELS_HEADERS", "_EXPORTS")
        return {flag for flag in flags if not any(name in flag for name in ours)}

    assert decisive(by_cmake) == decisive(by_setup)
