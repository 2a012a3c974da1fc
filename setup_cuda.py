"""What the build knows of nvcc: where it is, what it brings, and how it compiles csrc/cuda.

setup.py builds the library with it, and tests/compile_cuda_kernels.py checks what it makes of each
kernel.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

# The first that knows C++20.
OLDEST = (12, 0)
# The first that compiles for 10.0, Blackwell.
FIRST_WITH_BLACKWELL = (12, 8)
# Kernels for A100, H100 and B200, and PTX that the driver compiles for whatever comes after them.
# 9.0a is for H100 alone; code for 8.0 serves all GPUs of 8.x.
ARCHITECTURES = "8.0;9.0a;10.0+PTX"
ARCHITECTURES_BEFORE_BLACKWELL = "8.0+PTX;9.0a"

# What the C++ compiler gets that nvcc calls, as for other files.
HOST_FLAGS = Path(__file__).with_name("csrc").joinpath("flags.txt").read_text().split()
FLAGS = (
    "-std=c++20",
    "-O3",
    # As in C++: a failing assertion would have to be handled by every kernel.
    "-DNDEBUG",
    # PyTorch's builder sets these: conversions of half types are written out.
    "-D__CUDA_NO_HALF_OPERATORS__",
    "-D__CUDA_NO_HALF_CONVERSIONS__",
    "-D__CUDA_NO_BFLOAT16_CONVERSIONS__",
    "-D__CUDA_NO_HALF2_OPERATORS__",
    "--expt-relaxed-constexpr",
    # Registers, stack and spilled bytes of every kernel, for the log of the build.
    "-Xptxas=-v",
    f"-Xcompiler={','.join(('-fPIC', *HOST_FLAGS))}",
)

# All that the kernels ask of a toolkit, in two lines.
TRIAL = """
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <concepts>

template <std::integral T>
__global__ void trial(T* out) { *out = T(threadIdx.x); }
template __global__ void trial(int*);
"""


class UnusableError(Exception):
    """The reason why no CUDA code can be compiled here."""


@dataclass(frozen=True)
class Nvcc:
    """A CUDA compiler.

    Attributes:
        program: what is run.
        version: ``"13.0.88"``.
        root: folder of the toolkit that it belongs to, which holds ``bin/nvcc``.
        include_dirs: the folders of the toolkit's headers.
        library_dirs: the folders of its libraries.
        targets: the flags that name the GPUs to compile for; nvcc's own choice without.
    """

    program: str
    version: str
    root: str
    include_dirs: tuple[str, ...]
    library_dirs: tuple[str, ...]
    targets: tuple[str, ...] = ()

    @property
    def flags(self) -> list[str]:
        """All flags of a kernel, but for the folders of headers."""
        return [*FLAGS, *host_compiler(), *self.targets]

    @property
    def architectures(self) -> list[str]:
        """What it makes code for: ``["sm_80", "sm_90a", "sm_100", "compute_100"]``."""
        return [flag.rpartition("code=")[2] for flag in self.targets]

    def obstacle(self) -> str | None:
        """Why a small kernel can't be compiled, or None."""
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "trial.cu").write_text(TRIAL)
            trial = _output([self.program, *self.flags, "-c", "trial.cu"], cwd=folder)
        if not trial.returncode:
            return None
        lines = [line.strip() for line in trial.stdout.splitlines() if line.strip()]
        errors = [line for line in lines if re.search(r"\b(error|fatal)\b", line)]
        told = next(iter(errors or lines), f"exit status {trial.returncode}")
        return f"nvcc {self.version} could not compile a small kernel at build time ({told})"


def find() -> Nvcc:
    """The nvcc of ``CUDA_HOME`` or ``CUDA_PATH``, else the one on PATH or in /usr/local/cuda.

    Raises:
        UnusableError: there is none, or it is too old or broken.
    """
    program = _program()
    version = _version(program)
    if _release(version) < OLDEST:
        raise UnusableError(
            f"nvcc {version} at build time is older than {'.'.join(map(str, OLDEST))}, the first "
            "that knows C++20"
        )
    # It may be a script that calls another; what it would call knows where its toolkit is.
    told = _output([program, "--dryrun", "-x", "cu", "-c", os.devnull, "-o", os.devnull]).stdout
    settings = dict(re.findall(r"^#\$ (TOP|INCLUDES|LIBRARIES)=(.*)$", told, re.MULTILINE))
    if "TOP" not in settings:
        raise UnusableError(f"{program} --dryrun does not tell where its toolkit is at build time")
    return Nvcc(
        program,
        version,
        root=os.path.realpath(settings["TOP"].strip()),
        include_dirs=_folders(settings.get("INCLUDES", ""), "-I"),
        library_dirs=_folders(settings.get("LIBRARIES", ""), "-L"),
    )


def find_for(torch: Any, also_without_cuda: bool = False) -> Nvcc:
    """The nvcc that builds for a torch, with its targets.

    Args:
        torch: the module, imported.
        also_without_cuda: whether a torch that has no CUDA at all will do.

    Raises:
        UnusableError: there is none, or none that fits.
    """
    its_cuda: str | None = torch.version.cuda
    if torch.version.hip is not None:
        raise UnusableError(f"torch {torch.__version__} at build time is for AMD's GPUs")
    if its_cuda is None and not also_without_cuda:
        # A library that this torch can't load is worth its minutes only where it is asked for.
        raise UnusableError(
            f"torch {torch.__version__} at build time has no CUDA (INTROKERNELS_CUDA=1 builds the "
            "kernels all the same)"
        )
    nvcc = find()
    release = _release(nvcc.version)
    if its_cuda is not None and _release(its_cuda)[0] != release[0]:
        raise UnusableError(
            f"nvcc {nvcc.version} at build time does not fit torch {torch.__version__}, which is "
            f"built for CUDA {its_cuda}; CUDA_HOME chooses another nvcc"
        )
    return replace(nvcc, targets=_targets(release))


def host_compiler() -> list[str]:
    """nvcc's flag for the C++ compiler that it calls, where the environment names one."""
    named = (os.environ.get(variable, "") for variable in ("NVCC_CCBIN", "CXX", "CC"))
    words = shlex.split(next(filter(None, named), ""))
    # The last word: what stands before a compiler is a wrapper such as ccache.
    return [f"-ccbin={words[-1]}"] if words else []


def _program() -> str:
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if home := os.environ.get(variable):
            program = Path(home, "bin/nvcc")
            if not program.exists():
                raise UnusableError(f"{variable} was {home!r} at build time, without a bin/nvcc")
            return str(program)
    usual = Path("/usr/local/cuda/bin/nvcc")
    program_on_path = shutil.which("nvcc") or (str(usual) if usual.exists() else None)
    if program_on_path is None:
        raise UnusableError(
            "no CUDA compiler at build time (nvcc is not on PATH, in CUDA_HOME or in "
            "/usr/local/cuda)"
        )
    return program_on_path


def _version(program: str) -> str:
    found = re.search(r"release [\d.]+, V([\d.]+)", _output([program, "--version"]).stdout)
    if found is None:
        raise UnusableError(f"{program} does not tell its version at build time")
    return found[1]


def _release(version: str) -> tuple[int, ...]:
    """The first two numbers of a version."""
    return tuple(int(number) for number in version.split(".")[:2])


def _targets(release: tuple[int, ...]) -> tuple[str, ...]:
    """Flags for ``TORCH_CUDA_ARCH_LIST``, or for the default where that is not set.

    Raises:
        UnusableError: PyTorch does not understand the list.
    """
    from torch.utils import cpp_extension

    usual = ARCHITECTURES if release >= FIRST_WITH_BLACKWELL else ARCHITECTURES_BEFORE_BLACKWELL
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST") or usual
    # PyTorch's own reading of its syntax, which it takes from the environment alone.
    os.environ["TORCH_CUDA_ARCH_LIST"] = listed
    try:
        flags = cpp_extension._get_cuda_arch_flags()
    except (ValueError, IndexError, RuntimeError) as failure:
        raise UnusableError(
            f"PyTorch does not understand TORCH_CUDA_ARCH_LIST={listed!r} at build time ({failure})"
        ) from failure

    def by_age(flag: str) -> tuple[int, bool]:
        return int(re.findall(r"\d+", flag)[-1]), "code=compute" in flag

    return tuple(sorted(flags, key=by_age))


def _folders(flags: str, kind: str) -> tuple[str, ...]:
    return tuple(
        os.path.realpath(flag.removeprefix(kind))
        for flag in shlex.split(flags)
        if flag.startswith(kind)
    )


def _output(command: Sequence[str], cwd: str | None = None) -> subprocess.CompletedProcess[str]:
    """A finished process, with all that it printed in ``stdout``."""
    try:
        return subprocess.run(
            command,
            cwd=cwd,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
    except OSError as failure:
        raise UnusableError(
            f"{command[0]} can't be run at build time ({failure.strerror})"
        ) from failure
