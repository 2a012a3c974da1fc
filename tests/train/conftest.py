from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from introkernels.cli import TRAIN_EXTRA

try:
    from introkernels.train import cli as _needs_the_whole_extra  # noqa: F401
    from introkernels.train.config import TrainConfig
    from introkernels.train.experiment import run_experiment
except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] not in TRAIN_EXTRA:
        raise
    # Without the extra `train` there is nothing to test here.
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    """Small tensors on several threads of a busy machine mostly wait."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tiny() -> TrainConfig:
    """Four runs of three epochs: well under a second."""
    return TrainConfig(
        methods=("standard", "introspective_head"), seeds=2, epochs=3, train_size=40, test_size=200
    )


@pytest.fixture
def train(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Train a configuration in this process, quietly; keywords go to `run_experiment`."""

    def run(config: TrainConfig, name: str = "out", **keywords: Any) -> dict[str, Any]:
        options = {"worker_count": 1, "tensorboard": False} | keywords
        return run_experiment(config, tmp_path / name, **options)

    return run


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainConfig, Path]:
    """A finished experiment with every method, not to be changed."""
    out = tmp_path_factory.mktemp("finished") / "out"
    config = dataclasses.replace(TrainConfig(), seeds=2, epochs=4, train_size=60, test_size=200)
    run_experiment(config, out, worker_count=1, tensorboard=False)
    return config, out
