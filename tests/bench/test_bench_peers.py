"""Peers: what their adapters make equal is equal; absent ones are told, and none is imported early.

Those for GPUs meet stand-ins here, whose signatures and formulas are those of their documentation.
"""

from __future__ import annotations

import subprocess
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from bench_cases import QUICK
from torch import Tensor, nn

from introkernels.bench import accuracy
from introkernels.bench.model import Case, Contender, Suite
from introkernels.bench.operators.distillation import DISTILLATION
from introkernels.bench.operators.explanations import EXPLANATIONS
from introkernels.bench.operators.linear_losses import HEAD_CROSS_ENTROPY, HEAD_DIVERGENCE
from introkernels.bench.peers import torchdistill
from introkernels.bench.peers.captum import CAPTUM
from introkernels.bench.peers.cut_cross_entropy import CUT_CROSS_ENTROPY
from introkernels.bench.peers.flash_linear_attention import FLASH_LINEAR_ATTENTION
from introkernels.bench.peers.installed import needs, version_of
from introkernels.bench.peers.liger import (
    LIGER_CROSS_ENTROPY,
    LIGER_DISTILLATION,
    LIGER_DIVERGENCE,
)
from introkernels.bench.peers.linear_cross_entropy import (
    CHUNKED_CROSS_ENTROPY,
    LINEAR_CROSS_ENTROPY,
)
from introkernels.bench.peers.orda import ORDA
from introkernels.bench.peers.torchdistill import TORCHDISTILL
from introkernels.bench.runner import run_suite

DISTILLATION_CASE = Case(DISTILLATION, "tiny", "a tiny case", (5, 7))
CROSS_ENTROPY_CASE = Case(HEAD_CROSS_ENTROPY, "tiny", "a tiny case", (5, 7, 33))
DIVERGENCE_CASE = Case(HEAD_DIVERGENCE, "tiny", "a tiny case", (5, 7, 33))
EXPLAINED_CASE = Case(EXPLANATIONS, "tiny", "a tiny case", (5, 7, 9))
MODULES = ("captum", "cut_cross_entropy", "fla", "liger_kernel", "orda_kernel", "torchdistill")


class LigerKLDIVLoss(nn.Module):
    def __init__(self, eps: float = 1e-10, *, reduction: str = "mean") -> None:
        super().__init__()
        self.reduction = reduction

    def forward(self, y_pred: Tensor, y_true: Tensor) -> Tensor:
        return F.kl_div(y_pred, y_true, reduction=self.reduction)


class LigerFusedLinearCrossEntropyLoss(nn.Module):
    def __init__(self, *, accum_dtype: torch.dtype | None = None) -> None:
        super().__init__()

    def forward(self, lin_weight: Tensor, _input: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(_input @ lin_weight.T, target)


class LigerFusedLinearJSD(nn.Module):
    """Generalised: KL(teacher || student) at beta 0, KL(student || teacher) at 1; no T² factor."""

    def __init__(
        self,
        jsd_beta: float = 0.5,
        ignore_index: int = -100,
        temperature: float = 1.0,
        accum_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.beta, self.temperature = jsd_beta, temperature

    def forward(
        self,
        student_input: Tensor,
        student_weight: Tensor,
        teacher_input: Tensor,
        teacher_weight: Tensor,
        shift_labels: Tensor | None,
    ) -> Tensor:
        student = (student_input @ student_weight.T / self.temperature).log_softmax(-1)
        teacher = (teacher_input @ teacher_weight.T / self.temperature).log_softmax(-1)
        first, second = (teacher, student) if self.beta == 0 else (student, teacher)
        assert self.beta in (0, 1)
        return (first.exp() * (first - second)).sum() / len(student_input)


class FusedKLDivLoss(nn.Module):
    """Without a temperature; the teacher's tensors must not need gradients."""

    def __init__(self, reduction: str = "batchmean", accumulate_grad_in_fp32: bool = True) -> None:
        super().__init__()
        assert reduction == "batchmean"

    def forward(self, x: Tensor, target_x: Tensor, weight: Tensor, target_weight: Tensor) -> Tensor:
        assert not target_x.requires_grad
        assert not target_weight.requires_grad
        student = (x @ weight.T).log_softmax(-1)
        teacher = (target_x @ target_weight.T).softmax(-1)
        return F.kl_div(student, teacher, reduction="batchmean")


def linear_cross_entropy(
    e: Tensor,
    c: Tensor,
    targets: Tensor,
    ignore_index: int = -100,
    softcap: float | None = None,
    reduction: str = "mean",
    shift: bool = False,
    filter_eps: float | str | None = "high",
) -> Tensor:
    """It drops small gradients unless told not to."""
    assert filter_eps is None
    return F.cross_entropy(e @ c.T, targets, reduction=reduction)


STAND_INS = [
    (LIGER_DISTILLATION, DISTILLATION_CASE, "liger_kernel.transformers", LigerKLDIVLoss),
    (
        LIGER_CROSS_ENTROPY,
        CROSS_ENTROPY_CASE,
        "liger_kernel.transformers",
        LigerFusedLinearCrossEntropyLoss,
    ),
    (LIGER_DIVERGENCE, DIVERGENCE_CASE, "liger_kernel.transformers", LigerFusedLinearJSD),
    (FLASH_LINEAR_ATTENTION, DIVERGENCE_CASE, "fla.modules.fused_kl_div", FusedKLDivLoss),
    (CUT_CROSS_ENTROPY, CROSS_ENTROPY_CASE, "cut_cross_entropy", linear_cross_entropy),
]
REAL = [
    (TORCHDISTILL, DISTILLATION_CASE),
    (ORDA, DIVERGENCE_CASE),
    (CAPTUM, EXPLAINED_CASE),
    (LINEAR_CROSS_ENTROPY, CROSS_ENTROPY_CASE),
    (CHUNKED_CROSS_ENTROPY, CROSS_ENTROPY_CASE),
]
EVERY = [(row[0], row[1]) for row in (*STAND_INS, *REAL)]


def errors(contender: Contender, case: Case) -> dict[str, float]:
    tensors = case.draw(seed=7)
    result = case.operator.run(contender.prepare(case.operator), tensors)
    found = case.operator.outcome(result, tensors)
    return accuracy.errors(found, accuracy.expected_outcome(case, tensors))


def stand_in(monkeypatch: pytest.MonkeyPatch, name: str, api: Any) -> None:
    """Put a module of this name, and the packages it lies in, where imports find them."""
    parts = name.split(".")
    for number in range(1, len(parts) + 1):
        package = ModuleType(".".join(parts[:number]))
        monkeypatch.setitem(sys.modules, package.__name__, package)
    setattr(sys.modules[name], api.__name__, api)


@pytest.mark.parametrize(
    ("contender", "case", "module", "api"), STAND_INS, ids=lambda value: getattr(value, "name", "")
)
def test_adapters_for_gpus_compute_the_operator(
    contender: Contender, case: Case, module: str, api: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(monkeypatch, module, api)
    assert max(errors(contender, case).values()) < 1e-6
    assert contender.devices == ("cuda",)
    assert (case.operator.contenders).count(contender) == 1


@pytest.mark.parametrize(("contender", "case"), REAL, ids=lambda value: value.name)
def test_peers_that_are_there_compute_the_operator(contender: Contender, case: Case) -> None:
    if reason := contender.missing():
        pytest.skip(reason)
    assert max(errors(contender, case).values()) < 1e-6
    assert (case.operator.contenders).count(contender) == 1


@pytest.mark.parametrize(("contender", "case"), EVERY, ids=lambda value: value.name)
def test_every_peer_says_what_was_made_equal(contender: Contender, case: Case) -> None:
    assert contender.role == "other"
    assert contender.made_equal


def test_an_adapter_that_computes_something_else_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It would be another temperature, forgotten in the open."""
    if reason := TORCHDISTILL.missing():
        pytest.skip(reason)
    monkeypatch.setattr(torchdistill, "TEMPERATURE", 1.0)
    suite = Suite("tiny", (DISTILLATION_CASE,), ())
    (found,) = run_suite(suite, suite.cases, QUICK)
    record = next(record for record in found if record["contender"] == "torchdistill")
    assert record["status"] == "refused"
    assert record["seconds"] is None


def test_an_absent_peer_is_recorded_with_the_reason() -> None:
    absent = Contender("absent", lambda operator: pytest.fail("called"), missing=needs("absent_x"))
    suite = Suite("tiny", (DISTILLATION_CASE,), (absent,))
    (found,) = run_suite(suite, suite.cases, QUICK)
    record = next(record for record in found if record["contender"] == "absent")
    assert (record["status"], record["reason"]) == ("unavailable", "not installed")


def test_what_is_installed_is_not_missing() -> None:
    assert needs("torch")() is None
    assert version_of("torch") == f"torch {torch.__version__}"
    assert version_of("no-such-distribution") is None


def test_no_peer_is_imported_before_a_case_of_it_runs() -> None:
    code = (
        "import sys, introkernels.bench.suites\n"
        f"print([name for name in {MODULES} if name in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"
