"""Verification, interleaved timing and peak memory of steps in one process."""

from __future__ import annotations

import ctypes
import statistics
import time
from pathlib import Path

import torch

from kdkernels import kd_loss

from .providers import Case, Step

#: Beyond these a provider computes something else; below them its error stands beside its time.
GRADIENT_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}
LOSS_TOLERANCE = 5e-2


def verify(case: Case, step: Step) -> dict[str, float]:
    """Relative errors of loss and gradient against float64; raises where they are wrong."""
    step.prepare()
    loss, gradient = step.run()
    sample = slice(0, min(8, case.rows))
    student = case.student[sample].double().requires_grad_()
    options = {"divergence": case.instance, "temperature": case.temperature, "backend": "reference"}
    expected = kd_loss(student, case.teacher[sample].double(), reduction="sum", **options)
    expected.backward()
    errors = {}
    if gradient is not None:
        got = gradient[sample].double() * case.rows
        errors["gradient_error"] = float((got - student.grad).norm() / student.grad.norm())
    with torch.no_grad():
        blocks = [slice(i, i + 32) for i in range(0, case.rows, 32)]
        total = sum(
            kd_loss(case.student[b].double(), case.teacher[b].double(), reduction="sum", **options)
            for b in blocks
        )
    errors["loss_error"] = float(
        (loss.double() - total / case.rows).abs() / (total / case.rows).abs()
    )
    if errors["loss_error"] > LOSS_TOLERANCE:
        raise ArithmeticError(f"the loss is off by {errors['loss_error']:.1e}")
    if errors.get("gradient_error", 0) > GRADIENT_TOLERANCE[case.dtype]:
        raise ArithmeticError(f"the gradient is off by {errors['gradient_error']:.1e}")
    return errors


def interleaved(
    steps: dict[str, Step], rounds: int, progress=lambda: None
) -> dict[str, list[float]]:
    """Seconds of every step in each of ``rounds`` rounds, all steps in turn; one warm-up round."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + 1):
        for name, step in steps.items():
            step.prepare()
            start = time.perf_counter()
            step.run()
            elapsed = time.perf_counter() - start
            if number:
                times[name].append(elapsed)
            progress()
    return times


def ratios(times: dict[str, list[float]], to: str) -> dict[str, float]:
    """Median over rounds of the time of ``to`` divided by each step's: its speed relative to it."""
    return {
        name: statistics.median(b / a for a, b in zip(seconds, times[to], strict=True))
        for name, seconds in times.items()
    }


def peak_bytes(step: Step) -> int | None:
    """Growth of the process's peak resident memory over one run; None where unknown."""
    status, clear = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not clear.exists():
        return None

    def read(key: str) -> int:
        line = next(line for line in status.read_text().splitlines() if line.startswith(key))
        return int(line.split()[1]) * 1024

    step.prepare()
    # Memory that malloc kept would be reused without growing the resident size.
    ctypes.CDLL(None).malloc_trim(0)
    clear.write_text("5")
    before = read("VmRSS")
    keep = step.run()
    peak = read("VmHWM") - before
    del keep
    return max(0, peak)
