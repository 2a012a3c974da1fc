"""Small cases of every CUDA kernel under the four tools of compute-sanitizer, side by side.

A tool watches the kernels of PyTorch too; what it says of those is in its log and counts for
nothing.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
TESTS = (
    *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", "-k", "cuda"),
    *("tests/gpu/test_gpu_definition.py", "tests/gpu/test_gpu_targets.py"),
)
SANITIZER = "compute-sanitizer"
# Where toolkits are, which need not be on PATH.
TOOLKIT = "/usr/local/cuda/bin"
OURS = "introkernels::"
SHOWN = 20


def options(tool: str) -> list[str]:
    """Those of a tool. Every report counts, and frames of the host are no kernels."""
    return ["--tool", tool, "--show-backtrace", "no", "--print-limit", "1000"]


def reports(log: str) -> list[str]:
    """The lines in which a tool names a kernel of this package."""
    return [line for line in log.splitlines() if line.startswith("=========") and OURS in line]


def verdict(status: int, log: str) -> str | None:
    """What is wrong, or None: a tool that watched nothing has found nothing."""
    if found := reports(log):
        return f"{len(found)} lines about kernels of introkernels"
    if status:
        return f"exit status {status}"
    if not re.search(r"========= (ERROR|RACECHECK) SUMMARY", log):
        return "no summary: the program was not watched to its end"
    return None


def main(out: Path, watched: Sequence[str] = TESTS) -> int:
    """Run the tools, each into ``sanitizer-<tool>.log`` in ``out``; 1 where one found anything."""
    path = os.pathsep.join((os.environ.get("PATH", ""), TOOLKIT))
    sanitizer = shutil.which(SANITIZER, path=path)
    if sanitizer is None:
        print(f"{SANITIZER} is not installed: nothing is watched")
        return 1
    logs = {tool: out / f"sanitizer-{tool}.log" for tool in TOOLS}
    started = {}
    for tool, log in logs.items():
        with log.open("wb") as output:
            started[tool] = subprocess.Popen(
                [sanitizer, *options(tool), *watched], stdout=output, stderr=subprocess.STDOUT
            )
    wrong = {}
    for tool, process in started.items():
        status = process.wait()
        text = logs[tool].read_text(errors="replace")
        told = verdict(status, text)
        print(f"{tool}: {told or 'nothing found'}", flush=True)
        if told is not None:
            wrong[tool] = told
            print(
                *(f"    {line}" for line in (reports(text) or text.splitlines())[:SHOWN]), sep="\n"
            )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
