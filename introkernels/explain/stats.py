"""The public entry: check the call, decide which forward pass is explained, explain it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from introkernels import checks
from introkernels.explain import policy
from introkernels.explain.exact import exact
from introkernels.explain.head import head
from introkernels.explain.request import Request, logits_of
from introkernels.types import ExplanationStats

Method = Literal["exact", "head"]
Mode = Literal["eval", "train"]

METHODS: tuple[Method, ...] = get_args(Method)
MODES: tuple[Mode, ...] = get_args(Mode)

_EXPLAINERS: dict[str, Callable[[nn.Module, Tensor, Request], tuple[Tensor, ExplanationStats]]] = {
    "exact": exact,
    "head": head,
}


def class_explanation_stats(
    model: nn.Module,
    inputs: Tensor,
    target: Tensor,
    *,
    method: Method = "exact",
    chunk: int | None = None,
    top_k: int | None = None,
    center: bool = False,
    mode: Mode = "eval",
    ignore_index: int = -100,
) -> tuple[Tensor, ExplanationStats]:
    """The logits of a training forward pass, and the statistics of the model's explanations.

    The explanation of class ``c`` is gradient x input, ``E_c = (dz_c / dx) * x``. The statistics
    are ``dots = <E_c, E_y>`` and ``sq_norms = <E_c, E_c>``, what ``similarity_loss`` takes:

    >>> logits, stats = class_explanation_stats(model, images, labels)
    >>> loss = introkernels.similarity_loss(logits, labels, stats)

    Args:
        model: a module that maps ``[B, *S]`` to logits ``[B, C]``.
        inputs: ``[B, *S]``; floating for ``"exact"``, anything the model takes for ``"head"``.
        target: ``[B]`` int64.
        method: ``"exact"`` explains the input, with one vector-Jacobian product for the target and
            one for each class. ``"head"`` explains the features that the last Linear layer gets,
            in closed form without any backward pass: other explanations than those of the input,
            for models whose logits are the output of an ``nn.Linear``.
        chunk: how many classes ``"exact"`` differentiates at once, in ``chunk * B * D`` memory.
            By default 1 on the CPU and 8 elsewhere. More than 1 needs operators that can be
            batched over cotangents (``is_grads_batched`` of ``torch.autograd.grad``).
        top_k: explain only each row's target and the ``top_k`` other classes with the highest
            logits, from 1 to C - 1. The default explains all C classes.
        center: explain ``z_c - mean_k z_k``, the mean over the classes explained.
        mode: the state of the model that is explained. ``"eval"``: running statistics in
            BatchNorm, no dropout, so that each row's explanation is its own. If the model is in
            training mode this takes a forward pass of its own, before the one that gives the
            logits; it leaves training flags, buffers, module attributes, random number generators
            and ``.grad`` as they were. ``"train"``: the training forward pass itself, with its one
            dropout mask. Where BatchNorm couples the rows of a batch, a gradient is then that of
            the logits summed over the batch's rows, and depends on the other rows.
        ignore_index: rows with this target get zeros.

    Returns:
        Logits ``[B, C]`` of the model in the state it is in, with the graph for training (none
        where gradient mode is off); and detached statistics ``[B, C]``, or ``[B, top_k + 1]`` with
        ``class_index [B, top_k + 1]``, the target first. They are float64 where the model computes
        in float64, else float32. Inputs that the logits don't depend on have zero explanations.

    Compiled models run uncompiled wherever they are explained. Hooks that the caller placed on the
    model run in the explanation pass too.

    Raises:
        TypeError: for an argument of the wrong type or dtype.
        ValueError: for wrong shapes or values; for a model that doesn't return ``[B, C]``, has
            uninitialized lazy parameters, or has no Linear layer for ``"head"``.
        IndexError: for a target outside ``[0, C)`` that is not ``ignore_index``. On a GPU such a
            row gets NaN, unless ``INTROKERNELS_CHECK=1``.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {checks.describe(model)}")
    explain = _EXPLAINERS[METHODS[checks.choice("method", method, METHODS)]]
    _check_inputs(inputs, method)
    checks.target_of_rows(target, "inputs", inputs)
    checks.choice("mode", mode, MODES)
    request = Request(
        target=target,
        top_k=None if top_k is None else checks.integer("top_k", top_k),
        chunk=None if chunk is None else _positive_integer("chunk", chunk),
        center=checks.flag("center", center),
        ignore_index=checks.integer("ignore_index", ignore_index),
    )
    policy.reject_lazy(model)

    if mode == "train" or not policy.is_training(model):
        with policy.uncompiled():
            return explain(model, inputs, request)
    # The explanation pass comes first: its graph is gone before the training forward builds one.
    explained = policy.without_wrapper(model)
    with (
        policy.uncompiled(),
        policy.evaluation_mode(explained, inputs),
        torch.set_grad_enabled(method == "exact"),
    ):
        _, stats = explain(explained, inputs, request)
    return logits_of(model(inputs), inputs), stats


def _check_inputs(inputs: object, method: str) -> None:
    if method == "exact":
        if isinstance(inputs, Tensor) and not inputs.is_floating_point():
            raise TypeError(
                "inputs must be floating to be differentiated by, got "
                f"{checks.describe(inputs)}; method='head' takes inputs of any dtype"
            )
        checks.floating_tensor("inputs", inputs)
    elif not isinstance(inputs, Tensor):
        raise TypeError(f"inputs must be a torch.Tensor, got {checks.describe(inputs)}")
    assert isinstance(inputs, Tensor)
    if inputs.dim() == 0:
        raise ValueError(f"inputs must have shape [B, *S], got {checks.describe(inputs)}")


def _positive_integer(name: str, value: object) -> int:
    number = checks.integer(name, value)
    if number < 1:
        raise ValueError(f"{name} must be at least 1, got {number}")
    return number
