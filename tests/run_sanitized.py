"""Runs the tests on a C++ library built with AddressSanitizer and UndefinedBehaviourSanitizer.

    python tests/run_sanitized.py [--sample] [pytest's arguments]

A copy of the package is built in build/sanitize with the flags of csrc/sanitizers.txt (GCC's; the
one in introkernels/ stays as it is). Then defects are planted in a library of a few lines: unless
every one of them is caught, under the very flags and options of the tests, nothing else counts.
Then the tests run, all of them with the best instruction set and a few cases of each test of the
losses with the others: a masked load, which the widest one is fond of, is invisible to the
sanitizers, and the tails of the others are not. At last some of them run on the CUDA sources, built
with the same flags for csrc/emulation.

With --sample a few cases of each test of the losses run, and one of each test of what calls them.

Two runs go side by side, and each prints what it has to say when it is done. The first finding in
one ends it, with a report that names the line and a traceback that names the test.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "build" / "sanitize"
PACKAGES = OUT / "lib"
LIBRARY = PACKAGES / "introkernels" / "_cpu.so"
FLAGS = (ROOT / "csrc" / "sanitizers.txt").read_text().split()
CAPABILITY = "INTROKERNELS_CPU_CAPABILITY"
# Runs side by side: each keeps one core busy.
AT_A_TIME = 2
COMPILER = shlex.split(os.environ.get("CXX", "c++"))

LEFT_OUT = (
    # They build and load libraries of their own, in environments of their own.
    "--ignore=tests/packaging",
    # Freed memory is kept back, so that its use is seen: what a process holds says nothing.
    "--ignore=tests/losses/test_memory.py",
    "--ignore=tests/bench/test_bench_memory.py",
    # They start whole trainings, and trees of other commits, that watch nothing new.
    "--ignore=tests/train/study/test_study_quick.py",
    "--ignore=tests/train/test_distributed_training.py",
    "--ignore=tests/bench/test_bench_against.py",
    # It calls `ps`, which hangs when AddressSanitizer is preloaded into it.
    "--deselect",
    "tests/train/test_interruption.py::test_workers_die_with_a_killed_command_and_it_resumes",
)

DEFECTS = """
#include <cstdint>
#include <vector>

extern "C" {
float read(const float* values, int64_t index) { return values[index]; }
void write(float* values, int64_t index) { values[index] = 1.0f; }
int64_t add(int64_t a, int64_t b) { return a + b; }
int64_t round_down(double value) { return static_cast<int64_t>(value); }
int64_t element(int64_t index) { return std::vector<int64_t>{1, 2, 3}[index]; }
}
"""

# The memory is a tensor's: what counts is that the end of a tensor is guarded.
CALL = """
import ctypes, sys, torch
library = ctypes.CDLL(sys.argv[1])
for name in ("read", "write", "add", "round_down", "element"):
    getattr(library, name).restype = ctypes.c_int64
library.read.restype = ctypes.c_float
tensor = torch.ones(8)
start, number, real = tensor.data_ptr(), ctypes.c_int64, ctypes.c_double
pointer = ctypes.c_void_p
print("result", eval(sys.argv[2]))
"""

SOUND = ("library.read(pointer(start), number(7))", "result 1.0")
# Each call, and what the report says of it.
PLANTED = (
    ("library.read(pointer(start), number(8))", "AddressSanitizer: heap-buffer-overflow"),
    ("library.read(pointer(start), number(-1))", "AddressSanitizer: heap-buffer-overflow"),
    ("library.write(pointer(start), number(8))", "AddressSanitizer: heap-buffer-overflow"),
    ("library.read(pointer(start + 2), number(0))", "load of misaligned address"),
    ("library.add(number(2**63 - 1), number(1))", "signed integer overflow"),
    ("library.round_down(real(1e300))", "outside the range of representable values"),
    ("library.element(number(3))", "Assertion '__n < this->size()' failed"),
)


def environment() -> dict[str, str]:
    """What a process needs in which the sanitizers watch the library, and no other introkernels."""

    def runtime(name: str) -> str:
        command = [*COMPILER, f"-print-file-name={name}"]
        path = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        if not Path(path).is_absolute():
            sys.exit(f"{shlex.join(COMPILER)} has no {name}; the sanitizers need GCC's")
        return path

    return {
        **os.environ,
        # AddressSanitizer comes before everything else in a process, and wraps the exceptions of a
        # libstdc++ that Python itself does not bring.
        "LD_PRELOAD": f"{runtime('libasan.so')} {runtime('libstdc++.so.6')}",
        # Aborting makes Python say which test it was. Leaks are not looked for: Python and PyTorch
        # never free what lives as long as the process, and the library holds no memory by hand.
        "ASAN_OPTIONS": "abort_on_error=1:detect_leaks=0:detect_stack_use_after_return=1",
        "UBSAN_OPTIONS": "abort_on_error=1:print_stacktrace=1",
        "PYTHONPATH": str(PACKAGES),
        # The working directory holds the package as it usually is.
        "PYTHONSAFEPATH": "1",
        "PYTHONFAULTHANDLER": "1",
        "INTROKERNELS_TEST_BACKENDS": "cpu",
        "OMP_WAIT_POLICY": "PASSIVE",
    }


def build() -> None:
    """Build the copy of the package."""
    flags = " ".join(FLAGS)
    result = subprocess.run(
        [
            *(sys.executable, "setup.py", "--quiet", "build", "--debug"),
            *("--build-base", str(OUT), "--build-lib", str(PACKAGES)),
        ],
        cwd=ROOT,
        env={
            **os.environ,
            "CFLAGS": flags,
            "LDFLAGS": flags,
            "INTROKERNELS_CPP": "1",
            # Its host code can't be loaded here, and nvcc does not know these flags.
            "INTROKERNELS_CUDA": "0",
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if result.returncode:
        sys.exit(f"the build with sanitizers failed:\n{result.stdout}")
    library = LIBRARY.read_bytes()
    for symbol in (b"__asan_init", b"__ubsan_handle_add_overflow_abort"):
        if symbol not in library:
            sys.exit(f"{LIBRARY} does not call {symbol.decode()}: the flags did not reach it")


def check_that_defects_are_caught(env: dict[str, str]) -> None:
    """Exit unless the planted defects, and they alone, are found, and the tests load the build."""
    source, planted = OUT / "defects.cpp", OUT / "defects.so"
    source.write_text(DEFECTS)
    compile_it = [*COMPILER, "-O1", "-g", "-shared", "-fPIC", *FLAGS, "-o", planted, source]
    subprocess.run(compile_it, check=True)

    def call(expression: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", CALL, str(planted), expression]
        return subprocess.run(command, env=env, capture_output=True, text=True, check=False)

    expression, expected = SOUND
    result = call(expression)
    if result.returncode or expected not in result.stdout:
        sys.exit(f"{expression} is sound, but fails:\n{result.stderr}")
    for expression, expected in PLANTED:
        result = call(expression)
        if result.returncode != -signal.SIGABRT or expected not in result.stderr:
            sys.exit(
                f"{expression} is not caught (exit status {result.returncode}, where "
                f"{expected!r} should be reported):\n{result.stdout}{result.stderr}"
            )
    print(f"all of {len(PLANTED)} planted defects are caught", flush=True)

    mapped = "import introkernels; print(open('/proc/self/maps').read())"
    command = [sys.executable, "-c", mapped]
    maps = subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout
    if str(LIBRARY) not in maps or str(ROOT / "introkernels") in maps:
        sys.exit(f"introkernels does not load {LIBRARY}, and that alone, in the tests' environment")


def run_tests(env: dict[str, str], arguments: list[str], *, sample: bool) -> int:
    """Pytest's exit status; 0 if every run of it succeeds."""
    best, others = (2, 1) if sample else (0, 4)
    # Reports go past Python to the standard error, which pytest would capture and lose.
    pytest = [sys.executable, "-m", "pytest", "-q", "--capture=sys", *LEFT_OUT]
    emulated = {
        "INTROKERNELS_TEST_BACKENDS": "cuda",
        "INTROKERNELS_EMULATION_SANITIZED": "1",
        "INTROKERNELS_EMULATION_ORDER": "shuffled",
        # Each thread of a kernel has a stack: to keep those of calls that returned, too, would make
        # a switch between them ten times as long.
        "ASAN_OPTIONS": env["ASAN_OPTIONS"].replace("after_return=1", "after_return=0"),
    }
    runs: tuple[tuple[str, dict[str, str], tuple[str, ...]], ...] = (
        (
            "the best instruction set",
            {},
            ("tests/losses", *((f"--at-most={best}",) if best else ())),
        ),
        # The emulation's own tests belong to the run in which it is built with the sanitizers.
        (
            "the best instruction set, all but the losses",
            {},
            (
                ("tests/explain", "tests/head", "tests/train/test_engine.py", "--at-most=1")
                if sample
                else ("tests", "--ignore=tests/losses", "--ignore=tests/emulation")
            ),
        ),
        ("AVX2", {CAPABILITY: "avx2"}, ("tests/losses", f"--at-most={others}")),
        ("the baseline", {CAPABILITY: "baseline"}, ("tests/losses", f"--at-most={others}")),
        # Dynamo compiles what lies above the kernels.
        (
            "the emulation of CUDA",
            emulated,
            (
                "tests/emulation",
                "tests/losses",
                "--at-most=1",
                "--ignore=tests/losses/test_compile.py",
            ),
        ),
    )
    with ThreadPoolExecutor(AT_A_TIME) as pool:
        done = [
            pool.submit(_run, name, [*pytest, *(arguments or usual)], {**env, **chosen})
            for name, chosen, usual in runs
        ]
        for future in as_completed(done):
            name, status, output = future.result()
            print(f"tests under the sanitizers, with {name}\n{output}", flush=True)
            if status:
                pool.shutdown(wait=False, cancel_futures=True)
                return status
    return 0


def _run(name: str, command: list[str], env: dict[str, str]) -> tuple[str, int, str]:
    """The name, the exit status and what was printed."""
    result = subprocess.run(
        command,
        cwd=ROOT,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
    )
    return name, result.returncode, result.stdout


def main() -> int:
    build()
    env = environment()
    check_that_defects_are_caught(env)
    arguments = sys.argv[1:]
    sample = "--sample" in arguments
    return run_tests(env, [word for word in arguments if word != "--sample"], sample=sample)


if __name__ == "__main__":
    sys.exit(main())
