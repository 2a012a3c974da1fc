"""Which method to use for a model: each one's agreement with the exact one, its time and memory."""

from __future__ import annotations

import math
import statistics
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from introkernels import checks
from introkernels.explain import policy
from introkernels.explain.stats import METHODS, Method, class_explanation_stats
from introkernels.teachers import similarities
from introkernels.types import ExplanationStats

# What the sketch reaches with 8 probes on trained and untrained networks.
ENOUGH = 0.95

_NOTES: dict[str, str] = {
    "exact": "",
    "projection": "its own similarity, next to the exact cosines",
    "sketch": "",
    "head": "explains the last layer's features, not the input",
}


Explained = tuple[Tensor, ExplanationStats]


@dataclass(frozen=True)
class MethodAgreement:
    """What one method gives of a batch, and what it takes.

    Attributes:
        method: its name.
        correlation: of its similarities with the exact cosines, over all rows and other classes
            than the target; NaN where one of them is constant.
        mean_absolute_error: mean distance of the two.
        same_top_class: share of rows in which the other class most like the target is the same.
        seconds: median time of a call, the training forward among it.
        memory_bytes: the most bytes of tensors that a call held at any time, beyond those before.
        note: what a reader of the row has to know; or why the method can't be used with this
            model, where the figures are NaN.
    """

    method: str
    correlation: float
    mean_absolute_error: float
    same_top_class: float
    seconds: float
    memory_bytes: int
    note: str


@dataclass(frozen=True)
class MethodComparison:
    """The methods on one batch; ``str()`` of it is a table.

    Attributes:
        rows: one for each method, the exact one first.
        recommended: the fastest method whose correlation is at least 0.95.
    """

    rows: tuple[MethodAgreement, ...]
    recommended: str

    def __str__(self) -> str:
        header = ("method", "correlation", "mean error", "same top", "ms", "MB", "")
        lines = [header, *(self.cells(row) for row in self.rows)]
        widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
        table = [
            "  ".join(
                cell.ljust(width) if column in (0, len(header) - 1) else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        ]
        return "\n".join([*table, f"recommended: {self.recommended}"])

    @staticmethod
    def cells(row: MethodAgreement) -> tuple[str, ...]:
        """A row as text: numbers in the units of the table's header."""
        return (
            row.method,
            f"{row.correlation:.3f}",
            f"{row.mean_absolute_error:.3f}",
            f"{100 * row.same_top_class:.0f} %",
            f"{1e3 * row.seconds:.1f}",
            f"{row.memory_bytes / 1e6:.1f}",
            row.note,
        )


@policy.untraced
def compare_methods(
    model: nn.Module,
    inputs: Tensor | tuple[Any, ...],
    target: Tensor,
    *,
    methods: Sequence[Method] = METHODS,
    repeats: int = 3,
    **keywords: Any,
) -> MethodComparison:
    """Try each method on a batch, next to the exact one.

    The model's buffers, training flags and gradients and PyTorch's random numbers are left as they
    were; see `class_explanation_stats` for what is not, and for ``torch.compile``.

    Args:
        model: as `class_explanation_stats` takes it.
        inputs: a batch ``[B, *S]``, or a tuple of tensors.
        target: ``[B]`` int64.
        methods: which methods; ``"exact"`` is always among them.
        repeats: how often each is timed, in turns; at least 1. One more call of each, whose result
            is compared and whose memory is counted, is not timed.
        keywords: other arguments of `class_explanation_stats`, for all methods; ``at`` and
            ``mode`` don't concern ``"head"``.

    Raises:
        TypeError, ValueError, IndexError: as `class_explanation_stats` does for ``"exact"``. What
            another method can't do is told in its row.
    """
    for method in methods:
        checks.choice("methods", method, METHODS)
    checks.positive_integer("repeats", repeats)
    checks.int64_tensor("target", target)
    names: list[Method] = list(dict.fromkeys(("exact", *methods)))

    plain = policy.without_wrapper(model)
    arguments = inputs if isinstance(inputs, tuple) else (inputs,)
    random_state = policy.RandomState(policy.cuda_devices(plain, arguments))

    def explain(name: Method) -> tuple[Tensor, ExplanationStats]:
        chosen = dict(keywords)
        if name == "head":
            chosen.pop("at", None)
            chosen.pop("mode", None)
        with policy.extra_pass(plain), random_state.replayed():
            return class_explanation_stats(plain, inputs, target, method=name, **chosen)

    results: dict[Method, tuple[Explained, int]] = {
        "exact": _with_memory(partial(explain, "exact"), target.device)
    }
    refused: dict[str, str] = {}
    for name in names[1:]:
        outcome = _result_or_refusal(partial(explain, name), target.device)
        if isinstance(outcome, str):
            refused[name] = outcome
        else:
            results[name] = outcome
    times: dict[Method, list[float]] = {name: [] for name in results}
    for _ in range(repeats):
        for name, measured in times.items():
            measured.append(_seconds(partial(explain, name), target.device))

    live = target != keywords.get("ignore_index", -100)
    of = {name: _over_classes(*result, target) for name, (result, _) in results.items()}
    rows = []
    for name in names:
        if name in refused:
            rows.append(MethodAgreement(name, *(math.nan,) * 4, 0, refused[name]))
            continue
        agreement = _agreement(of[name][live], of["exact"][live])
        seconds = statistics.median(times[name])
        rows.append(MethodAgreement(name, *agreement, seconds, results[name][1], _NOTES[name]))
    good = [row for row in rows if row.method == "exact" or row.correlation >= ENOUGH]
    return MethodComparison(tuple(rows), min(good, key=lambda row: row.seconds).method)


def _result_or_refusal(
    call: Callable[[], Explained], device: torch.device
) -> tuple[Explained, int] | str:
    try:
        return _with_memory(call, device)
    except (RuntimeError, TypeError, ValueError) as reason:
        return str(reason)


def _over_classes(logits: Tensor, stats: ExplanationStats, target: Tensor) -> Tensor:
    """Similarities ``[B, C]`` in float64; NaN for the target and for what was not explained."""
    # Without norms of its own the projection has no cosine, and stands for itself in both.
    found = similarities(stats, target).double()
    if stats.class_index is not None:
        nothing = torch.full_like(logits, math.nan, dtype=found.dtype)
        found = nothing.scatter(1, stats.class_index, found)
    known = (target >= 0) & (target < found.shape[1])
    return found.scatter(1, torch.where(known, target, 0)[:, None], math.nan)


def _agreement(found: Tensor, exact: Tensor) -> tuple[float, float, float]:
    """Correlation, mean absolute error and share of rows with the same largest similarity."""
    both = found.isfinite() & exact.isfinite()
    if not both.any():
        return math.nan, math.nan, math.nan
    pairs = torch.stack([found[both], exact[both]])
    centred = pairs - pairs.mean(1, keepdim=True)
    lengths = centred.norm(dim=1).prod()
    correlation = float((centred[0] * centred[1]).sum() / lengths) if lengths > 0 else math.nan
    rows = both.any(1)
    tops = [
        torch.where(both, similarity, -math.inf)[rows].argmax(1) for similarity in (found, exact)
    ]
    same = float((tops[0] == tops[1]).double().mean())
    return correlation, float((pairs[0] - pairs[1]).abs().mean()), same


def _seconds(call: Callable[[], Explained], device: torch.device) -> float:
    _wait(device)
    started = time.perf_counter()
    call()
    _wait(device)
    return time.perf_counter() - started


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _with_memory(call: Callable[[], Explained], device: torch.device) -> tuple[Explained, int]:
    """The result of a call, and the most bytes that it held at any time."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        result = call()
        return result, torch.cuda.max_memory_allocated(device) - before
    with _LiveTensors() as live:
        result = call()
    return result, live.peak


class _LiveTensors(TorchDispatchMode):
    """Adds up the storages of tensors that operators make, for as long as each lives.

    Attributes:
        peak: the most bytes at any time.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self._now = 0
        self._known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        # What was there before the call is not the call's.
        given = {
            leaf.untyped_storage()._cdata
            for leaf in tree_leaves((args, kwargs))
            if isinstance(leaf, Tensor)
        }
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._see(leaf.untyped_storage(), given)
        return result

    def _see(self, storage: torch.UntypedStorage, given: set[int]) -> None:
        if storage._cdata in given or storage in self._known:
            return
        self._known.add(storage)
        self._now += storage.nbytes()
        self.peak = max(self.peak, self._now)
        weakref.finalize(storage, self._release, storage.nbytes())

    def _release(self, size: int) -> None:
        self._now -= size
