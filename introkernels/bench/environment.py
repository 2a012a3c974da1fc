"""Where and with what a measurement was made: machine and versions."""

from __future__ import annotations

import os
import platform
import re
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import introkernels as ik

_CPU_INFO = Path("/proc/cpuinfo")
_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_KILOBYTE = 1024
# Settings of the thread pools that move times.
_THREAD_VARIABLES = re.compile(r"(OMP|GOMP|KMP|MKL|OPENBLAS)_")


def machine(device: str = "cpu") -> dict[str, Any]:
    """CPU model, cores this process may use, memory and caches in bytes, operating system.

    ``load`` is the mean number of busy processes over the last minute; ``gpu`` is there where
    ``device`` is one.
    """
    return {
        **({"gpu": gpu()} if device == "cuda" else {}),
        "cpu": cpu_model(),
        "cores": usable_cores(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "caches": caches(),
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "os": operating_system(),
        "load": os.getloadavg()[0],
    }


def gpu() -> dict[str, Any]:
    """The current GPU: name, compute capability, processors, bytes of memory and last cache."""
    properties = torch.cuda.get_device_properties()
    return {
        "name": properties.name,
        "capability": list(torch.cuda.get_device_capability()),
        "processors": properties.multi_processor_count,
        "memory": properties.total_memory,
        "last_cache": getattr(properties, "L2_cache_size", None),
    }


def is_busy(machine: dict[str, Any]) -> bool:
    """Whether others computed on it as the measurement began, so that its times are too long."""
    return bool(machine["load"] > machine["cores"] / 2)


def slug(machine: dict[str, Any]) -> str:
    """A name for files: ``amd-epyc-2-cores``, or that of the GPU where one was measured."""
    cpu = f"{machine['cpu']} {machine['cores']} cores"
    words = (machine["gpu"]["name"] if "gpu" in machine else cpu).lower()
    return re.sub(r"[^a-z0-9]+", "-", words).strip("-")


def versions(gpu: bool = False) -> dict[str, Any]:
    """Python, torch and introkernels, and how its kernels were built, where that is on record.

    Args:
        gpu: also what makes and runs kernels on a GPU: Triton, CUDA or ROCm as torch has it.
    """
    info = ik.build_info()
    build = {name: value for name, value in info.items() if name not in ("version", "backends")}
    on_gpu = {
        "triton": _version_of("triton"),
        "cuda": torch.version.cuda,
        "rocm": torch.version.hip,
    }
    return {
        **(on_gpu if gpu else {}),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "introkernels": ik.__version__,
        "cpu_capability": ik.backends.cpu_capability(),
        "build": {name: value for name, value in build.items() if name != "torch"} or None,
    }


def thread_variables() -> dict[str, str]:
    """Environment variables that steer thread pools."""
    return {
        name: value for name, value in sorted(os.environ.items()) if _THREAD_VARIABLES.match(name)
    }


def cpu_model() -> str:
    if _CPU_INFO.exists():
        found = re.search(r"^model name\s*:\s*(.+)$", _CPU_INFO.read_text(), re.MULTILINE)
        if found:
            return found[1].strip()
    return platform.processor() or platform.machine()


def operating_system() -> str:
    """``Linux 6.1.0 x86_64, glibc 2.36``, without what a distributor adds to the release."""
    release = re.match(r"[\d.]*", platform.release())
    parts = [platform.system(), release[0] if release else "", platform.machine()]
    libc = " ".join(platform.libc_ver()).strip()
    return " ".join(filter(None, parts)) + (f", {libc}" if libc else "")


def usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def caches() -> dict[str, int]:
    """Bytes of each data cache that the first core sees, as ``{"L1": …, "L2": …}``."""
    sizes = {}
    for index in sorted(_CACHES.glob("index*")):
        try:
            kind, level, size = (
                (index / name).read_text().strip() for name in ("type", "level", "size")
            )
        except OSError:
            continue
        if kind != "Instruction" and size.endswith("K"):
            sizes[f"L{level}"] = int(size[:-1]) * _KILOBYTE
    return sizes


def _version_of(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
