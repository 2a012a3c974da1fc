"""Whether measurements are older than the code they measure.

A record names the commit that it was measured at. Its row is out of date if a file that its
operator is made of was changed or removed between that commit and the files as they lie in the
checkout, committed or not. A file that was only added changes nothing by itself: one that uses it
has changed too. What measures (introkernels.bench) is not what is measured, apart from the
operators' inputs and eager forms.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from enum import Enum
from functools import cache
from pathlib import Path

from introkernels.bench.records import Record
from introkernels.checkout import GitError, git


class Age(Enum):
    """How a measurement stands to the code in the checkout; the value marks it in tables."""

    CURRENT = ""
    OLDER = "†"
    UNKNOWN = "‡"


AgeOf = Callable[[Record], Age]
"""Tells the age of a record."""

NOTES = {
    Age.OLDER: "† older than the code: files that it measures have changed since.",
    Age.UNKNOWN: "‡ age unknown: not measured at a commit of this checkout.",
}

# What a call of any operator runs through, and how it is built.
_EVERY_OPERATOR = (
    "csrc/common",
    "introkernels/__init__.py",
    "introkernels/autograd.py",
    "introkernels/backends.py",
    "introkernels/bench/operators",
    "introkernels/checks.py",
    "introkernels/functional",
    "introkernels/ops",
    "introkernels/options.py",
    "introkernels/reference.py",
    "introkernels/teachers.py",
    "introkernels/types.py",
    "setup.py",
)
_ON_CPU = ("csrc/cpu", ":(exclude)introkernels/ops/triton")
_ON_GPU = ("csrc/cuda", "setup_cuda.py")
# Whatever is not one loss or one statistic is a part of training.
_SINGLE = (
    *("introspective", "statistics", "distillation", "similarity"),
    *(
        f"{loss}-{way}"
        for loss in ("distillation", "similarity")
        for way in ("forward", "backward")
    ),
    "confident-forward",
    *("head", "head-ce", "head-kl"),
)
_TRAINING = (
    "introkernels/bank.py",
    "introkernels/explain",
    "introkernels/generators.py",
    "introkernels/modules.py",
    "introkernels/objective.py",
    "introkernels/train/classifier.py",
    "introkernels/train/models",
)


def dependencies(operator: str, on_gpu: bool) -> tuple[str, ...]:
    """The files and folders, as git takes them, that ``operator`` is made of."""
    device = _ON_GPU if on_gpu else _ON_CPU
    training = () if operator in _SINGLE else _TRAINING
    return (*_EVERY_OPERATOR, *training, *device)


def fresh(record: Record) -> Age:
    """The age of what was measured just now."""
    return Age.CURRENT


def ages(root: Path | None) -> AgeOf:
    """What tells ages by the files as they lie now; it asks git once for each kind of record.

    Args:
        root: the project's folder in its checkout; None where there is none: then no age is known.
    """

    @cache
    def age(revision: str, paths: tuple[str, ...]) -> Age:
        assert root is not None
        try:
            git(root, "cat-file", "-e", f"{revision}^{{commit}}")
            changed = git(root, "diff", "--name-only", "--diff-filter=a", revision, "--", *paths)
        except GitError:
            return Age.UNKNOWN
        return Age.OLDER if changed else Age.CURRENT

    def of(record: Record) -> Age:
        commit = record["commit"]
        # Nobody can tell any more which changes a commit was measured with.
        if root is None or commit is None or commit["changed"]:
            return Age.UNKNOWN
        on_gpu = "gpu" in record["machine"]
        return age(commit["revision"], dependencies(record["operator"], on_gpu))

    return of


def notes(records: Iterable[Record], age_of: AgeOf) -> list[str]:
    """What the marks of these records mean: one sentence for each mark that there is."""
    marked = {age_of(record) for record in records}
    return [note for age, note in NOTES.items() if age in marked]
