"""Time and peak memory of a loss step, the loss and its gradient to the logits, in kdkernels and
in plain PyTorch."""

import ctypes
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kdkernels import kd_loss, release_memory

ROUNDS = 7

LossFn = Callable[[Tensor, Tensor], Tensor]


class Cost(NamedTuple):
    milliseconds: float
    peak_bytes: int | None  # above what was in use before the step; None: cannot be measured here


def compare(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> None:
    """Print the cost of forward KL and its gradient, once the implementations agree."""
    width = min(student_logits.size(-1), teacher_logits.size(-1))
    # Contiguous and of one width, so that PyTorch does not have to copy them first.
    student, teacher = (
        logits[:, :-1, :width].flatten(0, 1).contiguous()
        for logits in (student_logits, teacher_logits)
    )
    student.requires_grad_()

    def fused(student: Tensor, teacher: Tensor) -> Tensor:
        return kd_loss(student, teacher, temperature=temperature)

    def eager(student: Tensor, teacher: Tensor) -> Tensor:
        return eager_kl(student, teacher, temperature)

    losses = {"kdkernels": fused, "eager PyTorch": eager, "torch.compile": torch.compile(eager)}
    dtype = str(student.dtype).removeprefix("torch.")
    print(f"\nForward KL and its gradient, {len(student)} x {width} logits in {dtype}:", flush=True)
    try:
        step(losses["torch.compile"], student, teacher)
    except Exception as error:  # it needs a C++ compiler on CPU, Triton on a GPU
        del losses["torch.compile"]
        print(f"  torch.compile     not measured ({type(error).__name__})")
    check_agreement(losses, eager, student, teacher)
    for name, (milliseconds, peak) in measure(losses, student, teacher).items():
        memory = "not measured" if peak is None else f"{peak / 2**20:.0f} MiB"
        print(f"  {name:<16}{milliseconds:10.2f} ms    peak memory {memory}")


def eager_kl(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Forward KL per token times temperature squared, as one writes it in plain PyTorch."""

    def log_probs(logits: Tensor) -> Tensor:
        return F.log_softmax(logits if temperature == 1 else logits / temperature, dim=-1)

    divergence = F.kl_div(
        log_probs(student), log_probs(teacher), log_target=True, reduction="batchmean"
    )
    return divergence * temperature**2


def step(loss_fn: LossFn, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    loss = loss_fn(student, teacher)
    (gradient,) = torch.autograd.grad(loss, student)
    return loss.detach(), gradient


def check_agreement(
    losses: dict[str, LossFn], reference: LossFn, student: Tensor, teacher: Tensor
) -> None:
    """Raise AssertionError unless every loss and its gradient are those of the reference."""
    expected_loss, expected_gradient = step(reference, student, teacher)
    rows = len(student)  # a mean over rows divides gradients by their number; compare per row
    for name, loss_fn in losses.items():
        loss, gradient = step(loss_fn, student, teacher)
        options = {"rtol": 1e-3, "atol": 1e-5, "msg": lambda text, name=name: f"{name}: {text}"}
        torch.testing.assert_close(loss, expected_loss, **options)
        torch.testing.assert_close(rows * gradient, rows * expected_gradient, **options)


def measure(losses: dict[str, LossFn], student: Tensor, teacher: Tensor) -> dict[str, Cost]:
    """Measure each loss. Run each once before, so that compilation is not counted."""
    times = {name: [] for name in losses}
    for _ in range(ROUNDS):
        # Interleaved, so that whatever else the machine does falls on all of them alike.
        for name, loss_fn in losses.items():
            _synchronize(student)
            start = time.perf_counter()
            step(loss_fn, student, teacher)
            _synchronize(student)
            times[name].append(1000 * (time.perf_counter() - start))
    return {
        name: Cost(statistics.median(times[name]), _peak_memory(loss_fn, student, teacher))
        for name, loss_fn in losses.items()
    }


def _synchronize(tensor: Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)


def _peak_memory(loss_fn: LossFn, student: Tensor, teacher: Tensor) -> int | None:
    if student.is_cuda:
        before = torch.cuda.memory_allocated(student.device)
        torch.cuda.reset_peak_memory_stats(student.device)
        step(loss_fn, student, teacher)
        return torch.cuda.max_memory_allocated(student.device) - before
    try:
        # Give freed memory back to Linux first: its reuse would not show in the resident size.
        release_memory()
        ctypes.CDLL(None).malloc_trim(0)
        before = _process_status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, the peak, to VmRSS
    except (OSError, AttributeError, TypeError):
        return None  # not Linux with glibc, or no access to these counters
    step(loss_fn, student, teacher)
    return _process_status("VmHWM") - before


def _process_status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return 1024 * int(line.split()[1])
    raise OSError(f"no {field} in /proc/self/status")
