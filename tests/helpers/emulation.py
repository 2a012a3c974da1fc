"""Libraries of CUDA sources that run on the CPU, under csrc/emulation."""

from __future__ import annotations

import fcntl
import functools
import os
import re
import shlex
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path

import ninja
from torch.utils import cpp_extension

ROOT = Path(__file__).resolve().parents[2]
EMULATION = ROOT / "csrc" / "emulation"
ORDER_VARIABLE = "INTROKERNELS_EMULATION_ORDER"
ORDERS = ("ascending", "descending", "shuffled")

# Whether libraries are built with the sanitizers, as tests/run_sanitized.py asks for.
SANITIZED = bool(os.environ.get("INTROKERNELS_EMULATION_SANITIZED"))

_JOBS = 2
_FLAGS = (
    *("-std=c++20", "-O2", "-g1", "-fPIC", *(ROOT / "csrc" / "flags.txt").read_text().split()),
    # nvcc's `#pragma unroll`.
    "-Wno-unknown-pragmas",
    # Kernels load and store numbers of any type as vectors of integers.
    "-fno-strict-aliasing",
    # Its headers stand before those of CUDA, if there are any.
    *("-DINTROKERNELS_EMULATION", "-Icsrc/emulation", "-Icsrc"),
)
# What torch's headers ask for: the stable ABI of torch 2.10, as in setup.py.
TORCH_FLAGS = (
    "-DTORCH_TARGET_VERSION=0x020a000000000000",
    *(f"-isystem{folder}" for folder in cpp_extension.include_paths()),
)
_TORCH_LINK_FLAGS = (
    *(f"-L{folder}" for folder in cpp_extension.library_paths()),
    *("-ltorch_cpu", "-Wl,-z,defs"),
)
_SANITIZED_FLAGS = (*(ROOT / "csrc" / "sanitizers.txt").read_text().split(), "-O1", "-g")


def build(name: str, sources: Iterable[Path], *, torch_library: bool = False) -> Path:
    """The library of the sources and of the emulation, compiled again only where they changed.

    Args:
        name: of the library, and of its folder in build/emulation.
        sources: ``.cu`` and ``.cpp`` files of this repository.
        torch_library: whether they use PyTorch's stable ABI.

    Raises:
        RuntimeError: a file does not compile; the message has the compiler's.
    """
    rules = _Rules(name, torch_library)
    library = rules.folder / f"{name}.so"
    rules.link(library, [rules.compile(source) for source in _with_emulation(sources)])
    rules.follow()
    return library


def build_variants(
    name: str,
    sources: Iterable[Path],
    variants: Mapping[str, tuple[Path, str]],
    *,
    torch_library: bool = False,
) -> dict[str, Path]:
    """Libraries of the same sources, in each of which one file reads otherwise.

    Only what includes that file is compiled for a library of its own, quickly rather than to run
    quickly.

    Args:
        name: of the folder in build/emulation.
        sources: ``.cu`` and ``.cpp`` files of this repository.
        variants: by the names of the libraries, a file of csrc, and the text in its place.
        torch_library: whether they use PyTorch's stable ABI.

    Raises:
        RuntimeError: a file does not compile; the message has the compiler's.
    """
    rules = _Rules(name, torch_library, "-O0")
    sources = _with_emulation(sources)
    libraries = {}
    for variant, (file, text) in variants.items():
        folder = rules.folder / variant
        instead = folder / file.relative_to(ROOT)
        _write_if_other(instead, text)
        objects = []
        for source in sources:
            if source == file:
                objects.append(rules.compile(instead))
            elif file in _included_by(source):
                objects.append(rules.compile(source, folder))
            else:
                objects.append(rules.compile(source))
        libraries[variant] = folder / f"{name}.so"
        rules.link(libraries[variant], objects)
    rules.follow()
    return libraries


def _with_emulation(sources: Iterable[Path]) -> list[Path]:
    return [*sorted(EMULATION.glob("*.cpp")), *sources]


@functools.cache
def _included_by(source: Path) -> frozenset[Path]:
    """Files of csrc that a file of csrc includes, and those that these include."""
    direct = {
        ROOT / "csrc" / name
        for name in re.findall(r'^#include "(.+)"', source.read_text(), flags=re.MULTILINE)
    }
    found = {file for file in direct if file.exists()}
    return frozenset(found.union(*(_included_by(file) for file in found)))


def _write_if_other(file: Path, text: str) -> None:
    """Leaves a file alone that has the text, so that nothing is made of it again."""
    if file.exists() and file.read_text() == text:
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


class _Rules:
    """Ninja's rules; paths are those of the repository, which reports then show."""

    def __init__(self, name: str, torch_library: bool, *more_flags: str) -> None:
        self.name = name
        self.folder = ROOT / "build" / ("emulation-sanitized" if SANITIZED else "emulation") / name
        compiler = os.environ.get("CXX", "c++")
        sanitizers = _SANITIZED_FLAGS if SANITIZED else ()
        flags = shlex.join(
            (*_FLAGS, *(TORCH_FLAGS if torch_library else ()), *sanitizers, *more_flags)
        )
        link_flags = (*sanitizers, *(_TORCH_LINK_FLAGS if torch_library else ()))
        self._lines = [
            f"builddir = {self.folder.relative_to(ROOT)}",
            "rule compile",
            f"  command = {compiler} {flags} $own_flags -MMD -MF $out.d -c -x c++ $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule link",
            f"  command = {compiler} -shared $in -o $out {shlex.join(link_flags)}",
        ]
        self._objects: set[str] = set()

    def compile(self, source: Path, own: Path | None = None) -> str:
        """The object of a source, for which headers below ``own`` stand before the others."""
        place = source.relative_to(self.folder if source.is_relative_to(self.folder) else ROOT)
        target = f"{(own or self.folder).relative_to(ROOT) / place}.o"
        if target not in self._objects:
            self._objects.add(target)
            self._lines.append(f"build {target}: compile {source.relative_to(ROOT)}")
            if own is not None:
                self._lines.append(f"  own_flags = -iquote {own.relative_to(ROOT) / 'csrc'}")
        return target

    def link(self, library: Path, objects: Iterable[str]) -> None:
        self._lines.append(f"build {library.relative_to(ROOT)}: link {' '.join(objects)}")

    def follow(self) -> None:
        """Have everything made that is not up to date.

        Raises:
            RuntimeError: a file does not compile.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            file = self.folder / "build.ninja"
            file.write_text("\n".join((*self._lines, "")))
            result = subprocess.run(
                [Path(ninja.BIN_DIR, "ninja"), "-f", file, "-j", str(_JOBS), "--quiet"],
                cwd=ROOT,
                # What the sanitizers preload is not meant for compilers.
                env={name: text for name, text in os.environ.items() if name != "LD_PRELOAD"},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                check=False,
            )
        if result.returncode:
            raise RuntimeError(
                f"{self.name} does not compile under the emulation:\n{result.stdout}"
            )
