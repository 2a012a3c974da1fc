"""Which explanation method suits the network of an experiment, before and after its training."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import introkernels as ik
from introkernels.explain import MethodComparison
from introkernels.train import files
from introkernels.train.config import TrainConfig
from introkernels.train.engine import image_shape_and_classes, reproducible, split_for
from introkernels.train.experiment import run_directory
from introkernels.train.models import make_model
from introkernels.train.report import explained_method
from introkernels.train.runs import load_model
from introkernels.train.summary import plain

AUDIT = "explain_audit.json"
MOST_IMAGES = 100


@dataclass(frozen=True)
class Audit:
    """The methods of `introkernels.explain` on the model of one run, in training mode.

    Attributes:
        method: the training method of that run.
        seed: its seed.
        images: how many validation images were explained at once.
        untrained: with the initial weights.
        trained: with the weights after the last epoch.
    """

    method: str
    seed: int
    images: int
    untrained: MethodComparison
    trained: MethodComparison


def write(config: TrainConfig, out: Path) -> Audit:
    """Compare the methods on the first seed's model, and write `explain_audit.json`.

    The model is that of the method which the report explains.

    Raises:
        CheckpointError: the run is not in `out`, or damaged.
    """
    method, seed = explained_method(list(config.methods)), config.first_seed
    with reproducible(config):
        torch.manual_seed(seed)
        device = torch.device(config.device)
        model = make_model(config.model, *image_shape_and_classes(config)).to(device)
        images = min(MOST_IMAGES, config.validation_size)
        batch = split_for(config, seed).validation[torch.arange(images)].to(device)

        def compared() -> MethodComparison:
            # Explained as it is trained: where dropout or BatchNorm make a difference, an
            # explanation costs a forward pass of its own.
            model.train()
            return ik.explain.compare_methods(
                model,
                batch.images,
                batch.labels,
                center=getattr(config.method(method), "center", False),
                probes=config.hyperparameters.introspective_sketch.probes,
                generator=torch.Generator(device).manual_seed(seed),
            )

        untrained = compared()
        trained = load_model(config, method, seed, run_directory(out, method, seed))
        model.load_state_dict(trained.state_dict())
        audit = Audit(method, seed, images, untrained, compared())
    content = {"method": method, "seed": seed, "images": images} | {
        state: _content(getattr(audit, state)) for state in ("untrained", "trained")
    }
    files.write_json(out / AUDIT, content)
    return audit


def _content(comparison: MethodComparison) -> dict[str, Any]:
    rows = [{name: plain(value) for name, value in asdict(row).items()} for row in comparison.rows]
    return {"rows": rows, "recommended": comparison.recommended}
