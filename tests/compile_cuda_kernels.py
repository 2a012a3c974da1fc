"""Compiles every CUDA kernel for every GPU it is meant for, on a machine without one.

    python tests/compile_cuda_kernels.py [--targets sm_90a …] [--only TEXT] [--jobs N] [--write]
                                         [FILE …]
    python tests/compile_cuda_kernels.py --library introkernels/_cuda.so

Each file of csrc/cuda is compiled by nvcc with the flags of the build, and every kernel in it gets
a line for each target, like those of compile_kernels.py. A kernel that spills registers or has a
stack, and a file that does not compile for a target, is named at the end, and the exit status is 1.
What came out is kept in build/kernels/cuda: only what changed is compiled again. With --library
nothing is compiled: the table tells what a library that was built holds.

Unless files are chosen, what the main kernels reach of a plain copy is predicted (see
benchmarks/README.md), and a figure below its bar in benchmarks/predicted.toml is a failure. --write
keeps these figures there.

Without nvcc nothing is compiled, which is a failure where INTROKERNELS_CUDA=1.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))
sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))
from helpers import kernel_table
from helpers.kernel_table import Result
from roofline import sass, table
from roofline.cases import CASES, cuda_work, is_cuda_kernel
from roofline.machine import GPUS
from roofline.predict import predict

import setup_cuda

ROOT = Path(__file__).resolve().parents[1]
TARGETS = ("sm_80", "sm_90a", "sm_100")


@dataclass(frozen=True)
class Usage:
    """What ptxas says of a function: registers, and bytes of all else."""

    registers: int = 0
    stack: int = 0
    spilled: int = 0
    shared: int = 0


def usages(log: str) -> dict[str, Usage]:
    """What ``ptxas -v`` says of each function, by its mangled name."""
    found: dict[str, Usage] = {}
    name = ""
    for line in log.splitlines():
        if named := re.search(r"Function properties for (\S+)", line):
            name = named[1]
            found[name] = Usage()
        elif memory := re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line
        ):
            stack, stores, loads = map(int, memory.groups())
            found[name] = dataclasses.replace(found[name], stack=stack, spilled=stores + loads)
        elif used := re.search(r"Used (\d+) registers", line):
            shared = re.search(r"(\d+) bytes smem", line)
            found[name] = dataclasses.replace(
                found[name], registers=int(used[1]), shared=int(shared[1]) if shared else 0
            )
    return found


def functions(listing: str) -> dict[str, list[str]]:
    """The instructions of each function in a listing of machine code, by its mangled name."""
    _, *parts = re.split(r"^\s*Function : (\S+)$", listing, flags=re.MULTILINE)
    return {
        name: kernel_table.instructions(code)
        for name, code in zip(parts[::2], parts[1::2], strict=True)
    }


def in_library(library: Path) -> list[Result]:
    """What a built library holds for each architecture, by architecture and name."""
    listings = (_parts_of(library, option) for option in ("-res-usage", "-sass"))
    results = []
    for (target, resources), code in zip(*(parts.items() for parts in listings), strict=True):
        used, instructions = resource_usages(resources), functions(code[1])
        for name, (kernel, arguments) in zip(used, readable(list(used)), strict=True):
            results.append(result(arguments, kernel, target, used[name], instructions[name]))
    return sorted(results, key=lambda found: (found.target, found.kernel, found.name))


def resource_usages(listing: str) -> dict[str, Usage]:
    """What a listing of resources says of each function, by its mangled name."""
    found = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", listing)
    return {
        name: Usage(int(registers), int(stack), int(local), int(shared))
        for name, registers, stack, shared, local in found
    }


def _parts_of(library: Path, option: str) -> dict[str, str]:
    """A listing of a library, by architecture: each of its files has a part for each of them."""
    listing = subprocess.run(
        [disassembler(), option, str(library)], capture_output=True, text=True, check=True
    ).stdout
    _, *parts = re.split(r"^arch = (\S+)$", listing, flags=re.MULTILINE)
    by_target: dict[str, str] = {}
    for target, text in zip(parts[::2], parts[1::2], strict=True):
        by_target[target] = by_target.get(target, "") + text
    return dict(sorted(by_target.items()))


def readable(mangled: Sequence[str]) -> list[tuple[str, str]]:
    """For each function its name, and the arguments of its template; no namespaces."""
    tool = shutil.which("c++filt")
    if tool is None or not mangled:
        return [(name, "") for name in mangled]
    text = subprocess.run(
        [tool], input="\n".join(mangled), capture_output=True, text=True, check=True
    ).stdout
    return [parts_of_name(line) for line in text.splitlines()]


def parts_of_name(demangled: str) -> tuple[str, str]:
    """``"row"`` and ``"float, void"`` of ``void ns::row<float, void>(ns::Call)``."""
    name = demangled.replace("(anonymous namespace)::", "")
    name = re.sub(r"\b\w+::", "", name).removeprefix("void ")
    found = re.match(r"(\w+)(?:<(.*?)>)?(?:\(.*)?$", name)
    return (found[1], found[2] or "") if found else (name, "")


def compiled(nvcc: setup_cuda.Nvcc, source: Path, target: str, cache_in: Path) -> list[Result]:
    """What became of the kernels of a file on a target, from the cache where nothing changed."""
    number = target.removeprefix("sm_")
    nvcc = dataclasses.replace(nvcc, targets=(f"-gencode=arch=compute_{number},code={target}",))
    command = [nvcc.program, *nvcc.flags, f"-I{ROOT / 'csrc'}", str(source)]
    stem = cache_in / f"{source.stem}-{target}"
    kept, digest = stem.with_suffix(".json"), fingerprint(nvcc, command)
    if digest and kept.exists():
        known = json.loads(kept.read_text())
        if known["fingerprint"] == digest:
            return [Result(**fields) for fields in known["results"]]
    # Not by the name of the target alone: nvcc takes the end of a name for a kind of file.
    code = Path(f"{stem}.cubin")
    done = subprocess.run(
        [*command, "-cubin", "-o", str(code)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode:
        return [Result("its kernels", source.name, target, failure=reason(done.stdout))]
    results = read(source, target, done.stdout, code)
    kept.write_text(
        json.dumps({"fingerprint": digest, "results": list(map(dataclasses.asdict, results))})
    )
    return results


def fingerprint(nvcc: setup_cuda.Nvcc, command: Sequence[str]) -> str:
    """Of all that the outcome depends on; empty where the files can't even be read."""
    listed = subprocess.run([*command, "-MM"], capture_output=True, text=True, check=False)
    if listed.returncode:
        return ""
    files = shlex.split(listed.stdout.partition(":")[2].replace("\\\n", " "))
    digest = hashlib.sha256(f"{nvcc.version} {command}".encode())
    for file in (*files, __file__, kernel_table.__file__):
        digest.update(Path(file).read_bytes())
    return digest.hexdigest()


def reason(output: str) -> str:
    """The first error of a compiler, and where it is."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if re.search(r"\b(error|fatal)\b", line)]
    told = next(iter(errors or lines), "no message")
    return told.replace(f"{ROOT}/", "")[:300]


def read(source: Path, target: str, log: str, code: Path) -> list[Result]:
    """The figures of each kernel from what ptxas said and from the machine code."""
    used = usages(log)
    listing = subprocess.run(
        [disassembler(), "-sass", str(code)], capture_output=True, text=True, check=True
    ).stdout
    instructions = functions(listing)
    results = []
    for name, (kernel, arguments) in zip(used, readable(list(used)), strict=True):
        called = f"{arguments} ({source.name})" if arguments else source.name
        results.append(result(called, kernel, target, used[name], instructions.get(name, [])))
    return sorted(results, key=lambda found: (found.kernel, found.name))


def result(
    name: str, kernel: str, target: str, usage: Usage, instructions: Sequence[str]
) -> Result:
    """The line of the table for a kernel."""
    return Result(
        name=name,
        kernel=kernel,
        target=target,
        registers=str(usage.registers),
        spills=usage.spilled or usage.stack,
        shared=usage.shared,
        **kernel_table.nvidia_figures(instructions),
    )


@cache
def disassembler() -> str:
    """nvcc's cuobjdump, or the one that Triton brings where a toolkit has none."""
    found = shutil.which("cuobjdump", path=f"{setup_cuda.find().root}/bin")
    if found is not None:
        return found
    triton = importlib.util.find_spec("triton")
    if triton is None or triton.origin is None:
        raise SystemExit("cuobjdump is neither in nvcc's toolkit nor in a package of Triton")
    return str(Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump")


def compile_all(
    nvcc: setup_cuda.Nvcc,
    sources: Sequence[Path],
    targets: Sequence[str],
    jobs: int,
    cache_in: Path,
) -> Iterator[list[Result]]:
    """Results in the order of targets and files, as they come."""
    cache_in.mkdir(parents=True, exist_ok=True)
    work = [(nvcc, source, target, cache_in) for target in targets for source in sources]
    with ThreadPoolExecutor(jobs) as pool:
        yield from pool.map(lambda job: compiled(*job), work)


def predictions(
    targets: Sequence[str], jobs: int, cache_in: Path
) -> tuple[table.Predictions, list[str]]:
    """What the kernels in the cache are predicted to reach, and cases that none of them serves."""
    work, complaints = [], []
    for target in targets:
        found: dict[str, sass.Kernel] = {}
        for file in sorted(cache_in.glob(f"*-{target}.cubin")):
            found |= sass.kernels(disassembler(), file)
        parts = dict(zip(found, readable(list(found)), strict=True))
        for name, gpu in GPUS.items():
            for case in CASES if gpu.target == target.removesuffix("a") else ():
                serve = [found[one] for one in found if is_cuda_kernel(case, *parts[one])]
                if len(serve) == 1:
                    work.append((case, name, serve[0], cuda_work(case, gpu), gpu))
                else:
                    complaints.append(
                        f"{len(serve)} kernels serve {table.title('cuda', case)} on {target}"
                    )
    result: table.Predictions = {("cuda", case): {} for case, *_ in work}
    with ProcessPoolExecutor(jobs) as pool:
        made = pool.map(predict, *zip(*(job[2:] for job in work), strict=True))
        for (case, name, *_), prediction in zip(work, made, strict=True):
            result["cuda", case][name] = prediction
    return result, complaints


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("files", nargs="*", type=Path, help="all of csrc/cuda without")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=TARGETS)
    parser.add_argument("--only", default="", help="only files whose name holds this text")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--cache", type=Path, default=ROOT / "build/kernels/cuda")
    parser.add_argument("--library", type=Path, help="read this one instead of compiling")
    parser.add_argument("--write", action="store_true", help="keep predictions in predicted.toml")
    chosen = parser.parse_args(arguments)
    if chosen.library is not None:
        print(kernel_table.HEADING)
        found = in_library(chosen.library)
        print(*map(kernel_table.row, found), sep="\n")
        missing = set(TARGETS) - {line.target for line in found}
        return verdict(found, [f"no kernel for {target}" for target in sorted(missing)])
    try:
        nvcc = setup_cuda.find()
    except setup_cuda.UnusableError as obstacle:
        print(f"CUDA kernels were not compiled: {obstacle}")
        return 1 if os.environ.get("INTROKERNELS_CUDA") == "1" else 0
    files = chosen.files or sorted((ROOT / "csrc/cuda").rglob("*.cu"))
    sources = [file.resolve() for file in files if chosen.only in file.name]
    print(f"{len(sources)} files to compile with nvcc {nvcc.version}", flush=True)
    print(kernel_table.HEADING, flush=True)
    results = []
    for group in compile_all(nvcc, sources, chosen.targets, chosen.jobs, chosen.cache):
        results += group
        print(*map(kernel_table.row, group), sep="\n", flush=True)
    missing: list[str] = []
    if not (chosen.files or chosen.only or any(result.failure for result in results)):
        predicted, missing = predictions(chosen.targets, chosen.jobs, chosen.cache)
        missing += table.report(predicted, chosen.write)
    return verdict(results, missing)


def verdict(results: Sequence[Result], complaints: Sequence[str] = ()) -> int:
    """The exit status, after a word on what is not as it should be."""
    bad = [*complaints, *kernel_table.complaints(results)]
    print(*bad, sep="\n")
    print(f"{len(results)} kernels compiled, {len(bad)} of them not as they should be")
    return 1 if bad or not results else 0


if __name__ == "__main__":
    sys.exit(main())
