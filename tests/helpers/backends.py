"""Which backends the tests run on, in one place."""

from __future__ import annotations

import os

import introkernels as ik
from introkernels.ops import loader

ENVIRONMENT_VARIABLE = "INTROKERNELS_TEST_BACKENDS"
# Where tests of backends make their tensors: "cpu", or "cuda" for the current GPU.
DEVICE_VARIABLE = "INTROKERNELS_TEST_DEVICE"
DEVICES = ("cpu", "cuda")

# Every backend that serves tensors on the CPU.
KNOWN = ("reference", "composite", "cpu", "cuda", "triton")
# CUDA does so under an emulation and Triton in its interpreter, which take long: processes of their
# own ask for them by name.
DEFAULT = ("reference", "composite", "cpu")
ON_A_GPU = ("reference", "composite", "cuda", "triton")


def device() -> str:
    """Where tests that take a backend make their tensors.

    Raises:
        ValueError: the environment names something else than ``"cpu"`` or ``"cuda"``.
    """
    named = os.environ.get(DEVICE_VARIABLE, "cpu")
    if named not in DEVICES:
        raise ValueError(f"{DEVICE_VARIABLE} names {named!r}, known are {DEVICES}")
    return named


def under_test() -> list[str]:
    """The backends of this run: those named in the environment, else all that are loaded.

    Raises:
        ValueError: the environment names a backend that is unknown or not loaded.
    """
    if emulated():
        # Imported here, because it builds with what a machine with a GPU may not have.
        from helpers import emulated_backend

        emulated_backend.serve()
    status = {"reference": "loaded", "composite": "loaded", **ik.backends.status()}
    named = os.environ.get(ENVIRONMENT_VARIABLE)
    on_gpu = device() == "cuda"
    known = ON_A_GPU if on_gpu else KNOWN
    if named is None:
        return [name for name in (ON_A_GPU if on_gpu else DEFAULT) if status[name] == "loaded"]
    chosen = _named()
    for name in chosen:
        if name not in known:
            raise ValueError(f"{ENVIRONMENT_VARIABLE} names {name!r}, known are {known}")
        if status[name] != "loaded":
            raise ValueError(
                f"{ENVIRONMENT_VARIABLE} names {name!r}, which can't be used: {status[name]}"
            )
    if not chosen:
        raise ValueError(f"{ENVIRONMENT_VARIABLE} names no backend, known are {known}")
    return chosen


def interpreted() -> bool:
    """Whether this run is the one of Triton in its interpreter."""
    return loader.INTERPRETED and "triton" in under_test()


def emulated() -> bool:
    """Whether this run is one of the CUDA backend under the emulation of csrc/emulation."""
    return device() == "cpu" and "cuda" in _named()


def _named() -> list[str]:
    """The backends that the environment names."""
    named = os.environ.get(ENVIRONMENT_VARIABLE, "")
    return [name.strip() for name in named.split(",") if name.strip()]


def namespace(backend: str) -> str:
    """The namespace of the operators that serve a backend in this run."""
    if backend == "cuda" and emulated():
        return "introkernels_emulated"
    return {
        "reference": "introkernels_reference",
        "composite": "introkernels_composite",
        "triton": "introkernels_triton",
    }.get(backend, "introkernels")


def sized(usual: int, interpreted_size: int) -> int:
    """A size for compiled kernels, or the one for Triton's interpreter, which is far slower.

    The latter has to reach past the same boundaries: several tiles of a row, several programs.
    Emulated kernels take the usual sizes: only rows by the thousand take them seconds.
    """
    return interpreted_size if interpreted() else usual
