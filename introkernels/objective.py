"""The loss of a training loop: runs a model, explains it, and gives its introspective loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from introkernels import checks, teachers
from introkernels.bank import SimilarityBank
from introkernels.explain import policy
from introkernels.explain.explainers import Explainer, explainer_of
from introkernels.explain.jvp import JVPS, Jvp
from introkernels.explain.stats import (
    METHODS,
    MODES,
    Method,
    Mode,
    check_explained,
    class_explanation_stats,
)
from introkernels.functional import distillation_loss
from introkernels.generators import ResumableGenerator
from introkernels.modules import SimilarityLoss
from introkernels.types import (
    Divergence,
    ExplanationStats,
    LabelMode,
    LossParts,
    Reduction,
    Similarity,
)

# The keywords of a loss that tell how similarities become soft labels.
LABEL_KEYWORDS = ("similarity_temperature", "similarity", "label_mode", "non_target_mass")


class IntrospectiveObjective(nn.Module):
    """``loss = objective(inputs, target)``: a training loop's forward pass and its loss.

    >>> objective = introkernels.IntrospectiveObjective(model)
    >>> loss = objective(images, labels)
    >>> loss.backward()

    The model is not part of this module, nor is ``explained``: ``parameters()``, ``to``, ``train``
    and the like don't reach them. ``state_dict`` holds the number of steps, the similarity bank and
    the state of the random numbers, so that training goes on from it as if it had not stopped.

    ``IntrospectiveObjective(torch.compile(model))`` has a compiled training forward. The objective
    itself can't be compiled: in a compiled function it breaks the graph and runs outside of it, and
    with ``fullgraph=True`` it is an error.

    A step is a call where gradient mode is on. Other calls (validation) give the loss of the
    current step, with explanations of their own unless there is a filled bank, and change nothing.

    Args:
        model: maps its inputs to logits ``[B, C]``.
        explained: another network of the same inputs and classes, such as an average of the
            model's weights or the generation before, whose explanations make the soft labels, so
            that these don't feed on themselves. It runs in eval mode, without gradients, and stays
            as it was; its logits are not used. By default the model explains itself.
        method: how the model is explained. The default costs as much for 1000 classes as for 10;
            see `introkernels.explain.class_explanation_stats`, which also explains ``explainer``,
            ``at``, ``probes``, ``chunk``, ``top_k``, ``mode``, ``jvp``, ``generator`` and
            ``center``.
        every: explain at steps 0, ``every``, ``2 * every``, ... only. The steps between have no
            soft labels and keep the cross entropy with its weight, unless there is a bank.
        warmup_steps: at step ``i``, counted from 0, the soft labels have
            ``min(1, i / warmup_steps)`` of their weight. Where ``kl_weight`` or this share of it is
            0 and there is no bank, nothing is explained.
        bank_momentum: if given, in [0, 1): soft labels come from a class-by-class exponential
            moving average of the similarities, which each explained step updates first. Under
            DistributedDataParallel all processes update one and the same.
        similarity: ``"cosine"``, or ``"projection"``, which is the default (and the only one) of
            ``method="projection"``.
        temperature, similarity_temperature, ce_weight, kl_weight, divergence, beta, label_mode,
            non_target_mass, weight, ignore_index, label_smoothing, reduction, return_parts:
            keywords of `introkernels.SimilarityLoss`, which is the attribute ``loss``.

    Attributes:
        model: the model.
        explained: the network whose explanations make the soft labels.
        loss: the `SimilarityLoss`; its keywords may be changed between steps.
        step: steps done.
        logits: ``[B, C]``, detached, of the last call; None before.

    Raises:
        TypeError, ValueError: for arguments of the wrong type or value, here or in the call.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        explained: nn.Module | None = None,
        method: Method = "sketch",
        explainer: str | Explainer = "gradient_x_input",
        at: str | None = None,
        probes: int = 8,
        chunk: int | None = None,
        top_k: int | None = None,
        mode: Mode = "auto",
        jvp: Jvp = "auto",
        generator: torch.Generator | None = None,
        every: int = 1,
        warmup_steps: int = 0,
        bank_momentum: float | None = None,
        temperature: float = 4.0,
        similarity_temperature: float = 1.0,
        ce_weight: float = 0.7,
        kl_weight: float = 0.3,
        divergence: Divergence = "forward_kl",
        beta: float = 0.5,
        similarity: Similarity | None = None,
        label_mode: LabelMode = "softmax",
        non_target_mass: float = 0.1,
        center: bool = False,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        reduction: Reduction = "mean",
        return_parts: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {checks.describe(model)}")
        checks.choice("method", method, METHODS)
        checks.choice("mode", mode, MODES)
        check_explained(explained, mode)
        checks.choice("jvp", jvp, JVPS)
        checks.flag("center", center)
        if similarity is None:
            similarity = "projection" if method == "projection" else "cosine"
        if method == "projection" and similarity == "cosine":
            raise ValueError(
                "similarity must be 'projection' with method='projection', which knows the length "
                "of no explanation but the target's, got 'cosine'"
            )
        if bank_momentum is not None and checks.non_negative("bank_momentum", bank_momentum) >= 1:
            raise ValueError(f"bank_momentum must be in [0, 1) or None, got {bank_momentum!r}")
        # In a tuple and a dict, so that their parameters are not this module's.
        self._model = (model,)
        self._explanation: dict[str, Any] = {
            "explained": explained,
            "method": method,
            "explainer": explainer_of(explainer),
            "at": at,
            "probes": checks.positive_integer("probes", probes),
            "chunk": None if chunk is None else checks.positive_integer("chunk", chunk),
            "top_k": None if top_k is None else checks.positive_integer("top_k", top_k),
            "mode": mode,
            "jvp": jvp,
            "center": center,
        }
        self._generator = ResumableGenerator(generator)
        self.every = checks.positive_integer("every", every)
        if checks.integer("warmup_steps", warmup_steps) < 0:
            raise ValueError(f"warmup_steps must be at least 0, got {warmup_steps}")
        self.warmup_steps = warmup_steps
        self.loss = SimilarityLoss(
            temperature=temperature,
            similarity_temperature=similarity_temperature,
            ce_weight=ce_weight,
            kl_weight=kl_weight,
            divergence=divergence,
            beta=beta,
            similarity=similarity,
            label_mode=label_mode,
            non_target_mass=non_target_mass,
            weight=weight,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            reduction=reduction,
            return_parts=return_parts,
        )
        self._bank = None if bank_momentum is None else SimilarityBank(float(bank_momentum))
        self.step = 0
        self.logits: Tensor | None = None

    @property
    def model(self) -> nn.Module:
        """The model that is trained."""
        return self._model[0]

    @property
    def explained(self) -> nn.Module:
        """The network whose explanations make the soft labels: the model, or another one."""
        explained: nn.Module | None = self._explanation["explained"]
        return self.model if explained is None else explained

    @property
    def bank(self) -> Tensor | None:
        """Similarities ``[C, C]``, row = true class; None without a bank, or if it is empty."""
        return None if self._bank is None else self._bank.matrix

    @policy.untraced
    def forward(
        self,
        inputs: Tensor | tuple[Any, ...],
        target: Tensor,
        *,
        row_weight: Tensor | None = None,
    ) -> Tensor | LossParts:
        """The loss of a batch.

        Args:
            inputs: ``[B, *S]``, or a tuple of the model's arguments.
            target: ``[B]`` int64; or class probabilities ``[B, C]`` (mixup, cutmix), which go with
                ``label_mode="softmax"``, without a bank, whose similarities are by class, and
                without ``top_k``.
            row_weight: ``[B]``, multiplies each row's loss; means divide by its sum. A bank takes
                in all rows alike.
        """
        self._check_target(target)
        checks.row_weight(row_weight, target.shape[:1], target)
        counts = torch.is_grad_enabled()
        share = 1.0 if self.warmup_steps == 0 else min(1.0, self.step / self.warmup_steps)
        kl_weight = share * checks.non_negative("kl_weight", self.loss.kl_weight)
        logits, stats = self._explained(inputs, target, counts, kl_weight > 0)
        self.logits = logits.detach()
        keywords = self.loss.keywords()
        labels = {name: keywords.pop(name) for name in LABEL_KEYWORDS}
        similarity = labels.pop("similarity")
        temperature = keywords["temperature"]
        if self._bank is not None and self._bank.matrix is not None:
            found = self._bank.similarities(target)
            teacher = teachers.of_similarities(
                found, target, class_index=None, temperature=temperature, **labels
            )
        elif stats is not None:
            teacher = teachers.among_all(
                teachers.teacher_logits(
                    stats,
                    target,
                    similarity=similarity,
                    temperature=temperature,
                    ignore_index=self.loss.ignore_index,
                    **labels,
                ),
                stats.class_index,
                logits.shape[1],
            )
        else:
            # Without soft labels the model is its own teacher, from which nothing diverges.
            teacher, kl_weight = self.logits, 0.0
        result: Tensor | LossParts = distillation_loss(
            logits,
            teacher,
            target,
            row_weight=row_weight,
            **{**keywords, "kl_weight": kl_weight},
        )
        self.step += counts
        return result

    def _check_target(self, target: object) -> None:
        """Refuse what no step could do, though this one may explain nothing."""
        if not isinstance(target, Tensor) or not target.is_floating_point():
            checks.int64_tensor("target", target)
            return
        checks.label_mode_of(target, self.loss.label_mode)
        for name, value in (
            ("bank_momentum", None if self._bank is None else self._bank.momentum),
            ("top_k", self._explanation["top_k"]),
        ):
            if value is not None:
                raise ValueError(
                    f"{name} must be None where target holds class probabilities, got {value!r}"
                )

    def _explained(
        self, inputs: Tensor | tuple[Any, ...], target: Tensor, counts: bool, matters: bool
    ) -> tuple[Tensor, ExplanationStats | None]:
        """Logits with the training graph, and the statistics of a model that is explained now.

        They update the bank, if there is one. ``matters``: whether soft labels have any weight.
        """
        bank = self._bank
        if counts:
            explains = self.step % self.every == 0 and (bank is not None or matters)
        else:
            explains = matters and (bank is None or bank.matrix is None)
        if not explains:
            arguments = inputs if isinstance(inputs, tuple) else (inputs,)
            logits = self.model(*arguments)
            checks.logits_and_target(logits, target)
            return logits, None
        generator = self._generator.on(target.device)
        logits, stats = class_explanation_stats(
            self.model,
            inputs,
            target,
            # Validation draws from a copy: the training's random numbers stay as they are.
            generator=generator if counts else generator.clone_state(),
            ignore_index=self.loss.ignore_index,
            **self._explanation,
        )
        if bank is not None and counts:
            bank.update(
                stats,
                target,
                logits.shape[1],
                similarity=self.loss.similarity,
                ignore_index=self.loss.ignore_index,
                group=self._group(),
            )
        return logits, stats

    def _group(self) -> Any:
        # A compiled wrapper is a wrapper still.
        model = getattr(self.model, "_orig_mod", self.model)
        return model.process_group if isinstance(model, DistributedDataParallel) else None

    def get_extra_state(self) -> dict[str, Any]:
        """The number of steps, the bank and the random numbers, for ``state_dict``."""
        return {
            "step": self.step,
            "bank": {} if self._bank is None else self._bank.state(),
            "generator": self._generator.state(),
        }

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Go on from a ``state_dict``.

        Raises:
            ValueError: it has a bank and this objective has none.
        """
        if self._bank is not None:
            self._bank.restore(state["bank"])
        elif state["bank"]:
            raise ValueError(
                "bank_momentum must be given to load a state with a similarity bank, got None"
            )
        self._generator.restore(state["generator"])
        self.step = state["step"]

    def extra_repr(self) -> str:
        options = {
            "method": self._explanation["method"],
            "every": self.every,
            "warmup_steps": self.warmup_steps,
            "bank_momentum": None if self._bank is None else self._bank.momentum,
        }
        return ", ".join(f"{name}={value!r}" for name, value in options.items())
