"""The instruction count of the noise kernels: the counting by hand, and the count where nvcc is there."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PINNED = "release 13.0"

LISTING = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/                   LDG.E.128 R4, [R2.64] ;
        /*0020*/                   MUFU.RSQ R8, R9 ;
        /*0030*/              @P0  BRA 0x70 ;
        /*0040*/                   MUFU.RSQ R8, R10 ;
        /*0050*/                   STG.E.128 [R6.64], R4 ;
        /*0060*/              @P1  BRA 0x50 ;
        /*0070*/                   IADD3 R2, R2, R3, RZ ;
        /*0080*/              @P2  BRA 0x10 ;
        /*0090*/                   IADD3 R12, R12, 0x1, RZ ;
        /*00a0*/              @P3  BRA 0x0 ;
        /*00b0*/                   EXIT ;
"""


@pytest.fixture
def instructions(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "csrc"))
    import instructions

    yield instructions
    for name in ("instructions", "build_backend"):
        sys.modules.pop(name, None)


def test_the_loop_is_counted_without_the_ladders(instructions):
    """Of the loops 0x10-0x80 and 0x00-0xa0 the inner one, 8 instructions; 0x50-0x60 is the nested one, 2 of them."""
    from bpo_fast.kernels import sass

    assert instructions.count_loop(sass.instructions(LISTING)) == (6 / 4, 8 / 4)


def test_at_most_49_instructions_an_element(instructions):
    """bf16 on sm_86, also with the code that one level does not run; no kernel spills; as docs/kernels.md has it."""
    toolkit = instructions.find_toolkit()
    version = (
        toolkit and subprocess.run([toolkit.nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    )
    if not toolkit or PINNED not in version:
        pytest.skip(f"needs nvcc, {PINNED}")
    counts = instructions.count(toolkit, 86)
    kernel = counts["bfloat16", "bfloat16", True]
    assert kernel.plain <= kernel.ladder <= 49
    assert len(counts) == 18
    assert not any(count.spills for count in counts.values())
    (row,) = re.findall(r"^\| bfloat16 to bfloat16 \|.*$", (ROOT / "docs/kernels.md").read_text(), re.MULTILINE)
    assert row.split(" | ")[2] == instructions.cell(86, kernel)
