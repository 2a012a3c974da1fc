"""Installs without the C++ libraries: they work, and they say what is missing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from building import (
    STATUS_FILE,
    CleanEnvironment,
    build_wheel,
    copy_sources,
    member_text,
    members,
    run,
    setup_py,
)

NO_COMPILER = "no C++ compiler at build time (/nonexistent/c++: No such file or directory)"


def test_without_a_compiler_the_wheel_is_pure_python(pure_wheel: Path) -> None:
    assert pure_wheel.name.endswith("-py3-none-any.whl")
    assert not [name for name in members(pure_wheel) if name.endswith(".so")]
    assert json.loads(member_text(pure_wheel, STATUS_FILE))["cpu"] == NO_COMPILER


def test_switched_off(tmp_path: Path) -> None:
    tree = copy_sources(tmp_path / "tree")
    wheel = build_wheel(tree, tmp_path / "out", INTROKERNELS_CPP="0")
    assert wheel.name.endswith("-py3-none-any.whl")
    assert "INTROKERNELS_CPP=0" in json.loads(member_text(wheel, STATUS_FILE))["cpu"]


def test_without_torch_as_in_an_isolated_build(tmp_path: Path) -> None:
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    (hidden / "torch.py").write_text("raise ModuleNotFoundError(\"No module named 'torch'\")\n")
    tree = copy_sources(tmp_path / "tree")
    wheel = build_wheel(tree, tmp_path / "out", PYTHONPATH=str(hidden))
    assert wheel.name.endswith("-py3-none-any.whl")
    reason = json.loads(member_text(wheel, STATUS_FILE))["cpu"]
    assert "No module named 'torch'" in reason
    assert "--no-build-isolation" in reason


def test_doctor_says_what_is_missing_and_what_to_do(pure_install: CleanEnvironment) -> None:
    result = run(pure_install.command, "doctor", cwd=pure_install.folder)
    assert result.returncode == 0, result.stdout
    verdict = result.stdout.splitlines()[-1]
    assert verdict.startswith("usable, but slower: C++ kernels missing")
    assert NO_COMPILER in verdict
    assert "INTROKERNELS_CPP=1 pip install" in verdict


def test_losses_work_after_one_warning_and_the_cpu_backend_refuses_with_the_reason(
    pure_install: CleanEnvironment,
) -> None:
    printed = pure_install.run_python(
        """
import json, torch
import introkernels as ik
features, weight = torch.randn(4, 9), torch.randn(6, 9, requires_grad=True)
for _ in range(2):
    loss = ik.linear_introspective_loss(features, weight, torch.tensor([0, 5, 2, 2]))
    loss.backward()
try:
    ik.use_backend("cpu")
    refusal = None
except RuntimeError as error:
    refusal = str(error)
print(json.dumps({
    "file": ik.__file__,
    "finite": bool(loss.isfinite() and weight.grad.isfinite().all()),
    "refusal": refusal,
}))
"""
    )
    assert printed.count("introkernels has no kernels for tensors on 'cpu' here") == 1
    seen = json.loads(printed.splitlines()[-1])
    assert Path(seen["file"]).is_relative_to(pure_install.folder)
    assert seen["finite"]
    assert NO_COMPILER in seen["refusal"]


@pytest.mark.parametrize(
    ("switches", "message"),
    [
        ({"INTROKERNELS_CPP": "1", "CXX": "/nonexistent/c++"}, NO_COMPILER),
        ({"INTROKERNELS_CPP": "bogus"}, "INTROKERNELS_CPP is 'bogus'; allowed are"),
    ],
)
def test_refuses(tmp_path: Path, switches: dict[str, str], message: str) -> None:
    result = setup_py(copy_sources(tmp_path / "tree"), "bdist_wheel", **switches)
    assert result.returncode != 0
    assert message in result.stdout
