"""What differs between measuring on a CPU and on a GPU: clock, caches, yardstick and memory."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch

from introkernels.bench import environment
from introkernels.bench.memory import MemoryProbe
from introkernels.bench.model import Case, Contender, Tensors
from introkernels.bench.timing import wall_clock

# Sets of inputs that take turns, at most.
MOST_SETS = 16

# Where nothing tells the size of the last cache.
_USUAL_CACHE = 32 << 20

# What a contender's bandwidth is compared with, beside it in the same rounds: the speed at which
# this machine's memory can be read on a CPU, and copied on a GPU, where a sum is a kernel like
# others.
READ = "read"
COPY = "copy"


class Device(Protocol):
    """Where the tensors of a suite lie, and how to measure there.

    Attributes:
        name: of the device, as torch takes it.
        yardstick: ``"read"`` or ``"copy"``.
        last_cache: bytes of it.
        memory: bytes of it in all.
    """

    name: str
    yardstick: str
    last_cache: int
    memory: int

    def clock(self, call: Callable[[], object], calls: int) -> float:
        """Seconds of one call, the mean of ``calls`` that follow on each other."""

    def yardstick_call(self, size: int) -> tuple[Callable[[], object], int]:
        """What moves a float32 tensor of ``size`` bytes, and how many bytes that moves."""

    def peak(
        self, case: Case, contender: Contender, function: Callable[..., Any], tensors: Tensors
    ) -> int:
        """The most bytes held at any time during a call, beyond those held before it.

        Args:
            function: what the contender prepared for the case.
            tensors: inputs of the case.

        Raises:
            ProbeError: it can't be told.
        """

    def close(self) -> None:
        """Give back what measuring took."""


class Cpu:
    """The CPU: wall-clock time, and peak memory in a process of its own."""

    name = "cpu"
    yardstick = READ

    def __init__(self, threads: int) -> None:
        machine = environment.machine()
        self.last_cache: int = max(machine["caches"].values(), default=_USUAL_CACHE)
        self.memory: int = machine["memory"]
        self._probe = MemoryProbe(threads)

    def clock(self, call: Callable[[], object], calls: int) -> float:
        return wall_clock(call, calls)

    def yardstick_call(self, size: int) -> tuple[Callable[[], object], int]:
        plain = torch.ones(max(1, size // 4))
        return plain.sum, plain.nbytes

    def peak(
        self, case: Case, contender: Contender, function: Callable[..., Any], tensors: Tensors
    ) -> int:
        return self._probe.peak(case, contender)

    def close(self) -> None:
        self._probe.close()


class Gpu:
    """The current GPU: time between two events in its stream, and peak memory as PyTorch counts it.

    Memory that a library takes past PyTorch's allocator (workspaces of matrix products made before
    PyTorch ran any) is not seen.
    """

    name = "cuda"
    yardstick = COPY

    def __init__(self, threads: int) -> None:
        properties = torch.cuda.get_device_properties()
        self.last_cache: int = getattr(properties, "L2_cache_size", 0) or _USUAL_CACHE
        self.memory: int = properties.total_memory

    def clock(self, call: Callable[[], object], calls: int) -> float:
        """From the moment the GPU reaches the first call to the moment it is through with the last.

        Where Python can't start kernels as fast as they run, its time counts, as for a user.
        """
        start = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
        for _ in range(calls):
            call()
        end.record()
        end.synchronize()
        milliseconds: float = start.elapsed_time(end)
        return milliseconds / 1e3 / calls

    def yardstick_call(self, size: int) -> tuple[Callable[[], object], int]:
        # Two pairs in turn: what the last copy left in the cache is not what the next one reads.
        sources = [torch.ones(max(1, size // 4), device="cuda") for _ in range(2)]
        pairs = [(source, torch.empty_like(source)) for source in sources]
        turn = itertools.cycle(pairs)

        def copy() -> object:
            source, destination = next(turn)
            return destination.copy_(source)

        return copy, 2 * pairs[0][0].nbytes

    def peak(
        self, case: Case, contender: Contender, function: Callable[..., Any], tensors: Tensors
    ) -> int:
        with contender.context():
            # What a first call allocates and keeps does not count.
            case.operator.run(function, tensors)
            for name in case.operator.differentiable:
                tensors[name].grad = None
            gc.collect()
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            case.operator.run(function, tensors)
            torch.cuda.synchronize()
            return torch.cuda.max_memory_allocated() - before

    def close(self) -> None:
        torch.cuda.empty_cache()


class ReplayedGpu(Gpu):
    """The current GPU without the host: the calls of a sample are replayed as one CUDA graph.

    Else what is timed of a kernel that takes less than some 30 microseconds is Python. While this
    is open, the current stream is one of its own: PyTorch's default one can't be captured, and a
    backward runs in the stream of its forward.
    """

    def __init__(self, threads: int) -> None:
        super().__init__(threads)
        self._graphs: WeakKeyDictionary[Callable[[], object], dict[int, torch.cuda.CUDAGraph]] = (
            WeakKeyDictionary()
        )
        self._usual = torch.cuda.current_stream()
        self._stream = torch.cuda.Stream()
        self._stream.wait_stream(self._usual)
        torch.cuda.set_stream(self._stream)

    def clock(self, call: Callable[[], object], calls: int) -> float:
        graphs = self._graphs.setdefault(call, {})
        if not graphs:
            # What a call makes once for each set of inputs is no part of a graph.
            for _ in range(MOST_SETS):
                call()
        if calls not in graphs:
            graphs[calls] = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graphs[calls], stream=self._stream):
                for _ in range(calls):
                    call()
        return super().clock(graphs[calls].replay, 1) / calls

    def close(self) -> None:
        self._graphs.clear()
        torch.cuda.set_stream(self._usual)
        super().close()


DEVICES: dict[str, Callable[[int], Device]] = {
    "cpu": Cpu,
    "cuda": Gpu,
    "cuda-graphs": ReplayedGpu,
}
"""By the name that a suite gives its device; made for a number of CPU threads."""
