"""The C++ library uses wide registers only where it has asked for them first."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

import introkernels as ik

LIBRARY = Path(ik.__file__).with_name("_cpu.so")
# Registers, and the namespaces of the kernels that may use them.
WIDE = {r"%zmm\d": ("avx512",), r"%ymm\d": ("avx512", "avx2")}


@pytest.fixture(scope="module")
def functions() -> dict[str, str]:
    """The code of each function of the library, by its mangled name."""
    objdump = shutil.which("objdump")
    if objdump is None or not LIBRARY.exists():
        pytest.skip("needs objdump and a compiled library")
    listing = subprocess.run(
        [objdump, "--disassemble", "--no-show-raw-insn", LIBRARY],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    found = re.split(r"^[0-9a-f]+ <(.+)>:\n", listing, flags=re.MULTILINE)[1:]
    return dict(zip(found[::2], found[1::2], strict=True))


@pytest.mark.parametrize("register", WIDE)
def test_wide_registers_stay_in_their_kernels(functions: dict[str, str], register: str) -> None:
    """A function that the linker shares must not need more than the machine's baseline."""
    users = [name for name, code in functions.items() if re.search(register, code)]
    if not users:
        pytest.skip("built for another architecture than x86-64")
    stray = [name for name in users if not any(target in name for target in WIDE[register])]
    assert not stray
