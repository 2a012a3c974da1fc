"""Libraries are loaded where they are those of the record that their build left, and only there."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from building import ROOT, STATUS_FILE, environment, run

import introkernels as ik
from introkernels.ops import loader, schema

NEEDS_LIBRARY = pytest.mark.skipif(
    ik.backends.status()["cpu"] != "loaded", reason="needs the C++ kernels"
)


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """Stands in for a library that was just built."""
    library = tmp_path / "_cpu.so"
    library.write_bytes(b"kernels")
    return library


def record(**changes: Any) -> dict[str, Any]:
    """What the build of that library left."""
    identity = {
        "cpu": "built",
        "version": ik.__version__,
        "schemas": schema.digest(),
        "sha256": {"cpu": hashlib.sha256(b"kernels").hexdigest()},
    }
    return identity | changes


def test_the_library_that_was_built_is_taken(
    library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader, "build_record", record)
    loader._check_built(library, "cpu")


@pytest.mark.parametrize(
    ("left", "reason"),
    [
        (
            record(version="0.0.9"),
            f"_cpu.so was built for introkernels 0.0.9, this is {ik.__version__}: build it again",
        ),
        ({"cpu": "built"}, "_cpu.so was built for introkernels of an unknown version, this is"),
        ({}, "_cpu.so was built for introkernels of an unknown version, this is"),
        (record(schemas="other"), "_cpu.so was built for other operators than those of this"),
        (record(sha256={"cpu": "other"}), "_cpu.so is not the file that the build of introkernels"),
        (record(sha256={}), "_cpu.so is not the file that the build of introkernels"),
    ],
)
def test_any_other_is_refused_with_the_reason(
    left: dict[str, Any], reason: str, library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader, "build_record", lambda: left)
    with pytest.raises(loader._UnusableError) as caught:
        loader._check_built(library, "cpu")
    assert str(caught.value).startswith(reason)


@pytest.mark.parametrize("text", ["", "{", "[]"])
def test_a_record_that_is_damaged_is_none(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "_build_status.json").write_text(text)
    monkeypatch.setattr(loader, "_PACKAGE", tmp_path)
    assert loader.build_record() == {}


def cut_short(library: Path) -> None:
    with library.open("r+b") as file:
        file.truncate(library.stat().st_size // 2)


def of_another_version(library: Path) -> None:
    status = library.with_name(Path(STATUS_FILE).name)
    status.write_text(json.dumps(json.loads(status.read_text()) | {"version": "0.0.9"}))


@NEEDS_LIBRARY
@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (cut_short, "_cpu.so is not the file that the build of introkernels"),
        (of_another_version, "_cpu.so was built for introkernels 0.0.9"),
    ],
)
def test_the_package_works_without_a_library_that_it_refuses(
    harm: Callable[[Path], None], reason: str, tmp_path: Path
) -> None:
    package = tmp_path / "introkernels"
    shutil.copytree(ROOT / "introkernels", package, ignore=shutil.ignore_patterns("__pycache__"))
    harm(package / "_cpu.so")
    code = """
import torch, introkernels as ik
logits, target = torch.randn(4, 5, requires_grad=True), torch.arange(4)
ik.distillation_loss(logits, torch.randn(4, 5), target).backward()
print(bool(logits.grad.isfinite().all()), ik.backends.status()["cpu"])
"""
    result = run(sys.executable, "-c", code, cwd=tmp_path, env=environment())
    assert result.returncode == 0, result.stdout
    warning, *_, last = result.stdout.splitlines()
    assert reason in warning
    assert last.startswith(f"True {reason}"), result.stdout
