"""That the script which times the host runs, Triton's launches and all, where there is no GPU."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import introkernels as ik

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(ik.backends.status()["cpu"] != "loaded", reason="needs the C++ kernels")
def test_calls_are_timed_on_a_driver_that_starts_nothing(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    environment = {name: text for name, text in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "benchmarks/host_time.py", "0.01"],
        cwd=ROOT,
        env={**environment, "PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert re.fullmatch(r"logits \+ logits +\d+\.\d us +1\.0 x", lines[0])
    for backend in ("triton", "cpu"):
        for loss in ("distillation_loss", "introspective_loss"):
            of_both = [line for line in lines if line.startswith(f"{loss} on {backend}, ")]
            assert len(of_both) == 3
            assert all(re.search(r", \w[\w ]+ +\d+\.\d us +\d+\.\d x$", line) for line in of_both)
