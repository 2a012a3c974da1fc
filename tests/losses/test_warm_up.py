"""Compilation in advance: what a call would launch, and what is said where there is no GPU."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import introkernels as ik
from introkernels.ops import loader, schema, warming
from introkernels.ops.triton.launch import launch


class Kernel:
    """What ``triton.jit`` would make, as far as a warm-up looks at it."""

    def __init__(self, name: str) -> None:
        self.__name__ = name
        self.compiled: dict[Any, object] = {}

    def warmup(self, *arguments: Any, grid: tuple[int, ...], **options: Any) -> object:
        assert not any(isinstance(a, Tensor) and not a.is_meta for a in arguments)
        return self.compiled.setdefault(arguments[0].dtype, object())


FORWARD, BACKWARD = Kernel("forward"), Kernel("backward")


def row_loss_forward(logits: Tensor, teacher: Tensor, target: Tensor, *options: Any) -> Any:
    rows, classes = logits.shape
    launch(FORWARD, (rows,), logits, logits.stride(), classes, None, 0.5, BLOCK=64)
    return schema.FAKES["row_loss_forward"](logits, teacher, target, *options)


def row_loss_backward(grad_loss: Tensor, logits: Tensor, *others: Any) -> Tensor:
    stride = grad_loss.stride(0) if grad_loss.dim() else 0
    launch(BACKWARD, (len(logits),), logits, stride, BLOCK=64)
    return torch.empty_like(logits)


KERNELS = SimpleNamespace(row_loss_forward=row_loss_forward, row_loss_backward=row_loss_backward)


@pytest.fixture
def _triton_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(loader.STATUS, "triton", loader.LOADED)
    monkeypatch.setattr(loader, "INTERPRETED", False)
    monkeypatch.setattr(loader, "TRITON_KERNELS", KERNELS)
    monkeypatch.setattr(FORWARD, "compiled", {})
    monkeypatch.setattr(BACKWARD, "compiled", {})


def call(rows: int = 8, classes: int = 100, **options: Any) -> tuple[Tensor, ...]:
    logits = torch.empty(rows, classes, device="meta", **options)
    return logits, logits, torch.empty(rows, device="meta", dtype=torch.int64)


def names(function: Any, *arguments: Any, **keywords: Any) -> list[str]:
    return [
        launch.kernel.__name__ for launch in warming.record(KERNELS, function, arguments, keywords)
    ]


@pytest.mark.usefixtures("_triton_on_a_gpu")
def test_forward_and_backward_are_compiled_once_each() -> None:
    seen = []
    count = ik.backends.warm_up(
        ik.distillation_loss, *call(), progress=lambda *step: seen.append(step)
    )
    assert count == 2
    assert seen == [(0, 2, "forward"), (1, 2, "backward"), (2, 2, "")]
    assert list(FORWARD.compiled) == list(BACKWARD.compiled) == [torch.float32]


@pytest.mark.usefixtures("_triton_on_a_gpu")
def test_modules_parts_and_buffers() -> None:
    module = ik.DistillationLoss(weight=torch.ones(100), return_parts=True)
    assert ik.backends.warm_up(module, *call(), progress=lambda *_: None) == 2
    assert module.weight.device.type == "cpu"


@pytest.mark.usefixtures("_triton_on_a_gpu")
def test_default_progress_is_one_line_of_a_log(capsys: pytest.CaptureFixture[str]) -> None:
    ik.backends.warm_up(ik.distillation_loss, *call())
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == "introkernels: getting 2 Triton kernels ready\n"


def test_progress_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    warming.show_progress(0, 2, "forward")
    warming.show_progress(2, 2, "")
    first, last = capsys.readouterr().err.split("\r\033[K")[1:]
    assert first == "introkernels: kernel 1 of 2: forward"
    assert last == "introkernels: 2 kernels are ready\n"


def test_both_kinds_of_incoming_gradient_of_rows() -> None:
    # A stride of one number expanded, and that of a tensor of its own.
    assert names(ik.distillation_loss, *call(), reduction="none") == [
        *("forward", "backward", "backward"),
    ]


def test_another_batch_is_nothing_new_and_another_stride_is() -> None:
    def specialisations(*arguments: Tensor) -> set[Any]:
        found = warming.record(KERNELS, ik.distillation_loss, arguments, {})
        return {warming._specialisation(launch) for launch in found}

    known = specialisations(*call(8))
    assert specialisations(*call(77)) == known
    assert specialisations(*call(8, 104)) == known
    assert specialisations(*call(8, 112)) != known
    assert specialisations(*call(8, dtype=torch.float16)) != known


def test_gradients_are_those_that_the_tensors_ask_for() -> None:
    logits, teacher, target = call()
    assert names(ik.distillation_loss, logits, teacher.clone().requires_grad_(), target) == [
        "forward"
    ]
    with torch.no_grad():
        assert names(ik.distillation_loss, logits, teacher, target) == ["forward", "backward"]


def test_nothing_stays_of_a_recording() -> None:
    logits, teacher, target = torch.randn(8, 5), torch.randn(8, 5), torch.zeros(8).long()
    before = ik.distillation_loss(logits, teacher, target)
    assert names(ik.distillation_loss, logits, teacher, target) == ["forward", "backward"]
    assert not logits.requires_grad
    with pytest.raises(ZeroDivisionError):
        names(lambda: 1 / 0)
    assert torch.equal(ik.distillation_loss(logits, teacher, target), before)


@pytest.mark.usefixtures("_triton_on_a_gpu")
def test_refuses_a_function_without_kernels() -> None:
    with pytest.raises(ValueError, match="launches no Triton kernel"):
        ik.backends.warm_up(ik.reference.distillation_loss, *call())


def test_says_why_it_can_not_be_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(loader.STATUS, "triton", "no GPU that this torch can use")
    with pytest.raises(RuntimeError, match="'triton' can't be used: no GPU that this torch"):
        ik.backends.warm_up(ik.distillation_loss, *call())
    monkeypatch.setitem(loader.STATUS, "triton", loader.LOADED)
    monkeypatch.setattr(loader, "INTERPRETED", True)
    with pytest.raises(RuntimeError, match="nothing to compile: TRITON_INTERPRET is set"):
        ik.backends.warm_up(ik.distillation_loss, *call())
