"""A model as a function of what is explained: its inputs, or the output of one of its modules."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from introkernels import checks
from introkernels.explain import policy
from introkernels.explain.explainers import Explainer, Position, Tensors

Substitute = Callable[[Tensors], Tensors]


class Network:
    """Forward passes in which the explained tensors are replaced.

    Every pass sees the same random numbers and the same buffers. All leave both, and the inputs, as
    they found them, but for the first one if ``first_is_training``.

    Args:
        model: the module to run.
        inputs: its positional arguments.
        rows: how many rows the batch has.
        at: the name of the module whose output is explained, or None for the inputs.
        first_is_training: whether the first pass may change the model as a training forward does.
        runs_again: whether more than one pass is made.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: tuple[Any, ...],
        rows: int,
        at: str | None,
        *,
        first_is_training: bool,
        runs_again: bool,
    ) -> None:
        self._model = model
        self._rows = rows
        self._inputs = inputs
        self._at = at
        self._layer = None if at is None else _submodule(model, at)
        self._free_passes = int(first_is_training)
        devices = policy.cuda_devices(model, inputs)
        self._random_state = policy.RandomState(devices) if runs_again else None
        # What the training pass does to them must not be seen by the passes after it.
        self._buffers = (
            policy.copied_buffers(policy.without_wrapper(model))
            if runs_again and first_is_training
            else None
        )

    def __call__(self, substitute: Substitute) -> Tensor:
        """Logits ``[B, C]``, with what ``substitute`` makes of the explained tensors.

        Raises:
            ValueError: the model returns no such logits, or does not run its explained module
                exactly once, or that has no floating output with the rows of the inputs.
        """
        if self._free_passes:
            self._free_passes -= 1
            return self._run(self._model, tuple(map(_copied, self._inputs)), substitute)
        # Without a wrapper: its own forward would broadcast buffers.
        model = policy.without_wrapper(self._model)
        with policy.extra_pass(model, self._buffers):
            inputs = policy.copied_inputs(self._inputs)
            if self._random_state is None:
                return self._run(model, inputs, substitute)
            with self._random_state.replayed():
                return self._run(model, inputs, substitute)

    def _run(self, model: nn.Module, inputs: tuple[Any, ...], substitute: Substitute) -> Tensor:
        if self._layer is None:
            return logits_of(model(*self._replaced(inputs, substitute)), self._rows)
        calls = 0

        def replace(module: nn.Module, args: Any, output: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls > 1:
                raise ValueError(
                    f"at={self._at!r} must name a module that runs once in a forward pass, and it "
                    "runs again"
                )
            if isinstance(output, Tensor):
                return self._replaced((output,), substitute)[0]
            if isinstance(output, tuple):
                return self._replaced(output, substitute)
            raise ValueError(
                f"at={self._at!r} must name a module that returns a tensor or a tuple, got "
                f"{type(output).__name__}"
            )

        handle = self._layer.register_forward_hook(replace)
        try:
            output = model(*inputs)
        finally:
            handle.remove()
        if calls == 0:
            raise ValueError(f"at={self._at!r} names a module that did not run in the forward pass")
        return logits_of(output, self._rows)

    def _replaced(self, tensors: tuple[Any, ...], substitute: Substitute) -> tuple[Any, ...]:
        """The same tuple, with its explained tensors replaced."""
        places = [i for i, tensor in enumerate(tensors) if is_explained(tensor, self._rows)]
        if not places:
            got = ", ".join(map(checks.describe, tensors))
            what = "inputs" if self._at is None else f"the output of at={self._at!r}"
            raise ValueError(
                f"{what} must hold a floating tensor [{self._rows}, *S] to be explained, got {got}"
            )
        result = list(tensors)
        replacements = substitute(tuple(tensors[place] for place in places))
        for place, replacement in zip(places, replacements, strict=True):
            result[place] = replacement
        return tuple(result)


def is_explained(tensor: object, rows: int) -> bool:
    """Whether a tensor beside others is one to explain: floating, with the rows of the batch."""
    return (
        isinstance(tensor, Tensor)
        and tensor.is_floating_point()
        and tensor.dim() > 0
        and tensor.shape[0] == rows
    )


def logits_of(output: object, rows: int) -> Tensor:
    """The model's output; raises ValueError unless it is floating ``[B, C]`` with ``C >= 1``."""
    if (
        not isinstance(output, Tensor)
        or not output.is_floating_point()
        or output.dim() != 2
        or output.shape[0] != rows
        or output.shape[1] == 0
    ):
        got = checks.describe(output) if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(
            f"model must return logits of shape [{rows}, C] for inputs with {rows} rows, got {got}"
        )
    return output


def _submodule(model: nn.Module, at: str) -> nn.Module:
    modules: dict[str, nn.Module] = dict(policy.without_wrappers(model).named_modules())
    del modules[""]
    if at in modules:
        return modules[at]
    close = difflib.get_close_matches(at, modules, n=3, cutoff=0.4) or list(modules)[:3]
    raise ValueError(
        f"at must name a module of the model, such as {', '.join(map(repr, close))}, got {at!r}"
    )


class Trace(NamedTuple):
    """A forward pass that can be differentiated by what is explained.

    Attributes:
        logits: ``[B, C]``; a weighted mean where the explainer has several positions.
        variables: the tensors ``[B, *S]`` to differentiate by.
        values: the explained tensors themselves, detached.
        positions: where the model is differentiated.
        factor: what gradients are multiplied by, or None.
        own_logits: the model's own logits, detached.
    """

    logits: Tensor
    variables: Tensors
    values: Tensors
    positions: list[Position]
    factor: Tensors | None
    own_logits: Tensor


def traced(
    network: Network,
    explainer: Explainer,
    keep_graph: bool,
    generator: torch.Generator | None,
) -> Trace:
    """Run the network where the explainer differentiates it.

    Args:
        network: the model.
        explainer: where and how.
        keep_graph: whether the logits keep the graph that leads to the explained tensors.
        generator: of the explainer's random numbers.
    """
    if explainer.is_local:
        return _traced_once(network, explainer, keep_graph, generator)
    return _traced_at_positions(network, explainer, generator)


def _traced_once(
    network: Network, explainer: Explainer, keep_graph: bool, generator: torch.Generator | None
) -> Trace:
    variables: Tensors = ()

    def make_variables(found: Tensors) -> Tensors:
        nonlocal variables
        variables = tuple(_variable(value, keep_graph) for value in found)
        # The model gets copies, which it may change in place.
        return tuple(variable.clone() for variable in variables)

    logits = network(make_variables)
    values = tuple(variable.detach() for variable in variables)
    positions = list(explainer.positions(values, generator))
    return Trace(logits, variables, values, positions, explainer.factor(values), logits.detach())


def _traced_at_positions(
    network: Network, explainer: Explainer, generator: torch.Generator | None
) -> Trace:
    values: Tensors = ()

    def read(found: Tensors) -> Tensors:
        nonlocal values
        values = tuple(value.detach().clone() for value in found)
        return tuple(value.clone() for value in found)

    # The fast path of encoders, taken without gradients, computes something else at padding.
    with torch.no_grad(), plain_attention():
        own_logits = network(read)
    positions = list(explainer.positions(values, generator))
    # One offset for all positions: its gradient is their weighted sum.
    offsets = tuple(torch.zeros_like(value, requires_grad=True) for value in values)

    def logits_at(position: Position) -> Tensor:
        return network(
            lambda _: tuple(v + o for v, o in zip(position.values, offsets, strict=True))
        )

    logits = sum_over(positions, logits_at)
    return Trace(logits, offsets, values, positions, explainer.factor(values), own_logits)


def sum_over(positions: list[Position], result: Callable[[Position], Tensor]) -> Tensor:
    """The weighted sum of a result at each position."""
    first, *others = positions
    # A weight of 1 is not multiplied by: the logits of a shared forward stay the model's own.
    total = result(first) if first.weight == 1 else result(first) * first.weight
    for position in others:
        total = total + result(position) * position.weight
    return total


def _copied(value: Any) -> Any:
    """Inference tensors can't be part of a graph; a copy made outside that mode can."""
    return value.clone() if isinstance(value, Tensor) and value.is_inference() else value


def _variable(values: Tensor, keep_graph: bool) -> Tensor:
    """A tensor to differentiate by, which is not the caller's own."""
    if keep_graph and values.requires_grad:
        return values.view_as(values)
    variable: Tensor = _copied(values).detach().requires_grad_()
    return variable


@contextmanager
def plain_attention() -> Iterator[None]:
    """Attention from matrix products: fused kernels lack forward mode and double backward."""
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
