"""Whether the CUDA library is loaded, and what is said where it is not."""

from __future__ import annotations

import ctypes
import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch

import introkernels as ik
from introkernels.ops import driver, loader, schema
from introkernels.ops.driver import Driver

H100 = Driver(cuda=(13, 0), capabilities=((9, 0),))
BUILD = {
    "cuda_compiler": "nvcc 13.0.88",
    "cuda_architectures": ["sm_80", "sm_90a", "sm_100", "compute_100"],
}


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Path]:
    """What is loaded, on a machine where everything is there: a library, a GPU, a driver."""
    library = tmp_path / "_cuda.so"
    library.touch()
    record = {
        "version": ik.__version__,
        "schemas": schema.digest(),
        "sha256": {"cuda": hashlib.sha256(b"").hexdigest()},
        "build": dict(BUILD),
    }
    libraries: list[Path] = []
    monkeypatch.setattr(loader, "_CUDA_LIBRARY", library)
    monkeypatch.setattr(loader, "build_record", lambda: record)
    monkeypatch.setattr(driver, "find", lambda: H100)
    monkeypatch.setattr(torch.ops, "load_library", libraries.append)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.version, "hip", None)
    return libraries


def test_loaded(loaded: list[Path]) -> None:
    assert loader._load_cuda() == "loaded"
    assert [library.name for library in loaded] == ["_cuda.so"]


@pytest.mark.parametrize(
    ("report", "reason"),
    [
        ({}, "not built: the package was installed without building it"),
        ({"cuda": "no CUDA compiler"}, "not built: no CUDA compiler"),
        ({"cuda": "built"}, "_cuda.so was built but is gone"),
    ],
)
def test_not_there(
    report: dict[str, str], reason: str, loaded: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    loader._CUDA_LIBRARY.unlink()
    monkeypatch.setattr(loader, "build_record", lambda: report)
    assert loader._load_cuda() == reason
    assert not loaded


def test_torch_for_amd(loaded: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "7.0")
    reason = "_cuda.so was built for NVIDIA's GPUs, this torch for AMD's (ROCm 7.0)"
    assert loader._load_cuda() == reason
    assert not loaded


@pytest.mark.parametrize("its_cuda", [None, "13.0"])
def test_no_gpu(its_cuda: str | None, loaded: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", its_cuda)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert loader._load_cuda() == (
        f"_cuda.so was built, but there is no GPU that this torch can use (its CUDA: {its_cuda})"
    )
    assert not loaded


def test_gpus_that_it_was_not_built_for(
    loaded: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver, "find", lambda: Driver((13, 0), ((7, 5), (7, 5), (6, 1))))
    assert loader._load_cuda() == (
        "_cuda.so was built for sm_80 sm_90a sm_100 compute_100, no GPU here runs that: build with "
        "TORCH_CUDA_ARCH_LIST='7.5 6.1'"
    )
    assert not loaded
    monkeypatch.setattr(driver, "find", lambda: Driver((13, 0), ((7, 5), (8, 6))))
    assert loader._load_cuda() == "loaded"


def test_driver_older_than_the_compiler(
    loaded: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver, "find", lambda: Driver((12, 8), ((9, 0),)))
    assert loader._load_cuda() == (
        "_cuda.so was built by nvcc 13.0.88, the driver serves CUDA 12.8 at most: update the "
        "driver, or build with an older nvcc (CUDA_HOME)"
    )
    assert not loaded
    # A library of any 13 runs on a driver of any 13.
    loader.build_record()["build"]["cuda_compiler"] = "nvcc 13.2.1"
    monkeypatch.setattr(driver, "find", lambda: H100)
    assert loader._load_cuda() == "loaded"


@pytest.mark.parametrize("unknown", ["driver", "build"])
def test_what_can_not_be_told_keeps_nothing_from_loading(
    unknown: str, loaded: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    if unknown == "driver":
        monkeypatch.setattr(driver, "find", lambda: None)
    else:
        del loader.build_record()["build"]
    assert loader._load_cuda() == "loaded"


def test_library_that_can_not_be_loaded(
    loaded: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(library: Path) -> None:
        cause = OSError("undefined symbol: aoti_torch_get_current_cuda_stream")
        raise OSError("Could not load this library") from cause

    monkeypatch.setattr(torch.ops, "load_library", fail)
    assert loader._load_cuda() == (
        "_cuda.so was built but can't be loaded: undefined symbol: "
        "aoti_torch_get_current_cuda_stream"
    )


@pytest.mark.parametrize(
    ("architecture", "runs", "does_not"),
    [
        ("sm_80", [(8, 0), (8, 6), (8, 9)], [(7, 5), (9, 0), (10, 0)]),
        ("sm_86", [(8, 6), (8, 9)], [(8, 0), (9, 0)]),
        ("sm_90a", [(9, 0)], [(8, 9), (9, 1), (10, 0)]),
        ("sm_100", [(10, 0), (10, 3)], [(9, 0), (12, 0)]),
        ("sm_100f", [(10, 0), (10, 3)], [(9, 0), (12, 0)]),
        ("compute_100f", [(10, 0), (10, 3)], [(9, 0), (12, 0)]),
        ("compute_100", [(10, 0), (10, 3), (12, 0)], [(9, 0), (8, 0)]),
        ("compute_90a", [(9, 0)], [(10, 0)]),
        ("none", [], [(9, 0)]),
    ],
)
def test_which_gpus_run_what(
    architecture: str, runs: list[tuple[int, int]], does_not: list[tuple[int, int]]
) -> None:
    assert all(loader.runs_on(architecture, capability) for capability in runs)
    assert not any(loader.runs_on(architecture, capability) for capability in does_not)


class ManagementLibrary:
    """NVIDIA's management library on a machine of one GPU; ``failing`` fails."""

    def __init__(self, failing: str = "") -> None:
        self.failing = failing
        self.open = 0

    def __getattr__(self, name: str) -> Any:
        if name == self.failing:
            return lambda *arguments: 999
        return getattr(self, f"_{name}")

    def _nvmlInit_v2(self) -> int:  # noqa: N802
        self.open += 1
        return 0

    def _nvmlShutdown(self) -> int:  # noqa: N802
        self.open -= 1
        return 0

    def _nvmlSystemGetCudaDriverVersion_v2(self, version: Any) -> int:  # noqa: N802
        version._obj.value = 12080
        return 0

    def _nvmlDeviceGetCount_v2(self, count: Any) -> int:  # noqa: N802
        count._obj.value = 2
        return 0

    def _nvmlDeviceGetHandleByIndex_v2(self, index: Any, device: Any) -> int:  # noqa: N802
        device._obj.value = 0x1000 + index.value
        return 0

    def _nvmlDeviceGetCudaComputeCapability(  # noqa: N802
        self, device: Any, major: Any, minor: Any
    ) -> int:
        major._obj.value, minor._obj.value = {0x1000: (9, 0), 0x1001: (8, 6)}[device.value]
        return 0


def test_driver_is_asked_and_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    library = ManagementLibrary()
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    assert driver.find() == Driver((12, 8), ((9, 0), (8, 6)))
    assert library.open == 0


@pytest.mark.parametrize(
    "function",
    [
        "nvmlInit_v2",
        "nvmlSystemGetCudaDriverVersion_v2",
        "nvmlDeviceGetCount_v2",
        "nvmlDeviceGetHandleByIndex_v2",
        "nvmlDeviceGetCudaComputeCapability",
    ],
)
def test_driver_that_does_not_answer(function: str, monkeypatch: pytest.MonkeyPatch) -> None:
    library = ManagementLibrary(function)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    assert driver.find() is None
    assert library.open == 0


def test_no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert driver.find() is None
