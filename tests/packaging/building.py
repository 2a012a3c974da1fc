"""What the packaging tests share: copies of the source tree, wheels, and clean environments."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
STATUS_FILE = "introkernels/_build_status.json"
# What a build says of CUDA that no test asked for.
NO_CUDA = "switched off by INTROKERNELS_CUDA=0 at build time"
# What a source distribution is made of; a copy of a checkout must not bring its builds along.
SOURCES = (
    *("setup.py", "setup_cuda.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md"),
    *("introkernels", "csrc"),
)
TINY_KERNEL = """
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include "common/number.h"

int64_t number(torch::stable::Tensor) { return kNumber; }

STABLE_TORCH_LIBRARY(introkernels_tiny, m) { m.def("number(Tensor like) -> int"); }
STABLE_TORCH_LIBRARY_IMPL(introkernels_tiny, CPU, m) { m.impl("number", TORCH_BOX(&number)); }
"""

# The same number out of a kernel's file: what can be asked without a GPU.
TINY_CUDA_KERNEL = """
#include "common/number.h"

__global__ void tiny_kernel(int64_t* out) { *out = kNumber; }

extern "C" __attribute__((visibility("default"))) int64_t tiny_number() {
  int64_t* out = nullptr;
  tiny_kernel<<<1, 1>>>(out);
  return kNumber;
}
"""
TINY_CUDA_OPERATORS = """
#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

// As the operators do: a function that a torch without CUDA lacks.
void* current_stream() {
  void* stream = nullptr;
  aoti_torch_get_current_cuda_stream(0, &stream);
  return stream;
}
"""


def copy_sources(folder: Path) -> Path:
    """The files of this project that a build reads, without anything built."""
    built = shutil.ignore_patterns("*.so", Path(STATUS_FILE).name, "__pycache__")
    folder.mkdir(parents=True)
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=built)
        else:
            shutil.copy(ROOT / name, folder / name)
    return folder


def with_tiny_kernel(folder: Path) -> Path:
    """A copy of the sources whose C++ is one file of a few lines: the same build in seconds."""
    copy_sources(folder)
    for name in ("cpu", "cuda", "common"):
        shutil.rmtree(folder / "csrc" / name)
        (folder / "csrc" / name).mkdir()
    return folder


def write_tiny_kernel(folder: Path, number: int = 1) -> None:
    """Write the tiny kernel that returns this number; files that hold it already stay untouched."""
    texts = {
        "csrc/cpu/tiny.cpp": TINY_KERNEL,
        "csrc/cuda/tiny.cpp": TINY_CUDA_OPERATORS,
        "csrc/cuda/tiny.cu": TINY_CUDA_KERNEL,
        "csrc/common/number.h": (
            f"#pragma once\n#include <cstdint>\ninline constexpr int64_t kNumber = {number};\n"
        ),
    }
    for name, text in texts.items():
        file = folder / name
        if not file.exists() or file.read_text() != text:
            file.write_text(text)


def environment(**changes: str) -> dict[str, str]:
    """This process's environment without what would point a build or an import elsewhere.

    CUDA kernels take minutes: the tests that are about them ask for them.
    """
    ours = (
        *("PYTHONPATH", "INTROKERNELS_CPP", "INTROKERNELS_CUDA", "TORCH_CUDA_ARCH_LIST"),
        *("CUDA_HOME", "CUDA_PATH", "CXX", "CC", "CXXFLAGS", "CFLAGS", "LDFLAGS"),
    )
    kept = {key: text for key, text in os.environ.items() if key not in ours}
    return kept | {"INTROKERNELS_CUDA": "0"} | changes


def run(
    *command: str | Path, cwd: Path, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=env or environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )


def setup_py(tree: Path, *command: str | Path, **env: str) -> subprocess.CompletedProcess[str]:
    return run(sys.executable, "setup.py", *command, cwd=tree, env=environment(**env))


def build_in_place(tree: Path, **env: str) -> subprocess.CompletedProcess[str]:
    return setup_py(tree, "build_ext", "--inplace", **env)


def build_wheel(tree: Path, out: Path, **env: str) -> Path:
    """A wheel straight from the build backend: twice as fast as through pip, and the same."""
    return _only_wheel(setup_py(tree, "bdist_wheel", "--dist-dir", out, **env), out)


def build_wheel_with_pip(tree: Path, out: Path, **env: str) -> Path:
    result = run(
        *(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"),
        *("--wheel-dir", out, tree),
        cwd=tree,
        env=environment(**env),
    )
    return _only_wheel(result, out)


def _only_wheel(result: subprocess.CompletedProcess[str], out: Path) -> Path:
    assert result.returncode == 0, result.stdout
    (wheel,) = out.glob("*.whl")
    return wheel


def members(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def member_text(wheel: Path, name: str) -> str:
    with zipfile.ZipFile(wheel) as archive:
        return archive.read(name).decode()


@dataclass(frozen=True)
class CleanEnvironment:
    """A virtual environment that holds one installed wheel and sees this one's dependencies."""

    folder: Path

    @property
    def python(self) -> Path:
        return self.folder / "bin/python"

    @property
    def command(self) -> Path:
        return self.folder / "bin/introkernels"

    @classmethod
    def with_wheel(cls, folder: Path, wheel: Path) -> CleanEnvironment:
        venv.create(folder, with_pip=False)
        clean = cls(folder)
        # The wheel goes in before the dependencies come in sight: pip must not meet an
        # introkernels that is installed beside them.
        result = run(
            *(sys.executable, "-m", "pip", "--python", clean.python, "install", "--no-deps", wheel),
            cwd=folder,
        )
        assert result.returncode == 0, result.stdout
        clean.see_dependencies()
        return clean

    def see_dependencies(self) -> None:
        """Put the folder that torch was imported from at the end of this environment's path.

        Only its packages are seen: the .pth files in it, an editable install's among them, are not.
        """
        (site,) = self.folder.glob("lib/python*/site-packages")
        (site / "dependencies.pth").write_text(f"{Path(torch.__file__).parents[1]}\n")

    def run_python(self, code: str) -> str:
        """What the code prints, run in a folder that has no introkernels in it."""
        result = run(self.python, "-c", code, cwd=self.folder)
        assert result.returncode == 0, result.stdout
        return result.stdout.strip()
