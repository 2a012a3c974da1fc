"""What NVIDIA's driver says of the GPUs here.

Its management library is asked: CUDA itself, once started, can't be used in processes forked later.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Driver:
    """The driver of this machine.

    Attributes:
        cuda: the newest CUDA that it serves, ``(13, 0)``.
        capabilities: the compute capability of each GPU, ``(9, 0)`` for an H100, whether this
            process may use it or not.
    """

    cuda: tuple[int, int]
    capabilities: tuple[tuple[int, int], ...]


def find() -> Driver | None:
    """The driver of this machine, or None where it does not answer."""
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    try:
        if library.nvmlInit_v2():
            return None
        try:
            return _ask(library)
        finally:
            library.nvmlShutdown()
    except AttributeError:  # a driver older than one of these functions
        return None


def _ask(library: Any) -> Driver | None:
    version, count = ctypes.c_int(), ctypes.c_uint()
    failed = library.nvmlSystemGetCudaDriverVersion_v2(ctypes.byref(version))
    if failed or library.nvmlDeviceGetCount_v2(ctypes.byref(count)):
        return None
    capabilities = []
    for index in range(count.value):
        device, major, minor = ctypes.c_void_p(), ctypes.c_int(), ctypes.c_int()
        if library.nvmlDeviceGetHandleByIndex_v2(
            ctypes.c_uint(index), ctypes.byref(device)
        ) or library.nvmlDeviceGetCudaComputeCapability(
            device, ctypes.byref(major), ctypes.byref(minor)
        ):
            return None
        capabilities.append((major.value, minor.value))
    cuda = (version.value // 1000, version.value % 1000 // 10)
    return Driver(cuda, tuple(capabilities))
