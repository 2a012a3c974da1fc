"""Which compiled libraries and kernels are loaded, and why the others are not."""

from __future__ import annotations

import ctypes
import hashlib
import importlib
import importlib.util
import json
import os
import re
from pathlib import Path
from typing import Any

import torch

from introkernels._version import __version__
from introkernels.ops import driver, schema

_PACKAGE = Path(__file__).resolve().parent.parent

LOADED = "loaded"


def build_record() -> dict[str, Any]:
    """What the build wrote of the libraries (see setup.py); empty without a build."""
    try:
        record = json.loads((_PACKAGE / "_build_status.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


class _UnusableError(Exception):
    """The reason why a backend can't be used, in the words of its status."""


_CPU_LIBRARY = _PACKAGE / "_cpu.so"
_CUDA_LIBRARY = _PACKAGE / "_cuda.so"


def _load_cpu() -> str:
    try:
        _check_built(_CPU_LIBRARY, "cpu")
        _load(_CPU_LIBRARY)
    except _UnusableError as reason:
        return str(reason)
    return LOADED


def _load_cuda() -> str:
    """The state of the CUDA kernels.

    They are loaded where they can run and nowhere else: once loaded they serve every tensor on a
    GPU that is not given to another backend.
    """
    try:
        _check_built(_CUDA_LIBRARY, "cuda")
        _check_gpu(_CUDA_LIBRARY.name)
        _load(_CUDA_LIBRARY)
    except _UnusableError as reason:
        return str(reason)
    return LOADED


def _check_built(library: Path, name: str) -> None:
    """Whether a library is there, whole, and of this package.

    To be told before it is loaded: of a file cut short, the first read past its end ends the
    process, and one for other schemas would take arguments for what they are not.
    """
    record = build_record()
    if not library.exists():
        reason = record.get(name, "the package was installed without building it")
        raise _UnusableError(
            f"{library.name} was built but is gone" if reason == "built" else f"not built: {reason}"
        )
    version = record.get("version", "of an unknown version")
    if version != __version__:
        raise _UnusableError(
            f"{library.name} was built for introkernels {version}, this is {__version__}: "
            "build it again"
        )
    if record.get("schemas") != schema.digest():
        raise _UnusableError(
            f"{library.name} was built for other operators than those of this introkernels "
            f"{__version__}: build it again"
        )
    if record.get("sha256", {}).get(name) != hashlib.sha256(library.read_bytes()).hexdigest():
        raise _UnusableError(
            f"{library.name} is not the file that the build of introkernels {version} left, but "
            "damaged or from another build: build it again"
        )


def _load(library: Path) -> None:
    try:
        torch.ops.load_library(library)
    except (OSError, RuntimeError) as error:
        raise _UnusableError(
            f"{library.name} was built but can't be loaded: {error.__cause__ or error}"
        ) from error


def _check_gpu(library: str) -> None:
    """Whether a GPU here runs what the CUDA library holds, as far as can be told without CUDA."""
    if torch.version.hip is not None:
        raise _UnusableError(
            f"{library} was built for NVIDIA's GPUs, this torch for AMD's (ROCm "
            f"{torch.version.hip})"
        )
    if torch.cuda.device_count() == 0:
        raise _UnusableError(
            f"{library} was built, but there is no GPU that this torch can use (its CUDA: "
            f"{torch.version.cuda})"
        )
    build, found = build_record().get("build"), driver.find()
    if build is None or found is None:
        return
    compiler, architectures = build["cuda_compiler"], build["cuda_architectures"]
    if _version(compiler)[:1] > found.cuda[:1]:
        raise _UnusableError(
            f"{library} was built by {compiler}, the driver serves CUDA {_dotted(found.cuda)} at "
            "most: update the driver, or build with an older nvcc (CUDA_HOME)"
        )
    if not any(runs_on(name, gpu) for name in architectures for gpu in found.capabilities):
        gpus = " ".join(dict.fromkeys(map(_dotted, found.capabilities)))
        raise _UnusableError(
            f"{library} was built for {' '.join(architectures)}, no GPU here runs that: build with "
            f"TORCH_CUDA_ARCH_LIST='{gpus}'"
        )


def runs_on(architecture: str, capability: tuple[int, int]) -> bool:
    """Whether a GPU of a compute capability runs code for ``"sm_80"``, ``"compute_100"`` ….

    Machine code runs on GPUs of the same first number that are as new, that of an architecture's
    own features (``"sm_90a"``) on no other, and ``compute_…`` is compiled by the driver of any GPU
    as new.
    """
    found = re.fullmatch(r"(sm|compute)_(\d+)(\d)([a-z]?)", architecture)
    if found is None:
        return False
    target = int(found[2]), int(found[3])
    if found[4] == "a":
        return capability == target
    within_family = found[1] == "sm" or found[4] == "f"
    return capability >= target and (not within_family or capability[0] == target[0])


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"


# Tuples as arguments and loop-carried values, which the kernels use, came in steps up to 3.5.
_OLDEST_TRITON = (3, 5)
_INSTALL_TRITON = "pip install 'introkernels[triton]'"

# Whether Triton runs kernels on CPU tensors, in Python: Triton's own switch, read as it reads it.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


def _version(text: str) -> tuple[int, ...]:
    """The first two numbers of a version."""
    return tuple(int(number) for number in re.findall(r"\d+", text)[:2])


def _load_triton() -> tuple[str, Any]:
    """The state of Triton's kernels, and the module of their operators where it is usable."""
    try:
        return LOADED, _triton_kernels()
    except _UnusableError as reason:
        return str(reason), None
    except Exception as failure:  # a broken install raises anything, from OSError to RuntimeError
        return f"can't be imported: {type(failure).__name__}: {failure}", None


def _triton_kernels() -> Any:
    """The module of Triton's operators.

    Triton is imported where there is something for it to run on, and nowhere else: that takes
    longer than the rest of this package. The look for a GPU asks the driver's management library,
    so that it neither starts CUDA nor keeps a process from forking.
    """
    if importlib.util.find_spec("triton") is None:
        raise _UnusableError(f"not installed: {_INSTALL_TRITON}")
    if not INTERPRETED and torch.cuda.device_count() == 0:
        raise _UnusableError(
            f"no GPU that this torch can use (its CUDA: {torch.version.cuda}, its ROCm: "
            f"{torch.version.hip}); TRITON_INTERPRET=1, set before Python starts, runs the kernels "
            "on the CPU, slowly, for tests"
        )
    triton: Any = importlib.import_module("triton")
    if _version(triton.__version__) < _OLDEST_TRITON:
        raise _UnusableError(
            f"triton {triton.__version__} is too old, {'.'.join(map(str, _OLDEST_TRITON))} or "
            f"newer is needed: {_INSTALL_TRITON} --upgrade"
        )
    if INTERPRETED:
        _check_interpreter(triton)
        importlib.import_module("introkernels.ops.triton.interpreter").compute_like_a_gpu()
    return importlib.import_module("introkernels.ops.triton.operators")


def _check_interpreter(triton: Any) -> None:
    import numpy

    if _version(numpy.__version__) >= (2, 4) and _version(triton.__version__) <= (3, 6):
        # It makes an int of an array of one element, which numpy allowed until 2.4.
        raise _UnusableError(
            f"the interpreter of triton {triton.__version__} (TRITON_INTERPRET=1) needs numpy<2.4, "
            f"found {numpy.__version__}: pip install 'numpy<2.4'"
        )
    if isinstance(triton.language.sum, triton.JITFunction):
        raise _UnusableError(
            "triton was imported before TRITON_INTERPRET=1 was set: set it before Python starts"
        )


_TRITON_STATE, TRITON_KERNELS = _load_triton()

STATUS: dict[str, str] = {
    "cpu": _load_cpu(),
    "cuda": _load_cuda(),
    "triton": _TRITON_STATE,
}


def cpu_capability() -> str | None:
    """The instruction set that the C++ kernels use; None without them.

    ``INTROKERNELS_CPU_CAPABILITY`` is read once, by the first kernel or by this function.

    Raises:
        ValueError: the variable asks for one that does not exist or that the machine lacks.
    """
    if STATUS["cpu"] != LOADED:
        return None
    library = ctypes.CDLL(str(_CPU_LIBRARY))
    library.introkernels_cpu_capability.restype = ctypes.c_char_p
    reason = ctypes.create_string_buffer(500)
    name: bytes | None = library.introkernels_cpu_capability(reason, ctypes.c_size_t(len(reason)))
    if name is None:
        raise ValueError(reason.value.decode())
    return name.decode()
