"""Compiles csrc/cpu with other compilers than the one that builds it, for other machines too.

    python tests/compile_cpu_sources.py

Clang for this machine and GCC for aarch64 compile every file with the flags of the build, to code
rather than to a parsed file, since much of what a compiler has to say of vectors comes last. A
warning is a failure. Nothing is linked. A compiler that is not installed is named and left out.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from helpers.emulation import TORCH_FLAGS

ROOT = Path(__file__).resolve().parents[1]
# The first one found of each line.
COMPILERS = {
    "Clang": ("clang++-14", "clang++"),
    "GCC for aarch64": ("aarch64-linux-gnu-g++",),
}
FLAGS = (
    # -O3 finds nothing more here, and takes a quarter longer.
    *("-std=c++20", "-O1", "-fPIC", "-DNDEBUG", "-Werror", "-Icsrc", *TORCH_FLAGS),
    *(ROOT / "csrc" / "flags.txt").read_text().split(),
)


def messages(compiler: str, source: Path) -> str:
    """What a compiler says of a file that it can't compile without a warning, else nothing."""
    command = [compiler, *FLAGS, "-c", "-o", os.devnull, str(source.relative_to(ROOT))]
    done = subprocess.run(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    return done.stdout if done.returncode else ""


def main() -> int:
    sources = sorted((ROOT / "csrc" / "cpu").rglob("*.cpp"))
    failed = False
    for name, commands in COMPILERS.items():
        compiler = next(filter(shutil.which, commands), None)
        if compiler is None:
            print(f"{name}: skipped, there is no {' or '.join(commands)}", flush=True)
            continue
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            found = list(filter(None, pool.map(partial(messages, compiler), sources)))
        verdict = f"{len(found)} of them fail" if found else "no warning"
        print(f"{name} ({compiler}): {len(sources)} files, {verdict}", *found, sep="\n", flush=True)
        failed = failed or bool(found)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
