"""Builds the libraries with releases of torch from the package index, and tests them there.

    python tests/run_on_torch.py 2.11.0 …

Each release gets a virtual environment of its own, build/torch-RELEASE/env (5 to 7 GB, which stay
until someone deletes them). There csrc is built from source, where a warning is a failure, and a
sample of the losses' tests runs on the C++ kernels. Where nvcc is found that fits the release, the
CUDA library is built for 9.0a and loaded, for which a torch with CUDA needs no GPU. Of several
releases, the others then load and test what was built with the newest one, without building it.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# What the tests of the losses import and the build calls, at the versions of constraints.txt. That
# file as a whole holds for one release of torch: others ask for another Triton or setuptools.
NEEDED = ("captum", "expecttest", "hypothesis", "mpmath", "ninja", "numpy", "pytest")
# Of each test's parametrised cases: two minutes of tests, and one.
AT_MOST_WHERE_BUILT, AT_MOST_ELSEWHERE = 2, 1

WHY_NO_CUDA = """
import torch, setup_cuda
try:
    setup_cuda.find_for(torch)
except setup_cuda.UnusableError as reason:
    print(reason)
"""

LOAD_CUDA = """
import sys, torch, introkernels
from introkernels.ops.schema import SCHEMAS

def served():
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    return {name for name in SCHEMAS if has_kernel(f"introkernels::{name}", "CUDA")}

before = served()
torch.ops.load_library(sys.argv[1])
new = sorted(served() - before)
print(*new, sep=", ")
sys.exit(not new)
"""


class Release:
    """A release of torch in its environment, and what is built with it.

    Attributes:
        name: ``"2.11.0"``.
        packages: the folder that holds the package as it was built with this release.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._folder = ROOT / "build" / f"torch-{name}"
        self.packages = self._folder / "lib"

    @property
    def number(self) -> tuple[int, ...]:
        return tuple(int(part) for part in self.name.split("."))

    def install(self) -> None:
        """Make the environment, unless it is there."""
        environment = self._folder / "env"
        stamp = environment / ".installed"
        if stamp.exists():
            return
        say(f"torch {self.name}: installing it in {environment.relative_to(ROOT)}")
        venv.create(environment, clear=True, with_pip=True)
        pins = re.findall(
            rf"^(?:{'|'.join(NEEDED)})==.+$", (ROOT / "constraints.txt").read_text(), re.MULTILINE
        )
        pip = ("-m", "pip", "install", "-qq", "--no-cache-dir", "--disable-pip-version-check")
        self.python(*pip, f"torch=={self.name}", "setuptools>=77", *pins)
        stamp.touch()

    def build(self) -> None:
        """Build the package from source into ``packages``, with CUDA where that is possible."""
        reason = self.python("-c", WHY_NO_CUDA, captured=True).stdout.strip()
        say(f"torch {self.name}: building csrc" + (f", without CUDA: {reason}" if reason else ""))
        folders = ("--build-base", self._folder, "--build-lib", self.packages)
        done = self.python(
            *("setup.py", "--quiet", "build", *folders),
            captured=True,
            INTROKERNELS_CPP="1",
            INTROKERNELS_CUDA="0" if reason else "1",
            TORCH_CUDA_ARCH_LIST="9.0a",
        )
        log = done.stdout + done.stderr
        warned = re.findall(r"^.*(?:\bcsrc/\S+: |ptxas |\bld: )warning\b.*$", log, re.MULTILINE)
        if warned:
            sys.exit("\n".join([f"torch {self.name}: the build warns", *warned]))

    def test(self, built_with: Release, at_most: int) -> None:
        """Test what was built with a release on this one; load its CUDA library, if it has one."""
        say(f"torch {self.name}: testing what was built with {built_with.name}")
        # The working directory holds the package as it usually is.
        imported = {"PYTHONPATH": str(built_with.packages), "PYTHONSAFEPATH": "1"}
        tests = ("tests/losses", f"--at-most={at_most}")
        chosen = {"INTROKERNELS_TEST_BACKENDS": "cpu", "OMP_WAIT_POLICY": "PASSIVE"}
        self.python("-m", "pytest", "-q", "--show-capture=no", *tests, **imported, **chosen)
        library = built_with.packages / "introkernels" / "_cuda.so"
        if library.exists():
            served = self.python("-c", LOAD_CUDA, library, captured=True, **imported).stdout.strip()
            say(f"torch {self.name}: _cuda.so of {built_with.name} loads and serves {served}")

    def python(
        self, *arguments: str | Path, captured: bool = False, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        """Run this environment's Python; what it prints is shown, or captured.

        Raises:
            SystemExit: it fails.
        """
        done = subprocess.run(
            [self._folder / "env" / "bin" / "python", *arguments],
            cwd=ROOT,
            env={**os.environ, **variables},
            capture_output=captured,
            text=True,
            check=False,
        )
        if done.returncode:
            printed = f"{done.stdout}{done.stderr}\n" if captured else ""
            sys.exit(f"{printed}torch {self.name}: exit status {done.returncode} of {done.args}")
        return done


def say(line: str) -> None:
    print(line, flush=True)


def main() -> None:
    names = sys.argv[1:]
    if not names or not all(re.fullmatch(r"\d+\.\d+\.\d+", name) for name in names):
        sys.exit(f"name releases of torch, such as 2.11.0; got {' '.join(names) or 'none'}")
    releases = sorted(map(Release, names), key=lambda release: release.number)
    for release in releases:
        release.install()
        release.build()
        release.test(release, AT_MOST_WHERE_BUILT)
    *others, newest = releases
    for release in others:
        release.test(newest, AT_MOST_ELSEWHERE)


if __name__ == "__main__":
    main()
