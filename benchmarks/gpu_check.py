"""Everything that only a GPU can tell, in ten minutes at most and without a network.

    make gpu-check OUT=folder                         or  python benchmarks/gpu_check.py folder
    make gpu-check OUT=folder PARTS="build benchmark"  or  … folder --only build benchmark

It uses the Python that runs it and what that Python finds (PyTorch, Triton, pytest, a C++
compiler, nvcc), installs nothing, and builds the libraries in place. The parts of :func:`parts` run
one after the other, each in a process of its own and within its own time; one that fails does not
stop the others. Logs and results go to the folder. The last lines tell, part by part, what passed,
what failed and what did not run; the exit status is 0 only where every part passed.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HERE = Path("benchmarks")

# Of ten minutes, less what starting, ending a part and reading this summary take.
TOTAL_SECONDS = 560.0
# From the request to end until a part is ended: pytest tells what failed until then.
GRACE_SECONDS = 5.0
SHOWN_LINES = 30

PASSED = "passed"
# Tells a part how many seconds it may take.
LIMIT = "INTROKERNELS_PART_SECONDS"


@dataclass(frozen=True)
class Part:
    """One process.

    Attributes:
        name: of its log, and in the summary.
        command: program and arguments, started in the root of the checkout.
        seconds: its limit.
        least: it is not begun where less time is left.
        environment: variables on top of those of this process.
        shown: its log is shown where it passed too.
    """

    name: str
    command: tuple[str, ...]
    seconds: float
    least: float = 10.0
    environment: dict[str, str] = field(default_factory=dict)
    shown: bool = False


@dataclass(frozen=True)
class Outcome:
    """What became of a part: ``verdict`` is :data:`PASSED` or says what went wrong."""

    part: Part
    verdict: str
    seconds: float = 0.0
    log: Path | None = None

    @property
    def passed(self) -> bool:
        return self.verdict == PASSED


def architecture() -> dict[str, str]:
    """The variable that has the CUDA library built for the GPUs here alone; empty without one."""
    ask = ("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader")
    try:
        told = subprocess.run(ask, capture_output=True, text=True, check=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    # As the default list names it: an H100's own instructions are a target of their own.
    names = ["9.0a" if name == "9.0" else name for name in told.split()]
    return {"TORCH_CUDA_ARCH_LIST": ";".join(dict.fromkeys(names))} if names else {}


def parts(out: Path, python: str = sys.executable) -> list[Part]:
    """All parts, in the order in which they run: the dearest to know first."""
    pytest = (python, "-m", "pytest", "-q", "-p", "no:cacheprovider")
    # Most of the time of a first test goes into compiling its kernels, one core each.
    workers = min(12, os.cpu_count() or 1)
    side_by_side = ("-n", str(workers)) if importlib.util.find_spec("xdist") else ()
    needs_gpu = {"INTROKERNELS_REQUIRE_GPU": "1"}

    def gpu_tests(backend: str) -> tuple[str, ...]:
        return (*pytest, *side_by_side, "-m", "gpu", "-k", backend, "tests/gpu")

    def suite(at_most: str) -> tuple[str, ...]:
        return (*pytest, *side_by_side, "--at-most", at_most, "tests/losses")

    def on_gpu(backends: str) -> dict[str, str]:
        return {
            "INTROKERNELS_TEST_BACKENDS": backends,
            "INTROKERNELS_TEST_DEVICE": "cuda",
            # PyTorch asks for it where a test wants deterministic algorithms of all of PyTorch.
            "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        }

    return [
        # A CUDA library that fails must not take the others along: the next part asks for it.
        Part(
            "build",
            (python, "setup.py", "build_ext", "--inplace"),
            180,
            environment={
                "INTROKERNELS_CPP": "1",
                "INTROKERNELS_CUDA": "auto",
                # Lines of sources in what compute-sanitizer and profilers report.
                "NVCC_APPEND_FLAGS": "-lineinfo",
                **architecture(),
            },
        ),
        Part("environment", (python, str(HERE / "gpu_environment.py"), str(out)), 60),
        Part(
            "smoke",
            (python, "-X", "faulthandler", str(HERE / "gpu_smoke.py"), str(out)),
            135,
            shown=True,
        ),
        Part("triton-tests", gpu_tests("triton"), 100, environment=needs_gpu),
        Part("cuda-tests", gpu_tests("cuda"), 60, environment=needs_gpu),
        Part("benchmark", (python, str(HERE / "gpu_suite.py"), str(out)), 120, least=30),
        Part("triton-suite", suite("1"), 90, least=30, environment=on_gpu("triton")),
        Part("cuda-suite", suite("4"), 60, least=20, environment=on_gpu("cuda")),
        Part("doctor", (python, "-m", "introkernels", "doctor"), 40),
        Part(
            "big-tensors",
            (*pytest, "-m", "big", "tests/losses"),
            60,
            environment=on_gpu("cuda,triton"),
        ),
        Part(
            "sanitizer",
            (python, str(HERE / "gpu_sanitize.py"), str(out)),
            TOTAL_SECONDS,
            least=30,
            environment={
                **needs_gpu,
                # Each tensor in memory of its own, so that what lies beyond it is nobody's.
                "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",
            },
        ),
    ]


def run_part(part: Part, out: Path, seconds: float) -> Outcome:
    """Run a part for at most ``seconds``; what it prints goes to its log."""
    log = out / f"{part.name}.log"
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {
        "PYTHONPATH": paths,
        "PYTHONUNBUFFERED": "1",
        LIMIT: f"{seconds:.0f}",
        **part.environment,
    }
    start = time.monotonic()
    with log.open("wb") as output:
        try:
            # A session of its own, so that whatever it starts can be ended with it.
            process = subprocess.Popen(
                part.command,
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            return Outcome(part, f"did not run: it can't be started: {error}", log=log)
        try:
            status = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            _end(process)
    taken = time.monotonic() - start
    if status is None:
        return Outcome(part, f"failed: not done after {seconds:.0f} s", taken, log)
    if status != 0:
        how = f"exit status {status}" if status > 0 else f"ended by signal {-status}"
        return Outcome(part, f"failed: {how}", taken, log)
    return Outcome(part, PASSED, taken, log)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a part and all that it started: politely first, then for good."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=GRACE_SECONDS)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def tell(line: str) -> None:
    """Print at once: whoever ends this process keeps what it said."""
    print(line, flush=True)


def run(
    chosen: Sequence[Part],
    out: Path,
    total: float = TOTAL_SECONDS,
    say: Callable[[str], None] = tell,
) -> list[Outcome]:
    """Run the parts one after the other until all are done or ``total`` seconds have passed."""
    out.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + total
    outcomes = []
    for part in chosen:
        left = deadline - time.monotonic()
        if left < part.least:
            outcome = Outcome(part, f"did not run: {max(left, 0):.0f} s were left")
        else:
            limit = min(part.seconds, left)
            say(f"{part.name}: at most {limit:.0f} s")
            outcome = run_part(part, out, limit)
        say(f"{part.name}: {outcome.verdict}, {outcome.seconds:.0f} s")
        if outcome.log is not None and (part.shown or not outcome.passed):
            lines = outcome.log.read_text(errors="replace").splitlines()
            shown = lines if part.shown else lines[-SHOWN_LINES:]
            say("".join(f"    {line}\n" for line in shown))
        outcomes.append(outcome)
    return outcomes


def summary(outcomes: Sequence[Outcome]) -> str:
    """A line for each part."""
    width = max(len(outcome.part.name) for outcome in outcomes)
    lines = []
    for outcome in outcomes:
        log = f" ({outcome.log})" if outcome.log is not None and not outcome.passed else ""
        lines.append(
            f"{outcome.part.name:<{width}}  {outcome.seconds:4.0f} s  {outcome.verdict}{log}"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts asked for; 0 where all of them passed, 1 else, 2 for a wrong call."""
    parser = argparse.ArgumentParser(
        description="Tests and benchmarks on a GPU, within ten minutes."
    )
    parser.add_argument("out", type=Path, help="folder for logs and results")
    parser.add_argument("--only", nargs="+", metavar="PART", help="these parts instead of all")
    options = parser.parse_args(arguments)
    out = options.out.resolve()
    chosen = parts(out)
    names = [part.name for part in chosen]
    wanted = options.only or names
    if unknown := [name for name in wanted if name not in names]:
        parser.error(
            f"--only: no part is called {', '.join(unknown)}; there are {', '.join(names)}"
        )
    outcomes = run([part for part in chosen if part.name in wanted], out)
    text = summary(outcomes)
    (out / "summary.txt").write_text(f"{text}\n", encoding="utf-8")
    print(f"\n{text}")
    return 0 if all(outcome.passed for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
