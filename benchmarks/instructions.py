"""Counts the instructions of the CPU kernels and compares them with those on record.

    python -m benchmarks.instructions --output benchmarks/results/cpu_instructions.json
    python -m benchmarks.instructions --check     fail where a count differs by more than 3 %

A count is that of one call on fixed data in one thread (count_instructions.cpp), per vocabulary
entry of all rows, under valgrind's callgrind, which knows AVX2 but not AVX-512. It depends on the
compiler: with another one than on record nothing is compared, which is said. The floating-point
operations among them are counted too, and only recorded.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from . import flops
from .output import json_text

ROOT = Path(__file__).parents[1]
RECORD = ROOT / "benchmarks/results/cpu_instructions.json"
INSTRUCTION_SETS = ("avx2", "baseline")
TOLERANCE = 0.03
RENEW = "python -m benchmarks.instructions --output benchmarks/results/cpu_instructions.json"


def build(folder: Path) -> Path:
    """Compiles the driver and returns the folder it lies in."""
    tools = Path(sys.executable).parent  # those of this environment first
    environment = os.environ | {"PATH": f"{tools}{os.pathsep}{os.environ['PATH']}"}
    pybind11 = [sys.executable, "-m", "pybind11", "--cmakedir"]
    directory = subprocess.run(pybind11, capture_output=True, text=True, check=True).stdout.strip()
    options = ["-DKDKERNELS_BUILD_TESTS=ON", "-DKDKERNELS_CUDA=OFF", f"-Dpybind11_DIR={directory}"]
    for command in (
        ["cmake", "-S", ROOT, "-B", folder, "-G", "Ninja", *options],
        ["cmake", "--build", folder, "--target", "count_instructions", "--parallel", "2"],
    ):
        subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, check=True)
    return folder


def flags(folder: Path, instruction_set: str) -> str:
    """What the kernels of an instruction set are compiled with, paths left out."""
    for entry in json.loads((folder / "compile_commands.json").read_text()):
        if entry["file"].endswith(f"isa_{instruction_set}.cpp"):
            options = [x for x in shlex.split(entry["command"]) if x.startswith(("-O", "-m", "-f"))]
            return " ".join(options)
    raise FileNotFoundError(f"no isa_{instruction_set}.cpp in {folder}/compile_commands.json")


class Counts(NamedTuple):
    compiler: str
    instructions: dict[str, float]  # per vocabulary entry, of each configuration
    flops: dict[str, float]


def count(driver: Path, instruction_set: str) -> Counts:
    operations = flops.of_program(driver)
    function = "kd::cpu::logits(kd::LogitsParams const&, kd::InstructionSet const*, int)"
    with tempfile.TemporaryDirectory() as folder:
        command = [
            "valgrind",
            "--tool=callgrind",
            "--dump-instr=yes",
            "--compress-pos=no",
            "--compress-strings=no",
            f"--toggle-collect={function}",
            f"--dump-after={function}",
            f"--callgrind-out-file={folder}/calls",
            driver,
        ]
        environment = os.environ | {"KDKERNELS_CPU_ISA": instruction_set}
        run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if run.returncode:
            sys.exit(run.stderr)
        compiler, entries, *names = run.stdout.splitlines()
        counts = Counts(compiler, {}, {})
        for index, name in enumerate(names, 1):
            text = Path(folder, f"calls.{index}").read_text()
            (total,) = re.findall(r"^totals: (\d+)$", text, re.MULTILINE)
            executed = flops.executed(text, driver, operations)
            counts.instructions[name] = round(int(total) / int(entries), 3)
            counts.flops[name] = round(executed / int(entries), 3)
    return counts


def differences(recorded: dict[str, float], counts: dict[str, float]) -> list[str]:
    """A line for each count that is new, gone, or off by more than the tolerance."""
    lines = [f"{name}: not on record" for name in counts if name not in recorded]
    lines += [f"{name}: on record, not counted" for name in recorded if name not in counts]
    for name in recorded.keys() & counts.keys():
        change = counts[name] / recorded[name] - 1
        if not abs(change) <= TOLERANCE:
            lines.append(f"{name}: {counts[name]} for {recorded[name]}, {change:+.1%}")
    return sorted(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--build", type=Path, help="a folder CMake has built with the tests option")
    parser.add_argument("--output", type=Path, help="a JSON file to write")
    arguments = parser.parse_args()
    if not shutil.which("valgrind"):
        if arguments.output:
            sys.exit("there is no valgrind here, which counts instructions")
        print("NOT COMPARED: there is no valgrind here, which counts instructions")
        return

    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.build or build(Path(scratch))
        report: dict = {"instruction_sets": {}}
        for name in INSTRUCTION_SETS:
            counts = count(folder.resolve() / "count_instructions", name)
            report["compiler"] = counts.compiler
            report["instruction_sets"][name] = {
                "flags": flags(folder, name),
                "per_entry": counts.instructions,
                "flops_per_entry": counts.flops,
            }
    if arguments.output:
        arguments.output.write_text(json_text(report))
    if arguments.check:
        sys.exit(check(json.loads(RECORD.read_text()), report))


def check(recorded: dict, report: dict) -> int:
    """Prints how a report compares with the one on record; returns the exit status."""
    if report["compiler"] != recorded["compiler"]:
        print(
            f"NOT COMPARED: counts on record are those of {recorded['compiler']}, and this build "
            f"is by {report['compiler']}"
        )
        return 0
    compared = 0
    lines = []
    for name, measured in report["instruction_sets"].items():
        before = recorded["instruction_sets"][name]
        compared += len(measured["per_entry"])
        found = differences(before["per_entry"], measured["per_entry"])
        lines += [f"{name} {line}" for line in found]
        if found and before["flags"] != measured["flags"]:
            lines.append(f"{name} flags: {measured['flags']}\n    for {before['flags']}")
    for line in lines:
        print(line)
    print(
        f"{compared} counts of instructions compared, {len(lines)} differences beyond "
        f"{TOLERANCE:.0%}" + (f"; if they are meant, record them: {RENEW}" if lines else "")
    )
    return bool(lines)


if __name__ == "__main__":
    main()
