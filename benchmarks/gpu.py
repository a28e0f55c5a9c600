"""Checks and times the logits level on an NVIDIA GPU; benchmarks/gpu.sh runs it.

python -m benchmarks.gpu check
python -m benchmarks.gpu bench --output benchmarks/results/gpu.json
python -m benchmarks.gpu tune --output tiles.json

Times are medians of CUDA events over rounds in which every step has its turn. Speed is that of the
bytes a fused loss has to move (read student and teacher, write the gradient) relative to a device
copy measured in the same rounds; every step is verified against float64 before it is timed.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path

import torch
import torch.nn.functional as F

import kdkernels
from kdkernels import AlphaBeta, backends, kd_loss
from kdkernels.divergences import DIVERGENCES, Divergence

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
VOCABS = (32000, 50257, 128256, 151936, 256000)
#: Of the loss, and of the gradient by dtype of the logits: beyond them a step is not timed.
LOSS_TOLERANCE = 1e-4
GRADIENT_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 2e-3}
TILE = "KDKERNELS_CUDA_TILE"
TILES = [
    *(f"registers:{cluster}x256" for cluster in (1, 2, 4, 8, 16)),
    *(f"registers:{cluster}x512" for cluster in (1, 2, 4, 8, 16)),
    *(f"shared:{cluster}x256" for cluster in (1, 2, 4, 8, 16)),
    *(f"shared:{cluster}x128" for cluster in (2, 4, 8, 16)),
    "streaming:1x256",
]

Step = Callable[[], tuple[torch.Tensor, torch.Tensor | None]]


def instance(name: str) -> Divergence:
    return AlphaBeta(0.3, 0.7) if name == "alpha_beta" else DIVERGENCES[name]()


class Case:
    """Logits of a student that has learnt something, and of a teacher, on the GPU."""

    def __init__(
        self, rows: int, vocab: int, dtype: torch.dtype, divergence: str = "forward_kl"
    ) -> None:
        self.rows, self.vocab, self.dtype, self.divergence = rows, vocab, dtype, divergence
        self.student = torch.empty(rows, vocab, dtype=dtype, device="cuda")
        self.teacher = torch.empty_like(self.student)
        generator = torch.Generator("cuda").manual_seed(0)
        for i in range(0, rows, 256):  # in parts, for the float32 of a part
            shape = self.student[i : i + 256].shape
            teacher = 2 * torch.randn(shape, device="cuda", generator=generator)
            noise = torch.randn(shape, device="cuda", generator=generator)
            self.teacher[i : i + 256] = teacher
            self.student[i : i + 256] = 0.6 * teacher + 1.2 * noise

    @property
    def bytes(self) -> int:
        """Of one tensor."""
        return self.student.numel() * self.student.element_size()

    @functools.cached_property
    def expected(self) -> tuple[float, torch.Tensor]:
        """In float64: the sum of the losses, and the gradient of the first rows."""
        options = {"reduction": "sum", "backend": "reference"}
        student = self.student[:8].double().requires_grad_()
        self.loss(student, self.teacher[:8].double(), **options).backward()
        with torch.no_grad():
            total = sum(
                float(self.loss(s.double(), t.double(), **options))
                for s, t in zip(self.student.split(64), self.teacher.split(64), strict=True)
            )
        return total, student.grad

    def loss(self, student: torch.Tensor, teacher: torch.Tensor, **options) -> torch.Tensor:
        options = {"divergence": instance(self.divergence), "temperature": 2.0} | options
        return kd_loss(student, teacher, **options)


def fused(case: Case, backend: str, tile: str = "") -> Step:
    def run():
        os.environ[TILE] = tile
        leaf = case.student.detach().requires_grad_()
        loss = case.loss(leaf, case.teacher, backend=backend)
        loss.backward()
        os.environ.pop(TILE)
        return loss.detach(), leaf.grad

    return run


def loss_only(case: Case, backend: str) -> Step:
    def run():
        with torch.no_grad():
            return case.loss(case.student, case.teacher, backend=backend), None

    return run


def dense_forward_kl(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    log_q, log_p = F.log_softmax(student / 2, dim=-1), F.log_softmax(teacher / 2, dim=-1)
    return 4 * F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")


def dense(case: Case, function: Callable) -> Step:
    def run():
        leaf = case.student.detach().requires_grad_()
        loss = function(leaf, case.teacher)
        loss.backward()
        return loss.detach(), leaf.grad

    return run


def verify(case: Case, step: Step, exact: bool = True) -> dict[str, float]:
    """Relative errors against float64; an ArithmeticError where a fused loss is wrong."""
    loss, gradient = step()
    total, expected = case.expected
    errors = {"loss_error": abs(float(loss) * case.rows / total - 1)}
    if gradient is not None:
        got = gradient[: len(expected)].double() * case.rows
        errors["gradient_error"] = float((got - expected).norm() / expected.norm())
    if exact and not (
        errors["loss_error"] < LOSS_TOLERANCE
        and errors.get("gradient_error", 0) < GRADIENT_TOLERANCE[case.dtype]
    ):
        raise ArithmeticError(f"wrong: {errors}")
    return errors


def interleaved(steps: dict[str, Step], rounds: int) -> dict[str, float]:
    """Median milliseconds of every step; two rounds of warming up."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + 2):
        for name, step in steps.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            step()
            end.record()
            end.synchronize()
            if number >= 2:
                times[name].append(start.elapsed_time(end))
    return {name: statistics.median(values) for name, values in times.items()}


def measure(case: Case, steps: dict[str, Step], rounds: int) -> dict[str, object]:
    results: dict[str, dict[str, object]] = {}
    good: dict[str, Step] = {}
    for name, step in steps.items():
        try:
            results[name] = dict(verify(case, step, exact="dense" not in name))
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            step()
            peak = torch.cuda.max_memory_allocated() - before + 2 * case.bytes
            results[name]["peak_tensors"] = round(peak / case.bytes, 2)
            good[name] = step
        except Exception as error:  # the others still count
            results[name] = {"failed": str(error).splitlines()[0][:200]}
            torch.cuda.empty_cache()
    target = torch.empty_like(case.student)
    good["copy"] = lambda: (target.copy_(case.student), None)
    times = interleaved(good, rounds)
    copy_rate = 2 * case.bytes / times["copy"] / 1e6  # GB/s
    for name, ms in times.items():
        tensors = 2 if name == "copy" or "loss only" in name else 3
        rate = tensors * case.bytes / ms / 1e6
        results.setdefault(name, {})
        results[name] |= {
            "ms": round(ms, 4),
            "gb_per_s": round(rate, 1),
            "of_copy": round(rate / copy_rate, 3),
        }
    row = {
        "rows": case.rows,
        "vocab": case.vocab,
        "dtype": str(case.dtype).removeprefix("torch."),
        "divergence": case.divergence,
        "results": results,
    }
    print(line(row), flush=True)
    return row


def line(row: dict) -> str:
    def cell(name: str, r: dict) -> str:
        if "ms" not in r:
            return f"{name} {r['failed']}"
        return f"{name} {r['ms']:.3f} ms {100 * r['of_copy']:.0f}%"

    head = f"{row['vocab']:>7} {row['dtype']:<9}{row['divergence']:<19}"
    cells = [cell(name, r) for name, r in row["results"].items()]
    return head + " | ".join(text for text in cells if "cannot hold" not in text)


def gpu_backends() -> list[str]:
    """The kernels' backends that can serve a call here."""
    x = torch.zeros(1, 8, device="cuda")
    names = [name for name in backends.BACKENDS if name not in ("cpu", "reference")]
    divergence = instance("forward_kl")
    return [name for name in names if not backends.why_not(name, x, x, divergence, False)]


def bench(rows: int, rounds: int, compiled: bool) -> Iterator[dict]:
    """The most important cases first, since time may run out."""
    names = gpu_backends()
    for vocab in VOCABS:
        case = Case(rows, vocab, torch.bfloat16)
        steps = {name: fused(case, name) for name in names}
        steps |= {f"{name} loss only": loss_only(case, name) for name in names[:1]}
        if vocab <= 151936:  # beyond, 13 tensors do not fit
            steps["eager (dense)"] = dense(case, dense_forward_kl)
        if compiled and vocab == 128256:
            steps["torch.compile (dense)"] = dense(case, torch.compile(dense_forward_kl))
        yield measure(case, steps, rounds)
        del case, steps
    for vocab, dtype in (
        (128256, torch.bfloat16),
        (32000, torch.bfloat16),
        *((vocab, torch.float32) for vocab in VOCABS),
    ):
        for divergence in DIVERGENCES if dtype == torch.bfloat16 else ("forward_kl", "jsd"):
            case = Case(rows if dtype == torch.bfloat16 else rows // 2, vocab, dtype, divergence)
            yield measure(case, {name: fused(case, name) for name in names}, rounds)
            del case


def tune(rows: int, rounds: int, vocabs: list[int]) -> Iterator[dict]:
    for dtype in (torch.bfloat16, torch.float32):
        for vocab in vocabs:
            for divergence in ("forward_kl", "jsd"):
                count = rows if dtype == torch.bfloat16 else rows // 2
                case = Case(count, vocab, dtype, divergence)
                steps = {"chosen": fused(case, "cuda")}
                steps |= {tile: fused(case, "cuda", tile) for tile in TILES}
                yield measure(case, steps, rounds)
                del case, steps


def check() -> None:
    """Every kernel on small rows: aligned, unaligned, with tails; for compute-sanitizer."""
    wrong = 0
    for tile in ("", "registers:2x64", "registers:8x64", "shared:4x64", "streaming:1x64"):
        for dtype in DTYPES.values():
            for divergence in ("forward_kl", "reverse_kl", "jsd"):
                for vocab in (1000, 1003):
                    if tile.startswith("registers") and divergence == "jsd":
                        continue  # its kernels hold rows in shared memory only
                    case = Case(3, vocab, dtype, divergence)
                    try:
                        verify(case, fused(case, "cuda", tile))
                    except ArithmeticError as error:
                        wrong += 1
                        print(tile or "chosen", dtype, divergence, vocab, error)
        case = Case(3, 1003, torch.bfloat16)
        labels = torch.tensor([5, -100, 7], device="cuda")
        os.environ[TILE] = "" if tile.startswith("registers") else tile
        kd_loss(
            case.student.detach().requires_grad_(),
            case.teacher,
            labels=labels,
            ce_weight=0.5,
            student_softcap=30.0,
            return_metrics=True,
            backend="cuda",
        )[0].backward()
    torch.cuda.synchronize()
    print("check:", f"{wrong} wrong" if wrong else "all right")
    sys.exit(bool(wrong))


def environment() -> dict[str, object]:
    def output(*command: str) -> str:
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            return "unknown"
        return done.stdout.strip()

    commit = os.environ.get("KDKERNELS_COMMIT") or output("git", "describe", "--always", "--dirty")
    return {
        "gpu": torch.cuda.get_device_name(),
        "capability": ".".join(map(str, torch.cuda.get_device_capability())),
        "driver": output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "nvcc": output("nvcc", "--version").splitlines()[-1],
        "kdkernels": kdkernels.__version__,
        "commit": commit,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": date.today().isoformat(),
        "command": "python -m benchmarks.gpu " + shlex.join(sys.argv[1:]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("what", choices=("check", "bench", "tune"))
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--vocab", type=int, nargs="+", default=list(VOCABS), help="for tune")
    parser.add_argument("--compile", action="store_true", help="also torch.compile, for bench")
    parser.add_argument("--output", type=Path, help="a JSON file to write")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks.gpu: there is no CUDA device")
    if arguments.what == "check":
        check()
    cases: list[dict] = []
    if arguments.what == "bench":
        rows = bench(arguments.rows, arguments.rounds, arguments.compile)
    else:
        rows = tune(arguments.rows, arguments.rounds, arguments.vocab)
    report = {"environment": environment(), "cases": cases}
    for row in rows:
        cases.append(row)
        if arguments.output:  # after every case: time may run out
            arguments.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
