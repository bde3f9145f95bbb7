"""Reading the machine code (SASS) of a compiled kernel: its instructions, its hottest loop, and a count of both."""

import re
import subprocess
import tempfile
from collections import Counter
from typing import NamedTuple

import triton

_LINE = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:(@!?\w+)\s+)?([A-Z][\w.]*)\s*([^;]*);")
_MEMORY = ("LD", "ST", "ATOM", "RED")
_BYTES = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}


class Instruction(NamedTuple):
    """address in bytes; predicate such as "@!P0", or ""; opcode with its modifiers; operands as written."""

    address: int
    predicate: str
    opcode: str
    operands: str

    @property
    def kind(self) -> str:
        """The opcode, of memory accesses with the width (no width: 32 bits) and of MUFU with the function.

        >>> Instruction(0, "", "LDG.E.128.CONSTANT", "R4, [R2.64]").kind
        'LDG.E.128'
        >>> Instruction(0, "", "MUFU.EX2", "R4, R4").kind
        'MUFU.EX2'
        >>> Instruction(0, "", "FSETP.GT.AND", "P0, PT, R1, R2, PT").kind
        'FSETP'
        """
        name, *modifiers = self.opcode.split(".")
        if name == "MUFU":
            return self.opcode
        if not name.startswith(_MEMORY):
            return name
        return ".".join([name, *(word for word in modifiers if word == "E" or word in _BYTES)])


def cuobjdump(cubin: bytes, option: str = "-sass") -> str:
    """What cuobjdump of the triton package says of a cubin: its listing, or what another option asks for."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, option, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def instructions(listing: str) -> list[Instruction]:
    """The instructions of a listing, in order of address, without the padding behind the last one."""
    found = []
    for line in listing.splitlines():
        if match := _LINE.match(line):
            address, predicate, opcode, operands = match.groups(default="")
            found.append(Instruction(int(address, 16), predicate, opcode, operands.strip()))
    while found and found[-1].opcode == "NOP":
        found.pop()
    return found


def longest_loop(code: list[Instruction]) -> list[Instruction]:
    """The instructions of the longest loop that holds no other loop; empty if there is none."""
    loops, inner = [], [(0, -1)]  # (first, last) addresses; the empty one is the longest if there is no other
    for instruction in code:
        target = re.search(r"0x([0-9a-f]+)$", instruction.operands)
        # A loop is a branch back to where it starts; a branch to itself is padding.
        if instruction.opcode.startswith("BRA") and target and int(target[1], 16) < instruction.address:
            loops.append((int(target[1], 16), instruction.address))
    for first, last in loops:
        if not any((first, last) != other and first <= other[0] and other[1] <= last for other in loops):
            inner.append((first, last))
    first, last = max(inner, key=lambda loop: loop[1] - loop[0])
    return [instruction for instruction in code if first <= instruction.address <= last]


def loaded_bytes(code: list[Instruction]) -> int:
    """Bytes that a thread loads from global memory in one run through `code`.

    >>> loaded_bytes([Instruction(0, "", "LDG.E.128", ""), Instruction(16, "", "LDG.E", "")])
    20
    """
    loads = [instruction.kind.split(".") for instruction in code if instruction.kind.startswith("LDG")]
    return sum(_BYTES.get(kind[-1], 4) for kind in loads)


def report(code: list[Instruction]) -> str:
    """The listing, ">" before each instruction of the longest loop, and the count by kind of that loop and of all."""
    loop = longest_loop(code)
    inside = {instruction.address for instruction in loop}
    lines = []
    for instruction in code:
        mark = ">" if instruction.address in inside else " "
        words = f"{instruction.predicate:>5} {instruction.opcode:<22} {instruction.operands}"
        lines.append(f"{mark} {instruction.address:04x} {words}".rstrip())
    in_loop = Counter(instruction.kind for instruction in loop)
    in_all = Counter(instruction.kind for instruction in code)
    lines += ["", f"{'kind':<16}{'longest loop':>14}{'all':>8}"]
    for kind, count in sorted(in_all.items(), key=lambda item: (-in_loop[item[0]], -item[1], item[0])):
        lines.append(f"{kind:<16}{in_loop[kind]:>14}{count:>8}")
    lines.append(f"{'sum':<16}{len(loop):>14}{len(code):>8}")
    return "\n".join(lines)
