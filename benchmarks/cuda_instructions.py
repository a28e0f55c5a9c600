"""Instructions a pair of logits takes in the compiled CUDA kernels, and what time that is.

python -m benchmarks.cuda_instructions BUILD --output benchmarks/results/cuda_instructions.json

BUILD is a build folder of CMake. Derived from the disassembly, not measured: the longest path
through a resident kernel that moves 16 bytes at a time, its loops over vectors taken as often as a
vocabulary of VOCAB asks for. An upper estimate: where two blocks exclude each other in a way that
the code does not show, both count. Its time is that of issuing it, and its special functions, on
every slot of every multiprocessor, relative to reading student and teacher and writing the gradient
at the bandwidth of a device copy. Above 1 a kernel is not bound by memory; latencies are left out.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from .output import json_text

#: An H100 SXM: multiprocessors, Hz under load, instructions of a warp and special functions of a
#: thread that one issues in a cycle, bytes a second of a device copy.
MULTIPROCESSORS, CLOCK, ISSUED, SPECIAL, BANDWIDTH = 132, 1.7e9, 4, 16, 3.0e12
VOCAB = 128256
#: At most as long is the code that fetches later rows, in bytes.
FETCH_BYTES = 0xC00
#: Shared memory of one of two CTAs on a multiprocessor, and of what a warp tells others, as in
#: csrc/cuda/tiles.h and team.h.
SHARED_BYTES, SLOT_BYTES = (227 * 1024 - 1024) // 2, 128

#: Operations of a thread; special functions are counted apart.
FLOPS = {"FADD": 1, "FMUL": 1, "FFMA": 2}

INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]+)\*/\s+(@!?U?P\w+ )?([A-Z][\w.]*)(.*?);", re.MULTILINE)
NAME = re.compile(r"(registers|shared)_kernelINS0_\d+([A-Za-z]+)E(?:Li([24])E)?(?:Lb([01])E)?E")


class Instruction(NamedTuple):
    address: int
    predicate: str
    name: str
    operands: str
    target: int | None  # of a branch

    @property
    def wide(self) -> bool:
        return ".128" in self.name

    def narrow(self, kind: str) -> bool:
        return self.name.startswith(kind) and not self.wide


class Cost(NamedTuple):
    instructions: float
    special: float
    flops: float


def disassembler() -> str:
    """cuobjdump, from a CUDA toolkit or from Triton's package."""
    if found := shutil.which("cuobjdump"):
        return found
    triton = importlib.util.find_spec("triton")
    if triton is None or triton.origin is None:
        sys.exit("no cuobjdump on PATH and no Triton, whose package has one")
    return str(Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump")


def disassembly(objects: list[Path], architecture: str) -> Iterator[tuple[str, str]]:
    """Mangled name and text of every kernel for one architecture, such as "sm_90"."""
    program = disassembler()

    def text_of(path: Path) -> str:
        command = [program, "-sass", "-arch", architecture, str(path)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    with ThreadPoolExecutor() as pool:
        for text in pool.map(text_of, objects):
            for part in text.split("Function : ")[1:]:
                yield part.split(maxsplit=1)[0], part


def objects_of(build: Path) -> list[Path]:
    return sorted(build.glob("CMakeFiles/kdkernels_cuda.dir/**/*.o"))


def instructions_of(text: str) -> list[Instruction]:
    found = []
    for address, predicate, name, rest in INSTRUCTION.findall(text):
        target = re.search(r"0x([0-9a-f]+)\s*$", rest) if name.startswith("BRA") else None
        found.append(
            Instruction(int(address, 16), predicate, name, rest, target and int(target[1], 16))
        )
    return found


def blocks_of(code: list[Instruction]) -> list[list[Instruction]]:
    targets = {x.target for x in code if x.target is not None}
    blocks: list[list[Instruction]] = [[]]
    for x in code:
        if x.address in targets and blocks[-1]:
            blocks.append([])
        blocks[-1].append(x)
        if x.target is not None or x.name == "EXIT":
            blocks.append([])
    return [block for block in blocks if block]


def aligned(block: list[Instruction]) -> bool:
    """Whether it is no part of moving columns one by one."""
    return not any(x.narrow("STG") for x in block) and sum(x.narrow("LDG") for x in block) < 4


def successors_of(blocks: list[list[Instruction]]) -> list[list[int]]:
    at = {block[0].address: i for i, block in enumerate(blocks)}
    successors: list[list[int]] = []
    for i, block in enumerate(blocks):
        last = block[-1]
        ends = last.name == "EXIT" or (last.target is not None and ".U" not in last.name)
        ways = [] if last.target is None else [at[last.target]]
        if (
            ".DIV" in last.name
        ):  # taken where lanes have diverged, which no vote or shuffle here sees
            ways, ends = [], False
        if i + 1 < len(blocks) and (last.predicate or not ends):
            ways.append(i + 1)
        successors.append([way for way in ways if way != i or len(block) > 1])
    return successors


def loops_of(successors: list[list[int]]) -> tuple[list[int], list[set[int]]]:
    """Blocks, each after those it leads to other than by an edge back, and those of every loop."""
    order: list[int] = []
    loops: list[set[int]] = []
    predecessors: dict[int, list[int]] = {}
    for i, ways in enumerate(successors):
        for way in ways:
            predecessors.setdefault(way, []).append(i)
    entered, path = {0}, [(0, iter(successors[0]))]
    while path:
        here, ways = path[-1]
        for way in ways:
            if way not in entered:
                entered.add(way)
                path.append((way, iter(successors[way])))
                break
            if any(way == open_block for open_block, _ in path):
                loop, left = {way}, [here]
                while left:
                    if (block := left.pop()) not in loop:
                        loop.add(block)
                        left += predecessors.get(block, [])
                loops.append(loop)
        else:
            order.append(here)
            path.pop()
    return order, loops


def reachable(ways: list[list[int]], starts: set[int]) -> set[int]:
    found, left = set(starts), list(starts)
    while left:
        for way in ways[left.pop()]:
            if way not in found:
                found.add(way)
                left.append(way)
    return found


def near_blocks(
    blocks: list[list[Instruction]], successors: list[list[int]], order: list[int]
) -> set[int]:
    """Those for rows that are not far, see csrc/core/divergences.h: those whose terms compare, to
    choose a polynomial, and what leads to them and to nothing else once the gradient of a far row
    could have begun."""
    exponentials = [sum(x.name == "MUFU.EX2" for x in block) for block in blocks]
    comparisons = [sum(x.name.startswith("FSETP") for x in block) for block in blocks]
    sweeps = {i for i, n in enumerate(exponentials) if n >= 8}
    terms = {i for i in sweeps if exponentials[i] <= 2 * comparisons[i]}
    predecessors: list[list[int]] = [[] for _ in blocks]
    for i, ways in enumerate(successors):
        for way in ways:
            predecessors[way].append(i)
    before = reachable(predecessors, terms)
    to_sweep = reachable(predecessors, sweeps)
    leaving = [
        i for i in order if i in before and any(way in to_sweep - before for way in successors[i])
    ]
    # The order begins at the end: the last of these is the first on every way.
    return before - reachable(predecessors, {leaving[-1]}) if leaving else terms


def one_warp_only(code: list[Instruction]) -> set[int]:
    """Where it branches by the question whether this is the first warp of the CTA, or the one that
    fetches later rows into the cache."""
    asks = re.compile(r"\s*(P\d), PT, R\d+, 0x1f, PT\s*")
    asked: dict[str, bool] = {}  # of a predicate, in the order of addresses
    found = set()
    for x in code:
        if x.target is not None and asked.get(x.predicate.strip().lstrip("@!")):
            found.add(x.address)
        elif written := re.match(r"\s*(P\d),", x.operands):
            asked[written[1]] = bool(asks.fullmatch(x.operands))
    fetches = [x.address for x in code if x.name.startswith("UBLKPF")]
    over = 0  # the end of what the last of these branches leaves out
    for x in code:
        if x.target is None or not over <= x.address < x.target < x.address + FETCH_BYTES:
            continue
        if any(x.address < fetch < x.target for fetch in fetches):
            found.add(x.address)
            over = x.target
    return found


def longest_path(code: list[Instruction], trips: int, *, far: bool) -> Cost:
    """Of a thread, on average over the warps of a CTA of 256 threads; loops over vectors, which
    exchange or exponentiate them, have `trips`."""
    blocks = blocks_of(code)
    successors = successors_of(blocks)
    order, loops = loops_of(successors)
    row = ("LDS.128", "LDG.E.NA.128", "LDGSTS", "MUFU.EX2")
    first_warp = one_warp_only(code)
    left_out = near_blocks(blocks, successors, order) if far else set()
    vectors = set()
    for loop in loops:
        names = [x.name for i in loop for x in blocks[i]]
        # Doubles are added over what the warps tell each other.
        if any(x.startswith(row) for x in names) and "DADD" not in names:
            vectors |= loop

    best: dict[int, Cost] = {}  # from a block to the end
    for i in order:
        block = blocks[i]
        ways = [best[way] for way in successors[i] if way in best]
        if block[-1].name == "EXIT":
            ways.append(Cost(0, 0, 0))
        if not aligned(block) or i in left_out or not ways:
            continue
        rest = max(ways)
        if block[-1].address in first_warp and len(ways) == 2:
            others = min(ways)
            rest = Cost(*((x + 7 * y) / 8 for x, y in zip(rest, others, strict=True)))
        n = trips if i in vectors else 1
        special = sum(x.name.startswith("MUFU") for x in block)
        flops = sum(FLOPS.get(x.name.split(".")[0], 0) for x in block)
        best[i] = Cost(
            rest.instructions + n * len(block), rest.special + n * special, rest.flops + n * flops
        )
    if 0 not in best:
        raise ArithmeticError("no path through the kernel moves 16 bytes at a time")
    return best[0]


def vectors_of(kernel: str, divergence: str, item_size: int) -> int:
    """Of a thread, for VOCAB, in the tile that csrc/cuda/tiles.h chooses."""
    if kernel == "registers":
        return {"TVD": 8, "SoftCrossEntropy": 9}.get(divergence, 10)
    sums_to_zero = divergence in ("ForwardKL", "SoftCrossEntropy")
    keeps = not sums_to_zero and divergence not in ("ReverseKL", "TVD")
    slot = 16 * (3 if keeps and item_size == 2 else 2)
    for cluster in (1, 2, 4, 8, 16):
        vectors = -(-(VOCAB * item_size // 16 + 1) // (cluster * 256))
        if vectors * 256 * slot + cluster * 8 * SLOT_BYTES <= SHARED_BYTES:
            break
    return vectors


def estimate(build: Path) -> Iterator[dict]:
    for name, text in disassembly(objects_of(build), "sm_90"):
        found = NAME.search(name)
        if not found or found[4] == "1":  # with options
            continue
        kernel, divergence, item = found[1], found[2], int(found[3])
        vectors = vectors_of(kernel, divergence, item)
        pairs = vectors * 16 // item
        code = instructions_of(text)
        for rows in ("far", "near"):
            far = rows == "far"
            cost = longest_path(code, vectors, far=far)
            one_more = longest_path(code, vectors + 1, far=far)
            instructions, special = cost.instructions / pairs, cost.special / pairs
            floor = 3 * item / BANDWIDTH * MULTIPROCESSORS * CLOCK  # cycles of a multiprocessor
            yield {
                "kernel": kernel,
                "divergence": divergence,
                "item_size": item,
                "rows": rows,
                "pairs_per_thread": pairs,
                "instructions_per_pair": round(instructions, 1),
                # Without what does not grow with the row; the registers kernel has no loop to tell.
                "in_loops": round((one_more.instructions - cost.instructions) * item / 16, 1)
                if kernel == "shared"
                else None,
                "special_per_pair": round(special, 2),
                "flops_per_pair": round(cost.flops / pairs, 1),
                "issue_of_floor": round(instructions / (32 * ISSUED) / floor, 2),
                "special_of_floor": round(special / SPECIAL / floor, 2),
            }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("build", type=Path)
    parser.add_argument("--output", type=Path, help="a JSON file to write")
    arguments = parser.parse_args()
    cases = sorted(
        estimate(arguments.build), key=lambda x: (x["kernel"], x["divergence"], x["item_size"])
    )
    for case in cases:
        print(*(f"{value!s:>{18 if isinstance(value, str) else 6}}" for value in case.values()))
    if arguments.output:
        nvcc = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True)
        environment = {
            "nvcc": re.search(r"V[\d.]+", nvcc.stdout)[0],
            "command": "python -m benchmarks.cuda_instructions " + shlex.join(sys.argv[1:]),
            "note": "derived from compiled code for sm_90, not measured",
            "vocab": VOCAB,
            "assumed": {
                "multiprocessors": MULTIPROCESSORS,
                "clock": CLOCK,
                "bandwidth": BANDWIDTH,
            },
        }
        report = {"environment": environment, "cases": cases}
        arguments.output.write_text(json_text(report))


if __name__ == "__main__":
    main()
