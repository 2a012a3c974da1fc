"""Build of the optional native libraries; everything static stands in pyproject.toml.

Two libraries are built from csrc/, and the package works without either:

* ``introkernels/_cpu.so``: the C++ kernels, a plain library over PyTorch's stable ABI, so that one
  binary serves every Python and every torch from 2.10 on;
* ``introkernels/_C.<python abi>.so``: what was built and how, for ``introkernels.build_info()``.

``INTROKERNELS_CPP`` = ``auto`` (default) builds them where possible and goes on without, with a
warning; ``1`` makes any failure an error; ``0`` doesn't try. ``MAX_JOBS`` limits the compilers that
run at once.

Each build writes ``introkernels/_build_status.json``: an object with the keys ``cpu`` and
``build_info``, each either ``"built"`` or the reason why that library is missing.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import setuptools

if int(setuptools.__version__.split(".")[0]) < 77:
    # Without build isolation nobody checks this, and an old one fails on pyproject.toml's license.
    raise SystemExit(
        f"introkernels needs setuptools>=77 to build, found {setuptools.__version__}: "
        "pip install --upgrade setuptools"
    )

from setuptools import Extension, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext as plain_build_ext

try:
    import torch
    from torch.utils.cpp_extension import BuildExtension

    TORCH_FAILURE = None
except Exception as failure:  # a broken torch raises anything, from OSError to RuntimeError
    torch = None
    BuildExtension = plain_build_ext
    TORCH_FAILURE = f"{type(failure).__name__}: {failure}"

ROOT = Path(__file__).resolve().parent
PACKAGE = "introkernels"
CPU = f"{PACKAGE}._cpu"
BUILD_INFO = f"{PACKAGE}._C"
STATUS_KEYS = {CPU: "cpu", BUILD_INFO: "build_info"}
BUILT = "built"
STATUS_FILE = "_build_status.json"

OLDEST_TORCH = (2, 10)
# Byte-wise hexadecimal: 0x0210… would be torch 2.16.
TORCH_TARGET_VERSION = f"0x{OLDEST_TORCH[0]:02x}{OLDEST_TORCH[1]:02x}000000000000"
STANDARD = "-std=c++20"
# No -ffast-math (NaN and −inf carry meaning here), and no contraction to fused multiply-add, so
# that the same inputs give the same bits whichever instruction set a kernel is compiled for.
CXX_FLAGS = [
    STANDARD,
    "-O3",
    "-fno-math-errno",
    "-ffp-contract=off",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
]


def requested() -> str:
    value = os.environ.get("INTROKERNELS_CPP", "auto")
    if value not in ("auto", "0", "1"):
        raise SystemExit(f"INTROKERNELS_CPP is {value!r}; allowed are 'auto', '0' and '1'")
    return value


def torch_obstacle() -> str | None:
    if torch is None:
        return (
            f"the Python that built introkernels could not import torch ({TORCH_FAILURE}); "
            "install torch first and use pip install --no-build-isolation"
        )
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < OLDEST_TORCH:
        return f"torch {torch.__version__} at build time is older than 2.10"
    return None


def compiler_obstacle() -> str | None:
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    try:
        trial = subprocess.run(
            [*compiler, STANDARD, "-fsyntax-only", "-x", "c++", "-"],
            input="#include <version>\n",
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError as failure:
        return f"no C++ compiler at build time ({compiler[0]}: {failure.strerror})"
    if trial.returncode:
        message = (trial.stderr or trial.stdout).strip().splitlines()
        return (
            f"the C++ compiler {compiler[0]} could not compile an empty C++20 file at build time"
            f" ({message[0] if message else f'exit status {trial.returncode}'})"
        )
    return None


MODE = requested()
OBSTACLE = (
    "switched off by INTROKERNELS_CPP=0 at build time"
    if MODE == "0"
    else torch_obstacle() or compiler_obstacle()
)


def use_installed_ninja() -> None:
    """Put pip's ninja on PATH: its folder is not there when a venv's Python runs unactivated."""
    try:
        import ninja
    except ImportError:
        return
    os.environ["PATH"] = os.pathsep.join((ninja.BIN_DIR, os.environ.get("PATH", "")))


def extensions() -> list[Extension]:
    if OBSTACLE:
        return []
    use_installed_ninja()
    from torch.utils import cpp_extension

    headers = sorted(
        path.relative_to(ROOT).as_posix()
        for pattern in ("*.h", "*.hpp")
        for path in (ROOT / "csrc").rglob(pattern)
    )
    torch_include = cpp_extension.include_paths()[0]
    cpu = Extension(
        CPU,
        sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc/cpu").glob("*.cpp")),
        include_dirs=[str(ROOT / "csrc")],  # absolute: ninja runs in another folder
        depends=headers,
        define_macros=[("TORCH_TARGET_VERSION", TORCH_TARGET_VERSION)],
        extra_compile_args=[
            *CXX_FLAGS,
            f"-ffile-prefix-map={ROOT}=.",
            f"-ffile-prefix-map={torch_include}=torch",
            # A system include, so that -Wextra speaks of our sources only.
            f"-isystem{torch_include}",
        ],
        # No rpath: torch is imported first, and its library is found by its name.
        library_dirs=cpp_extension.library_paths(),
        libraries=["torch_cpu"],
        # Undefined symbols fail here, where they can be explained, instead of when loading.
        extra_link_args=["-Wl,-z,defs"] if sys.platform == "linux" else [],
        language="c++",
    )
    build_info = Extension(
        BUILD_INFO,
        ["csrc/build_info.cpp"],
        extra_compile_args=[*CXX_FLAGS, f"-ffile-prefix-map={ROOT}=."],
        language="c++",
    )
    return [cpu, build_info]


class NativeBuild(BuildExtension):
    """torch's builder, where each library may fail on its own, and a record of what happened."""

    def run(self) -> None:
        if OBSTACLE:
            if MODE == "1":
                raise SystemExit(f"INTROKERNELS_CPP=1, but {OBSTACLE}")
            if MODE == "auto":
                warn(f"no C++ kernels: {OBSTACLE}")
        self.status = dict.fromkeys(STATUS_KEYS.values(), OBSTACLE or "not built")
        folders = [Path(self.build_lib, PACKAGE)]
        if self.inplace:
            folders.append(ROOT / PACKAGE)
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
            for name in STATUS_KEYS:
                # What an earlier build left must not be taken for this one's.
                Path(folder, Path(self.get_ext_filename(name)).name).unlink(missing_ok=True)
        super().run()
        for folder in folders:
            (folder / STATUS_FILE).write_text(json.dumps(self.status, indent=2) + "\n")

    def build_extension(self, ext: Extension) -> None:
        key = STATUS_KEYS[ext.name]
        try:
            if ext.name == BUILD_INFO:
                self.describe_build(ext)
            if not self.debug:
                ext.extra_compile_args.append("-g0")
            super().build_extension(ext)
        except Exception as failure:  # a RuntimeError from ninja, a CompileError without it
            if MODE == "1":
                raise
            cause = failure if isinstance(failure, ImportError) else "compiling or linking"
            self.status[key] = f"its build failed ({cause}); pip install -v shows the messages"
            ext.optional = True
            warn(f"{ext.name} is missing: {self.status[key]}")
        else:
            self.status[key] = BUILT

    def describe_build(self, ext: Extension) -> None:
        import pybind11

        ext.include_dirs.append(pybind11.get_include())
        libraries = [
            key for key, state in self.status.items() if key != "build_info" and state == BUILT
        ]
        texts = {
            "FLAGS": " ".join(CXX_FLAGS),
            "TORCH_VERSION": torch.__version__,
            "TORCH_TARGET_VERSION": TORCH_TARGET_VERSION,
            "LIBRARIES": " ".join(libraries),
        }
        ext.define_macros += [
            (f"INTROKERNELS_{name}", json.dumps(text)) for name, text in texts.items()
        ]

    def get_ext_filename(self, fullname: str) -> str:
        if fullname in (CPU, CPU.rpartition(".")[2]):
            # Not a Python module: no Python ABI in its name.
            return os.path.join(*fullname.split(".")) + ".so"
        return super().get_ext_filename(fullname)

    def get_outputs(self) -> list[str]:
        built = [path for path in super().get_outputs() if Path(path).exists()]
        return [*built, str(Path(self.build_lib, PACKAGE, STATUS_FILE))]

    def get_output_mapping(self) -> dict[str, str]:
        mapping = {
            built: source
            for built, source in super().get_output_mapping().items()
            if Path(built).exists()
        }
        if self.inplace:
            mapping[str(Path(self.build_lib, PACKAGE, STATUS_FILE))] = str(
                ROOT / PACKAGE / STATUS_FILE
            )
        return mapping


class Build(build):
    """A build that starts from an empty package folder and always records its status."""

    sub_commands = [  # noqa: RUF012 (setuptools' own declaration)
        (name, None if name == "build_ext" else predicate) for name, predicate in build.sub_commands
    ]

    def run(self) -> None:
        # A module or library that an earlier build left here would be packaged again.
        if Path(self.build_lib).resolve() != ROOT:
            shutil.rmtree(Path(self.build_lib, PACKAGE), ignore_errors=True)
        super().run()


def warn(reason: str) -> None:
    warnings.warn(f"introkernels is built incompletely, {reason}", stacklevel=2)


setup(ext_modules=extensions(), cmdclass={"build": Build, "build_ext": NativeBuild})
