"""``introkernels doctor``: what is installed, what was built and loaded, and whether it works."""

from __future__ import annotations

import os
import platform
import re
import sys
from collections.abc import Callable, Iterable
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor

import introkernels as ik
from introkernels.ops import loader, select

# Float32 sums of this size are good to about 1e-7; the contract allows 2e-6 (relative, 2-norm).
TOLERANCE = 2e-6
REBUILD = "INTROKERNELS_CPP=1 pip install --force-reinstall --no-deps --no-build-isolation ."


def main() -> int:
    """Print the report; its last line is the verdict.

    Returns:
        0 where the losses work, whatever serves them; 1 where a backend computes wrongly.
    """
    status = ik.backends.status()
    where = "cuda" if torch.cuda.device_count() else "cpu"
    checks = {name: self_check(name) for name in usable_backends(status)}
    sections: dict[str, Iterable[tuple[str, str]]] = {
        "Versions": versions(),
        "Machine": machine(),
        "Build": build(),
        "Backends": status.items(),
        f"Automatic choice on {where}": choices(where),
        "Optional dependencies": extras(),
        "Self-check: float32 losses and gradients against the float64 reference": checks.items(),
    }
    for title, rows in sections.items():
        print(title)
        for key, value in rows:
            print(f"  {key:<22} {value}")
        print()
    wrong = [f"{name}: {result}" for name, result in checks.items() if not result.startswith("ok")]
    print(verdict(status, wrong, gpus=torch.cuda.device_count()))
    return 1 if wrong else 0


def verdict(status: dict[str, str], wrong: list[str], gpus: int = 0) -> str:
    """One line: healthy, usable, or broken, and what to do about it.

    Args:
        status: what ``ik.backends.status()`` gives.
        wrong: the failed self-checks, one sentence each.
        gpus: how many GPUs torch sees. Without one, GPU kernels are not missed.
    """
    if wrong:
        return f"broken: {'; '.join(wrong)}"
    if status["cpu"] != "loaded":
        return (
            f"usable, but slower: C++ kernels missing ({status['cpu']}); with a C++20 compiler, "
            f"run in the source folder: {REBUILD}"
        )
    if not gpus:
        return "healthy: C++ CPU kernels loaded"
    on_gpu = {"CUDA": status["cuda"], "Triton": status["triton"]}
    loaded = [name for name, state in on_gpu.items() if state == "loaded"]
    if not loaded:
        reasons = "; ".join(f"{name}: {state}" for name, state in on_gpu.items())
        return f"usable, but slower on the GPU: kernels missing ({reasons})"
    return f"healthy: C++ CPU kernels and {' and '.join(loaded)} GPU kernels loaded"


def versions() -> list[tuple[str, str]]:
    rows = [
        ("introkernels", f"{ik.__version__} in {Path(ik.__file__).parent}"),
        ("python", f"{platform.python_version()} at {sys.executable}"),
    ]
    return rows + [(name, _installed(name)) for name in ("torch", "numpy", "triton")]


def machine() -> list[tuple[str, str]]:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    try:
        kernels = ik.backends.cpu_capability() or "none"
    except ValueError as error:
        kernels = str(error)
    return [
        ("platform", platform.platform()),
        ("C++ kernels", kernels),
        ("CUDA kernels", _cuda_kernels()),
        ("Triton kernels", _triton_kernels()),
        ("PyTorch's kernels", torch.backends.cpu.get_cpu_capability()),
        ("CPUs", f"{usable} usable of {os.cpu_count()}"),
        ("torch threads", str(torch.get_num_threads())),
        ("GPU", ", ".join(gpus) or f"none that this torch sees (its CUDA: {torch.version.cuda})"),
    ]


def _cuda_kernels() -> str:
    if ik.backends.status()["cuda"] != "loaded":
        return "none"
    return _text(ik.build_info().get("cuda_architectures", "of unknown architectures"))


def _triton_kernels() -> str:
    if ik.backends.status()["triton"] != "loaded":
        return "none"
    if loader.INTERPRETED:
        return "interpreted on the CPU, slowly, for tests (TRITON_INTERPRET is set)"
    return "compiled at first use"


def build() -> list[tuple[str, str]]:
    """What the build recorded, without what the other sections tell."""
    told = {"version", "torch", "backends"}
    rows = [(key, _text(value)) for key, value in ik.build_info().items() if key not in told]
    return rows or [("no record", "no library was built; the backends below tell why")]


def choices(device: str) -> list[tuple[str, str]]:
    """For each operator what ``"auto"`` takes on a device of this type, and on what ground."""
    return [
        (name, f"{backend} ({ground})")
        for name, (backend, ground) in select.automatic(device).items()
    ]


def extras() -> list[tuple[str, str]]:
    """For each extra of the distribution, which of its requirements are missing."""
    try:
        distribution = metadata.distribution("introkernels")
    except metadata.PackageNotFoundError:
        return [("unknown", "introkernels runs from a folder, it is not installed")]
    requirements = distribution.requires or []
    rows = []
    for extra in distribution.metadata.get_all("Provides-Extra") or []:
        marker = re.compile(rf"""extra\s*==\s*["']{re.escape(extra)}["']""")
        names = [
            re.split(r"[^\w.-]", requirement, maxsplit=1)[0]
            for requirement in requirements
            if marker.search(requirement)
        ]
        missing = [name for name in names if not _is_installed(name)]
        state = f"missing {', '.join(missing)}" if missing else "complete"
        rows.append((f"introkernels[{extra}]", state))
    return rows


def usable_backends(status: dict[str, str]) -> list[str]:
    return [
        "reference",
        "composite",
        *(name for name, state in status.items() if state == "loaded"),
    ]


def self_check(backend: str) -> str:
    """Small losses and their gradients through one backend, compared with the definition.

    Returns:
        ``"ok (…)"`` with the largest relative error, or what is wrong.
    """
    on_cpu = backend in ("reference", "composite", "cpu") or (
        backend == "triton" and loader.INTERPRETED
    )
    device = "cpu" if on_cpu else "cuda"
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    target = torch.randint(7, (5,), generator=generator).to(device)
    cases: dict[str, tuple[Tensor, ...]] = {
        "distillation_loss": (normal(5, 7), normal(5, 7), target),
        "introspective_loss": (normal(5, 7), target, normal(5, 7, 3, 11), normal(5, 3, 11)),
        "linear_introspective_loss": (normal(5, 33), normal(7, 33), target, normal(7)),
    }
    worst = 0.0
    for name, arguments in cases.items():
        expected = _loss_and_gradient(getattr(ik.reference, name), arguments, torch.float64)
        try:
            with ik.use_backend(backend):
                computed = _loss_and_gradient(getattr(ik, name), arguments, torch.float32)
        except Exception as failure:  # a doctor reports whatever goes wrong
            return f"{name} raises {type(failure).__name__}: {failure}"
        for part, got, want in zip(("loss", "gradient"), computed, expected, strict=True):
            error = float((got.double() - want).norm() / want.norm())
            if not error <= TOLERANCE:
                return f"the {part} of {name} is off by {error:.1e} (relative)"
            worst = max(worst, error)
    return f"ok (largest relative error {worst:.0e})"


def _loss_and_gradient(
    loss_function: Callable[..., Tensor], arguments: tuple[Tensor, ...], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The loss, and its gradient in the first argument."""
    first, *others = (
        argument.to(dtype) if argument.is_floating_point() else argument for argument in arguments
    )
    first = first.detach().requires_grad_()
    loss = loss_function(first, *others)
    (gradient,) = torch.autograd.grad(loss, first)
    return loss.detach(), gradient


def _is_installed(distribution: str) -> bool:
    try:
        metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True


def _installed(distribution: str) -> str:
    return metadata.version(distribution) if _is_installed(distribution) else "not installed"


def _text(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_text(item)}" for key, item in value.items()) or "none"
    if isinstance(value, (list, tuple)):
        return " ".join(map(str, value)) or "none"
    return str(value)
