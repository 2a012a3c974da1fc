"""The library of the emulation's own tests, and the order in which it runs threads."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import emulation
from torch import Tensor

KERNELS = Path(__file__).with_name("kernels")

Kernel = Callable[..., None]


class Library:
    """Functions of the test kernels: tensors and integers in, RuntimeError out."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._library = ctypes.CDLL(str(path))

    def __getattr__(self, name: str) -> Kernel:
        function = self._library[f"run_{name}"]
        function.restype = ctypes.c_char_p

        def call(*arguments: Tensor | int) -> None:
            report = function(
                *(
                    ctypes.c_void_p(argument.data_ptr())
                    if isinstance(argument, Tensor)
                    else ctypes.c_int(argument)
                    for argument in arguments
                )
            )
            if report is not None:
                raise RuntimeError(report.decode())

        return call

    def function(self, name: str, result: type | None = None) -> Callable[..., object]:
        """A plain function that launches nothing."""
        function = self._library[name]
        function.restype = result
        return function


@pytest.fixture(scope="session")
def library() -> Library:
    """The test kernels, compiled."""
    sources = [KERNELS / f"{name}.cu" for name in ("sound", "faults", "numbers")]
    return Library(emulation.build("kernels", sources))


@pytest.fixture(autouse=True)
def _usual_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ascending, whatever the order is in which this run has other tests' kernels run."""
    monkeypatch.delenv(emulation.ORDER_VARIABLE, raising=False)


@pytest.fixture(params=[*emulation.ORDERS, "shuffled:7"])
def order(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each of the orders in which threads may run."""
    monkeypatch.setenv(emulation.ORDER_VARIABLE, request.param)
    return request.param
