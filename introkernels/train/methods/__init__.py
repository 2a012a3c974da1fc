"""Training methods, one small file each: every module in this folder is imported and may register.

To add a method, put a file here with a dataclass of its hyperparameters::

    @register("my_method")
    @dataclass(frozen=True)
    class MyMethod(Method):
        \"\"\"Shown by `introkernels train --help`.\"\"\"

        summary: ClassVar[str] = "one sentence for the report"

        strength: float = 0.5
        \"\"\"Shown by `introkernels train --help`.\"\"\"

        def loss(self, model, inputs, target):
            logits = model(inputs)
            return LossOutput(..., logits)

A method that trains several networks, or remembers something between steps, defines `learner`
instead of `loss`; one that learns from a trained network names it in `teacher`; one that needs
images in pairs or groups defines `batches`. `introkernels.train.methods.base` explains each.
"""

from __future__ import annotations

import importlib
import pkgutil

from introkernels.train.methods.base import (
    REGISTRY,
    Learner,
    LossOutput,
    Method,
    Setting,
    Teacher,
    register,
)

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")


def _reading_order(name: str) -> tuple[bool, bool, str]:
    return name != "standard", REGISTRY[name].introspective, name


METHODS: dict[str, type[Method]] = {
    name: REGISTRY[name] for name in sorted(REGISTRY, key=_reading_order)
}
"""Every method by name: `standard`, then the other baselines, then the introspective ones and
their controls."""

BY_EXPLANATION: dict[str, str] = {
    "exact": "introspective_input",
    "sketch": "introspective_sketch",
    "projection": "introspective_projection",
    "head": "introspective_head",
}
"""The training method that uses each method of `introkernels.explain`."""

__all__ = [
    "BY_EXPLANATION",
    "METHODS",
    "Learner",
    "LossOutput",
    "Method",
    "Setting",
    "Teacher",
    "register",
]
