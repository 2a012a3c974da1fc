"""The one door through which kernels are started."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any

import pytest
import torch

from introkernels.ops.triton.launch import MOST_REGISTERS, Launch, launch, recording


class Kernel:
    """Notes its launches, and which device was current."""

    def __init__(self) -> None:
        self.started: list[Any] = []
        self.current = 0

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def start(*arguments: Any, **options: Any) -> None:
            self.started.append((self.current, grid, arguments, options))

        return start


class OnGpu:
    """As much of a GPU's tensor as a launch looks at."""

    is_cuda = True

    def __init__(self, index: int) -> None:
        self.device = torch.device("cuda", index)

    def get_device(self) -> int:
        return self.device.index


def test_a_launch_hands_everything_on() -> None:
    kernel, tensor = Kernel(), torch.ones(3)
    launch(kernel, (2, 3), tensor, 5, BLOCK=8)
    everything = {"BLOCK": 8, "maxnreg": MOST_REGISTERS}
    assert kernel.started == [(0, (2, 3), (tensor, 5), everything)]


def test_the_limit_of_registers_is_the_launchs_own_and_nvidias(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kernel, tensor = Kernel(), torch.ones(3)
    launch(kernel, (1,), tensor, maxnreg=None)
    monkeypatch.setattr(torch.version, "hip", "6.3")
    launch(kernel, (1,), tensor, maxnreg=None, BLOCK=8)
    launch(kernel, (1,), tensor)
    assert [options for *_, options in kernel.started] == [{"maxnreg": None}, {"BLOCK": 8}, {}]


def test_no_programs_no_launch() -> None:
    kernel = Kernel()
    launch(kernel, (0,), torch.ones(3))
    launch(kernel, (4, 0), torch.ones(3))
    assert kernel.started == []


@pytest.mark.parametrize("index", [0, 1])
def test_it_starts_on_the_device_of_its_tensors(
    monkeypatch: pytest.MonkeyPatch, index: int
) -> None:
    kernel = Kernel()
    switched = []

    @contextmanager
    def current(device: torch.device) -> Any:
        switched.append(device.index)
        kernel.current = device.index
        yield
        kernel.current = 0

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", current)
    launch(kernel, (1,), OnGpu(index))
    assert [device for device, *_ in kernel.started] == [index]
    # Switching costs time: it is left out where nothing changes.
    assert switched == ([] if index == 0 else [1])


def test_a_recorded_launch_is_not_made() -> None:
    kernel, tensor = Kernel(), torch.ones(3)
    outer: list[Launch] = []
    inner: list[Launch] = []
    with recording(outer.append):
        launch(kernel, (0,), tensor)
        with recording(inner.append):
            launch(kernel, (1,), tensor, 2, BLOCK=8)
        with pytest.raises(KeyError), recording(inner.append):
            raise KeyError
        launch(kernel, (3,), tensor)
    assert kernel.started == []
    options = {"BLOCK": 8, "maxnreg": MOST_REGISTERS}
    assert inner == [Launch(kernel, (1,), (tensor, 2), options)]
    assert [launched.grid for launched in outer] == [(0,), (3,)]
    launch(kernel, (3,), tensor)
    assert len(kernel.started) == 1
