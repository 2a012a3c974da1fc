"""Build of the optional native libraries; everything static stands in pyproject.toml.

Two libraries are built from csrc/, and the package works without either:

* ``introkernels/_cpu.so``: the C++ kernels;
* ``introkernels/_cuda.so``: the CUDA kernels. It needs no torch with CUDA to be built, only to be
  loaded.

They are plain libraries over PyTorch's stable ABI rather than Python modules, so that one wheel
serves every Python and every torch from 2.10 on.

``INTROKERNELS_CPP`` = ``auto`` (default) builds the first where possible and goes on without, with
a warning; ``1`` makes any failure an error; ``0`` doesn't try. ``INTROKERNELS_CUDA`` is the same
for the second, where ``auto`` asks for nvcc and for a torch with CUDA, and ``1`` for nvcc alone.

``TORCH_CUDA_ARCH_LIST`` says for which GPUs, in PyTorch's syntax; setup_cuda.py says for which
without it. ``MAX_JOBS`` limits the compilers that run at once, ``NVCC_THREADS`` is how many
architectures each nvcc compiles for at once, ``CUDA_HOME`` chooses the toolkit.

Each build writes ``introkernels/_build_status.json`` last: an object with the keys ``cpu`` and
``cuda``, each either ``"built"`` or the reason why that library is missing. Where one was built, it
also has what libraries are known by when they are loaded: ``version``, the package's, ``schemas``,
a digest of its operators' schemas, and ``sha256``, each library's own; and ``build``, how they were
built, for ``introkernels.build_info()``.
"""

from __future__ import annotations

import hashlib
import json
import os
import runpy
import shlex
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import setuptools

if int(setuptools.__version__.split(".")[0]) < 77:
    # Without build isolation nobody checks this, and an old one fails on pyproject.toml's license.
    raise SystemExit(
        f"introkernels needs setuptools>=77 to build, found {setuptools.__version__}: "
        "pip install --upgrade setuptools"
    )

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext as plain_build_ext

# A build backend runs this file without a look at the modules beside it.
sys.path.append(str(Path(__file__).resolve().parent))
import setup_cuda

try:
    import torch
    from torch.utils import cpp_extension
    from torch.utils.cpp_extension import BuildExtension

    TORCH_FAILURE = None
except Exception as failure:  # a broken torch raises anything, from OSError to RuntimeError
    torch = None
    BuildExtension = plain_build_ext
    TORCH_FAILURE = f"{type(failure).__name__}: {failure}"

ROOT = Path(__file__).resolve().parent
PACKAGE = "introkernels"
CPU = f"{PACKAGE}._cpu"
CUDA = f"{PACKAGE}._cuda"
STATUS_KEYS = {CPU: "cpu", CUDA: "cuda"}
BUILT = "built"
STATUS_FILE = "_build_status.json"

OLDEST_TORCH = (2, 10)
# Byte-wise hexadecimal: 0x0210… would be torch 2.16.
TORCH_TARGET_VERSION = f"0x{OLDEST_TORCH[0]:02x}{OLDEST_TORCH[1]:02x}000000000000"
CXX = shlex.split(os.environ.get("CXX", "c++"))
STANDARD = "-std=c++20"
# No -ffast-math (NaN and −inf carry meaning here), and no contraction to fused multiply-add other
# than where a kernel says so: the bits are not the compiler's choice. -fno-trapping-math, without
# which GCC vectorises no loop with a choice in it: nobody traps floating-point exceptions.
# -Wno-psabi, as vectors wider than the machine's registers are passed between inlined functions
# only.
CXX_FLAGS = [STANDARD, "-O3", *(ROOT / "csrc" / "flags.txt").read_text().split()]


def requested(switch: str) -> str:
    value = os.environ.get(switch, "auto")
    if value not in ("auto", "0", "1"):
        raise SystemExit(f"{switch} is {value!r}; allowed are 'auto', '0' and '1'")
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
    try:
        trial = subprocess.run(
            [*CXX, STANDARD, "-fsyntax-only", "-x", "c++", "-"],
            input="#include <version>\n",
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError as failure:
        return f"no C++ compiler at build time ({CXX[0]}: {failure.strerror})"
    if trial.returncode:
        message = (trial.stderr or trial.stdout).strip().splitlines()
        return (
            f"the C++ compiler {CXX[0]} could not compile an empty C++20 file at build time"
            f" ({message[0] if message else f'exit status {trial.returncode}'})"
        )
    return None


KERNELS = {CPU: "C++", CUDA: "CUDA"}
SWITCHES = {CPU: "INTROKERNELS_CPP", CUDA: "INTROKERNELS_CUDA"}
MODES = {library: requested(switch) for library, switch in SWITCHES.items()}
NVCC = None

# Why a library is not even tried.
OBSTACLES = {
    library: f"switched off by {SWITCHES[library]}=0 at build time"
    for library, mode in MODES.items()
    if mode == "0"
}
if len(OBSTACLES) < len(MODES) and (common := torch_obstacle() or compiler_obstacle()):
    OBSTACLES = dict.fromkeys(MODES, common) | OBSTACLES
if CUDA not in OBSTACLES:
    try:
        NVCC = setup_cuda.find_for(torch, also_without_cuda=MODES[CUDA] == "1")
    except setup_cuda.UnusableError as obstacle:
        OBSTACLES[CUDA] = str(obstacle)


def compiler_version() -> str:
    told = subprocess.run([*CXX, "--version"], capture_output=True, text=True, check=False).stdout
    return told.partition("\n")[0]


def use_installed_ninja() -> None:
    """Put pip's ninja on PATH: its folder is not there when a venv's Python runs unactivated."""
    try:
        import ninja
    except ImportError:
        return
    os.environ["PATH"] = os.pathsep.join((ninja.BIN_DIR, os.environ.get("PATH", "")))


def sources(pattern: str) -> list[str]:
    return sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob(pattern))


def headers(*folders: str) -> list[str]:
    return [header for folder in folders for header in sources(f"csrc/{folder}/**/*.h")]


def extensions() -> list[Extension]:
    makers = {CPU: cpu_library, CUDA: cuda_library}
    chosen = [make for library, make in makers.items() if library not in OBSTACLES]
    if chosen:
        use_installed_ninja()
    return [make() for make in chosen]


def kernel_flags() -> list[str]:
    """What both libraries of kernels give to the C++ compiler."""
    torch_include = cpp_extension.include_paths()[0]
    return [
        *CXX_FLAGS,
        f"-ffile-prefix-map={ROOT}=.",
        f"-ffile-prefix-map={torch_include}=torch",
        # A system include, so that -Wextra speaks of our sources only.
        f"-isystem{torch_include}",
    ]


def cpu_library() -> Extension:
    return Extension(
        CPU,
        sources("csrc/cpu/**/*.cpp"),
        include_dirs=[str(ROOT / "csrc")],  # absolute: ninja runs in another folder
        depends=headers("common", "cpu"),
        define_macros=[("TORCH_TARGET_VERSION", TORCH_TARGET_VERSION)],
        extra_compile_args=kernel_flags(),
        # No rpath: torch is imported first, and its library is found by its name.
        library_dirs=cpp_extension.library_paths(),
        libraries=["torch_cpu"],
        # Undefined symbols fail here, where they can be explained, instead of when loading.
        extra_link_args=["-Wl,-z,defs"] if sys.platform == "linux" else [],
        language="c++",
    )


def cuda_library() -> Extension:
    """The operators; `NativeBuild` adds the kernels to its sources."""
    cpp_extension.CUDA_HOME = NVCC.root
    digest = hashlib.sha256()
    of_kernels = headers("common", "cuda")
    for header in of_kernels:
        digest.update(Path(ROOT, header).read_bytes())
    return Extension(
        CUDA,
        sources("csrc/cuda/**/*.cpp"),
        include_dirs=[str(ROOT / "csrc")],
        depends=of_kernels,
        define_macros=[("TORCH_TARGET_VERSION", TORCH_TARGET_VERSION), ("USE_CUDA", None)],
        extra_compile_args={
            "cxx": [*kernel_flags(), *(f"-isystem{folder}" for folder in NVCC.include_dirs)],
            "nvcc": [
                *NVCC.flags,
                f"--threads={os.environ.get('NVCC_THREADS', '1')}",
                f"-Xcompiler=-ffile-prefix-map={ROOT}=.",
                # Without a torch for CUDA, PyTorch's builder does not look for the headers of a
                # kernel: another command for other headers has it compile anew.
                f"-DINTROKERNELS_HEADERS={digest.hexdigest()[:16]}",
            ],
        },
        library_dirs=[*cpp_extension.library_paths(), *NVCC.library_dirs],
        # CUDA's runtime within the library, so that whatever CUDA a torch brings is no matter.
        libraries=["torch_cpu", "cudart_static", "dl", "rt", "pthread"],
        # The stream and the device of a call come from a library that a torch without CUDA lacks:
        # they stay undefined until libtorch brings it.
        extra_link_args=["-Wl,--exclude-libs,ALL", "-Wl,--no-as-needed", "-ltorch"],
        language="c++",
    )


class NativeBuild(BuildExtension):
    """torch's builder, where each library may fail on its own, and a record of what happened."""

    def run(self) -> None:
        for library, switch in SWITCHES.items():
            reason = OBSTACLES.get(library)
            if reason and MODES[library] == "1":
                raise SystemExit(f"{switch}=1, but {reason}")
            # A machine without CUDA is complete without its kernels.
            if reason and MODES[library] == "auto" and (library == CPU or has_cuda()):
                warn(f"no {KERNELS[library]} kernels: {reason}")
        self.status = {
            key: OBSTACLES.get(library, "not built") for library, key in STATUS_KEYS.items()
        }
        folders = [Path(self.build_lib, PACKAGE)]
        if self.inplace:
            folders.append(ROOT / PACKAGE)
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
            for name in STATUS_KEYS:
                # What an earlier build left must not be taken for this one's.
                self.library(folder, name).unlink(missing_ok=True)
        super().run()
        for folder in folders:
            record = self.status | self.description(folder)
            (folder / STATUS_FILE).write_text(json.dumps(record, indent=2) + "\n")

    def description(self, folder: Path) -> dict[str, Any]:
        """What the libraries in a folder are known by, and how they were built."""
        digests = {
            key: hashlib.sha256(self.library(folder, name).read_bytes()).hexdigest()
            for name, key in STATUS_KEYS.items()
            if self.status[key] == BUILT
        }
        if not digests:
            return {}
        package = ROOT / PACKAGE
        return {
            "version": runpy.run_path(str(package / "_version.py"))["__version__"],
            "schemas": runpy.run_path(str(package / "ops/schema.py"))["digest"](),
            "sha256": digests,
            "build": {
                "compiler": compiler_version(),
                "flags": " ".join(CXX_FLAGS),
                "libraries": list(digests),
                "torch_built_with": str(torch.__version__),
                "torch_target_version": TORCH_TARGET_VERSION,
                "cuda_compiler": f"nvcc {NVCC.version}" if "cuda" in digests else "none",
                "cuda_architectures": NVCC.architectures if "cuda" in digests else [],
            },
        }

    def library(self, folder: Path, name: str) -> Path:
        return Path(folder, Path(self.get_ext_filename(name)).name)

    def build_extension(self, ext: Extension) -> None:
        key = STATUS_KEYS[ext.name]
        try:
            if ext.name == CUDA:
                self.add_kernels(ext)
            elif self.debug:
                # For the sanitizers, whose checks double the code: with -O3 it would compile three
                # times as long.
                ext.extra_compile_args += ["-O1", "-g1"]
            else:
                ext.extra_compile_args.append("-g0")
            super().build_extension(ext)
        except Exception as failure:  # a RuntimeError from ninja, a CompileError without it
            if MODES[ext.name] == "1":
                raise
            if isinstance(failure, setup_cuda.UnusableError):
                self.status[key] = str(failure)
            else:
                cause = failure if isinstance(failure, ImportError) else "compiling or linking"
                self.status[key] = f"its build failed ({cause}); pip install -v shows the messages"
            ext.optional = True
            warn(f"{ext.name} is missing: {self.status[key]}")
        else:
            self.status[key] = BUILT

    def add_kernels(self, ext: Extension) -> None:
        """Give the library of operators its kernels, if nvcc compiles any here.

        Not before: where PyTorch's builder sees CUDA sources at its start and does not like the
        compilers, it builds nothing at all.

        Raises:
            setup_cuda.UnusableError: it compiles none.
        """
        if reason := NVCC.obstacle():
            raise setup_cuda.UnusableError(reason)
        ext.sources = [*ext.sources, *sources("csrc/cuda/**/*.cu")]
        self.compiler.object_filenames = partial(object_filenames, self.compiler.object_filenames)
        if not self.debug:
            ext.extra_compile_args["cxx"].append("-g0")
            ext.extra_compile_args["nvcc"].append("-Xcompiler=-g0")

    def get_ext_filename(self, fullname: str) -> str:
        """Without Python's ABI in the name: the libraries are not Python modules."""
        return os.path.join(*fullname.split(".")) + ".so"

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


class Wheel(bdist_wheel):
    """A wheel for every Python 3, as its libraries are not Python modules."""

    def get_tag(self) -> tuple[str, str, str]:
        *_, platform = super().get_tag()
        return "py3", "none", platform


def object_filenames(
    usual: Callable[..., list[str]], source_filenames: list[str], *args: Any, **kwargs: Any
) -> list[str]:
    """The usual names, but for kernels: operators of the same name lie beside them."""
    return [
        f"{Path(name).with_suffix('')}_kernels.o" if source.endswith(".cu") else name
        for source, name in zip(
            source_filenames, usual(source_filenames, *args, **kwargs), strict=True
        )
    ]


def has_cuda() -> bool:
    return torch is not None and torch.version.cuda is not None


def warn(reason: str) -> None:
    warnings.warn(f"introkernels is built incompletely, {reason}", stacklevel=2)


setup(
    ext_modules=extensions(),
    cmdclass={"build": Build, "build_ext": NativeBuild, "bdist_wheel": Wheel},
)
