"""Kernels exist for several instruction sets: that asked for runs, with the bits it promises."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

import introkernels as ik

VARIABLE = "INTROKERNELS_CPU_CAPABILITY"
# From the narrowest to the widest.
CAPABILITIES = ("baseline", "avx2", "avx512")
HERE = Path(__file__).resolve()

pytestmark = pytest.mark.skipif(
    ik.backends.status()["cpu"] != "loaded", reason="instruction sets are the C++ kernels' matter"
)


def supported() -> tuple[str, ...]:
    """The capabilities that this processor has, as its own description says."""
    flags = set(Path("/proc/cpuinfo").read_text().split())
    widest = 1
    if {"avx2", "fma", "f16c"} <= flags:
        widest = 2
        if {"avx512f", "avx512bw", "avx512dq", "avx512vl"} <= flags:
            widest = 3
    return CAPABILITIES[:widest]


def environment(capability: str | None) -> dict[str, str]:
    """This process's environment with another choice of capability, or none."""
    # The package that is tested here, and the tests' helpers.
    paths = [str(HERE.parents[1]), str(Path(ik.__file__).resolve().parents[1])]
    chosen = {} if capability is None else {VARIABLE: capability}
    rest = {name: text for name, text in os.environ.items() if name != VARIABLE}
    return {**rest, **chosen, "PYTHONPATH": os.pathsep.join(paths), "PYTHONSAFEPATH": "1"}


def python(code: str, capability: str | None) -> subprocess.CompletedProcess[str]:
    """Run ``code`` in a process where the library is loaded under that choice."""
    return subprocess.run(
        [sys.executable, "-c", f"import introkernels as ik\n{code}"],
        env=environment(capability),
        capture_output=True,
        text=True,
        check=False,
    )


def test_capability_of_this_process() -> None:
    """What the environment asks for, else the widest that the processor has."""
    assert ik.backends.cpu_capability() == os.environ.get(VARIABLE, supported()[-1])


@pytest.mark.parametrize("capability", [None, *supported()])
def test_capability_asked_for_is_in_force(capability: str | None) -> None:
    result = python("print(ik.backends.cpu_capability())", capability)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == (capability or supported()[-1])


@pytest.mark.parametrize("value", ["sse9", "AVX2", "avx2 "])
def test_unknown_capability(value: str) -> None:
    """The package can be imported and says what is wrong; no kernel runs by another choice."""
    call = """
import torch
logits = torch.randn(3, 4, requires_grad=True)
arguments = logits, torch.randn(3, 4), torch.tensor([0, 1, 2])
with ik.use_backend("reference"):
    ik.distillation_loss(*arguments).backward()
# Large enough for several threads, which must not be the first to find out.
gradients, inputs, many = torch.randn(64, 50, 600), torch.randn(64, 600), torch.arange(64) % 50
uses = (
    lambda: ik.distillation_loss(*arguments),
    lambda: ik.explanation_stats(gradients, inputs, many),
    lambda: ik.introspective_loss(torch.randn(64, 50), many, gradients, inputs),
    lambda: ik.linear_introspective_loss(inputs, torch.randn(500, 600), many),
    ik.backends.cpu_capability,
)
for use in uses:
    try:
        use()
    except ValueError as error:
        print(error)
"""
    result = python(call, value)
    assert result.returncode == 0, result.stderr
    messages = result.stdout.splitlines()
    assert len(messages) == 5, result.stdout
    for message in messages:
        assert VARIABLE in message
        assert repr(value) in message
        for capability in CAPABILITIES:
            assert repr(capability) in message


def test_doctor_tells_of_an_unknown_capability() -> None:
    command = [sys.executable, "-m", "introkernels", "doctor"]
    result = subprocess.run(
        command, env=environment("sse9"), capture_output=True, text=True, check=False
    )
    assert re.search(rf"{VARIABLE}.*'sse9'", result.stdout), result.stdout + result.stderr
    assert not result.stdout.splitlines()[-1].startswith("healthy")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Tensor]]:
    """What every operator gives, by capability and by the name of the result."""
    folder = tmp_path_factory.mktemp("capability")
    found = {}
    for capability in supported():
        file = folder / f"{capability}.pt"
        script = HERE.with_name("capability_results.py")
        result = subprocess.run(
            [sys.executable, str(script), str(file)],
            env=environment(capability),
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 0, result.stderr
        found[capability] = torch.load(file)
    return found


def bits(tensor: Tensor) -> Tensor:
    """The numbers as integers; every NaN is the same one."""
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    # Which of two NaNs an operation passes on is not defined.
    same_nan = torch.where(tensor.isnan(), torch.nan, tensor).contiguous()
    return same_nan.view(integers[tensor.element_size()])


def comparable(operator: str) -> tuple[str, ...]:
    """The capabilities whose bits an operator promises to be the same."""
    # Exponentials and matrix products are made with fused multiply-add, which the baseline lacks.
    return tuple(
        capability
        for capability in supported()
        if operator == "explanation_stats" or capability != "baseline"
    )


@pytest.mark.parametrize(
    "operator",
    [
        operator
        for operator in (
            "distillation_loss",
            "similarity_loss",
            "introspective_loss",
            "linear_introspective_loss",
            "explanation_stats",
        )
        if len(comparable(operator)) > 1
    ],
)
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
def test_capabilities_give_the_same_bits(
    results: dict[str, dict[str, Tensor]], dtype: str, operator: str
) -> None:
    first, *others = comparable(operator)
    names = [name for name in results[first] if name.startswith(f"{operator} {dtype} ")]
    assert len(names) >= 20
    for other in others:
        assert results[other].keys() == results[first].keys()
        different = [
            name
            for name in names
            if not torch.equal(bits(results[other][name]), bits(results[first][name]))
        ]
        assert not different, f"{other} differs from {first} in {different}"
