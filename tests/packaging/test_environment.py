"""The environment that the tests run in, and the files that set it up."""

from __future__ import annotations

import ast
import os
import re
import shutil
import sys
from collections.abc import Collection, Iterable, Iterator
from graphlib import TopologicalSorter
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from building import ROOT, run

import introkernels as ik


@pytest.mark.skipif(
    os.environ.get("INTROKERNELS_CPP") != "1" and os.environ.get("CI") != "true",
    reason="only where the C++ kernels have to be there: INTROKERNELS_CPP=1 or CI=true",
)
def test_cpp_kernels_were_really_built() -> None:
    assert ik.backends.status()["cpu"] == "loaded"
    assert "cpu" in ik.build_info()["libraries"]


@pytest.mark.skipif(
    os.environ.get("INTROKERNELS_CUDA") != "1",
    reason="only where the CUDA kernels have to be built: INTROKERNELS_CUDA=1",
)
def test_cuda_kernels_were_really_built() -> None:
    assert "cuda" in ik.build_info()["libraries"]
    assert not ik.backends.status()["cuda"].startswith("not built")


def distribution(requirement: str) -> str:
    """The normalised name in a requirement or a pin."""
    return re.split(r"[^\w.-]", requirement, maxsplit=1)[0].lower().replace("_", "-")


def project() -> dict[str, Any]:
    tomllib = pytest.importorskip("tomllib", reason="reads TOML with Python 3.11's own library")
    parsed: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
    return parsed


def third_party_imports(files: Iterable[Path]) -> set[str]:
    """Distributions of the modules that these files import, wherever in a file they are."""
    modules = set()
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                modules |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                modules.add(node.module.partition(".")[0])
    providers = metadata.packages_distributions()
    modules -= sys.stdlib_module_names | {"introkernels"}
    return {distribution(providers[module][0]) for module in modules}


def test_constraints_pin_every_direct_dependency() -> None:
    settings = project()
    direct = settings["build-system"]["requires"] + settings["project"]["dependencies"]
    for extra in settings["project"]["optional-dependencies"].values():
        direct += extra
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", pin) for pin in pins)
    assert set(map(distribution, direct)) <= set(map(distribution, pins))


def test_every_import_is_declared() -> None:
    declared = project()["project"]
    base = set(map(distribution, declared["dependencies"]))
    package = ROOT / "introkernels"
    rest = set(package.rglob("*.py"))
    # Figures are drawn by both of the extras that have it.
    plotting = package / "plotting.py"
    for extra, folder in (("train", "train"), ("bench", "bench"), ("triton", "ops/triton")):
        sources = set((package / folder).rglob("*.py"))
        if extra in ("train", "bench"):
            sources.add(plotting)
        optional = set(map(distribution, declared["optional-dependencies"][extra]))
        assert third_party_imports(sources) - base == optional
        rest -= sources
    # Type checkers alone read typing_extensions, and torch depends on it.
    assert third_party_imports(rest) - {"typing-extensions"} <= base


def our_imports(path: Path, modules: Collection[str]) -> Iterator[str]:
    """Which of our modules a file imports, those too that it names in a string to import later."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            inside = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in modules else str(node.module) for name in inside]
        else:
            text = node.value if isinstance(node, ast.Constant) else None
            names = [text] if isinstance(text, str) and "." in text else []
        yield from (name for name in names if name in modules)


@pytest.mark.parametrize("levels", [2, None], ids=["folders", "modules"])
def test_imports_go_one_way(levels: int | None) -> None:
    files = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for path in (ROOT / "introkernels").rglob("*.py")
    }

    def place(module: str) -> str:
        return ".".join(module.split(".")[:levels])

    arrows: dict[str, set[str]] = {}
    for module, path in files.items():
        used = {place(name) for name in our_imports(path, files)}
        arrows.setdefault(place(module), set()).update(used - {place(module)})
    TopologicalSorter(arrows).prepare()  # raises CycleError


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_alone_lists_every_target() -> None:
    listed = run("make", "--no-print-directory", cwd=ROOT).stdout
    text = (ROOT / "Makefile").read_text()
    (phony,) = re.findall(r"^\.PHONY: (.*)$", text, flags=re.MULTILINE)
    for target in phony.split():
        assert re.search(rf"^  make {target} +\S", listed, flags=re.MULTILINE), target
