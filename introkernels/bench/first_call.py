"""What a first call costs: imports, and the call that compiles, in a process of its own.

Compilers of PyTorch and Triton find their caches empty there. What the system keeps of files in
memory it keeps: the figures are those of a program's second start, not of the first after a boot.
"""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from introkernels.bench.model import Case, Contender

# Longer than any compilation of a single function lasts.
_PATIENCE_SECONDS = 600

# The clock starts before anything of torch is there.
_CHILD = """
import json, sys, time
sys.path[:] = json.loads(sys.argv[1])
times = [time.perf_counter()]
import torch
times.append(time.perf_counter())
import introkernels
times.append(time.perf_counter())
from introkernels.bench.first_call import answer
answer(*times)
"""


class FirstCallError(RuntimeError):
    """A first call could not be measured; says why."""


@dataclass(frozen=True)
class FirstCall:
    """Seconds of a fresh process.

    Attributes:
        import_torch: of importing torch.
        import_introkernels: of importing introkernels after it, which loads its libraries.
        call: of preparing and calling the contender once, with what it imports and compiles.
        second: of the call after it.
    """

    import_torch: float
    import_introkernels: float
    call: float
    second: float


def first_call(case: Case, contender: Contender, device: str, threads: int) -> FirstCall:
    """Measure a contender in a fresh process with empty caches.

    Args:
        device: where the inputs lie, ``"cpu"`` or ``"cuda"``.
        threads: of torch.

    Raises:
        FirstCallError: the process failed; with the last line that it wrote.
    """
    with tempfile.TemporaryDirectory() as folder:
        caches = {
            name: str(Path(folder) / name)
            for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
        }
        try:
            child = subprocess.run(
                [sys.executable, "-c", _CHILD, json.dumps(sys.path)],
                input=pickle.dumps((case, contender, device, threads)),
                capture_output=True,
                env=os.environ | caches,
                timeout=_PATIENCE_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise FirstCallError(f"not over after {_PATIENCE_SECONDS} s") from error
    if child.returncode:
        lines = child.stderr.decode(errors="replace").strip().splitlines()
        raise FirstCallError(lines[-1] if lines else f"exit status {child.returncode}")
    return FirstCall(**json.loads(child.stdout.splitlines()[-1]))


def answer(start: float, torch_there: float, all_there: float) -> None:
    """In the fresh process: measure what the other one sent, and write the `FirstCall` as JSON."""
    case, contender, device, threads = pickle.load(sys.stdin.buffer)
    torch.set_num_threads(threads)
    tensors = case.draw(0, device)

    def call() -> None:
        with contender.context():
            case.operator.run(function, tensors)
        if device == "cuda":
            torch.cuda.synchronize()

    if device == "cuda":
        torch.cuda.synchronize()
    before = time.perf_counter()
    function = contender.prepare(case.operator)
    call()
    first = time.perf_counter()
    call()
    second = time.perf_counter()
    found = FirstCall(torch_there - start, all_there - torch_there, first - before, second - first)
    print(json.dumps(asdict(found)))
