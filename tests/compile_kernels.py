"""Compiles every Triton kernel for every GPU it is meant for, on a machine without one.

    python tests/compile_kernels.py [--targets sm_90 …] [--in-turn] [--only TEXT] [--module FILE]
                                    [--jobs N] [--write]

What there is to compile is not listed anywhere: the losses are called on tensors without data, for
the shapes, dtypes and options below, and their launches are recorded. Each launch is specialised by
Triton's own rules for a target and compiled as it would be there. The table tells what came out:
registers (vector and accumulator registers on AMD), spilled bytes or loads and stores, shared
memory, instructions in all, 128-bit loads and stores.

A kernel that spills registers or does not compile for a target is named at the end, and the exit
status is 1. Compiled kernels are kept in build/kernels: only what changed is compiled again.

Unless calls are chosen, what the main kernels reach of a plain copy is predicted (see
benchmarks/README.md), and a figure below its bar in benchmarks/predicted.toml is a failure. --write
keeps these figures there.
"""

from __future__ import annotations

import argparse
import itertools
import math
import multiprocessing
import os
import re
import runpy
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
os.environ.setdefault("TRITON_CACHE_DIR", str(ROOT / "build" / "kernels"))
sys.path.append(str(ROOT / "benchmarks"))
# Interpreted kernels can't be compiled.
os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from helpers import kernel_table
from helpers.kernel_table import Result
from roofline import sass, table
from roofline.cases import CASES, TRITON_KERNELS, Case
from roofline.machine import GPUS, LANES
from roofline.predict import Prediction, predict
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

import introkernels as ik
from introkernels.ops import warming
from introkernels.ops.triton.launch import NVIDIA_OPTIONS, Launch

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
FLOAT64, FLOAT32, BFLOAT16, FLOAT16 = torch.float64, torch.float32, torch.bfloat16, torch.float16

# What is compiled is data: a name, and a function's launches.
Call = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]


def empty(*shape: int, dtype: torch.dtype = FLOAT32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def calls() -> Iterator[tuple[str, Call]]:
    """Every call whose kernels are compiled, by a name for the table."""
    yield from row_loss_calls()
    yield from introspective_calls()
    yield from head_calls()


# Few classes, an odd number, one tile, many tiles; float64 and the half types have their own tiles.
ROW_LOSSES = (
    *((10, FLOAT64), (10, FLOAT32), (10, BFLOAT16), (101, FLOAT32), (101, BFLOAT16)),
    *((1000, FLOAT64), (1000, FLOAT32), (1000, BFLOAT16), (1000, FLOAT16)),
    *((32000, FLOAT64), (32000, FLOAT32), (32000, BFLOAT16)),
)
# Each way through the kernels, as options open and close it at compile time.
OPTIONS: tuple[dict[str, Any], ...] = (
    {"reduction": "sum"},
    {"reduction": "none", "label_smoothing": 0.1},
    {"label_smoothing": 0.1},
)


def row_loss_calls() -> Iterator[tuple[str, Call]]:
    many = empty(2**17, dtype=torch.int64)
    rows = 256
    target = empty(rows, dtype=torch.int64)
    for classes, dtype in ROW_LOSSES:
        name = f"distillation {classes} {short(dtype)}"
        logits = empty(*many.shape, classes, dtype=dtype)
        yield f"{name}, many rows", (ik.distillation_loss, (logits, logits, many), {})
        logits = empty(rows, classes, dtype=dtype)
        arguments = (logits, logits, target)
        yield name, (ik.distillation_loss, arguments, {})
        if (classes, dtype) in ((1000, FLOAT32), (32000, BFLOAT16), (32000, FLOAT64)):
            for options in OPTIONS:
                suffix = " ".join(str(option) for option in options.values())
                yield f"{name}, {suffix}", (ik.distillation_loss, arguments, options)
    half, single = empty(rows, 1000, dtype=BFLOAT16), empty(rows, 1000)
    mixed = (ik.distillation_loss, (half, single, target), {})
    yield "distillation 1000 bf16, f32 teacher", mixed
    strided = empty(1000, rows).T
    yield "distillation 1000 f32, strided", (ik.distillation_loss, (strided, strided, target), {})


# Classes explained and dimensions: CIFAR-100, ImageNet images, MNIST, odd and unaligned.
EXPLANATIONS = (
    *((100, 3072, FLOAT32), (100, 3072, BFLOAT16), (100, 3072, FLOAT16), (100, 3072, FLOAT64)),
    *((16, 150528, FLOAT32), (16, 150528, BFLOAT16), (16, 150528, FLOAT64)),
    *((10, 784, FLOAT32), (10, 784, BFLOAT16), (7, 1021, FLOAT32), (7, 1021, BFLOAT16)),
)


def introspective_calls() -> Iterator[tuple[str, Call]]:
    rows = 64
    target = empty(rows, dtype=torch.int64)
    for (classes, size, dtype), center in itertools.product(EXPLANATIONS, (False, True)):
        name = f"{classes}x{size} {short(dtype)}{', centred' if center else ''}"
        logits = empty(rows, classes, dtype=dtype)
        gradients, inputs = empty(rows, classes, size, dtype=dtype), empty(rows, size, dtype=dtype)
        options = {"center": center}
        loss = (ik.introspective_loss, (logits, target, gradients, inputs), options)
        yield f"introspective {name}", loss
        statistics = (ik.explanation_stats, (gradients, inputs, target), options)
        yield f"statistics {name}", statistics
    logits = empty(rows, 1000)
    gradients, inputs = empty(rows, 10, 3, 32, 32), empty(rows, 3, 32, 32)
    index = empty(rows, 10, dtype=torch.int64)
    chosen = (ik.introspective_loss, (logits, target, gradients, inputs), {"class_index": index})
    yield "introspective f32, 10 of 1000 explained", chosen
    few = gradients[:, :, 0], inputs[:, 0]
    projected = {"similarity": "projection", "label_smoothing": 0.1, "reduction": "none"}
    loss = (ik.introspective_loss, (empty(rows, 10), target, *few), projected)
    yield "introspective f32, projection", loss
    last = empty(rows, 10, 32, 32, 3).movedim(-1, 2)
    yield "statistics f32, channels last", (ik.explanation_stats, (last, inputs, target), {})


# Classes and width: CIFAR-100 on a small network, ImageNet on ResNet-50, a language model, odd
# numbers. A head's kernels are those of its row loss.
HEADS = (
    *((100, 512, FLOAT32), (100, 512, BFLOAT16), (100, 512, FLOAT64)),
    *((1000, 2048, FLOAT32), (1000, 2048, BFLOAT16), (1000, 2048, FLOAT16), (1000, 2048, FLOAT64)),
    *((32000, 1024, FLOAT32), (32000, 1024, BFLOAT16), (101, 77, FLOAT32), (101, 77, BFLOAT16)),
)


def head_calls() -> Iterator[tuple[str, Call]]:
    rows = 256
    target = empty(rows, dtype=torch.int64)
    for classes, width, dtype in HEADS:
        features, weight = empty(rows, width, dtype=dtype), empty(classes, width, dtype=dtype)
        bias = empty(classes, dtype=dtype)
        yield (
            f"head {classes}x{width} {short(dtype)}",
            (ik.linear_introspective_loss, (features, weight, target, bias), {}),
        )
        if (classes, width, dtype) == (1000, 2048, BFLOAT16):
            options = {"center": True, "reduction": "none"}
            yield (
                f"head {classes}x{width} {short(dtype)} centred, none",
                (ik.linear_introspective_loss, (features, weight, target), options),
            )


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.").replace("bfloat", "bf").replace("float", "f")


@dataclass(frozen=True)
class Job:
    """A kernel specialised for a target as it would be at run time."""

    name: str
    kernel: Any
    target: str
    signature: dict[str, Any]
    constants: dict[Any, Any]
    attributes: dict[Any, Any]
    options: dict[str, Any]

    @property
    def key(self) -> str:
        parts = (self.signature, self.constants, self.attributes, self.options)
        return f"{self.target} {self.kernel} {parts}"


def specialised(name: str, launch: Launch, target: str) -> Job:
    """The job that Triton's launcher would make of a launch, by the launcher's own steps."""
    kernel, backend = launch.kernel, make_backend(TARGETS[target])
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    known = {
        name: option
        for name, option in launch.options.items()
        if TARGETS[target].backend == "cuda" or name not in NVIDIA_OPTIONS
    }
    keywords = {**known, "debug": False, "instrumentation_mode": ""}
    bound, specialisation, rest = bind(*launch.arguments, **keywords)
    options, signature, constants, attributes = kernel._pack_args(
        backend, keywords, bound, specialisation, rest
    )
    return Job(name, kernel, target, signature, constants, attributes, options.__dict__)


def find_jobs(
    kernels: Any,
    named: Iterator[tuple[str, Call]],
    targets: Sequence[str],
    only: str,
    in_turn: bool = False,
) -> list[Job]:
    """The distinct jobs of all calls whose name holds ``only``.

    There is one for each target, or with ``in_turn`` one for one of them, which spreads kernels
    evenly and is the same in each run.
    """
    jobs: dict[str, Job] = {}
    for name, (function, arguments, keywords) in named:
        if only in name:
            for launch in warming.record(kernels, function, arguments, keywords):
                made = [specialised(name, launch, target) for target in targets]
                if in_turn:
                    same_for_all = f"{made[0].kernel} {made[0].signature} {made[0].constants}"
                    made = [made[zlib.crc32(same_for_all.encode()) % len(made)]]
                for job in made:
                    jobs.setdefault(job.key, job)
    return sorted(jobs.values(), key=lambda job: list(TARGETS).index(job.target))


def compiled_code(job: Job) -> Any:
    """What Triton's compiler makes of a job."""
    source = ASTSource(job.kernel, job.signature, job.constants, job.attributes)
    return triton.compile(source, target=TARGETS[job.target], options=job.options)


def compiled(job: Job) -> Result:
    """Compile one job and read its machine code."""
    kernel = job.kernel.__name__
    try:
        code = compiled_code(job)
    except Exception as failure:  # whatever the compiler or the assembler raises
        return Result(job.name, kernel, job.target, failure=reason(failure))
    read = nvidia_figures if TARGETS[job.target].backend == "cuda" else amd_figures
    return Result(job.name, kernel, job.target, shared=code.metadata.shared, **read(code.asm))


def reason(failure: BaseException) -> str:
    """What is wrong, and the line of the kernel where it is: what Triton raises tells both."""
    cause = failure
    while cause.__cause__ is not None:
        cause = cause.__cause__
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    marks = [number for number, line in enumerate(lines) if set(line) == {"^"}]
    # The code is quoted up to the line in question, which is marked with a caret.
    quoted = f" in `{lines[marks[-1] - 1]}`" if marks and marks[-1] else ""
    told = lines[-1] if lines and lines[-1] != "^" else ""
    return f"{type(cause).__name__}{quoted}: {told[:300]}"


# The one that Triton brings.
CUOBJDUMP = str(Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump")


def cubin_file(asm: dict[str, Any]) -> Path:
    """Machine code in a file, until this process writes the next one."""
    file = Path(os.environ["TRITON_CACHE_DIR"]) / f"{os.getpid()}.cubin"
    file.write_bytes(asm["cubin"])
    return file


def nvidia_figures(asm: dict[str, Any]) -> dict[str, Any]:
    """Figures from the machine code in a cubin."""
    command = [CUOBJDUMP, "-sass", "-res-usage", str(cubin_file(asm))]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert usage is not None, text
    code = kernel_table.instructions(text)
    spills = kernel_table.count(code, r"(LDL|STL)\b") or int(usage[2])
    return {"registers": usage[1], "spills": spills, **kernel_table.nvidia_figures(code)}


def amd_figures(asm: dict[str, Any]) -> dict[str, Any]:
    """Figures from the assembly's own record of its resources, and from the assembly."""
    text = asm["amdgcn"]

    def recorded(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", text)
        assert found is not None, f"no .{name} in the assembly"
        return int(found[1])

    code = re.findall(r"^\t([a-z]\w+)", text, re.MULTILINE)
    spills = recorded("vgpr_spill_count") + recorded("private_segment_fixed_size")
    return {
        # Scalars that don't fit go to lanes of vector registers: no memory is touched.
        "registers": f"{recorded('vgpr_count')}+{recorded('agpr_count')}",
        "spills": spills,
        "instructions": len(code),
        "wide_loads": kernel_table.count(code, r"(global|buffer)_load_dwordx4$"),
        "wide_stores": kernel_table.count(code, r"(global|buffer)_store_dwordx4$"),
    }


# The jobs of this process and, after a fork, of its workers: a kernel can't be sent to a process.
_jobs: list[Job] = []


def _compiled(index: int) -> Result:
    return compiled(_jobs[index])


def compile_jobs(jobs: Sequence[Job], processes: int) -> Iterator[Result]:
    """Results in the order of the jobs, as they come."""
    global _jobs
    _jobs = list(jobs)
    Path(os.environ["TRITON_CACHE_DIR"]).mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        yield from pool.map(_compiled, range(len(jobs)))


def call_of(case: Case) -> Call:
    """The call that launches the kernel of a prediction."""
    dtype = getattr(torch, case.dtype)
    rows, classes, *dims = case.shape
    logits, target = empty(rows, classes, dtype=dtype), empty(rows, dtype=torch.int64)
    if not dims:
        return ik.distillation_loss, (logits, logits, target), {}
    gradients, inputs = empty(*case.shape, dtype=dtype), empty(rows, *dims, dtype=dtype)
    if case.kernel == "explanation_stats":
        return ik.explanation_stats, (gradients, inputs, target), {}
    return ik.introspective_loss, (logits, target, gradients, inputs), {}


def predicted(case: Case, target: str) -> dict[str, Prediction]:
    """What a case's kernel is predicted to reach on the GPUs that run code for a target."""
    from introkernels.ops.triton import operators

    launch = next(
        launch
        for launch in warming.record(operators, *call_of(case))
        if TRITON_KERNELS.get(launch.kernel.__name__) == case.kernel
    )
    code = compiled_code(specialised(str(case), launch, target))
    (kernel,) = sass.kernels(CUOBJDUMP, cubin_file(code.asm)).values()
    warps = code.metadata.num_warps
    work = case.work(math.prod(launch.grid), warps, LANES * warps, shared=code.metadata.shared)
    return {name: predict(kernel, work, gpu) for name, gpu in GPUS.items() if gpu.target == target}


def predictions(targets: Sequence[str], processes: int) -> table.Predictions:
    """What the main kernels are predicted to reach."""
    work = [
        (case, target)
        for case in CASES
        for target in targets
        if any(gpu.target == target for gpu in GPUS.values())
    ]
    result: table.Predictions = {("triton", case): {} for case, _ in work}
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        made = pool.map(predicted, *zip(*work, strict=True))
        for (case, _), found in zip(work, made, strict=True):
            result["triton", case] |= found
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--targets", nargs="+", choices=list(TARGETS), default=list(TARGETS))
    parser.add_argument("--in-turn", action="store_true", help="each kernel for one of the targets")
    parser.add_argument("--only", default="", help="only calls whose name holds this text")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--module", help="a file with other `calls` and kernels, for tests")
    parser.add_argument("--write", action="store_true", help="keep predictions in predicted.toml")
    chosen = parser.parse_args(arguments)
    if chosen.module:
        other = runpy.run_path(chosen.module)
        kernels, named = other["kernels"], other["calls"]()
    else:
        from introkernels.ops.triton import operators as kernels

        named = calls()
    jobs = find_jobs(kernels, named, chosen.targets, chosen.only, chosen.in_turn)
    print(f"{len(jobs)} kernels to compile with triton {triton.__version__}", flush=True)
    print(kernel_table.HEADING, flush=True)
    results = []
    for result in compile_jobs(jobs, chosen.jobs):
        results.append(result)
        print(kernel_table.row(result), flush=True)
    bad = kernel_table.complaints(results)
    if not (chosen.only or chosen.module or any(result.failure for result in results)):
        bad += table.report(predictions(chosen.targets, chosen.jobs), chosen.write)
    print(*bad, sep="\n")
    print(f"{len(results)} kernels compiled, {len(bad)} of them not as they should be")
    return 1 if bad or not results else 0


if __name__ == "__main__":
    sys.exit(main())
