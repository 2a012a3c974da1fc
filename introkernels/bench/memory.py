"""Peak memory that a call adds, whoever allocates it: PyTorch, a C++ vector, a library.

It is measured as the growth of the resident set in a process of its own: Linux lets a process reset
its high-water mark. There the C library is told to take every larger block from the system and to
give it back at once, so that freed memory can't hide a new allocation. The second call is measured:
what a library allocates once and keeps (code, packing buffers, sleeping threads) does not count.
The kernel counts in batches of pages; figures are good to about a megabyte.
"""

from __future__ import annotations

import ctypes
import gc
import json
import multiprocessing
import os
import signal
import subprocess
import sys
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType

import torch

from introkernels.bench.model import Case, Contender, Tensors

# glibc reads them when a process starts; without them it keeps freed blocks of up to 32 MB.
_ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "0",
    "MALLOC_TOP_PAD_": "0",
}
_CHILD = """
import json, sys
sys.path[:] = json.loads(sys.argv[1])
from introkernels.bench.memory import serve
serve(int(sys.argv[2]), int(sys.argv[3]))
"""
_RESET = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")
_RESET_PEAK = "5"


class ProbeError(RuntimeError):
    """Peak memory could not be measured; says why."""


class MemoryProbe:
    """A process that measures memory, started when it is first asked; a context manager."""

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None

    def __enter__(self) -> MemoryProbe:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def peak(self, case: Case, contender: Contender) -> int:
        """The most bytes held at any time during a call, beyond those held before it.

        Raises:
            ProbeError: this system can't tell, or the process did not survive.
        """
        if self._connection is None:
            self._start()
        assert self._connection is not None
        try:
            self._connection.send((case, contender))
            answer = self._connection.recv()
        except (EOFError, ConnectionError) as error:
            self.close()
            raise ProbeError("the measuring process was killed (out of memory?)") from error
        if isinstance(answer, str):
            raise ProbeError(answer)
        return int(answer)

    def _start(self) -> None:
        # Not multiprocessing's own processes: those run the caller's main module once more.
        self._connection, theirs = multiprocessing.Pipe()
        with theirs:
            self._process = subprocess.Popen(
                [
                    *(sys.executable, "-c", _CHILD),
                    *(json.dumps(sys.path), str(theirs.fileno()), str(self._threads)),
                ],
                pass_fds=(theirs.fileno(),),
                env=os.environ | _ALLOCATOR,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
            )

    def close(self) -> None:
        """End the process, where one was started."""
        if self._connection is not None:
            self._connection.close()
        if self._process is not None:
            self._process.wait()
        self._connection = self._process = None


def serve(descriptor: int, threads: int) -> None:
    """Answer the questions of a :class:`MemoryProbe` until it closes its end of the connection."""
    # Ctrl-C reaches every process of the terminal; this one ends when its connection does.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(threads)
    connection = Connection(descriptor)
    drawn: Case | None = None
    tensors: Tensors = {}
    while True:
        try:
            case, contender = connection.recv()
        except EOFError:
            return
        try:
            if case != drawn:
                tensors.clear()
                drawn, tensors = case, case.draw(seed=0)
            answer: int | str = _peak(case, contender, tensors)
        except Exception as error:  # whatever it is, the benchmark goes on without this figure
            answer = f"{type(error).__name__}: {error}".splitlines()[0]
        connection.send(answer)


def _peak(case: Case, contender: Contender, tensors: Tensors) -> int:
    function = contender.prepare(case.operator)
    with contender.context():
        case.operator.run(function, tensors)
        for name in case.operator.differentiable:
            tensors[name].grad = None
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        _RESET.write_text(_RESET_PEAK)
        before = _resident("VmRSS:")
        case.operator.run(function, tensors)
        return max(0, _resident("VmHWM:") - before)


def _resident(name: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    raise OSError(f"{_STATUS} has no {name}")
