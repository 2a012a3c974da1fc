"""Which backends the tests run on, in one place."""

from __future__ import annotations

import os

import introkernels as ik

ENVIRONMENT_VARIABLE = "INTROKERNELS_TEST_BACKENDS"

# Every backend that serves tensors on the CPU, the definition first.
KNOWN = ("reference", "cpu")


def under_test() -> list[str]:
    """The backends of this run: those named in the environment, else all that are loaded.

    Raises:
        ValueError: the environment names a backend that is unknown or not loaded.
    """
    status = {"reference": "loaded", **ik.backends.status()}
    named = os.environ.get(ENVIRONMENT_VARIABLE)
    if named is None:
        return [name for name in KNOWN if status[name] == "loaded"]
    chosen = [name.strip() for name in named.split(",") if name.strip()]
    for name in chosen:
        if name not in KNOWN:
            raise ValueError(f"{ENVIRONMENT_VARIABLE} names {name!r}, known are {KNOWN}")
        if status[name] != "loaded":
            raise ValueError(f"{ENVIRONMENT_VARIABLE} names {name!r}, which is {status[name]}")
    if not chosen:
        raise ValueError(f"{ENVIRONMENT_VARIABLE} names no backend, known are {KNOWN}")
    return chosen
