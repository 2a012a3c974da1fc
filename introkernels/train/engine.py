"""One run: one method, one seed, from the initial weights (or a checkpoint) to the test metrics."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, LRScheduler

from introkernels.train import checkpoint, records
from introkernels.train.classifier import Classifier
from introkernels.train.config import TrainConfig
from introkernels.train.data import LabelledImages, Splits, load_dataset, split
from introkernels.train.methods import Method
from introkernels.train.metrics import Evaluator
from introkernels.train.models import MODELS

CHECKPOINT = "checkpoint.pt"


class DivergedError(RuntimeError):
    """The training loss is not finite any more."""


class Run:
    """The state of a run: `train_epoch` moves it on, `state` and `restore` are its memory."""

    def __init__(self, config: TrainConfig, method: str, seed: int) -> None:
        self.config = config
        self.identity = config.run_identity(method, seed)
        self.method: Method = config.method(method)
        self.device = torch.device(config.device)
        self.dataset = load_dataset(config.dataset)
        splits = split(
            self.dataset,
            train_size=config.train_size,
            validation_size=config.validation_size,
            test_size=config.test_size,
            split_seed=config.split_seed,
            subset_seed=seed,
        )
        self.splits = Splits(
            splits.train.to(self.device),
            splits.validation.to(self.device),
            splits.test.to(self.device),
        )
        classes = len(self.dataset.class_names)
        torch.manual_seed(seed)
        self.model: Classifier = MODELS[config.model](self.dataset.input_shape, classes)
        self.model.to(self.device)
        self.optimizer = AdamW(
            self.model.parameters(),
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
            fused=self.device.type in ("cpu", "cuda"),
        )
        self.scheduler = _scheduler(self.optimizer, config)
        self.order = torch.Generator().manual_seed(seed)
        self.evaluate = Evaluator(classes, self.device)
        self.history: list[dict[str, float]] = []
        self.test: dict[str, float] | None = None
        self.step_seconds = 0.0
        self.wall_seconds = 0.0

    @property
    def epoch(self) -> int:
        """Epochs done."""
        return len(self.history)

    @property
    def finished(self) -> bool:
        return self.test is not None

    def train_epoch(self) -> None:
        started = time.perf_counter()
        learning_rate = float(self.scheduler.get_last_lr()[0])
        trained = self._pass_over(self.splits.train)
        self.step_seconds += time.perf_counter() - started
        if not math.isfinite(trained["loss"]):
            name, seed = self.identity["method"], self.identity["seed"]
            raise DivergedError(
                f"{name}, seed {seed}: the training loss of epoch {self.epoch + 1} is "
                f"{trained['loss']}; lower learning_rate (now {self.config.learning_rate:g}) "
                "or soften the method's settings"
            )
        self.scheduler.step()
        validated = self.evaluate(self.model, self.splits.validation)
        measured: dict[str, float] = {"epoch": self.epoch + 1, "learning_rate": learning_rate}
        measured |= {f"train_{name}": value for name, value in trained.items()}
        measured |= {f"validation_{name}": value for name, value in validated.items()}
        self.history.append(measured)
        if self.epoch == self.config.epochs:
            self.test = self.evaluate(self.model, self.splits.test)
        self.wall_seconds += time.perf_counter() - started

    def _pass_over(self, data: LabelledImages) -> dict[str, float]:
        """Train on every image once; mean loss, its parts and the accuracy on the way."""
        self.model.train()
        sums: dict[str, Tensor] = {}
        for index in torch.randperm(len(data), generator=self.order).split(self.config.batch_size):
            batch = data[index.to(self.device)]
            output = self.method.loss(self.model, batch.images, batch.labels)
            self.optimizer.zero_grad()
            output.loss.backward()
            self.optimizer.step()
            right = (output.logits.detach().argmax(dim=1) == batch.labels).float().mean()
            values = {"loss": output.loss.detach(), "accuracy": right} | output.parts
            for name, value in values.items():
                sums[name] = sums.get(name, torch.zeros_like(value)) + value * len(index)
        return {name: (total / len(data)).item() for name, total in sums.items()}

    def state(self) -> dict[str, Any]:
        rng = {"torch": torch.get_rng_state(), "order": self.order.get_state()}
        if self.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state(self.device)
        return {
            "identity": self.identity,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "rng": rng,
            "history": self.history,
            "test": self.test,
            "step_seconds": self.step_seconds,
            "wall_seconds": self.wall_seconds,
        }

    def restore(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        torch.set_rng_state(state["rng"]["torch"])
        self.order.set_state(state["rng"]["order"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(state["rng"]["cuda"], self.device)
        self.history = state["history"]
        self.test = state["test"]
        self.step_seconds = state["step_seconds"]
        self.wall_seconds = state["wall_seconds"]

    def record(self) -> dict[str, Any]:
        """What is written for people and for the summary."""
        steps = self.epoch * math.ceil(self.config.train_size / self.config.batch_size)
        return {
            "run": self.identity,
            "finished": self.finished,
            "test": self.test,
            "wall_seconds": self.wall_seconds,
            "step_milliseconds": 1000 * self.step_seconds / steps if steps else None,
            "history": self.history,
        }


def train_run(
    config: TrainConfig,
    method: str,
    seed: int,
    directory: Path,
    *,
    checkpoint_every: int,
    tensorboard: bool,
    on_epoch: Callable[[int], None],
) -> dict[str, Any]:
    """Train one run to its end, from its checkpoint in `directory` if there is one.

    Everything written is a function of the last checkpoint: it is saved first, so a process killed
    at any moment leaves a directory that continues to the same result. `on_epoch` is called with
    the number of epochs done since it was called last. Returns the record in `metrics.json`.
    """
    with reproducible(config):
        run = Run(config, method, seed)
        path = directory / CHECKPOINT
        state = checkpoint.load(path, run.identity)
        if state is not None:
            run.restore(state)
            on_epoch(run.epoch)
        with records.TensorBoard(
            directory, wanted=tensorboard and not run.finished, first_epoch=run.epoch + 1
        ) as board:
            while not run.finished:
                run.train_epoch()
                board.log(run.epoch, run.history[-1])
                if run.finished or run.epoch % checkpoint_every == 0:
                    checkpoint.save(path, run.state())
                    if not run.finished:
                        records.write_run(directory, run.record())
                on_epoch(1)
        records.write_run(directory, run.record())
        return run.record()


def load_model(config: TrainConfig, method: str, seed: int, directory: Path) -> Classifier:
    """The trained model of a run, in evaluation mode on the CPU.

    Raises:
        CheckpointError: there is no checkpoint, or not one of this run.
    """
    path = directory / CHECKPOINT
    state = checkpoint.load(path, config.run_identity(method, seed))
    if state is None:
        raise checkpoint.CheckpointError(f"{path} does not exist")
    dataset = load_dataset(config.dataset)
    model = MODELS[config.model](dataset.input_shape, len(dataset.class_names))
    model.load_state_dict(state["model"])
    return model.eval()


def _scheduler(optimizer: AdamW, config: TrainConfig) -> LRScheduler:
    if config.schedule == "cosine":
        return CosineAnnealingLR(optimizer, config.epochs)
    return ConstantLR(optimizer, factor=1.0, total_iters=0)


@contextmanager
def reproducible(config: TrainConfig) -> Iterator[None]:
    """Fix what else decides the bits of a run, and put it back afterwards."""
    threads = torch.get_num_threads()
    device = torch.device(config.device)
    cuda = [device.index or 0] if device.type == "cuda" else []
    with (
        torch.random.fork_rng(devices=cuda),
        torch.backends.cudnn.flags(
            enabled=torch.backends.cudnn.enabled, benchmark=False, deterministic=True
        ),
    ):
        torch.set_num_threads(config.threads)
        try:
            yield
        finally:
            torch.set_num_threads(threads)
