"""Training one learner: from initial weights (or a checkpoint) to the test metrics."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, LRScheduler, MultiStepLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from introkernels.train import checkpoint
from introkernels.train.classifier import Classifier
from introkernels.train.config import TrainConfig
from introkernels.train.data import Dataset, LabelledImages, Splits, load_dataset, split
from introkernels.train.data.augment import AUGMENTATIONS
from introkernels.train.distributed import Processes
from introkernels.train.methods import Method, Setting
from introkernels.train.metrics import Evaluator
from introkernels.train.models import make_model


class DivergedError(RuntimeError):
    """The training loss is not finite any more."""


class Run:
    """The state of a run: `train_epoch` moves it on, `state` and `restore` are its memory.

    Args:
        config: the experiment.
        method: the name of the method.
        seed: of the training images, their order, initial weights and all that is drawn.
        teacher: the trained network of a method that has one.
    """

    def __init__(
        self, config: TrainConfig, method: str, seed: int, teacher: Classifier | None = None
    ) -> None:
        self.config = config
        self.identity = config.run_identity(method, seed)
        self.method: Method = config.method(method)
        self.device = torch.device(config.device)
        self.processes = Processes()
        splits = split_for(config, seed)
        # Batches are drawn on the CPU.
        self.labels = splits.train.labels
        self.splits = Splits(
            splits.train.to(self.device),
            splits.validation.to(self.device),
            splits.test.to(self.device),
        )
        torch.manual_seed(seed)
        shape, classes = image_shape_and_classes(config)
        if teacher is not None:
            teacher = teacher.to(self.device).eval().requires_grad_(False)
        self.learner = self.method.learner(
            Setting(lambda: make_model(config.model, shape, classes), classes, teacher)
        ).to(self.device)
        self.averaged = (
            AveragedModel(
                self.learner.model, multi_avg_fn=get_ema_multi_avg_fn(config.ema), use_buffers=True
            )
            if config.ema
            else None
        )
        self.optimizer = _optimizer(self.learner, config)
        self.scheduler = _scheduler(self.optimizer, config)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.precision == "float16")
        self.augment = AUGMENTATIONS[config.augmentation]
        self.order = torch.Generator().manual_seed(seed)
        if self.processes.count > 1:
            torch.manual_seed(self.processes.seed(seed))
        self.evaluate = Evaluator(classes, self.device)
        self.history: list[dict[str, float]] = []
        self.best: dict[str, float] | None = None
        self.test: dict[str, float] | None = None
        self.steps = 0
        self.step_seconds = 0.0
        self.wall_seconds = 0.0
        self.trained = self.processes.wrap(self.learner)

    @property
    def epoch(self) -> int:
        """Epochs done."""
        return len(self.history)

    @property
    def finished(self) -> bool:
        return self.test is not None

    @property
    def model(self) -> Classifier:
        """The network that is evaluated: with averaged weights, if they are averaged."""
        if self.averaged is None:
            return self.learner.model
        model: Classifier = self.averaged.module  # type: ignore[assignment]
        return model

    def train_epoch(self) -> None:
        started = time.perf_counter()
        if self.epoch == 0:
            self.learner.prepare(self.splits.train)
        learning_rate = float(self.scheduler.get_last_lr()[0])
        trained = self._pass_over(self.splits.train)
        self.learner.end_epoch()
        self.step_seconds += time.perf_counter() - started
        if not math.isfinite(trained["loss"]):
            name, seed = self.identity["method"], self.identity["seed"]
            raise DivergedError(
                f"{name}, seed {seed}: the training loss of epoch {self.epoch + 1} is "
                f"{trained['loss']}; lower learning_rate (now {self.config.learning_rate:g}) "
                "or soften the method's settings"
            )
        self.scheduler.step()
        self._measure(learning_rate, trained)
        self.wall_seconds += time.perf_counter() - started

    def _measure(self, learning_rate: float, trained: dict[str, float]) -> None:
        """Note what an epoch came to, and the test metrics of the last and of the best one."""
        validated = self._evaluated(self.splits.validation)
        measured: dict[str, float] = {"epoch": self.epoch + 1, "learning_rate": learning_rate}
        measured |= {f"train_{name}": value for name, value in trained.items()}
        measured |= {f"validation_{name}": value for name, value in validated.items()}
        better = all(_quality(validated) > _quality(past, "validation_") for past in self.history)
        self.history.append(measured)
        last = self.epoch == self.config.epochs
        if better or last:
            tested = self._evaluated(self.splits.test)
            if better:
                self.best = {"epoch": self.epoch, **tested}
            if last:
                self.test = tested

    def _evaluated(self, data: LabelledImages) -> dict[str, float]:
        return self.processes.from_first(lambda: self.evaluate(self.model, data))

    def _pass_over(self, data: LabelledImages) -> dict[str, float]:
        """Train on every image once; mean loss, its parts and the accuracy on the way."""
        self.learner.train()
        sums: dict[str, Tensor] = {}
        rows = 0
        for index in self.method.batches(self.labels, self.config.batch_size, self.order):
            for name, value in self._step(data, index.reshape(len(index), -1)).items():
                sums[name] = sums.get(name, torch.zeros_like(value)) + value * len(index)
            rows += len(index)
        totals = self.processes.total(torch.stack(list(sums.values())))
        count = rows * self.processes.count
        return dict(zip(sums, (totals / count).tolist(), strict=True))

    def _step(self, data: LabelledImages, rows: Tensor) -> dict[str, Tensor]:
        """One step of the optimiser on images ``rows [B, n]``; what this process has to log."""
        mine, weight = self.processes.share(rows)
        # As many in every process, which has one row more than another at most.
        fewest = max(1, len(rows) // self.processes.count)
        parts = mine.tensor_split(min(self.config.accumulate, fewest))
        logged: dict[str, Tensor] = {}
        self.optimizer.zero_grad()
        for number, part in enumerate(parts, start=1):
            share = len(part) / len(mine)
            batch = data[part.flatten().to(self.device)]
            more = number < len(parts)
            with self.processes.without_averaging(self.trained, wanted=more):
                with self._autocast():
                    output = self.trained(self.augment(batch.images, None), batch.labels)
                self.scaler.scale(output.loss * (share * weight)).backward()
            right = (output.logits.detach().argmax(dim=1) == batch.labels).float().mean()
            values = {"loss": output.loss.detach(), "accuracy": right} | output.parts
            for name, value in values.items():
                sofar = logged.get(name, torch.zeros_like(value, dtype=torch.float64))
                logged[name] = sofar + value * (share * weight)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.averaged is not None:
            self.averaged.update_parameters(self.learner.model)
        self.steps += 1
        return logged

    def _autocast(self) -> torch.autocast:
        precision = self.config.precision
        return torch.autocast(
            self.device.type,
            dtype=torch.float16 if precision == "float16" else torch.bfloat16,
            enabled=precision != "float32",
        )

    def state(self) -> dict[str, Any]:
        rng = {"torch": torch.get_rng_state(), "order": self.order.get_state()}
        if self.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state(self.device)
        return {
            "identity": self.identity,
            "learner": self.learner.state_dict(),
            "model": self.model.state_dict(),
            "averaged": None if self.averaged is None else self.averaged.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "rng": rng,
            "history": self.history,
            "best": self.best,
            "test": self.test,
            "steps": self.steps,
            "step_seconds": self.step_seconds,
            "wall_seconds": self.wall_seconds,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Take over the state of a run of the same identity.

        Raises:
            ValueError, RuntimeError: something is missing, or has another shape.
        """
        checkpoint.check_layout(state, self.state())
        self.learner.load_state_dict(state["learner"])
        if self.averaged is not None:
            self.averaged.load_state_dict(state["averaged"])
        self.optimizer.load_state_dict(state["optimizer"])
        self._check_moments()
        self.scheduler.load_state_dict(state["scheduler"])
        self.scaler.load_state_dict(state["scaler"])
        torch.set_rng_state(state["rng"]["torch"])
        self.order.set_state(state["rng"]["order"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(state["rng"]["cuda"], self.device)
        for name in ("history", "best", "test", "steps", "step_seconds", "wall_seconds"):
            setattr(self, name, state[name])

    def _check_moments(self) -> None:
        """Raise ValueError where the optimiser, which doesn't look itself, would go astray."""
        state = self.optimizer.state
        if len({frozenset(values) for values in state.values()}) > 1:
            raise ValueError("state.optimizer.state lacks a field of some parameters")
        for parameter, values in state.items():
            for name, value in values.items():
                if isinstance(value, Tensor) and value.shape not in ((), parameter.shape):
                    raise ValueError(
                        f"{name} of a parameter has shape {list(value.shape)}, expected "
                        f"{list(parameter.shape)}"
                    )

    def record(self) -> dict[str, Any]:
        """What is written for people and for the summary."""
        return {
            "run": self.identity,
            "finished": self.finished,
            "test": self.test,
            "best": self.best,
            "wall_seconds": self.wall_seconds,
            "step_milliseconds": 1000 * self.step_seconds / self.steps if self.steps else None,
            "history": self.history,
        }


def dataset_of(config: TrainConfig) -> Dataset:
    """The data set of an experiment."""
    return load_dataset(config.dataset, Path(config.data_dir), image_size=config.image_size)


def image_shape_and_classes(config: TrainConfig) -> tuple[tuple[int, int, int], int]:
    """``(channels, height, width)`` of an image, and the number of classes."""
    dataset = dataset_of(config)
    return dataset.input_shape, len(dataset.class_names)


def split_for(config: TrainConfig, seed: int) -> Splits:
    """The images of a run with that seed."""
    return split(
        dataset_of(config),
        train_size=config.train_size,
        validation_size=config.validation_size,
        test_size=config.test_size,
        split_seed=config.split_seed,
        subset_seed=seed,
        label_noise=config.label_noise,
    )


def _quality(measured: dict[str, float], prefix: str = "") -> tuple[float, float]:
    """What the best epoch is chosen by: accuracy, and NLL among equals."""
    return measured[f"{prefix}accuracy"], -measured[f"{prefix}nll"]


def _optimizer(learner: torch.nn.Module, config: TrainConfig) -> Optimizer:
    parameters = [parameter for parameter in learner.parameters() if parameter.requires_grad]
    common: dict[str, Any] = {
        "lr": config.learning_rate,
        "weight_decay": config.weight_decay,
        "fused": torch.device(config.device).type in ("cpu", "cuda"),
    }
    if config.optimizer == "sgd":
        return SGD(parameters, momentum=config.momentum, nesterov=config.momentum > 0, **common)
    return AdamW(parameters, **common)


def _scheduler(optimizer: Optimizer, config: TrainConfig) -> LRScheduler:
    if config.schedule == "cosine":
        return CosineAnnealingLR(optimizer, config.epochs)
    if config.schedule == "step":
        return MultiStepLR(optimizer, list(config.milestones), gamma=config.decay)
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
