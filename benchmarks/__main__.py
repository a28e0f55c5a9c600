"""Times one level on this CPU and writes JSON with everything needed to repeat it.

python -m benchmarks --output benchmarks/results/cpu.json
python -m benchmarks --level linear --output benchmarks/results/cpu_linear.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

import torch
import torch.nn.functional as F

import kdkernels
from kdkernels import _C
from kdkernels.divergences import DIVERGENCES

from .linear import LINEAR_PROVIDERS, LINEAR_SHAPES, LinearCase, verify_linear
from .measure import interleaved, peak_bytes, ratios, verify
from .providers import PROVIDERS, Case, Step

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def environment(threads: int) -> dict[str, object]:
    cpu = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        models = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = models[0].split(":")[1].strip() if models else cpu
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    ).stdout.strip()
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": threads,
        "instruction_set": os.environ.get("KDKERNELS_CPU_ISA") or _C.instruction_sets()[0],
        "kdkernels": kdkernels.__version__,
        "commit": commit,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": date.today().isoformat(),
        "command": "python -m benchmarks " + shlex.join(sys.argv[1:]),
    }


def run_case(
    case: Case | LinearCase, names: list[str], rounds: int, memory: bool
) -> dict[str, object]:
    linear = isinstance(case, LinearCase)
    providers = LINEAR_PROVIDERS if linear else PROVIDERS
    check = verify_linear if linear else verify
    steps: dict[str, Step] = {"floor": providers["floor"](case)}
    results: dict[str, dict[str, object]] = {"floor": {}}
    for name in names:
        if name == "floor":
            continue
        step = providers[name](case)
        try:
            results[name] = dict(check(case, step))
            steps[name] = step
        except ArithmeticError as wrong:
            results[name] = {"wrong": str(wrong)}

    def progress() -> None:
        print(".", end="", flush=True)

    print(f"{case.label} {case.divergence} ", end="", flush=True)
    times = interleaved(steps, rounds, progress)
    print()
    speed = ratios(times, "floor")
    for name, seconds in times.items():
        results[name] |= {
            "ms": round(statistics.median(seconds) * 1e3, 3),
            "ms_min": round(min(seconds) * 1e3, 3),
            "ms_max": round(max(seconds) * 1e3, 3),
            "speed_of_floor": round(speed[name], 4),
        }
        if memory and name != "floor":
            results[name]["peak_mib"] = round((peak_bytes(steps[name]) or 0) / 2**20, 1)
    return {**case.describe(), "results": results}


def small_call(rounds: int = 2000) -> dict[str, float]:
    """Microseconds of forward and backward of one (1, 8) call."""
    student = torch.randn(1, 8, requires_grad=True)
    teacher = torch.randn(1, 8)

    def eager() -> torch.Tensor:
        log_q, log_p = F.log_softmax(student, dim=-1), F.log_softmax(teacher, dim=-1)
        return F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")

    report = {}
    for name, loss in (("us", lambda: kdkernels.kd_loss(student, teacher)), ("eager_us", eager)):
        times = []
        for _ in range(rounds):
            student.grad = None
            start = time.perf_counter()
            loss().backward()
            times.append(time.perf_counter() - start)
        report |= {
            name: round(statistics.median(times) * 1e6, 1),
            f"{name}_min": round(min(times) * 1e6, 1),
        }
    return report


def logits_cases(arguments: argparse.Namespace, names: list[str]) -> list[dict[str, object]]:
    cases = []
    for vocab in arguments.vocab:
        for dtype in arguments.dtype:
            case = Case(arguments.rows, vocab, DTYPES[dtype])
            cases.append(run_case(case, names, arguments.rounds, memory=True))
            if not arguments.divergences:
                continue
            for divergence in DIVERGENCES:
                case = Case(arguments.rows, vocab, DTYPES[dtype], divergence)
                in_place = ["kdkernels", "kdkernels in place", "kdkernels loss only"]
                cases.append(run_case(case, in_place, arguments.rounds, memory=False))
    return cases


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--level", choices=("logits", "linear"), default="logits")
    parser.add_argument("--rows", type=int, default=512, help="of the logits level")
    parser.add_argument("--vocab", type=int, nargs="+", default=[32000, 128256])
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["float32", "bfloat16"])
    parser.add_argument("--providers", nargs="+", help="default: all of the level")
    parser.add_argument("--divergences", action="store_true", help="also all nine, in place")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, help="a JSON file to write")
    arguments = parser.parse_args()
    known = LINEAR_PROVIDERS if arguments.level == "linear" else PROVIDERS
    names = arguments.providers or list(known)
    if unknown := set(names) - set(known):
        parser.error(f"--providers: {', '.join(unknown)} unknown, expected {', '.join(known)}")

    torch.set_num_threads(arguments.threads)
    report: dict[str, object] = {"environment": environment(arguments.threads)}
    cases = []
    if arguments.level == "linear":
        for rows, vocab, hidden, teacher_hidden in LINEAR_SHAPES:
            if vocab in arguments.vocab:
                for dtype in arguments.dtype:
                    case = LinearCase(rows, vocab, hidden, teacher_hidden, DTYPES[dtype])
                    cases.append(run_case(case, names, arguments.rounds, memory=True))
    else:
        report["small_call"] = small_call()
        cases = logits_cases(arguments, names)
    report["cases"] = cases
    text = json.dumps(report, indent=1)
    if arguments.output:
        arguments.output.write_text(text + "\n")
    else:
        print(text)


if __name__ == "__main__":
    main()
