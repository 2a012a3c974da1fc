"""The report of ``introkernels doctor``, its verdicts and its exit status."""

from __future__ import annotations

from email.message import Message
from importlib import metadata
from types import SimpleNamespace

import pytest
import torch

import introkernels as ik
from introkernels import doctor
from introkernels.ops import loader, select

HEALTHY = {"cpu": "loaded", "cuda": "no", "triton": "no"}


def test_report_of_this_install(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main() == 0
    report = capsys.readouterr().out
    assert f"{ik.__version__} in " in report
    assert metadata.version("torch") in report
    assert torch.backends.cpu.get_cpu_capability() in report
    for name, state in ik.backends.status().items():
        assert f"  {name:<22} {state}\n" in report
    where = "cuda" if torch.cuda.device_count() else "cpu"
    assert f"Automatic choice on {where}\n" in report
    for name, (backend, ground) in select.automatic(where).items():
        assert f"  {name:<22} {backend} ({ground})\n" in report
    verdict = report.splitlines()[-1]
    loaded = ik.backends.status()["cpu"] == "loaded"
    assert verdict.startswith("healthy:" if loaded else "usable, but slower:")


def test_the_automatic_choice_has_its_ground(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "STATUS", HEALTHY | {"triton": "loaded"})
    choices = dict(doctor.choices("cuda"))
    assert choices["row_loss_forward"] == (
        "triton (predicted ahead of cuda from machine code, benchmarks/predicted.toml; "
        "not measured)"
    )
    assert choices["teacher_logits"] == "composite (has no kernels on a GPU)"
    assert dict(doctor.choices("cpu"))["linear"] == "cpu (C++)"
    monkeypatch.setattr(loader, "STATUS", HEALTHY | {"cpu": "not built: no compiler"})
    assert dict(doctor.choices("cpu"))["linear"] == "composite (cpu: not built: no compiler)"


def test_build_is_what_the_build_wrote(monkeypatch: pytest.MonkeyPatch) -> None:
    written = {"cpu": "built", "build": {"compiler": "c++ 12.2.0", "libraries": ["cpu", "cuda"]}}
    monkeypatch.setattr(loader, "build_record", lambda: written)
    assert doctor.build() == [("compiler", "c++ 12.2.0"), ("libraries", "cpu cuda")]
    del written["build"]
    assert doctor.build() == [("no record", "no library was built; the backends below tell why")]


@pytest.mark.parametrize("name", doctor.usable_backends(ik.backends.status()))
def test_self_check_passes(name: str) -> None:
    assert doctor.self_check(name).startswith("ok")


def test_self_check_finds_a_wrong_loss(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = ik.distillation_loss
    monkeypatch.setattr(ik, "distillation_loss", lambda *args: right(*args) * (1 + 1e-5))
    assert doctor.main() == 1
    verdict = capsys.readouterr().out.splitlines()[-1]
    assert verdict.startswith("broken: reference: the loss of distillation_loss is off by 1.0e-05")


def test_self_check_finds_a_wrong_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    right = ik.linear_introspective_loss

    def detached_twice(features: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        return right((features + features.detach()) / 2, *others)

    monkeypatch.setattr(ik, "linear_introspective_loss", detached_twice)
    assert "the gradient of linear_introspective_loss is off" in doctor.self_check("reference")


def test_self_check_reports_what_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no such operator")

    monkeypatch.setattr(ik, "introspective_loss", fails)
    expected = "introspective_loss raises RuntimeError: no such operator"
    assert doctor.self_check("reference") == expected


def test_self_check_finds_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    right = ik.distillation_loss
    monkeypatch.setattr(ik, "distillation_loss", lambda *args: right(*args) * float("nan"))
    assert "off by nan" in doctor.self_check("reference")


def test_verdicts() -> None:
    assert doctor.verdict(HEALTHY, []) == "healthy: C++ CPU kernels loaded"
    slower = doctor.verdict(HEALTHY | {"cpu": "not built: no compiler"}, [])
    assert slower.startswith("usable, but slower: C++ kernels missing (not built: no compiler);")
    assert doctor.verdict(HEALTHY, ["cpu: wrong"]) == "broken: cpu: wrong"
    gpu = doctor.verdict(HEALTHY, [], gpus=1)
    assert gpu == "usable, but slower on the GPU: kernels missing (CUDA: no; Triton: no)"
    for loaded, kernels in (
        (("triton",), "Triton"),
        (("cuda",), "CUDA"),
        (("cuda", "triton"), "CUDA and Triton"),
    ):
        one = doctor.verdict(HEALTHY | dict.fromkeys(loaded, "loaded"), [], gpus=1)
        assert one == f"healthy: C++ CPU kernels and {kernels} GPU kernels loaded"
    assert doctor.verdict(HEALTHY | {"triton": "loaded"}, []) == "healthy: C++ CPU kernels loaded"


def test_extras_name_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    described = Message()
    described["Provides-Extra"] = "train"
    described["Provides-Extra"] = "test"
    requirements = [
        "introkernels-absent-but-not-optional",
        'numpy; extra == "train"',
        'introkernels-absent>=1; extra == "train"',
        'numpy>=1; extra == "test"',
    ]
    ours = SimpleNamespace(requires=requirements, metadata=described)
    find = metadata.distribution
    monkeypatch.setattr(
        doctor.metadata, "distribution", lambda name: ours if name == "introkernels" else find(name)
    )
    assert doctor.extras() == [
        ("introkernels[train]", "missing introkernels-absent"),
        ("introkernels[test]", "complete"),
    ]


def test_extras_of_a_folder_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(doctor.metadata, "distribution", unknown)
    assert doctor.extras() == [("unknown", "introkernels runs from a folder, it is not installed")]
