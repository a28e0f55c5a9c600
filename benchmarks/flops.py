"""Floating-point operations of a run under callgrind, from its counts of every instruction."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

#: Additions, multiplications, divisions and roots, each an operation a lane, a fused one two.
#: Comparisons, minima, conversions and moves are none.
ARITHMETIC = re.compile(
    r"^\s*([0-9a-f]+):\s+v?(?:(add|sub|mul|div|sqrt)|fn?m(?:add|sub)\d{3})([ps])([sd])\s(.*)$",
    re.MULTILINE,
)
LANES = {"x": 4, "y": 8, "z": 16}  # floats of a register


def of_instructions(disassembly: str) -> dict[int, int]:
    """Address of every arithmetic instruction, and its operations."""
    operations = {}
    for address, plain, packed, kind, operands in ARITHMETIC.findall(disassembly):
        lanes = 1
        if packed == "p":
            lanes = LANES[re.findall(r"%([xyz])mm", operands)[-1]] // (2 if kind == "d" else 1)
        operations[int(address, 16)] = lanes * (1 if plain else 2)
    return operations


def of_program(program: Path) -> dict[int, int]:
    command = ["objdump", "--disassemble", "--no-show-raw-insn", str(program)]
    return of_instructions(
        subprocess.run(command, capture_output=True, text=True, check=True).stdout
    )


def executions(dump: str, program: Path) -> Iterator[tuple[int, int]]:
    """Address and count of instructions of the program, from an uncompressed callgrind file."""
    inside = after_call = False
    for line in dump.splitlines():
        if line.startswith("ob="):
            inside = line == f"ob={program}"
        elif line.startswith("calls="):
            after_call = True  # what the call took in all follows
        elif line.startswith("0x"):
            if inside and not after_call:
                address, _, count = line.split()
                yield int(address, 16), int(count)
            after_call = False


def executed(dump: str, program: Path, operations: dict[int, int]) -> int:
    """Operations of a run."""
    return sum(count * operations.get(address, 0) for address, count in executions(dump, program))
