"""The two devices steps are timed on; all that differs between them stands here.

``seconds`` empties the caches before it times, by reading a buffer larger than them: writing one
would leave lines behind whose write-back the timed step would pay for.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import os
import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch

import kdkernels

from .case import Step

DEVICES = ("cpu", "cuda")


def stdout_of(*command: str) -> str:
    """What a command prints, or nothing where there is no such command."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def cache_bytes() -> int:
    """Of the CPU's last level."""
    size = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
    return int(size.read_text().strip().rstrip("K")) * 1024 if size.exists() else 2**26


def status_bytes(key: str) -> int:
    """A line of Linux's account of this process, such as VmRSS."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(key))


class Cpu:
    """Wall time, and the growth of the process's resident memory."""

    copy_bytes = 2**28  # of the copy and the product that measure_ceilings times
    gemm_size = 512  # without instructions for bfloat16 a product may take a second even so
    ceiling_rounds = 7
    least_rounds = 0

    def __init__(self) -> None:
        self.torch_device = torch.device("cpu")
        self._evict = torch.zeros(2 * cache_bytes() // 4)

    def synchronize(self) -> None: ...

    def flush(self) -> None:
        self._evict.sum()

    def seconds(self, run: Callable[[], object]) -> float:
        self.flush()
        start = time.perf_counter()
        result = run()
        elapsed = time.perf_counter() - start
        del result  # freed outside the timed part
        return elapsed

    def peak_bytes(self, step: Step) -> int | None:
        """None where the system does not tell."""
        clear = Path("/proc/self/clear_refs")
        if not clear.exists():
            return None
        step.prepare()
        self.release()
        clear.write_text("5")
        before = status_bytes("VmRSS")
        result = step.run()
        peak = status_bytes("VmHWM") - before
        del result
        return max(0, peak)

    def release(self) -> None:
        """Gives memory back to the system: what is kept would be reused unseen."""
        kdkernels.release_memory()
        ctypes.CDLL(None).malloc_trim(0)

    def clock_mhz(self) -> int | None:
        return None

    def describe(self) -> dict[str, object]:
        from kdkernels import _C

        info = Path("/proc/cpuinfo")
        lines = info.read_text().splitlines() if info.exists() else []
        models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
        return {
            "cpu": models[0] if models else platform.processor(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "load_average": round(os.getloadavg()[0], 1),  # of the minute before: who else ran
            "instruction_set": os.environ.get("KDKERNELS_CPU_ISA") or _C.instruction_sets()[0],
        }


class Cuda:
    """Times of CUDA events, and the peak of PyTorch's allocator."""

    copy_bytes = 2**31
    gemm_size = 8192
    ceiling_rounds = 50  # more than an idle device's clocks take to rise
    least_rounds = 3  # timed even where compiling and verifying have spent the budget

    def __init__(self) -> None:
        self.torch_device = torch.device("cuda", torch.cuda.current_device())
        self._properties = torch.cuda.get_device_properties(self.torch_device)

    @functools.cached_property
    def _evict(self) -> torch.Tensor:
        """1 GiB, far more than any L2.

        Reading it also keeps the device busy while Python enqueues what is timed, as a training
        loop does, so that the events enclose the step and no idle device.
        """
        return torch.zeros(2**28, device=self.torch_device)

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def flush(self) -> None:
        self._evict.sum()
        self._evict.sum()

    def seconds(self, run: Callable[[], object]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush()
        start.record()
        result = run()
        end.record()
        end.synchronize()
        del result
        return start.elapsed_time(end) / 1e3

    def peak_bytes(self, step: Step) -> int | None:
        step.prepare()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        result = step.run()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
        del result
        return peak

    def release(self) -> None:
        gc.collect()
        torch.cuda.empty_cache()

    def clock_mhz(self) -> int | None:
        """Of the multiprocessors, now: from the driver's library at once, or from its tool."""
        try:
            return torch.cuda.clock_rate(self.torch_device)
        except Exception:  # no pynvml, or one that does not answer
            pass
        clock = self._query("clocks.sm")
        return int(clock) if clock.isdigit() else None

    def _query(self, field: str) -> str:
        return stdout_of(
            "nvidia-smi",
            f"--id=GPU-{self._properties.uuid}",
            f"--query-gpu={field}",
            "--format=csv,noheader,nounits",
        )

    def describe(self) -> dict[str, object]:
        p = self._properties
        return {
            "gpu": p.name,
            "capability": f"{p.major}.{p.minor}",
            "multiprocessors": p.multi_processor_count,
            "memory_gib": round(p.total_memory / 2**30, 1),
            "l2_mib": round(getattr(p, "L2_cache_size", 0) / 2**20, 1),
            "driver": self._query("driver_version"),
            "max_sm_clock_mhz": self._query("clocks.max.sm"),
            "cuda": torch.version.cuda,
            "allocator": os.environ.get("PYTORCH_CUDA_ALLOC_CONF", ""),
            "threads": torch.get_num_threads(),
        }


def device_of(name: str) -> Cpu | Cuda:
    """The device to time on, or a ValueError where there is none."""
    if name == "cpu":
        return Cpu()
    if not torch.cuda.is_available():
        raise ValueError("device is 'cuda', and PyTorch sees no CUDA device here")
    return Cuda()
