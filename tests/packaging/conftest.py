"""Wheels and environments that several packaging tests look at; each is made once."""

from __future__ import annotations

from pathlib import Path

import pytest
from building import (
    CleanEnvironment,
    build_wheel_with_pip,
    copy_sources,
    with_tiny_kernel,
    write_tiny_kernel,
)


@pytest.fixture(scope="session")
def native_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("native")
    return build_wheel_with_pip(copy_sources(folder / "tree"), folder / "out", INTROKERNELS_CPP="1")


@pytest.fixture(scope="session")
def native_install(
    native_wheel: Path, tmp_path_factory: pytest.TempPathFactory
) -> CleanEnvironment:
    return CleanEnvironment.with_wheel(tmp_path_factory.mktemp("native_env"), native_wheel)


@pytest.fixture(scope="session")
def pure_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built on a machine without a C++ compiler, switches left alone."""
    folder = tmp_path_factory.mktemp("pure")
    return build_wheel_with_pip(
        copy_sources(folder / "tree"), folder / "out", CXX="/nonexistent/c++"
    )


@pytest.fixture(scope="session")
def pure_install(pure_wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> CleanEnvironment:
    return CleanEnvironment.with_wheel(tmp_path_factory.mktemp("pure_env"), pure_wheel)


@pytest.fixture(scope="session")
def built_tiny_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_tiny_kernel(tmp_path_factory.mktemp("tiny") / "tree")


@pytest.fixture
def tiny_tree(built_tiny_tree: Path) -> Path:
    """Sources with a tiny kernel. Object files of earlier tests are there, as on any machine."""
    write_tiny_kernel(built_tiny_tree)
    return built_tiny_tree
