"""A wheel with the C++ libraries: what is in it, and that it works where only it is installed."""

from __future__ import annotations

import json
import re
import shutil
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from building import NO_CUDA, ROOT, STATUS_FILE, CleanEnvironment, member_text, members, run

pytestmark = pytest.mark.slow


def test_holds_the_library_and_says_so(native_wheel: Path) -> None:
    libraries = [name for name in members(native_wheel) if name.endswith(".so")]
    assert libraries == ["introkernels/_cpu.so"]
    status = json.loads(member_text(native_wheel, STATUS_FILE))
    assert status | {"cpu": "built", "cuda": NO_CUDA} == status


def test_is_tagged_for_any_python_on_this_platform(native_wheel: Path) -> None:
    _, _, python_tag, abi_tag, platform_tag = native_wheel.stem.split("-")
    assert (python_tag, abi_tag) == ("py3", "none")
    assert platform_tag == re.sub(r"[-.]", "_", sysconfig.get_platform())


@pytest.mark.parametrize("version", ["3.11", "3.12", "3.13"])
def test_is_installed_on_every_python(native_wheel: Path, tmp_path: Path, version: str) -> None:
    result = run(
        *(sys.executable, "-m", "pip", "install", "--no-deps", "--only-binary=:all:"),
        *("--python-version", version, "--target", tmp_path, native_wheel),
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stdout
    assert (tmp_path / "introkernels/_cpu.so").exists()


def test_holds_every_module_the_data_files_and_nothing_else(native_wheel: Path) -> None:
    package = ROOT / "introkernels"
    expected = {
        path.relative_to(ROOT).as_posix()
        for pattern in ("*.py", "py.typed", "train/templates/*", "train/study/presets/*")
        for path in package.rglob(pattern)
    }
    assert "introkernels/py.typed" in expected
    built = {name for name in members(native_wheel) if name.endswith(".so")} | {STATUS_FILE}
    packaged = {name for name in members(native_wheel) if ".dist-info/" not in name}
    assert packaged == expected | built


def test_metadata(native_wheel: Path) -> None:
    import introkernels

    (name,) = (name for name in members(native_wheel) if name.endswith(".dist-info/METADATA"))
    metadata = member_text(native_wheel, name).splitlines()
    assert f"Version: {introkernels.__version__}" in metadata
    assert "Requires-Dist: torch>=2.10" in metadata
    required = {
        line for line in metadata if line.startswith("Requires-Dist") and "extra" not in line
    }
    assert required == {"Requires-Dist: torch>=2.10", "Requires-Dist: numpy"}


def test_doctor_calls_it_healthy(native_install: CleanEnvironment) -> None:
    result = run(native_install.command, "doctor", cwd=native_install.folder)
    assert result.returncode == 0, result.stdout
    assert result.stdout.splitlines()[-1] == "healthy: C++ CPU kernels loaded"


def test_loss_runs_on_the_cpu_kernels_of_the_installed_package(
    native_install: CleanEnvironment,
) -> None:
    printed = native_install.run_python(
        """
import json, torch
import introkernels as ik
torch.manual_seed(0)
logits, gradients, inputs = torch.randn(4, 6), torch.randn(4, 6, 9), torch.randn(4, 9)
target = torch.tensor([0, 5, 2, 2])
with ik.use_backend("cpu"):
    loss = ik.introspective_loss(logits, target, gradients, inputs)
definition = ik.reference.introspective_loss(
    logits.double(), target, gradients.double(), inputs.double()
)
print(json.dumps({
    "file": ik.__file__,
    "status": ik.backends.status()["cpu"],
    "build": ik.build_info(),
    "error": float((loss - definition).abs() / definition.abs()),
}))
"""
    )
    seen = json.loads(printed)
    assert Path(seen["file"]).is_relative_to(native_install.folder)
    assert seen["status"] == "loaded"
    build = seen["build"]
    assert build["libraries"] == ["cpu"]
    assert "-ffp-contract=off" in build["flags"].split()
    assert "-ffast-math" not in build["flags"].split()
    assert re.search(r"\d+\.\d+", build["compiler"])
    assert build["torch_built_with"] == torch.__version__
    assert build["torch_target_version"] == "0x020a000000000000"
    assert (build["cuda_compiler"], build["cuda_architectures"]) == ("none", [])
    assert seen["error"] <= 2e-6


@pytest.mark.skipif(shutil.which("nm") is None, reason="needs binutils' nm")
def test_kernel_library_needs_no_python_and_exports_nothing(
    native_install: CleanEnvironment,
) -> None:
    (library,) = native_install.folder.glob("lib/python*/site-packages/introkernels/_cpu.so")
    symbols = run("nm", "--dynamic", library, cwd=native_install.folder).stdout
    assert "aoti_torch" in symbols
    assert not [line for line in symbols.splitlines() if line.split()[-1].startswith(("Py", "_Py"))]
    # The stable ABI is C; a C++ symbol of torch or c10 would tie the library to one release.
    undefined = run("nm", "--dynamic", "--undefined-only", "--demangle", library, cwd=ROOT).stdout
    assert not [line for line in undefined.splitlines() if " at::" in line or " c10::" in line]
