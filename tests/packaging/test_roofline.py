"""Predictions from machine code (benchmarks/roofline), of kernels whose figures are known."""

from __future__ import annotations

import shutil
import sys
from collections import Counter
from pathlib import Path

import pytest
from building import ROOT, environment, run

sys.path.append(str(ROOT / "benchmarks"))
from roofline import machine, predict, sass, table
from roofline.cases import CASES, Case, cuda_work
from roofline.graph import Graph
from roofline.machine import GPUS

FOLDER = Path(__file__).parent
LISTING = (FOLDER / "roofline_toy.sass").read_text()
H200 = GPUS["H200"]


@pytest.fixture
def recorded() -> sass.Kernel:
    return sass.Kernel(tuple(sass.instructions(LISTING)), registers=18, shared=32)


def names(code: list[sass.Instruction]) -> Counter[str]:
    return Counter(one.name for one in code)


def test_instructions_and_their_control_bits_are_read(recorded: sass.Kernel) -> None:
    assert len(recorded.code) == 78
    at = {one.address: one for one in recorded.code}
    load = at[0xF0]
    assert (load.opcode, load.width) == ("LDG.E.128.CONSTANT", 16)
    assert load.operands == ("R4", "desc[UR6][R4.64]")
    assert (load.stall, load.sets, load.sets_read, load.waits) == (1, 2, None, ())
    # The address waits for the pointer from the constants, which sets scoreboard 1.
    address = at[0xE0]
    assert (at[0xA0].sets, address.waits, address.sets, address.stall) == (1, (1,), None, 6)
    branch = at[0x150]
    assert (branch.guard, branch.target, branch.predicates) == ("!P0", 0x1A0, set())
    assert at[0x140].predicates == {"P0"}


@pytest.mark.parametrize(
    ("opcode", "width"),
    [
        *(("LDG.E.ENL2.256", 32), ("LDG.E.128", 16), ("STG.E.64", 8), ("LDG.E", 4)),
        *(("LDG.E.U16.CONSTANT", 2), ("LDG.E.S8", 1), ("LDGSTS.E.BYPASS.128", 16)),
    ],
)
def test_widths_are_read(opcode: str, width: int) -> None:
    assert sass.Instruction(0, "", opcode, ()).width == width


def test_the_main_loop_is_what_one_counts_by_hand(recorded: sass.Kernel) -> None:
    """25 instructions for four numbers: without the call where a larger number comes."""
    walk = predict.Walk(recorded, element=4, lanes=256)
    assert walk.width == 16
    assert [walk.loop[0].address, walk.loop[-1].address] == [0xE0, 0x2A0]
    assert "CALL" not in names(walk.loop)
    assert Counter(map(machine.unit_of, walk.loop)) == Counter(
        {"FP32": 8, "IMAD": 1, "ALU": 7, "MUFU": 4, "LSU": 1, "control": 4}
    )


def test_programs_are_what_one_counts_by_hand(recorded: sass.Kernel) -> None:
    """14 instructions, the loop, five steps of a sum of lanes; one warp stores the row."""
    walk = predict.Walk(recorded, element=4, lanes=256)
    first, second, idle = walk.programs([2, 2, 0], 1, is_split=False)
    assert len(first) == 14 + 2 * 25 + 2 + 5 * 5 + 12 + 12
    assert len(second) == len(first) - 12
    assert len(idle) == len(second) - 2 * 25
    assert [names(code)["STG"] for code in (first, second, idle)] == [1, 0, 0]
    assert {names(code)["BAR"] for code in (first, second, idle)} == {1}


def branch(address: int, guard: str, target: int) -> sass.Instruction:
    return sass.Instruction(address, guard, "BRA", (hex(target),))


def test_branches_on_one_predicate_go_together() -> None:
    """Either both blocks of work or none; a predicate that was written anew decides anew."""

    def ways(*middle: sass.Instruction) -> int:
        work = [sass.Instruction(address, "", "FADD", ("R0", "R0", "R1")) for address in (1, 4)]
        code = [branch(0, "P0", 2), work[0], *middle, branch(3, "P0", 5), work[1]]
        graph = Graph([*code, sass.Instruction(5, "", "EXIT", ())])
        path = graph.way([0], lambda block, to: to == -1, lambda one: one.address == 4)
        return sum(map(sass.operations, graph.code(path)))

    assert ways(sass.Instruction(2, "", "MOV", ("R2", "R3"))) == 2
    assert ways(sass.Instruction(2, "", "ISETP.NE.AND", ("P0", "PT", "R2", "RZ", "PT"))) == 1


def test_resident_blocks_are_what_registers_and_shared_memory_allow() -> None:
    assert H200.resident(registers=32, shared=0, warps=8) == 8
    # 168 registers of 32 threads: 5376, of which 16384 hold three.
    assert H200.resident(registers=168, shared=0, warps=4) == 3
    assert H200.resident(registers=32, shared=100 * 1024, warps=8) == 2
    assert GPUS["RTX 4090"].resident(registers=32, shared=0, warps=8) == 6
    assert H200.resident(registers=255, shared=227 * 1024, warps=16) == 1


CASE = Case("row_loss_forward", (8192, 32000), "bfloat16")


def prediction(share: float, bound: str = "issue", cap: float = 2.0) -> predict.Prediction:
    return predict.Prediction(20.0, {"FP32": 20.0}, 2 * cap, {bound: cap}, share)


def complaints(entries: table.Entries, share: float, gpu: str = "H200") -> list[str]:
    return table.verdict(entries, {("cuda", CASE): {gpu: prediction(share)}})[1]


def test_a_figure_below_its_bar_is_a_failure() -> None:
    entries = table.updated({}, {("cuda", CASE): {"H200": prediction(0.7)}})
    assert entries["cuda", CASE]["H200"]["bar"] == 0.68
    entries["cuda", CASE]["reason"] = "it has to be so"
    assert not complaints(entries, 0.68)
    (complaint,) = complaints(entries, 0.67)
    assert complaint == (
        "cuda row_loss_forward 8192x32000 bfloat16 is predicted 0.67 on H200, below its bar of 0.68"
    )
    assert "has no bar on A100" in complaints(entries, 0.9, "A100")[0]


def test_bars_rise_to_the_goal_and_never_fall() -> None:
    entries: table.Entries = {}
    bars = []
    for share in (0.5, 0.95, 0.6):
        entries = table.updated(entries, {("cuda", CASE): {"H200": prediction(share)}})
        bars.append(entries["cuda", CASE]["H200"]["bar"])
    assert bars == [0.48, 0.85, 0.85]


def test_a_missed_goal_needs_a_reason() -> None:
    made = {("cuda", CASE): {"H200": prediction(0.5), "RTX 4090": prediction(0.9, "FP64", 0.95)}}
    entries = table.updated({}, made)
    notes, missing = table.verdict(entries, made)
    assert not notes
    assert len(missing) == 2
    assert missing[0].endswith(
        "0.50 on H200, of 0.85 that are meant, and predicted.toml has no reason for it"
    )
    assert "is bound by float64 on RTX 4090, to 0.95" in missing[1]
    entries["cuda", CASE]["reason"] = "it has to be so"
    notes, missing = table.verdict(entries, made)
    assert not missing
    assert [note.endswith(": it has to be so") for note in notes] == [True, True]
    # A reason goes with what it was for.
    reached = {("cuda", CASE): {"H200": prediction(0.9), "RTX 4090": prediction(0.9)}}
    assert "reason" not in table.updated(entries, reached)["cuda", CASE]


def test_the_tables_are_whole_and_as_they_are_made() -> None:
    entries = table.read()
    assert set(entries) == {(backend, case) for backend in ("cuda", "triton") for case in CASES}
    assert all("bar" in entry[gpu] for entry in entries.values() for gpu in GPUS)
    assert table.PATH.read_text() == table.text(entries)
    assert table.document(entries) in table.README.read_text()


def test_plans_of_launches() -> None:
    """Blocks as csrc/cuda shares them out; what moves doesn't depend on them."""
    long, short = (Case("row_loss_forward", (B, C), "bfloat16") for B, C in ((8, 4096), (64, 100)))
    assert [cuda_work(case, H200).blocks for case in (long, short)] == [8, 2]
    assert [cuda_work(case, H200).lanes for case in (long, short)] == [256, 8]
    of_thread = cuda_work(Case("row_loss_backward", (1, 2**20), "float32"), H200)
    assert of_thread.blocks * of_thread.warps * 32 <= 2**18
    assert of_thread.moved == 3 * 4 * 2**20
    # 6 slices of 512 dimensions; of five blocks a row that are wanted, three have two slices each.
    statistics = cuda_work(Case("explanation_stats", (256, 100, 3072), "bfloat16"), H200)
    assert (statistics.blocks, statistics.turns, statistics.is_split) == (768, 2, True)


needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, sass.Kernel]]:
    """By target, the kernels of roofline_toys.cu."""
    sys.path.append(str(ROOT / "tests"))
    from compile_cuda_kernels import disassembler

    folder = tmp_path_factory.mktemp("toys")
    found = {}
    for target in {gpu.target for gpu in GPUS.values()}:
        cubin = folder / f"{target}.cubin"
        arguments = ("-O3", "-use_fast_math", f"-arch={target}", "-cubin", "-o", cubin)
        run("nvcc", *arguments, FOLDER / "roofline_toys.cu", cwd=folder, env=environment())
        found[target] = sass.kernels(disassembler(), cubin)
    return found


def kernel(kernels: dict[str, sass.Kernel], name: str) -> sass.Kernel:
    (found,) = (kernel for mangled, kernel in kernels.items() if name in mangled)
    return found


@needs_nvcc
@pytest.mark.parametrize("gpu", GPUS)
def test_a_copy_reaches_a_copy(toys: dict[str, dict[str, sass.Kernel]], gpu: str) -> None:
    copy = kernel(toys[GPUS[gpu].target], "copy")
    # 4 KiB a warp.
    work = predict.Work(
        blocks=1000, warps=8, moved=2000 * 32768, read=1000 * 32768, element=4, lanes=256
    )
    made = predict.predict(copy, work, GPUS[gpu])
    assert made.share == pytest.approx(1, abs=0.03)
    assert made.cap > 2


@needs_nvcc
def test_what_computes_too_much_is_told_with_its_unit(
    toys: dict[str, dict[str, sass.Kernel]],
) -> None:
    """16 of MUFU keep a scheduler busy for 128 clocks with 32 lanes' 256 bytes: 2 a clock."""
    work = predict.Work(
        blocks=1, warps=8, moved=2 * 256 * 16 * 16, read=256 * 16 * 16, element=4, lanes=256
    )
    made = predict.predict(kernel(toys["sm_90"], "slow"), work, H200)
    assert made.by_unit["MUFU"] == 16
    assert made.bound == "MUFU"
    assert made.cap == pytest.approx(4 * 2 / H200.bytes_a_clock, rel=1e-6)
    assert made.cap - 0.05 < made.share < made.cap + 0.01
    # It would not pass for one that reaches its goal.
    entries: table.Entries = {("cuda", CASE): {"H200": {"bar": CASE.goal}, "reason": "none"}}
    assert "below its bar" in table.verdict(entries, {("cuda", CASE): {"H200": made}})[1][0]


@needs_nvcc
def test_the_recorded_listing_is_what_nvcc_makes_of_its_source(
    toys: dict[str, dict[str, sass.Kernel]], recorded: sass.Kernel
) -> None:
    """As far as another release of nvcc leaves it so: the loop that is counted above."""
    loops = [
        predict.Walk(of, element=4, lanes=256).loop
        for of in (recorded, kernel(toys["sm_90"], "sum"))
    ]
    assert names(loops[0])["MUFU"] == names(loops[1])["MUFU"] == 4
    assert len(loops[1]) == pytest.approx(len(loops[0]), abs=6)
