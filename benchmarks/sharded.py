"""Times losses of a sharded vocabulary, on CPUs and gloo.

    python -m benchmarks.sharded --output benchmarks/results/cpu_sharded.json

Each process has one thread and its shard of the logits. All of them run the same step at the same
time, and a step takes as long as its slowest process. Results are checked against float64 first.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kdkernels import kd_loss

from . import dense
from .arguments import count
from .case import DTYPES, Step
from .cases import LogitsCase
from .device import Cpu
from .environment import environment
from .measure import Budget, interleaved, speed, summary, verify
from .output import json_text
from .shapes import Shape
from .tables import milliseconds, reported, table

VOCABS = 32000, 128256
ROWS = 512
DIVERGENCES = "forward_kl", "reverse_kl", "jsd"

#: (student shard, teacher shard, temperature) -> the loss, the same in every process.
Loss = Callable[[Tensor, Tensor, float], Tensor]


class _Sum(torch.autograd.Function):
    """Over the processes; every one of them uses the sum, or only one loss does."""

    @staticmethod
    def forward(ctx, x, used_by_all):
        ctx.used_by_all = used_by_all
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, gradient):
        if ctx.used_by_all:
            gradient = gradient.clone()
            dist.all_reduce(gradient)
        return gradient, None


def _log_softmax(shard: Tensor) -> Tensor:
    """As frameworks write it: the largest logit of all processes, the sum of all, then PyTorch."""
    top = shard.detach().amax(-1, keepdim=True)
    dist.all_reduce(top, dist.ReduceOp.MAX)
    shifted = shard - top
    return shifted - _Sum.apply(shifted.exp().sum(-1, keepdim=True), True).log()


def eager(divergence: str) -> Loss:
    """The textbook's terms of sharded log-softmaxes."""
    terms = dense.TERMS[divergence]

    def loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        log_q = _log_softmax(student / temperature)
        with torch.no_grad():
            log_p = _log_softmax(teacher / temperature)
        return _Sum.apply(terms(log_p, log_q).sum(-1), False).mean() * temperature**2

    return loss


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, shard):
        shards = [torch.empty_like(shard) for _ in range(dist.get_world_size())]
        dist.all_gather(shards, shard.contiguous())
        return torch.cat(shards, -1)

    @staticmethod
    def backward(ctx, gradient):
        return gradient.chunk(dist.get_world_size(), -1)[dist.get_rank()].contiguous()


def gathered(divergence: str) -> Loss:
    """All logits to every process, then the loss of one process."""

    def loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        whole = _Gather.apply(student), _Gather.apply(teacher)
        return kd_loss(*whole, divergence=dense.instance(divergence), temperature=temperature)

    return loss


def ours(divergence: str) -> Loss:
    """kd_loss of shards."""

    def loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        return kd_loss(
            student,
            teacher,
            divergence=dense.instance(divergence),
            temperature=temperature,
            group=dist.group.WORLD,
        )

    return loss


PROVIDERS = {"kdkernels": ours, "eager": eager, "gather, then kd_loss": gathered}


def _in_step(step: Step) -> Step:
    """Starts when all processes are ready."""

    def prepare() -> None:
        step.prepare()
        dist.barrier()

    return Step(step.run, prepare)


def _whole(step: Step) -> Step:
    """With the gradients of all processes, for the check."""

    def run() -> tuple[Tensor, tuple[Tensor, ...]]:
        loss, (gradient,) = step.run()
        return loss, (_Gather.apply(gradient),)

    return Step(run, step.prepare)


def _measure(whole: LogitsCase, rounds: int, device: Cpu) -> dict[str, Any]:
    """Results of a case by provider."""
    rank, size = dist.get_rank(), dist.get_world_size()
    student, teacher = (x.chunk(size, -1)[rank].clone() for x in (whole.student, whole.teacher))
    shard = dataclasses.replace(whole, student=student, teacher=teacher)
    out = torch.empty_like(student)
    steps = {"floor": Step(lambda: (torch.add(student, teacher, out=out), ()))}
    results: dict[str, dict[str, Any]] = {"floor": {}}
    for name, provider in PROVIDERS.items():
        step = shard.step(provider(whole.divergence))
        results[name] = dict(verify(whole, _whole(step)))
        steps[name] = step
        dist.barrier()
        peak = device.peak_bytes(step)
        if peak is not None:
            results[name]["peak_mib"] = round(_largest([peak])[0] / 2**20, 1)
    steps = {name: _in_step(step) for name, step in steps.items()}
    times, failed = interleaved(steps, device, rounds, Budget())
    assert not failed, failed
    slowest = {name: _largest(seconds) for name, seconds in times.items()}
    for name, seconds in slowest.items():
        results[name] |= summary(shard, shard.work, seconds)
        results[name]["speed_of_floor"] = speed(seconds, 1, slowest["floor"], 1)
    return shard.describe() | {"tensor_mib": student.nbytes / 2**20, "results": results}


def _largest(values: list[float]) -> list[float]:
    """Of the processes, one by one."""
    tensor = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor.tolist()


def _work(rank: int, size: int, meeting: str, options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=size)
    device, cases = Cpu(), []
    for vocab in options.vocab:
        for dtype in options.dtype:
            shape = Shape(f"{options.rows}x{vocab}", options.rows, vocab)
            whole = LogitsCase.make(shape, DTYPES[dtype], device.torch_device)
            for divergence in options.divergence:
                start = time.monotonic()
                case = whole.variant(divergence, whole.what)
                cases.append(_measure(case, options.rounds, device))
                if rank == 0:
                    print(f"{case.label}: {time.monotonic() - start:.0f} s", file=sys.stderr)
    if rank == 0:
        command = ["benchmarks.sharded", *sys.argv[1:]]
        report = {
            "environment": environment(command) | device.describe() | {"processes": size},
            "cases": cases,
        }
        print(sharded_table(report, str(options.output or "")))
        if options.output:
            options.output.write_text(json_text(report))
    dist.destroy_process_group()


def sharded_table(report: dict, file: str) -> str:
    """Times and peak extra memory, in shards of logits, a case a row."""
    rows = []
    for case in report["cases"]:
        results = case["results"]
        row = [f"{case['rows']} x {case['vocab']} {case['dtype']}", case["divergence"]]
        for name in ("eager", "gather, then kd_loss", "kdkernels"):
            result = results[name]
            memory = f", {result['peak_mib'] / case['tensor_mib']:.1f}" * ("peak_mib" in result)
            row.append(f"{milliseconds(result['ms'])} ms{memory}")
        row.append(f"{milliseconds(results['floor']['ms'])} ms")
        row.append(f"{results['eager']['ms'] / results['kdkernels']['ms']:.1f}x")
        rows.append(row)
    header = ["logits", "divergence", "eager", "gather, then kd_loss", "kd_loss(group=)"]
    header += ["add(s, t, out=g)", "eager / kd_loss"]
    processes = report["environment"]["processes"]
    return f"{table(header, rows)}\n\n{processes} processes, {reported(report, file)}\n"


def main() -> None:
    """Starts the processes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=count, default=2)
    parser.add_argument("--rows", type=count, default=ROWS)
    parser.add_argument("--vocab", type=count, nargs="+", default=VOCABS)
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=("float32", "bfloat16"))
    parser.add_argument("--divergence", nargs="+", choices=dense.TERMS, default=DIVERGENCES)
    parser.add_argument("--rounds", type=count, default=7)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        arguments = options.processes, f"{directory}/meet", options
        torch.multiprocessing.spawn(_work, arguments, nprocs=options.processes)


if __name__ == "__main__":
    main()
