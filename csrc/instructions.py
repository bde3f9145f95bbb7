"""Instructions an element of the noise kernels, counted in their machine code: `python csrc/instructions.py`.

Compiles csrc/noise_cuda.cu as the build does, for each architecture, and needs nvcc and the triton package's
cuobjdump. An element's instructions are those of the loop around the square roots, each of which serves two elements,
without the nested loop that is run for the further levels of a ladder. Ends with code 1 if a kernel spills.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from build_backend import ARCHS, MIN_NVCC, NVCC_FLAGS, Toolkit, find_toolkit

from bpo_fast.kernels import sass
from bpo_fast.kernels.occupancy import occupancy

SOURCE = Path(__file__).with_name("noise_cuda.cu")
DTYPES = {"Float32": "float32", "BFloat16": "bfloat16", "Float16": "float16"}
THREADS = 256
MARKS = ("<!-- python csrc/instructions.py --markdown docs/kernels.md -->\n", "<!-- end -->\n")
_NAME = re.compile(r"noise_kernelINS_\d+(?P<x>B?Float\d\d)E(?:S2_|NS_\d+(?P<out>B?Float\d\d)E)Lb(?P<aligned>[01])E")


class Count(NamedTuple):
    """Instructions an element, without and with the code of a ladder's further levels; registers; spills."""

    plain: float
    ladder: float
    registers: int
    spills: int


def _compiled(toolkit: Toolkit, architecture: int) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "noise.cubin"
        command = [toolkit.nvcc, "-cubin", f"-arch=sm_{architecture}", *NVCC_FLAGS]
        subprocess.run([*command, "-I", toolkit.root / "include", "-o", output, SOURCE], check=True)
        return output.read_bytes()


def count_loop(code: list[sass.Instruction]) -> tuple[float, float]:
    """(without, with the nested loops) instructions an element of the smallest loop that holds every square root."""
    loops = []
    for instruction in code:
        target = re.search(r"0x([0-9a-f]+)$", instruction.operands)
        if instruction.opcode.startswith("BRA") and target and int(target[1], 16) < instruction.address:
            loops.append((int(target[1], 16), instruction.address))
    roots = [instruction.address for instruction in code if instruction.kind == "MUFU.RSQ"]
    around = [loop for loop in loops if loop[0] <= roots[0] and roots[-1] <= loop[1]]
    first, last = min(around, key=lambda loop: loop[1] - loop[0])
    inside = [instruction.address for instruction in code if first <= instruction.address <= last]
    nested = [loop for loop in loops if first < loop[0] and loop[1] < last]
    plain = [address for address in inside if not any(start <= address <= end for start, end in nested)]
    return len(plain) / (2 * len(roots)), len(inside) / (2 * len(roots))


def count(toolkit: Toolkit, architecture: int) -> dict[tuple[str, str, bool], Count]:
    """The kernels on sm_`architecture`, by (dtype of x, dtype of out, aligned).

    Raises:
        subprocess.CalledProcessError: nvcc does not compile the source.
    """
    cubin, counts = _compiled(toolkit, architecture), {}
    usage = sass.cuobjdump(cubin, "-res-usage")
    for part in sass.cuobjdump(cubin).split("Function : ")[1:]:
        name = part.split("\n", 1)[0].strip()
        words, code = _NAME.search(name), sass.instructions(part)
        registers = int(re.search(rf"{name}:\s*REG:(\d+)", usage)[1])
        spills = sum(instruction.opcode.startswith(("LDL", "STL")) for instruction in code)
        key = DTYPES[words["x"]], DTYPES[words["out"] or words["x"]], words["aligned"] == "1"
        counts[key] = Count(*count_loop(code), registers, spills)
    return counts


def cell(architecture: int, kernel: Count) -> str:
    """What the table says of a kernel on sm_`architecture`."""
    share = occupancy(architecture, kernel.registers, 0, THREADS // 32).share
    return f"{kernel.plain:.1f} ({kernel.ladder:.1f}); {kernel.registers}, {share:.0%}"


def markdown(counts: dict[int, dict[tuple[str, str, bool], Count]]) -> str:
    """The table: a kernel a row, an architecture a column."""
    lines = [f"| 16-byte rows | {' | '.join(f'sm_{architecture}' for architecture in counts)} |"]
    lines.append("|---" * (len(counts) + 1) + "|")
    for x in DTYPES.values():
        for out in DTYPES.values():
            cells = [cell(architecture, found[x, out, True]) for architecture, found in counts.items()]
            lines.append(f"| {x} to {out} | {' | '.join(cells)} |")
    spills = sum(kernel.spills for found in counts.values() for kernel in found.values())
    number = sum(map(len, counts.values()))
    lines += ["", f"Spilling accesses in the {number} kernels, those of other rows included: {spills}."]
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--markdown", type=Path, metavar="PATH", help="write the table between the marks of this file")
    options = parser.parse_args(arguments)
    toolkit = find_toolkit()
    if toolkit is None:
        parser.error(f"nvcc: found none, expected {MIN_NVCC}; install one or set CUDA_HOME.")
    with ThreadPoolExecutor(2) as pool:
        counts = dict(zip(ARCHS, pool.map(lambda architecture: count(toolkit, architecture), ARCHS), strict=True))
    table = markdown(counts)
    print(table, end="")
    if options.markdown:
        text = options.markdown.read_text()
        before, found, rest = text.partition(MARKS[0])
        if not found or MARKS[1] not in rest:
            parser.error(f"--markdown: found no {MARKS[0].strip()} in {options.markdown}, expected it and {MARKS[1]}")
        options.markdown.write_text(f"{before}{found}\n{table}\n{MARKS[1]}{rest.split(MARKS[1], 1)[1]}")
    return 1 if any(kernel.spills for found in counts.values() for kernel in found.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
