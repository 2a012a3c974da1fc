"""Whether Triton is used, and what is said where it is not; each case is a process of its own."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy
import pytest
from building import ROOT, environment, run

import introkernels as ik

HAS_TRITON = "not installed" not in ik.backends.status()["triton"]
NEEDS_TRITON = pytest.mark.skipif(not HAS_TRITON, reason="needs triton")

# What a process does before it imports introkernels. A stand-in's version is its text.
BLOCKED = "sys.modules['triton'] = None"
A_GPU = "torch.cuda.device_count = lambda: 1"
STAND_IN = "sys.path.insert(0, {folder!r})"

REPORT = """
import introkernels as ik
from introkernels.ops.select import automatic, operators

def refusal():
    try:
        ik.use_backend("triton")
    except RuntimeError as error:
        return str(error)

def served(device):
    # The composite is made of functions, which have no namespace.
    operator = operators(torch.device(device)).row_loss_forward
    return getattr(operator, "namespace", "composite")

head, weight = torch.randn(4, 9), torch.randn(6, 9, requires_grad=True)
ik.linear_introspective_loss(head, weight, torch.tensor([0, 5, 2, 2])).backward()
report = {
    "status": ik.backends.status()["triton"],
    "imported": "triton.language" in sys.modules,
    "finite": bool(weight.grad.isfinite().all()),
    "auto": [served("cpu"), served("cuda")],
    "told": automatic("cuda")["row_loss_forward"][0],
    "refusal": refusal(),
    "forced": None,
}
if report["refusal"] is None:
    report["forced"] = []
    for device in ("cpu", "cuda", "meta"):
        try:
            report["forced"].append(served(device))
        except ValueError as error:
            report["forced"].append(str(error))
print(json.dumps(report))
"""


def report_of(*before: str, **env: str) -> dict[str, object]:
    """What a process reports that ran ``before`` first."""
    ours = {key: text for key, text in environment().items() if key != "TRITON_INTERPRET"}
    code = "\n".join(("import json, sys, torch", *before, REPORT))
    result = run(sys.executable, "-c", code, cwd=ROOT, env=ours | env)
    assert result.returncode == 0, result.stdout
    told: dict[str, object] = json.loads(result.stdout.splitlines()[-1])
    assert told["finite"]
    if told["status"] != "loaded":
        assert told["refusal"] == f"backend 'triton' can't be used: {told['status']}"
        assert told["auto"] == ["introkernels", "composite"]
    assert told["told"] == ("triton" if told["status"] == "loaded" else "composite")
    return told


def stand_in(folder: Path, text: str) -> str:
    """A triton that is the file ``text``; returns the line that puts it first on the path."""
    (folder / "triton.py").write_text(text)
    return STAND_IN.format(folder=str(folder))


def test_not_installed() -> None:
    told = report_of(BLOCKED, A_GPU)
    assert told["status"] == "not installed: pip install 'introkernels[triton]'"


@NEEDS_TRITON
def test_without_a_gpu_it_is_not_even_imported() -> None:
    told = report_of("torch.cuda.device_count = lambda: 0")
    assert str(told["status"]).startswith("no GPU that this torch can use (its CUDA: ")
    assert "TRITON_INTERPRET=1" in str(told["status"])
    assert not told["imported"]


def test_too_old(tmp_path: Path) -> None:
    told = report_of(stand_in(tmp_path, "__version__ = '3.4.0+git1'"), A_GPU)
    assert told["status"] == (
        "triton 3.4.0+git1 is too old, 3.5 or newer is needed: "
        "pip install 'introkernels[triton]' --upgrade"
    )


def test_broken_install(tmp_path: Path) -> None:
    told = report_of(stand_in(tmp_path, "raise ImportError('libtriton.so: no symbol')"), A_GPU)
    assert told["status"] == "can't be imported: ImportError: libtriton.so: no symbol"


@NEEDS_TRITON
def test_on_a_gpu() -> None:
    told = report_of(A_GPU)
    triton = "introkernels_triton"
    assert told["status"] == "loaded"
    assert told["auto"] == ["introkernels", triton]
    on_cpu, on_gpu, on_meta = told["forced"]
    assert on_gpu == triton
    assert on_cpu == (
        "backend 'triton' serves tensors on 'cuda' only, got a tensor on cpu; "
        "choose another with introkernels.use_backend"
    )
    assert "got a tensor on meta" in on_meta


@NEEDS_TRITON
@pytest.mark.parametrize("switch", ["1", "on"])
def test_in_the_interpreter_it_serves_the_cpu_when_asked_to(switch: str) -> None:
    told = report_of(TRITON_INTERPRET=switch)
    triton = "introkernels_triton"
    assert told["status"] == "loaded"
    assert told["auto"] == ["introkernels", triton]
    assert told["forced"][:2] == [triton, triton]
    assert "serves tensors on 'cuda' and 'cpu' only, got a tensor on meta" in told["forced"][2]


def test_interpreter_that_this_numpy_breaks(tmp_path: Path) -> None:
    triton = stand_in(tmp_path, "__version__ = '3.6.0'")
    newer = "import numpy; numpy.__version__ = '2.4.1'"
    told = report_of(triton, newer, TRITON_INTERPRET="1")
    assert told["status"] == (
        "the interpreter of triton 3.6.0 (TRITON_INTERPRET=1) needs numpy<2.4, "
        "found 2.4.1: pip install 'numpy<2.4'"
    )


@NEEDS_TRITON
@pytest.mark.skipif(
    tuple(map(int, numpy.__version__.split(".")[:2])) >= (2, 4), reason="needs numpy<2.4"
)
def test_interpreter_that_was_switched_on_too_late() -> None:
    told = report_of("import triton, os; os.environ['TRITON_INTERPRET'] = '1'")
    assert str(told["status"]).startswith("triton was imported before TRITON_INTERPRET=1 was set")


@NEEDS_TRITON
def test_doctor_names_the_interpreter_and_checks_it() -> None:
    env = environment(TRITON_INTERPRET="1")
    result = run(sys.executable, "-m", "introkernels", "doctor", cwd=ROOT, env=env)
    assert result.returncode == 0, result.stdout
    assert "  Triton kernels         interpreted on the CPU, slowly, for tests" in result.stdout
    *_, self_check = (line for line in result.stdout.splitlines() if line.startswith("  triton"))
    assert self_check.startswith("  triton                 ok (")
