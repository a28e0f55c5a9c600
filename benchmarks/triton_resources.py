"""Compiles the Triton kernels for GPUs that need not be here and reports what they take.

    python -m benchmarks.triton_resources --output benchmarks/results/triton_resources.json
    python -m benchmarks.triton_resources --check      fail where a kernel spills
    python -m benchmarks.triton_resources --check --every 7

Registers, spilled bytes, instructions and those of float64 come from the compiled code, for
NVIDIA's GPUs through the disassembler in Triton's package. It takes half as long as compiling, so
that instructions are counted for a file only.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import itertools
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from kdkernels.divergences import DIVERGENCES
from kdkernels.options import METRICS, SHARD_PHASES, LogitsOptions, TailOptions
from kdkernels.triton import launch, schedule
from kdkernels.triton.divergences import FUNCTIONS

from .output import json_text

SCALE = "scale"  # in the place of a divergence: the kernel that scales a gradient
TAILS = "tails"  # likewise: those of a sparse teacher
#: What GPUs without fast float64 do slowly: its arithmetic, and conversions from and to it.
FLOAT64 = re.compile(r"\b(D(ADD|MUL|FMA|SETP|MNMX)|MUFU\.\w+64H|[FI]2[FI]\S*64)\b")
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class Target(NamedTuple):
    """A GPU, with what the schedule depends on."""

    name: str
    gpu: GPUTarget
    multiprocessors: int
    cache_mib: int
    registers: int  # of a multiprocessor; 0 where a kernel's cannot be limited


TARGETS = (
    Target("sm_80", GPUTarget("cuda", 80, 32), 108, 40, 65536),
    Target("sm_90", GPUTarget("cuda", 90, 32), 132, 50, 65536),
)
#: An AMD Instinct MI300X.
AMD = Target("gfx942", GPUTarget("hip", "gfx942", 64), 304, 4, 0)


class Kernel(NamedTuple):
    """One compiled kernel."""

    target: Target
    divergence: str
    dtype: str
    vocab: int
    gradient: bool = True
    labels: bool = False  # and cross-entropy, weights
    options: bool = False  # these, metrics and softcaps
    phase: str = ""  # of a shard of the vocabulary
    rows: int = 64
    padding: int = 0  # columns beyond the vocabulary


class _Driver:
    """Stands in for a GPU, so that the JIT specialises and compiles as it would for one."""

    def __init__(self, target: Target) -> None:
        self.target = target

    def get_current_target(self):
        return self.target.gpu

    def get_current_device(self):
        return self.target.gpu.arch

    def get_current_stream(self, device=None):
        return 0

    def get_active_torch_device(self):
        return torch.device("meta")


def kernels() -> list[Kernel]:
    """Every divergence with every schedule, and the rarer variants once."""
    result = []
    for target in TARGETS:
        for divergence in DIVERGENCES:
            for vocab in (1000, 32000, 50257, 128256):
                for dtype in ("bfloat16", "float32"):
                    result.append(Kernel(target, divergence, dtype, vocab))
            for vocab in (32000, 128256):
                result.append(Kernel(target, divergence, "bfloat16", vocab, labels=True))
            result.append(Kernel(target, divergence, "bfloat16", 19))
            result.append(Kernel(target, divergence, "bfloat16", 151665, padding=399))
            result.append(Kernel(target, divergence, "bfloat16", 128256, gradient=False))
            result.append(Kernel(target, divergence, "float16", 128256, options=True))
        result += shard_kernels(target)
        # Sizes of 1 are compiled in as constants.
        for phase in ("", *SHARD_PHASES):
            result.append(Kernel(target, "jsd", "float16", 1, rows=1, options=True, phase=phase))
        result += other_kernels(target, (1000, 128256))
    result += [Kernel(AMD, divergence, "bfloat16", 128256) for divergence in DIVERGENCES]
    result.append(Kernel(AMD, "jsd", "float16", 128256, options=True))
    return result + shard_kernels(AMD)[:1] + other_kernels(AMD, (128256,))


def other_kernels(target: Target, vocabs: Sequence[int]) -> list[Kernel]:
    """Those that know no divergence."""
    result = [Kernel(target, SCALE, dtype, 128256) for dtype in ("bfloat16", "float16")]
    for vocab, gradient, options in itertools.product(vocabs, (False, True), (False, True)):
        result.append(Kernel(target, TAILS, "bfloat16", vocab, gradient, options=options))
    return result


def shard_kernels(target: Target) -> list[Kernel]:
    """One of two shards; its states are the same whatever the divergence."""
    phases = [("jsd", "states")]
    for divergence in DIVERGENCES:
        phases.append((divergence, "sums"))
        if not FUNCTIONS[divergence].slope_sums_to_zero:
            phases.append((divergence, "gradient"))
    return [
        Kernel(target, divergence, dtype, 64128, labels=labels, options=options, phase=phase)
        for divergence, phase in phases
        for dtype, labels, options in (
            ("bfloat16", False, False),
            ("bfloat16", True, False),
            ("float16", False, True),
        )
    ]


def sources() -> str:
    """What tells whether the kernels have changed since they were compiled for a file."""
    package = Path(launch.__file__).parents[1]
    files = [*sorted((package / "triton").glob("*.py")), package / "constants.py"]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def device_of(target: Target) -> schedule.Device:
    cache_bytes = target.cache_mib * 2**20
    return schedule.Device(
        target.multiprocessors, cache_bytes, target.gpu.warp_size, target.registers
    )


def compile_scale(kernel: Kernel):
    """The kernel that scales a gradient, by a number per row for float16."""
    dtype = getattr(torch, kernel.dtype)
    gradient = torch.empty(kernel.rows, kernel.vocab, dtype=dtype, device="meta")
    per_row = torch.empty(kernel.rows, device="meta") if dtype == torch.float16 else None
    grad_output = torch.empty((), device="meta") if per_row is None else per_row
    chosen = launch.schedule_of_scaling(gradient, device_of(kernel.target))
    arguments = launch.arguments_of_scaling(gradient, grad_output, per_row)
    options = launch.options_of(chosen)
    return launch.scale_kernel.warmup(*arguments, chosen.block, grid=(1,), **options)


def compile_tails(kernel: Kernel):
    """The kernels of a sparse teacher that lists 64 tokens."""
    student = torch.empty(
        kernel.rows, kernel.vocab, dtype=getattr(torch, kernel.dtype), device="meta"
    )
    listed = torch.empty(kernel.rows, 64, dtype=torch.int64, device="meta")
    cap = 30.0 if kernel.options else 0.0
    o = TailOptions(2.0, kernel.options, 1.0, cap, kernel.vocab)
    numbers = torch.empty(o.results, kernel.rows, device="meta")
    if kernel.gradient:
        of_listed = torch.empty(kernel.rows, 64, device="meta")
        of_tails = torch.empty(o.results - 1, kernel.rows, device="meta")
        between = launch._rows(student.clone()), numbers, of_tails, of_listed
        function = launch.tails_gradient_kernel
    else:
        kept = torch.empty(kernel.rows, dtype=torch.bool, device="meta")
        between, function = (kept if kernel.options else None, numbers), launch.tails_kernel
    chosen = launch.schedule_of_tails(student, o, device_of(kernel.target))
    arguments = launch.arguments_of_tails(student, listed, between, o)
    options = launch.options_of(chosen)
    return function.warmup(*arguments, chosen.block, grid=(kernel.rows,), **options)


def options_of(kernel: Kernel) -> LogitsOptions:
    cap = 30.0 if kernel.options else 0.0
    return LogitsOptions(
        divergence=kernel.divergence,
        parameter_0=0.5,
        parameter_1=0.3,
        temperature=2.0,
        kd_weight=4.0,
        ce_weight=0.5 if kernel.labels or kernel.options else 0.0,
        ignore_index=-100,
        reduction="mean",
        vocab=kernel.vocab,
        student_scale=1.0,
        student_softcap=cap,
        teacher_scale=1.0,
        teacher_softcap=cap,
        metrics=kernel.options,
        group="",
        rank=0,
        processes=1,
        vocab_start=0,
        vocab_size=kernel.vocab,
    )


def compile_rows(kernel: Kernel):
    """The kernel of a loss, or of one phase of a shard."""
    o, device = options_of(kernel), device_of(kernel.target)
    dtype = getattr(torch, kernel.dtype)
    student = torch.empty(kernel.rows, kernel.vocab + kernel.padding, dtype=dtype, device="meta")
    teacher, gradient = student.clone(), student.clone() if kernel.gradient else None
    per_row = torch.empty(kernel.rows, device="meta")
    labels = weight = None
    if o.ce_weight:
        labels, weight = torch.empty(kernel.rows, dtype=torch.int64, device="meta"), per_row
    row_scale = per_row if kernel.gradient and dtype == torch.float16 else None
    logits = student, teacher, gradient, labels
    if kernel.phase:
        records = torch.empty(kernel.rows, 6, dtype=torch.float64, device="meta")
        shard = launch.ShardCall(kernel.phase, *logits, per_row, records, records, row_scale, o)
        function, taken = launch.shard_kernel, launch.arguments_of_shard(shard, device)
    else:
        metrics = torch.empty(len(METRICS), kernel.rows, device="meta") if o.metrics else None
        call = launch.Call(*logits, weight, None, per_row, row_scale, metrics, o)
        function, taken = launch.loss_kernel, launch.arguments_of(call, device)
    arguments, options = taken
    return function.warmup(*arguments, grid=(kernel.rows,), **options)


def compile_kernel(kernel: Kernel):
    """The compiled kernel of one configuration, from tensors without memory."""
    driver.set_active(_Driver(kernel.target))
    if kernel.divergence == SCALE:
        return compile_scale(kernel)
    return compile_tails(kernel) if kernel.divergence == TAILS else compile_rows(kernel)


def nvidia_resources(cubin: bytes, *, count: bool) -> dict[str, int]:
    """Of compiled code for NVIDIA's GPUs."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()

        def tool(option: str) -> str:
            command = [str(TOOLS / "cuobjdump"), option, file.name]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        usage = dict(re.findall(r"(\w+):(\d+)", tool("--dump-resource-usage").splitlines()[-1]))
        code = tool("-sass") if count else ""
    result = {
        "registers": int(usage["REG"]),
        "stack": int(usage["STACK"]),  # what registers spill to
        "local": int(usage["LOCAL"]),
    }
    if count:
        instructions = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/ +(.*)", code, re.MULTILINE)
        result["instructions"] = len(instructions)
        result["float64"] = sum(bool(FLOAT64.search(line)) for line in instructions)
    return result


def amd_resources(assembly: str) -> dict[str, int]:
    """Of compiled code for AMD's GPUs, whose scalar registers spill to vector registers."""
    usage = dict(re.findall(r"^\s+\.(\w+): +(\d+)$", assembly, re.MULTILINE))
    return {
        "registers": int(usage["vgpr_count"]),
        "stack": int(usage["vgpr_spill_count"]),
        "local": int(usage["private_segment_fixed_size"]),
        "instructions": len(re.findall(r"^\t[a-z]\w*", assembly, re.MULTILINE)),
    }


def resources(kernel: Kernel, *, count: bool) -> dict[str, object]:
    """Registers and spills of one configuration, and how many instructions it has."""
    compiled = compile_kernel(kernel)
    gpu = kernel.target.gpu
    return {
        "target": kernel.target.name,
        "divergence": kernel.divergence,
        "dtype": kernel.dtype,
        "vocab": kernel.vocab,
        "gradient": kernel.gradient,
        "labels": kernel.labels,
        "options": kernel.options,
        "phase": kernel.phase,
        "padding": kernel.padding,
        "threads": gpu.warp_size * compiled.metadata.num_warps,
        **(
            nvidia_resources(compiled.asm["cubin"], count=count)
            if gpu.backend == "cuda"
            else amd_resources(compiled.asm["amdgcn"])
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--every", type=int, default=1, help="compile one of so many kernels")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--output", type=Path, help="a JSON file to write")
    arguments = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET"):
        sys.exit("TRITON_INTERPRET is set: kernels would be interpreted, not compiled")

    with ProcessPoolExecutor(arguments.processes, get_context("spawn")) as pool:
        measure = functools.partial(resources, count=arguments.output is not None)
        compiled = list(pool.map(measure, kernels()[:: arguments.every], chunksize=4))
    report = {"triton": triton.__version__, "sources": sources(), "kernels": compiled}
    if arguments.output:
        arguments.output.write_text(json_text(report))
    spilled = [k for k in compiled if k["stack"] or k["local"]]
    for kernel in spilled:
        print("spills:", kernel)
    print(f"{len(compiled)} kernels compiled, {len(spilled)} spill")
    sys.exit(bool(arguments.check and spilled))


if __name__ == "__main__":
    main()
