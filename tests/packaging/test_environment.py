"""The environment that the tests run in, and the files that set it up."""

from __future__ import annotations

import os
import re
import shutil
import sys

import pytest
from building import ROOT, run

import introkernels as ik


@pytest.mark.skipif(
    os.environ.get("INTROKERNELS_CPP") != "1" and os.environ.get("CI") != "true",
    reason="only where the C++ kernels have to be there: INTROKERNELS_CPP=1 or CI=true",
)
def test_cpp_kernels_were_really_built() -> None:
    assert ik.backends.status()["cpu"] == "loaded"
    assert ik.build_info()["libraries"] == ["cpu"]


@pytest.mark.skipif(sys.version_info < (3, 11), reason="reads TOML with the standard library")
def test_constraints_pin_every_direct_dependency() -> None:
    import tomllib

    def name(requirement: str) -> str:
        return re.split(r"[^\w.-]", requirement, maxsplit=1)[0].lower().replace("_", "-")

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    direct = project["build-system"]["requires"] + project["project"]["dependencies"]
    for extra in project["project"]["optional-dependencies"].values():
        direct += extra
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", pin) for pin in pins)
    assert {name(requirement) for requirement in direct} <= {name(pin) for pin in pins}


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_alone_lists_every_target() -> None:
    listed = run("make", "--no-print-directory", cwd=ROOT).stdout
    text = (ROOT / "Makefile").read_text()
    (phony,) = re.findall(r"^\.PHONY: (.*)$", text, flags=re.MULTILINE)
    for target in phony.split():
        assert re.search(rf"^  make {target} +\S", listed, flags=re.MULTILINE), target
