"""GPUs as kernels see them: what executes an instruction, how often, and when its result is there.

Rates are those of the table "Throughput of native arithmetic instructions" in NVIDIA's CUDA C++
programming guide, which counts results a clock and multiprocessor; a scheduler has a quarter of
them, so that 16 results a clock keep its unit busy for 8 clocks with a warp of 32. Multiprocessors,
registers, shared memory and warps are from its table of compute capabilities and the papers on each
architecture. Clocks are those under load, and bandwidths what plain copies are known to reach: some
0.9 of what data sheets promise. Latencies are what microbenchmarks of these architectures report.
"""

from __future__ import annotations

from dataclasses import dataclass

from roofline.sass import LOADS, Instruction

LANES = 32
SCHEDULERS = 4
REGISTERS = 65536


@dataclass(frozen=True)
class Gpu:
    """A GPU.

    Attributes:
        target: the architecture whose code it runs, as compilers call it.
        multiprocessors: how many it has.
        clock: GHz.
        bandwidth: of a plain copy, both directions together, GB/s.
        warps: that a multiprocessor holds at most.
        blocks: likewise.
        shared: bytes of shared memory of a multiprocessor.
        float32: clocks that an instruction keeps a scheduler's unit for.
        float64: likewise.
        latency: of memory, in ns.
    """

    target: str
    multiprocessors: int
    clock: float
    bandwidth: float
    warps: int = 64
    blocks: int = 32
    shared: int = 228 * 1024
    float32: int = 1
    float64: int = 2
    latency: float = 750.0

    @property
    def bytes_a_clock(self) -> float:
        """Of memory, for a multiprocessor."""
        return self.bandwidth / self.clock / self.multiprocessors

    def resident(self, registers: int, shared: int, warps: int) -> int:
        """Blocks of so many warps that a multiprocessor holds; at least 1.

        A warp's registers come by 256, and the system keeps 1 KiB of shared memory for each block.
        """
        of_warp = -(-registers * LANES // 256) * 256
        by_registers = REGISTERS // SCHEDULERS // of_warp * SCHEDULERS
        by_shared = self.shared // (shared + 1024)
        return max(1, min(min(self.warps, by_registers) // warps, by_shared, self.blocks))


GPUS = {
    "H200": Gpu("sm_90", 132, 1.755, 4300),
    "A100": Gpu("sm_80", 108, 1.41, 1700, shared=164 * 1024, float32=2, float64=4),
    "B200": Gpu("sm_100", 148, 1.9, 7000, latency=800.0),
    # It runs what is compiled for the A100.
    "RTX 4090": Gpu("sm_80", 128, 2.5, 930, warps=48, blocks=24, shared=100 * 1024, float64=64),
}

# What executes an instruction, by its name: all of float32's, half of them (products of integers),
# special functions and conversions, float64, loads and shuffles, control. Others are the ALU's.
_UNITS = {
    "FP32": "FFMA FADD FMUL FFMA2 FADD2 FMUL2 HADD2 HMUL2 HFMA2",
    "IMAD": "IMAD IDP",
    "MUFU": "MUFU I2F F2I POPC FLO FRND BREV F2F",
    "FP64": "DADD DMUL DFMA DSETP DMNMX",
    "LSU": "LDG STG LDS STS LD ST LDL STL SHFL ATOM ATOMG ATOMS RED LDSM STSM LDGSTS LDGDEPBAR "
    "UBLKCP SYNCS",
    "tensor": "HMMA IMMA DMMA HGMMA UTCHMMA",
    "control": "BRA BRX BRXU BSSY BSYNC EXIT RET CALL BAR WARPSYNC NOP DEPBAR YIELD MEMBAR ERRBAR "
    "CCTL CGAERRBAR BREAK BMOV VOTE NANOSLEEP ENDCOLLECTIVE ELECT LDC LDCU ULDC S2R S2UR CS2R R2UR "
    "MATCH REDUX",
}
_UNIT_OF = {name: unit for unit, names in _UNITS.items() for name in names.split()}
UNITS = ("FP32", "IMAD", "ALU", "MUFU", "FP64", "LSU", "tensor", "uniform", "control")


def unit_of(one: Instruction) -> str:
    """What executes an instruction, one of ``UNITS``."""
    if one.name in ("F2F", "I2F", "F2I", "FRND") and "64" in one.opcode:
        return "FP64"
    return _UNIT_OF.get(one.name) or ("uniform" if one.name.startswith("U") else "ALU")


def clocks_of(one: Instruction, gpu: Gpu) -> float:
    """For how long an instruction keeps a scheduler's unit busy.

    The unit of loads is one for all schedulers: 32 lanes of 4 bytes a clock.
    """
    unit = unit_of(one)
    if unit == "LSU":
        is_access = one.name in (*LOADS, "STG", "LDS", "STS", "LD", "ST")
        return max(1, one.width // 4) if is_access else 1
    if unit == "FP64":
        return gpu.float64 if one.name.startswith("D") else max(8, gpu.float64)
    of_unit = {"FP32": gpu.float32, "MUFU": 8, "tensor": 16, "control": 0}
    return of_unit.get(unit, 2)


# Clocks until a result is there, where a scoreboard tells of it: the compiler's stalls are enough
# for all else.
_LATENCIES = {"LD": 40, "SHFL": 24, "LDS": 29, "LDSM": 33, "STS": 20}
_LATENCIES_OF_UNITS = {"MUFU": 22, "FP64": 20, "LSU": 20, "tensor": 33, "uniform": 12}
BARRIER = 22
# Until an instruction has read its registers.
READ = 10
# Of a load whose line a neighbour has fetched.
HIT = 38


def latency_of(one: Instruction, gpu: Gpu) -> float:
    """Clocks until the result of an instruction is there."""
    if one.name in (*LOADS, "ATOMG", "ATOM", "RED"):
        return gpu.latency * gpu.clock
    known = _LATENCIES.get(one.name)
    latency = known or _LATENCIES_OF_UNITS.get(unit_of(one), 25)
    return latency + (one.width // 4 if one.name in ("LDS", "STS") else 0)
