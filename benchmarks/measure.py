"""Verifies the providers of a case, then times the right ones in turns beside the floor."""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

import kdkernels

from .case import Case, Step
from .device import Cpu, Cuda
from .providers import Provider, floors

WARM_UP_ROUNDS = 1


class Wrong(ArithmeticError):
    """A result whose error is beyond what the case allows."""

    def __init__(self, reason: str, errors: dict[str, float]) -> None:
        super().__init__(reason)
        self.errors = errors


class Budget:
    """Seconds from now on; without a number there is no end."""

    def __init__(self, seconds: float | None = None) -> None:
        self._end = None if seconds is None else time.monotonic() + seconds

    def allows(self, seconds: float = 0.0) -> bool:
        """Whether something that takes ``seconds`` would be done in time."""
        return self._end is None or time.monotonic() + seconds < self._end


class Progress:
    """A bar on standard error, in steps of a case."""

    def __init__(self, total: int) -> None:
        self._total, self._done, self._start = total, 0, time.monotonic()

    def __call__(self, text: str, steps: int = 1) -> None:
        self._done = min(self._total, self._done + steps)
        filled = 24 * self._done // max(1, self._total)
        seconds = time.monotonic() - self._start
        line = f"[{'#' * filled}{'.' * (24 - filled)}] {seconds:4.0f} s  {text}"
        if sys.stderr.isatty():
            print(f"\r\033[K{line[:118]}", end="", file=sys.stderr, flush=True)
        elif steps == 0:  # a log: one line a case
            print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        if sys.stderr.isatty():
            print("\r\033[K", end="", file=sys.stderr, flush=True)


def verify(case: Case, step: Step, allowed: tuple[float, float] | None = None) -> dict[str, float]:
    """Relative errors of a step against float64; raises Wrong where they are beyond the allowed.

    Those of loss and gradient are the case's where none are given.
    """
    step.prepare()
    errors = case.errors(step.run())
    allowed_loss, allowed_gradient = allowed or case.allowed
    for name, error in errors.items():
        most = allowed_loss if name == "loss_error" else allowed_gradient
        if not error <= most:  # a NaN is wrong
            what = name.removesuffix("_error").replace("_", " ")
            raise Wrong(f"the {what} is off by {error:.1e}, {most:.1e} allowed", errors)
    return errors


def first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def try_provider(
    case: Case, provider: Provider, device: Cpu | Cuda
) -> tuple[dict[str, object], Step | None]:
    """What is known before any timing, and the step to time if it is right."""
    try:
        if reason := provider.why_not(case):
            return {"refused": reason}, None
        step = provider.make(case)
        allowed = case.allowed_of_ours if provider.ours else None
        result: dict[str, object] = dict(verify(case, step, allowed))
        peak = device.peak_bytes(step)
        step.prepare()
    except Wrong as wrong:
        finite = {name: error for name, error in wrong.errors.items() if math.isfinite(error)}
        return {"wrong": str(wrong), **finite}, None
    except Exception as error:  # out of memory, a package or kernel that fails: the others go on
        return {"failed": first_line(error)}, None
    if peak is not None:
        result["peak_mib"] = round(peak / 2**20, 1)
    return result, step


def interleaved(
    steps: dict[str, Step],
    device: Cpu | Cuda,
    rounds: int,
    budget: Budget,
    progress: Callable[[], None] = lambda: None,
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Seconds of every step in each round, all in turn, and why a step failed.

    Rounds end early where the budget does not last for another one.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    failed: dict[str, str] = {}
    took = 0.0
    least = min(rounds, device.least_rounds)
    for done in range(WARM_UP_ROUNDS + rounds):
        if done >= WARM_UP_ROUNDS + least and not budget.allows(took):
            break
        start = time.monotonic()
        running = [name for name in steps if name not in failed]
        for name in running:
            try:
                steps[name].prepare()
                times[name].append(device.seconds(steps[name].run))
            except Exception as error:
                failed[name] = first_line(error)
        if failed.keys() & set(running):
            device.release()  # here: in the except clause a traceback holds on to tensors
        took = time.monotonic() - start
        progress()
    times = {name: times[name][WARM_UP_ROUNDS:] for name in steps if name not in failed}
    return times, failed


def summary(case: Case, work: int, times: list[float]) -> dict[str, object]:
    """Milliseconds, and the bytes or FLOPs of the model per second."""
    quartiles = (
        statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else 3 * times
    )
    median = statistics.median(times)
    values = {
        "ms": median,
        "ms_q1": quartiles[0],
        "ms_q3": quartiles[2],
        "ms_min": min(times),
        "ms_max": max(times),
    }
    rate = f"g{'b' if case.unit == 'bytes' else 'flop'}_per_s"
    return {name: round(value * 1e3, 4) for name, value in values.items()} | {
        rate: round(work / median / 1e9, 2)
    }


def speed(times: list[float], work: int, of: list[float], of_work: int) -> float:
    """Median over rounds of work per second as a share of another's."""
    ratio = statistics.median(b / a for a, b in zip(times, of, strict=True))
    return round(ratio * work / of_work, 4)


def run_case(
    case: Case,
    providers: list[Provider],
    device: Cpu | Cuda,
    rounds: int,
    budget: Budget,
    progress: Progress,
) -> dict[str, object]:
    """Everything about one case, for the JSON file."""
    progress(case.label, 0)
    # Before any provider runs: one that overwrites its inputs changes the results of the others,
    # not what they are compared with.
    allowed_loss, allowed_gradient = case.allowed
    reference = floors(case)
    results: dict[str, dict[str, object]] = {}
    steps: dict[str, Step] = {}
    for provider in providers:
        if not budget.allows():
            results[provider.name] = {"left_out": "the budget was spent"}
            continue
        result, step = try_provider(case, provider, device)
        results[provider.name] = result
        if step:
            steps[provider.name] = step
        elif "refused" not in result:  # which has allocated nothing, and collecting takes long
            device.release()
        progress(f"{case.label}: {provider.name} verified" if step else case.label)

    clock = device.clock_mhz()
    times, failed = interleaved(
        reference | steps, device, rounds, budget, lambda: progress(f"{case.label}: timing")
    )
    for name, reason in failed.items():
        results.setdefault(name, {})["failed"] = reason
    works = {"floor": case.floor_work, "copy": 2 * case.floor_work // 3}
    done = max(map(len, times.values()), default=0)
    for name, seconds in times.items():
        if not seconds:
            results.setdefault(name, {})["left_out"] = "the budget was spent"
            continue
        work = works.get(name, case.work)
        result = results.setdefault(name, {})
        result |= summary(case, work, seconds)
        for other in reference:
            if other in times:
                share = speed(seconds, work, times[other], works[other])
                result[f"speed_of_{other}"] = share
    ordered = {name: results[name] for name in (*reference, *results) if name in results}
    description = case.describe() | {
        "rounds": done,
        "allowed_loss_error": allowed_loss,
        "allowed_gradient_error": allowed_gradient,
        "allowed_of_ours": case.allowed_of_ours,
    }
    if clock is not None:
        description["sm_clock_mhz"] = [clock, device.clock_mhz()]
    return description | {"results": ordered}


def measure_ceilings(device: Cpu | Cuda) -> dict[str, float]:
    """What the device can do at best: bytes of a large copy, FLOPs of a large bfloat16 product."""
    n = device.gemm_size
    source = torch.randn(device.copy_bytes // 4, device=device.torch_device)
    target = torch.empty_like(source)
    a = torch.randn(n, n, device=device.torch_device).bfloat16()
    b = torch.randn(n, n, device=device.torch_device).bfloat16()
    c = torch.empty_like(a)
    steps = {
        "copy": Step(lambda: (target.copy_(source), ())),
        "gemm": Step(lambda: (torch.mm(a, b, out=c), ())),
    }
    times, _ = interleaved(steps, device, device.ceiling_rounds, Budget())
    copy, gemm = (statistics.median(times[name]) for name in ("copy", "gemm"))
    return {
        "copy_gb_per_s": round(2 * device.copy_bytes / copy / 1e9, 1),
        "bfloat16_gemm_gflop_per_s": round(2 * n**3 / gemm / 1e9, 1),
    }


def small_call(device: Cpu | Cuda, rounds: int = 2000) -> dict[str, float]:
    """Microseconds of forward and backward of one (1, 8) call, until the device is done."""
    student = torch.randn(1, 8, device=device.torch_device, requires_grad=True)
    teacher = torch.randn(1, 8, device=device.torch_device)

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
            device.synchronize()
            times.append(time.perf_counter() - start)
        report |= {
            name: round(statistics.median(times) * 1e6, 1),
            f"{name}_min": round(min(times) * 1e6, 1),
        }
    return report
