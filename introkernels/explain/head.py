"""Explanations of every class at the features of the last Linear layer, in closed form."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from introkernels import checks
from introkernels.explain.classes import (
    ExplainedClasses,
    explained_classes,
    finished,
    statistics,
    wide_dtype,
)
from introkernels.explain.network import logits_of
from introkernels.explain.request import Request
from introkernels.types import ExplanationStats


def head(
    model: nn.Module, inputs: tuple[object, ...], rows: int, request: Request
) -> tuple[Tensor, ExplanationStats]:
    """Logits of one forward pass and the statistics at the features of its last Linear layer.

    The gradient of a linear layer is the same everywhere, so each explainer is its factor times the
    weight.
    """
    # A weight that is computed at each access must be the one that the forward pass had.
    with parametrize.cached(), _recorded_linears(model) as calls:
        logits = logits_of(model(*inputs), rows)
        call = _head_call(calls, logits)
        features = call.features.detach().reshape(len(logits), call.features.shape[-1])
        weight = call.module.weight.detach()
    with torch.autocast(logits.device.type, enabled=False), torch.no_grad():
        classes = explained_classes(
            logits.detach(), request.target, request.top_k, request.ignore_index
        )
        wide = wide_dtype(features, weight)
        given = request.explainer.factor((features.to(wide),))
        factor = torch.ones_like(features, dtype=wide) if given is None else given[0]
        closed_form = _chosen_classes if classes.chosen else _all_classes
        return logits, closed_form(factor, weight.to(wide), classes, request.center)


def _all_classes(
    factor: Tensor, weight: Tensor, classes: ExplainedClasses, center: bool
) -> ExplanationStats:
    if center:
        weight = weight - weight.mean(0)
    squares = factor.square()
    mixed = classes.target_is_mixed
    target_weight = classes.target.to(weight.dtype) @ weight if mixed else weight[classes.target]
    return finished(
        (squares * target_weight) @ weight.t(),
        squares @ weight.square().t(),
        (squares * target_weight.square()).sum(-1),
        classes,
    )


def _chosen_classes(
    factor: Tensor, weight: Tensor, classes: ExplainedClasses, center: bool
) -> ExplanationStats:
    columns = list(classes.index.unbind(1))
    mean = torch.zeros_like(factor)
    if center:
        for column in columns:
            mean += weight[column] / len(columns)
    return statistics(
        (weight[columns[0]] - mean,),
        (((weight[column] - mean)[None],) for column in columns[1:]),
        (factor,),
        classes,
    )


class _Call(NamedTuple):
    """One call of a Linear layer, and how often its tensors had been written to by then."""

    name: str
    module: nn.Linear
    features: Tensor
    output: Tensor
    versions: tuple[int, int]


@contextmanager
def _recorded_linears(model: nn.Module) -> Iterator[list[_Call]]:
    """Collect all calls of the model's Linear layers while the context lasts."""
    calls: list[_Call] = []
    handles = []
    try:
        for name, module in model.named_modules():
            # A subclass may compute something else than features @ weight.T + bias.
            if isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward:
                handle = module.register_forward_hook(
                    _recorder(name, calls),
                    prepend=True,  # other hooks may replace the output
                    with_kwargs=True,
                )
                handles.append(handle)
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _recorder(name: str, calls: list[_Call]) -> Callable[..., None]:
    def record(
        module: nn.Linear, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: Tensor
    ) -> None:
        features = args[0] if args else kwargs["input"]
        calls.append(_Call(name, module, features, output, _versions(features, output)))

    return record


def _versions(features: Tensor, output: Tensor) -> tuple[int, int]:
    features_version, output_version = (
        0 if tensor.is_inference() else tensor._version for tensor in (features, output)
    )
    return features_version, output_version


def _head_call(calls: list[_Call], logits: Tensor) -> _Call:
    """The call whose output is the logits themselves; raises ValueError if there is none."""
    for call in reversed(calls):
        if _is_same(call.output, logits):
            if call.versions == _versions(call.features, call.output):
                return call
            found = f"{_named(call)} does, but its features or its output were changed in place"
            break
    else:
        found = (
            f"the last Linear layer to run was {_named(calls[-1])}, and its output is processed "
            "further"
            if calls
            else "no Linear layer ran"
        )
    raise ValueError(
        "method='head' needs a model whose logits are the output of an nn.Linear layer, but "
        f"{found}; logits are {checks.describe(logits)}. Use method='exact' to explain the "
        "model's input, or introkernels.linear_introspective_loss with your own features and "
        "weight"
    )


def _named(call: _Call) -> str:
    where = repr(call.name) if call.name else "the model itself"
    return f"{where} with output {checks.describe(call.output)}"


def _is_same(output: Tensor, logits: Tensor) -> bool:
    """Whether the logits are the output or a view of all of it, with rows in the same order."""
    return output is logits or (
        output.numel() == logits.numel() > 0
        and output.shape[-1] == logits.shape[-1]
        and output.dtype == logits.dtype
        and output.data_ptr() == logits.data_ptr()
        and output.is_contiguous()
        and logits.is_contiguous()
    )
