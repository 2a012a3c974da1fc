"""The public entry: check the call, decide which forward pass is explained, explain it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from introkernels import checks
from introkernels.explain import policy
from introkernels.explain.classes import ExplainedClasses, explained_classes
from introkernels.explain.exact import exact
from introkernels.explain.explainers import Explainer, explainer_of
from introkernels.explain.head import head
from introkernels.explain.jvp import JVPS, Jvp
from introkernels.explain.network import Network, Trace, is_explained, logits_of, traced
from introkernels.explain.probes import own_generator
from introkernels.explain.projection import projection
from introkernels.explain.request import Request
from introkernels.explain.sketch import sketch
from introkernels.types import ExplanationStats

Method = Literal["exact", "projection", "sketch", "head"]
Mode = Literal["auto", "eval", "train"]

METHODS: tuple[Method, ...] = get_args(Method)
MODES: tuple[Mode, ...] = get_args(Mode)

_Estimate = Callable[[Network, Trace, ExplainedClasses, Request], ExplanationStats]

_ESTIMATES: dict[str, _Estimate] = {"exact": exact, "projection": projection, "sketch": sketch}


@policy.untraced
def class_explanation_stats(
    model: nn.Module,
    inputs: Tensor | tuple[Any, ...],
    target: Tensor,
    *,
    explained: nn.Module | None = None,
    method: Method = "exact",
    explainer: str | Explainer = "gradient_x_input",
    at: str | None = None,
    probes: int = 8,
    chunk: int | None = None,
    top_k: int | None = None,
    center: bool = False,
    mode: Mode = "auto",
    jvp: Jvp = "auto",
    generator: torch.Generator | None = None,
    ignore_index: int = -100,
) -> tuple[Tensor, ExplanationStats]:
    """The logits of a training forward pass, and the statistics of the model's explanations.

    By default the explanation of class ``c`` is gradient x input, ``E_c = (dz_c / dx) * x``. The
    statistics are ``dots = <E_c, E_y>`` and ``sq_norms = <E_c, E_c>``, what ``similarity_loss``
    takes:

    >>> logits, stats = class_explanation_stats(model, images, labels)
    >>> loss = introkernels.similarity_loss(logits, labels, stats)

    Args:
        model: a module that maps its inputs to logits ``[B, C]``.
        inputs: ``[B, *S]``, or a tuple of the model's positional arguments. Of a tuple all floating
            tensors with B rows are explained, as one long vector; the rest is passed on.
        target: ``[B]`` int64; or class probabilities ``y`` ``[B, C]`` (mixup, cutmix), whose
            explanation ``E_y`` is that of ``sum_k y_k z_k``, and no class's.
        explained: another module of the same inputs and classes, whose explanations are taken
            instead of the model's own. It runs in eval mode beside the training forward and stays
            as it was; no gradient flows to it, and its logits are not used. ``at``, ``mode`` and
            ``jvp`` are about it.
        method: how the statistics are found, beside the training forward:

            ``"exact"``: one vector-Jacobian product for the target and one for each class.
            ``"projection"``: one of these and one Jacobian-vector product, however many classes:
            exact ``dots``. In place of each class's ``sq_norms`` stands ``<E_y, E_y>``, which is
            all that ``similarity="projection"`` looks at.
            ``"sketch"``: one vector-Jacobian product and ``1 + probes`` Jacobian-vector products:
            exact ``dots``, and unbiased estimates of ``sq_norms``.
            ``"head"``: nothing more, as it explains the features that the last ``nn.Linear`` gets,
            in closed form: other explanations than those of the input.
        explainer: what an explanation is: ``"gradient_x_input"``, ``"gradient"``,
            ``"integrated_gradients"``, ``"smoothgrad"``, or an object of one of their classes in
            ``introkernels.explain``, with settings.
        at: the name of a module, as in ``model.named_modules()``, whose output ``[B, *S]`` is
            explained instead of the inputs; token models are explained at their embedding. It has
            to run once in a forward pass.
        probes: random vectors of ``"sketch"``. The error of a cosine falls as ``1 / sqrt(probes)``.
        chunk: how many classes ``"exact"`` differentiates at once, in ``chunk * B * D`` memory.
            By default 1 on the CPU and 8 elsewhere. More than 1 needs operators that can be
            batched over cotangents (``is_grads_batched`` of ``torch.autograd.grad``).
        top_k: explain only each row's target and the ``top_k`` other classes with the highest
            logits, from 1 to C - 1. The default explains all C classes, as it has to where
            ``target`` holds class probabilities.
        center: explain ``z_c - mean_k z_k``, the mean over the classes explained.
        mode: the state of the model that is explained. ``"eval"``: running statistics in
            BatchNorm, no dropout, so that each row's explanation is its own. If any module is in
            training mode, this takes a forward pass of its own, before the one that gives the
            logits. ``"train"``: the training forward pass itself, with its one dropout mask. A
            model without dropout and BatchNorm has the same explanations in both, and
            ``mode="train"`` saves it a forward pass. Where BatchNorm couples the rows of a batch, a
            gradient is then that of the logits summed over the batch's rows, and depends on the
            other rows (with ``top_k``, of each row's own k-th class); only ``"exact"`` and
            ``"head"`` can do that. ``"auto"``: ``"train"`` for ``"head"``, whose features are the
            training's own, else ``"eval"``; with ``explained`` there is no other.
        jvp: how Jacobian-vector products are made. ``"forward"``: dual numbers, about two forward
            passes each. ``"double_backward"``: exact too, for models without forward-mode
            derivatives. ``"finite_difference"``: two forward passes each, good to two or three
            digits in float32, for models with neither. ``"auto"``: the first of these that the
            model supports; a warning tells if it is not ``"forward"``.
        generator: of the random numbers of ``"sketch"`` and of SmoothGrad, on the device of the
            inputs. By default one of the package's own, which starts from the seed that
            ``torch.manual_seed`` set, so that the random numbers of the training stay as they are.
        ignore_index: rows with this target get zeros; no row of class probabilities is ignored.

    Returns:
        Logits ``[B, C]`` of the model in the state it is in, with the graph for training (none
        where gradient mode is off); and detached statistics ``[B, C]``, or ``[B, top_k + 1]`` with
        ``class_index [B, top_k + 1]``, the target first. They are float64 where the model computes
        in float64, else float32. Inputs that the logits don't depend on have zero explanations.

    Passes beside the training forward leave the modules' training flags and buffers, the objects
    that their attributes refer to, PyTorch's random number generators and ``.grad`` as they were.
    Whatever else a forward pass does is done once more in each: a list that a module appends to
    grows, and Python's ``random`` and NumPy's generators move on. Hooks that the caller placed on
    the model run in each pass too. Fused attention has no Jacobian-vector products: those passes
    run it as plain matrix products.

    A compiled model runs uncompiled wherever it is explained. In a function that ``torch.compile``
    compiles, this one breaks the graph and runs outside of it, the training forward included: what
    there is to compile is the model. ``fullgraph=True`` is an error.

    Raises:
        TypeError: for an argument of the wrong type or dtype.
        ValueError: for wrong shapes or values; for ``top_k`` with class probabilities; for
            ``mode="train"`` with ``explained``, or classes that are not the model's; for a model
            that doesn't return ``[B, C]``, has uninitialized lazy parameters, has no Linear layer
            for ``"head"``, or mixes the rows of a batch where ``"projection"`` or ``"sketch"`` is
            asked for (not noticed on a GPU unless ``INTROKERNELS_CHECK=1``, but for BatchNorm).
        IndexError: for a target outside ``[0, C)`` that is not ``ignore_index``. On a GPU such a
            row gets NaN, unless ``INTROKERNELS_CHECK=1``.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {checks.describe(model)}")
    checks.choice("method", method, METHODS)
    checks.choice("mode", mode, MODES)
    check_explained(explained, mode)
    arguments = inputs if isinstance(inputs, tuple) else (inputs,)
    first = _first_tensor(arguments, needs_floating=method != "head" and at is None)
    if isinstance(target, Tensor) and target.is_floating_point():
        checks.probabilities_of_rows(target, "inputs", first)
        if top_k is not None:
            raise ValueError(
                f"top_k must be None where target holds class probabilities, got {top_k!r}"
            )
    else:
        checks.target_of_rows(target, "inputs", first)
    explained_by = explainer_of(explainer)
    draws = method == "sketch" or (method != "head" and not explained_by.is_local)
    request = Request(
        target=target,
        explainer=explained_by,
        at=at,
        probes=checks.positive_integer("probes", probes),
        top_k=None if top_k is None else checks.integer("top_k", top_k),
        chunk=None if chunk is None else checks.positive_integer("chunk", chunk),
        center=checks.flag("center", center),
        jvp=JVPS[checks.choice("jvp", jvp, JVPS)],
        generator=_checked_generator(generator, first.device, draws),
        ignore_index=checks.integer("ignore_index", ignore_index),
    )
    if method == "head" and at is not None:
        raise ValueError(f"at must be None with method='head', which explains at it, got {at!r}")
    explains_itself = explained is None
    explained = model if explained is None else explained
    policy.reject_lazy(explained)

    if mode == "auto":
        mode = "train" if method == "head" and explains_itself else "eval"
    mixer = policy.row_mixer(explained, mode) if method in ("projection", "sketch") else None
    if mixer is not None:
        raise ValueError(
            f"method={method!r} explains each row by itself, but {mixer} computes with the "
            "statistics of the batch: use mode='eval' and running statistics, or method='exact'"
        )
    rows = first.shape[0]
    in_training_state = mode == "train" or not any(m.training for m in model.modules())
    if explains_itself and in_training_state:
        if method == "head":
            with policy.uncompiled():
                return head(model, arguments, rows, request)
        if request.explainer.is_local:
            return _explained(model, arguments, rows, method, request, is_training=True)
    # The explanation pass comes first: its graph is gone before the training forward builds one.
    explained = policy.without_wrapper(explained)
    with ExitStack() as stack:
        stack.enter_context(policy.uncompiled())
        if mode == "eval":
            stack.enter_context(policy.evaluation_mode(explained, arguments))
        if method == "head":
            with torch.no_grad():
                own_logits, stats = head(explained, policy.copied_inputs(arguments), rows, request)
        else:
            own_logits, stats = _explained(
                explained, arguments, rows, method, request, is_training=False
            )
    logits = logits_of(model(*arguments), rows)
    if logits.shape[1] != own_logits.shape[1]:
        raise ValueError(
            f"explained must score the model's {logits.shape[1]} classes, got logits "
            f"{checks.describe(own_logits)}"
        )
    return logits, stats


def check_explained(explained: object, mode: Mode) -> None:
    """Check another module to explain, if there is one, and the state it is asked to be in."""
    if explained is None:
        return
    if not isinstance(explained, nn.Module):
        raise TypeError(
            f"explained must be a torch.nn.Module or None, got {checks.describe(explained)}"
        )
    if mode == "train":
        raise ValueError(
            "mode must be 'auto' or 'eval' where another module is explained, which is not "
            f"trained, got {mode!r}"
        )


def _explained(
    model: nn.Module,
    inputs: tuple[Any, ...],
    rows: int,
    method: str,
    request: Request,
    is_training: bool,
) -> tuple[Tensor, ExplanationStats]:
    """Logits of the explained pass and its statistics; with the graph if it is the training's."""
    keep_graph = is_training and torch.is_grad_enabled()
    with policy.uncompiled(), torch.inference_mode(False), torch.enable_grad():
        network = Network(
            model,
            inputs,
            rows,
            request.at,
            first_is_training=is_training,
            runs_again=method != "exact" or not request.explainer.is_local,
        )
        trace = traced(network, request.explainer, keep_graph, request.generator)
        with torch.no_grad():
            classes = explained_classes(
                trace.own_logits, request.target, request.top_k, request.ignore_index
            )
            stats = _ESTIMATES[method](network, trace, classes, request)
    return (trace.logits if keep_graph else trace.logits.detach()), stats


def _first_tensor(inputs: tuple[Any, ...], needs_floating: bool) -> Tensor:
    """The tensor that tells how many rows there are, checked."""
    first = next((value for value in inputs if isinstance(value, Tensor)), None)
    if first is None:
        got = ", ".join(map(checks.describe, inputs))
        raise TypeError(f"inputs must be a torch.Tensor or a tuple that holds one, got {got}")
    if first.dim() == 0:
        raise ValueError(f"inputs must have shape [B, *S], got {checks.describe(first)}")
    if needs_floating and not any(is_explained(value, first.shape[0]) for value in inputs):
        raise TypeError(
            f"inputs must be floating to be differentiated by, got {checks.describe(first)}; "
            "at='name of a module' explains its output, such as an embedding's, and "
            "method='head' takes inputs of any dtype"
        )
    return first


def _checked_generator(
    generator: object, device: torch.device, draws: bool
) -> torch.Generator | None:
    if generator is None:
        return own_generator(device) if draws else None
    if not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator, got {checks.describe(generator)}")
    if generator.device.type != device.type:
        raise ValueError(
            f"generator must be on the device of inputs ({device}), got one on {generator.device}"
        )
    return generator
