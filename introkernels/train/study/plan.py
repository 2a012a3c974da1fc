"""The plan of a study: a TOML file that fixes every choice before there is a result."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, get_type_hints

from introkernels.train.config import ConfigError, TrainConfig
from introkernels.train.methods import METHODS
from introkernels.train.runs import fingerprint

GROUPS: dict[str, str] = {
    "standard": "standard",
    "label_smoothing": "regularisation",
    "confidence_penalty": "regularisation",
    "dropout": "regularisation",
    "mixup": "regularisation",
    "online_label_smoothing": "self-teaching",
    "cs_kd": "self-teaching",
    "tf_kd_self": "self-teaching",
    "tf_kd_reg": "self-teaching",
    "kd": "teacher",
    "born_again": "teacher",
    "deep_mutual_learning": "peers",
    "introspective_permuted": "control",
    "introspective_mean": "control",
    "introspective_inverted": "control",
}
"""What a method is compared as; the others are introspective or components of a teacher."""

# What `[train]` may say: a study sets the rest itself.
_SET_BY_STUDY = ("methods", "seeds", "first_seed", "hyperparameters", "device", "data_dir")
_SEARCH_SEED = 0


class PlanError(ValueError):
    """A plan that can't be carried out: the message names the entry and what is allowed."""


@dataclass(frozen=True)
class Cell:
    """Conditions under which all methods are compared.

    Attributes:
        name: for people.
        changes: fields of `TrainConfig`.
    """

    name: str
    changes: dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """A study.

    Attributes:
        name: of the study.
        representative: the introspective method that stands for introspective learning in the
            verdicts; named here, so that it is no choice made after the results.
        margin: percentage points of accuracy that count as nothing where a claim is that one method
            is as good as another.
        trials: settings tried for each method in each cell.
        tuning_seeds: runs of each trial.
        seeds: fresh runs of the chosen setting.
        train: fields of `TrainConfig`, for all runs; "all" images are what is None there.
        cells: lists of values of fields of `TrainConfig`; every combination is a cell.
        space: values to try of fields of `TrainConfig`, for every method.
        methods: for each method values to try of its hyperparameters; a value alone is fixed. It is
            called by its own name, or by another one and names itself as ``method``: so one method
            can take part in several forms.
    """

    name: str
    representative: str
    margin: float
    trials: int
    tuning_seeds: int
    seeds: int
    train: dict[str, Any]
    cells: dict[str, list[Any]]
    space: dict[str, list[Any]]
    methods: dict[str, dict[str, Any]]

    def __post_init__(self) -> None:
        for name in ("trials", "tuning_seeds", "seeds"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        _require(self.margin >= 0, "margin", self.margin, "at least 0")
        known = {field.name for field in dataclasses.fields(TrainConfig)} - set(_SET_BY_STUDY)
        for part in ("train", "cells", "space"):
            for name in getattr(self, part):
                _require(name in known, part, repr(name), f"one of {', '.join(sorted(known))}")
        for name, values in {**self.cells, **self.space}.items():
            _require(isinstance(values, list) and values, name, values, "a list of values")
        _require(bool(self.methods), "methods", "none", "at least one")
        for name in self.methods:
            registered = self.registered(name)
            _require(
                registered in METHODS, "methods", repr(registered), f"one of {', '.join(METHODS)}"
            )
        _require(
            self.representative in self.methods
            and METHODS[self.registered(self.representative)].introspective,
            "representative",
            repr(self.representative),
            "an introspective one of the methods",
        )
        # Nothing that can't be made is found out after hours.
        for cell, name in itertools.product(self.list_cells(), self.methods):
            for settings in self.settings(name):
                self.config(cell, name, settings)

    def only(self, methods: Sequence[str]) -> Plan:
        """The study of some of its methods; their rows are the same.

        Raises:
            PlanError: one of them is not in the plan.
        """
        for name in methods:
            _require(
                name in self.methods, "methods", repr(name), f"one of {', '.join(self.methods)}"
            )
        chosen = [name for name in self.methods if name in {*methods, self.representative}]
        return dataclasses.replace(self, methods={name: self.methods[name] for name in chosen})

    def registered(self, name: str) -> str:
        """What a method of the plan is called in `introkernels.train.methods`."""
        return str(self.methods[name].get("method", name))

    def list_cells(self) -> list[Cell]:
        """Every combination of the values in `cells`."""
        return [
            Cell(self._name(changes), changes)
            for values in itertools.product(*self.cells.values())
            for changes in [dict(zip(self.cells, values, strict=True))]
        ]

    def settings(self, method: str) -> list[dict[str, Any]]:
        """The settings that are tried for a method: as many for each.

        They are drawn from all combinations without replacement, by numbers that the plan alone
        decides. Names of a method's own hyperparameters follow its name and a dot.

        Raises:
            PlanError: there are fewer combinations than trials.
        """
        space = self.searched(method)
        count = math.prod(map(len, space.values()))
        _require(
            count >= self.trials,
            f"methods.{method}",
            f"{count} settings",
            f"at least {self.trials}, one for each trial",
        )
        draw = random.Random(f"{_SEARCH_SEED} {method}")
        chosen = sorted(draw.sample(range(count), self.trials))
        combinations = list(itertools.product(*space.values()))
        return [dict(zip(space, combinations[index], strict=True)) for index in chosen]

    def searched(self, method: str) -> dict[str, list[Any]]:
        """The values that are tried for a method, those of one value left out."""
        own = {
            f"{method}.{name}": values
            for name, values in self.methods[method].items()
            if isinstance(values, list)
        }
        return {**self.space, **own}

    def config(
        self, cell: Cell, method: str, settings: Mapping[str, Any], **others: Any
    ) -> TrainConfig:
        """The experiment of a method with its settings in a cell.

        Raises:
            PlanError: a setting can't be.
        """
        fixed = {
            name: value
            for name, value in self.methods[method].items()
            if name != "method" and not isinstance(value, list)
        }
        own = {
            name.removeprefix(f"{method}."): value
            for name, value in settings.items()
            if name.startswith(f"{method}.")
        }
        recipe = {name: value for name, value in settings.items() if "." not in name}
        fields = {name: _plain(value) for name, value in {**self.train, **cell.changes}.items()}
        try:
            made = METHODS[self.registered(method)](**fixed, **own)
            return TrainConfig(methods=(made.name,), **fields, **recipe, **others).with_method(made)
        except (ConfigError, TypeError, ValueError) as error:
            raise PlanError(f"methods.{method} in {cell.name}: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return dataclasses.asdict(self)

    @property
    def hash(self) -> str:
        """Tells plans apart."""
        return fingerprint(self.to_dict())

    def _name(self, changes: dict[str, Any]) -> str:
        fields = {**self.train, **changes}
        default = TrainConfig()
        parts = [str(fields.get("dataset", default.dataset))]
        if "train_size" in changes:
            size = changes["train_size"]
            parts.append(f"{size} images")
        if "label_noise" in changes:
            noise = changes["label_noise"]
            parts.append(f"{noise:.0%} label noise" if noise else "clean labels")
        parts += [
            f"{name} {value}"
            for name, value in changes.items()
            if name not in ("dataset", "train_size", "label_noise")
        ]
        return ", ".join(parts)


def presets() -> list[str]:
    """The names of the plans that come with the package."""
    folder = resources.files(__package__) / "presets"
    return sorted(Path(file.name).stem for file in folder.iterdir() if file.name.endswith(".toml"))


def load_preset(name: str) -> Plan:
    """A plan that comes with the package.

    Raises:
        PlanError: there is none of that name.
    """
    _require(name in presets(), "preset", repr(name), f"one of {', '.join(presets())}")
    return parse((resources.files(__package__) / "presets" / f"{name}.toml").read_text())


def load(path: Path) -> Plan:
    """A plan from a file.

    Raises:
        PlanError: the file can't be read, or describes no plan.
    """
    try:
        return parse(path.read_text())
    except OSError as error:
        raise PlanError(f"plan: {path} can't be read ({error.strerror})") from error


def parse(text: str) -> Plan:
    """A plan from TOML.

    Raises:
        PlanError: it is not TOML, or describes no plan.
    """
    try:
        found = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise PlanError(f"plan: not valid TOML ({error})") from error
    kinds = get_type_hints(Plan)
    for name in found:
        _require(name in kinds, "plan", repr(name), f"one of {', '.join(kinds)}")
    for name, kind in kinds.items():
        _require(name in found, "plan", f"no {name}", f"all of {', '.join(kinds)}")
        allowed = (int, float) if kind is float else getattr(kind, "__origin__", kind)
        right = isinstance(found[name], allowed) and not isinstance(found[name], bool)
        _require(right, name, repr(found[name]), f"a value of type {kind}")
    for name, space in found["methods"].items():
        _require(isinstance(space, dict), f"methods.{name}", repr(space), "a table")
    return Plan(**found)


def _plain(value: Any) -> Any:
    """What an experiment takes for a value of TOML, which has no None."""
    if value == "all":
        return None
    return tuple(value) if isinstance(value, list) else value


def _require(condition: object, name: str, got: object, allowed: str) -> None:
    if not condition:
        raise PlanError(f"{name}: got {got}, expected {allowed}")
