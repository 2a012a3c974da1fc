"""What `make kernels` reports of CUDA kernels: its reading of nvcc's output, and toy kernels."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest
from building import ROOT, environment, run

SCRIPT = ROOT / "tests/compile_cuda_kernels.py"


def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("compile_cuda_kernels", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Data classes look their module up.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


check = script()

PTXAS = """\
ptxas info    : 0 bytes gmem, 24 bytes cmem[3]
ptxas info    : Compiling entry function '_Z4goodPf' for 'sm_90a'
ptxas info    : Function properties for _Z4goodPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 80 registers, used 1 barriers, 128 bytes smem, 704 bytes cmem[0]
ptxas info    : Compile time = 889.670 ms
ptxas info    : Compiling entry function '_Z6spillsPf' for 'sm_90a'
ptxas info    : Function properties for _Z6spillsPf
    352 bytes stack frame, 340 bytes spill stores, 496 bytes spill loads
ptxas info    : Used 128 registers, used 1 barriers, 352 bytes cumulative stack size
ptxas info    : Function properties for _Z6callee
    16 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
"""

LISTING = """\
\tcode for sm_90a
\t\tFunction : _Z4goodPf
\t.headerflags\t@"EF_CUDA_SM90"
        /*0000*/                   LDC R1, c[0x0][0x28] ;       /* 0x00000a00ff017624 */
                                                                /* 0x000fe400078e00ff */
        /*0070*/              @!P0 LDG.E.128 R4, desc[UR4][R2.64] ;  /* 0x0000620002048a25 */
        /*1080*/             @!UP1 STG.E.128 desc[UR4][R2.64], R4 ;  /* 0x0000620002048a25 */
        /*1090*/                   LDG.E.64 R4, desc[UR4][R2.64] ;
\t\t..........

\t\tFunction : _Z6spillsPf
        /*0000*/                   LDG.E.ENL2.256 R4, R8, desc[UR4][R2.64] ;
        /*0010*/                   HMMA.16816.F32.BF16 R4, R8, R10, R4 ;
        /*0020*/                   EXIT ;
"""


def test_what_ptxas_says_is_read() -> None:
    assert check.usages(PTXAS) == {
        "_Z4goodPf": check.Usage(registers=80, shared=128),
        "_Z6spillsPf": check.Usage(registers=128, stack=352, spilled=836),
        # A function that kernels call, with a stack of its own.
        "_Z6callee": check.Usage(stack=16),
    }


def test_instructions_are_told_apart_by_function() -> None:
    code = check.functions(LISTING)
    assert code["_Z4goodPf"] == ["LDC", "LDG.E.128", "STG.E.128", "LDG.E.64"]
    figures = {name: check.kernel_table.nvidia_figures(found) for name, found in code.items()}
    assert figures["_Z4goodPf"] == {
        "instructions": 4,
        "wide_loads": 1,
        "wide_stores": 1,
    }
    assert figures["_Z6spillsPf"] == {
        "instructions": 3,
        "wide_loads": 1,
        "wide_stores": 0,
    }


@pytest.mark.parametrize(
    ("demangled", "parts"),
    [
        (
            "void ns::(anonymous namespace)::row<ns::Half, void, 4>(ns::Call)",
            ("row", "Half, void, 4"),
        ),
        ("void a::b::row<float, true>(a::Rows, float*)", ("row", "float, true")),
        ("void row<a::List<int, 2>, (a::Way)1>(a::List<int, 2>)", ("row", "List<int, 2>, (Way)1")),
        ("plain(float*, void (*)(int))", ("plain", "")),
        ("_Z5named", ("_Z5named", "")),
    ],
)
def test_names_are_short(demangled: str, parts: tuple[str, str]) -> None:
    assert check.parts_of_name(demangled) == parts


GOOD = """
template <typename T> __global__ void copy(const T* in, T* out) {
  out[threadIdx.x] = in[threadIdx.x];
}
template __global__ void copy(const float4*, float4*);
"""
BAD = """
__global__ void spill(const float* in, float* out) {
  float values[400], sum = 0;
#pragma unroll
  for (int i = 0; i < 400; ++i) values[i] = in[i * 32 + threadIdx.x];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 400; ++i) sum += values[i];
#pragma unroll
  for (int i = 0; i < 400; ++i) out[i * 32 + threadIdx.x] = values[i] / sum;
}
__global__ void stack(const int* in, int* out) {
  int values[40];
  for (int i = 0; i < 40; ++i) values[in[i]] = i;
  for (int i = 0; i < 40; ++i) out[i] = values[in[i + 40]];
}
"""


def report(folder: Path, *files: Path, **env: str) -> tuple[int, list[str]]:
    """The exit status and the lines of the script on these files for an A100."""
    command = (sys.executable, SCRIPT, *files, "--targets", "sm_80", "--cache", folder)
    result = run(*command, cwd=ROOT, env=environment(**env))
    return result.returncode, result.stdout.splitlines()


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
@pytest.mark.slow
def test_toys(tmp_path: Path) -> None:
    good, bad, broken = (tmp_path / f"{name}.cu" for name in ("good", "bad", "broken"))
    good.write_text(GOOD)
    bad.write_text(BAD)
    broken.write_text("#include <cuda_runtime.h>\nint number = nothing;\n")

    status, lines = report(tmp_path, good)
    assert status == 0, lines
    assert lines[0].startswith("1 files to compile with nvcc ")
    # target, kernel, registers, spills, shared, instructions, wide loads, wide stores
    cells = lines[2].split()
    assert cells[:2] == ["sm_80", "copy"]
    assert cells[3:5] == ["0", "0"]
    assert cells[6:8] == ["1", "1"]
    assert lines[-1] == "1 kernels compiled, 0 of them not as they should be"

    status, lines = report(tmp_path, good, bad, broken)
    assert status == 1
    *complaints, verdict = lines[-4:]
    assert complaints[0].startswith("spill for bad.cu on sm_80 spills registers (")
    assert complaints[1] == "stack for bad.cu on sm_80 spills registers (160)"
    assert complaints[2].startswith("broken.cu for its kernels on sm_80 ")
    assert 'identifier "nothing" is undefined' in complaints[2]
    assert verdict == "4 kernels compiled, 3 of them not as they should be"

    # What is kept is what was compiled last, and no more than that.
    good.write_text(GOOD.replace("float4", "float2"))
    _, lines = report(tmp_path, good)
    assert lines[2].split()[6:8] == ["0", "0"]
    assert report(tmp_path, good)[1] == lines


def test_without_nvcc_it_is_skipped_unless_it_has_to_be_there(tmp_path: Path) -> None:
    status, lines = report(tmp_path, CUDA_HOME="/nonexistent")
    reason = "CUDA_HOME was '/nonexistent' at build time, without a bin/nvcc"
    assert (status, lines) == (0, [f"CUDA kernels were not compiled: {reason}"])
    status, _ = report(tmp_path, CUDA_HOME="/nonexistent", INTROKERNELS_CUDA="1")
    assert status == 1


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_nothing_to_compile_is_a_failure(tmp_path: Path) -> None:
    status, lines = report(tmp_path, "--only", "no such file")
    assert status == 1
    assert lines[0].startswith("0 files")


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_a_built_library_is_read(tmp_path: Path) -> None:
    source, library = tmp_path / "toys.cu", tmp_path / "toys.fatbin"
    source.write_text(GOOD + BAD)
    targets = [f"-gencode=arch=compute_{of},code=sm_{of}" for of in ("90a", "80")]
    run("nvcc", "-fatbin", *targets, "-o", library, source, cwd=tmp_path, env=environment())
    found = check.in_library(library)
    assert [(line.target, line.kernel) for line in found] == [
        (target, kernel) for target in ("sm_80", "sm_90a") for kernel in ("copy", "spill", "stack")
    ]
    spills = {line.kernel: line.spills for line in found if line.target == "sm_80"}
    assert spills["copy"] == 0
    assert spills["spill"] > 0
    assert spills["stack"] == 160
    assert [line.wide_loads for line in found if line.kernel == "copy"] == [1, 1]

    result = run(sys.executable, SCRIPT, "--library", library, cwd=ROOT, env=environment())
    assert result.returncode == 1
    assert "no kernel for sm_100" in result.stdout
    assert result.stdout.splitlines()[-1] == "6 kernels compiled, 5 of them not as they should be"
