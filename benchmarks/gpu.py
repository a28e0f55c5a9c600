"""What only a GPU can answer; times come from ``python -m benchmarks --device cuda``.

python -m benchmarks.gpu check                       every CUDA kernel, for compute-sanitizer
python -m benchmarks.gpu tune --output tiles.json    which tile serves which vocabulary best
python -m benchmarks.gpu table FILE.json...          a line for each case of these results
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from kdkernels import collectives, kd_loss, scalars
from kdkernels.divergences import DIVERGENCES

from . import output
from .arguments import count
from .case import APPROXIMATE, DTYPES, Case, Step, relative
from .cases import LogitsCase
from .device import Cpu, Cuda, device_of
from .environment import environment
from .measure import Budget, Progress, Wrong, run_case, verify
from .providers import Provider, kdkernels
from .shapes import Shape
from .tables import FLOORS, case_table, case_title, milliseconds, reason

BACKEND = "cuda"
TILE = "KDKERNELS_CUDA_TILE"
TILES = [
    *(f"registers:{cluster}x256" for cluster in (1, 2, 4, 8, 16)),
    *(f"registers:{cluster}x256+ahead" for cluster in (1, 2, 4, 8, 16)),
    *(f"registers:{cluster}x128" for cluster in (2, 4, 8, 16)),
    *(f"registers:{cluster}x128+ahead" for cluster in (2, 4, 8, 16)),
    # 50257 tokens: ten vectors a thread, as many as there is room for, and three CTAs an SM.
    "registers:4x160+ahead",
    *(f"registers:{cluster}x512" for cluster in (1, 2, 4, 8, 16)),
    *(f"shared:{cluster}x256" for cluster in (1, 2, 4, 8, 16)),
    *(f"shared:{cluster}x256+ahead" for cluster in (1, 2, 4, 8, 16)),
    *(f"shared:{cluster}x128" for cluster in (2, 4, 8, 16)),
    *(f"shared:{cluster}x128+ahead" for cluster in (2, 4, 8, 16)),
    "streaming:1x256",
    "streaming:1x512",
]
TABLE_PROVIDERS = 8  # that a line of the table holds
SMALL_TILES = ("", "registers:2x64", "registers:8x64", "shared:4x64", "streaming:1x64")


@contextmanager
def forced(tile: str) -> Iterator[None]:
    """The CUDA backend takes this tile; without a name it chooses."""
    os.environ[TILE] = tile
    try:
        yield
    finally:
        os.environ.pop(TILE)


def with_tile(case: Case, tile: str) -> Step:
    step = kdkernels(case, BACKEND)

    def run():
        with forced(tile):
            return step.run()

    return dataclasses.replace(step, run=run)


def tile_why_not(case: LogitsCase, tile: str) -> str | None:
    """Asked of one row: an exception in a whole step leaves memory behind."""
    try:
        with forced(tile), torch.no_grad():
            row = case.student[:1], case.teacher[:1]
            kd_loss(*row, divergence=case.instance, backend=BACKEND)
    except ValueError as error:
        raise_unless_refused(error)
        return str(error)
    return None


@contextmanager
def shared_with_nobody() -> Iterator[None]:
    """Any group is of this process, its last, and of one without columns that tells nothing."""
    before = collectives.all_gather, scalars.process_group
    collectives.all_gather = lambda x, group: x.unsqueeze(0)
    scalars.process_group = lambda name, group: scalars.Processes("nobody", 1, 2)
    try:
        yield
    finally:
        collectives.all_gather, scalars.process_group = before


def shard(case: LogitsCase) -> Step:
    """The kernels of a sharded vocabulary, whose only shard is all of it."""

    def loss(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
        with shared_with_nobody():
            return kd_loss(
                student,
                teacher,
                divergence=case.instance,
                temperature=temperature,
                group="nobody",
                vocab_start=0,
                vocab_size=case.vocab,
                backend=BACKEND,
            )

    return case.step(loss)


def check(device: Cpu | Cuda) -> int:
    """Kernels on small rows, aligned, unaligned, with tails; returns how many are wrong."""
    wrong = 0
    for (dtype_name, dtype), vocab in itertools.product(DTYPES.items(), (1000, 1003)):
        inputs = LogitsCase.make(Shape("", 3, vocab), dtype, torch.device("cpu"))
        print(dtype_name, vocab, file=sys.stderr, flush=True)  # how far it came, if time runs out
        for divergence in DIVERGENCES:
            case = inputs.variant(divergence, inputs.what)
            steps = {
                tile or "chosen": functools.partial(with_tile, tile=tile) for tile in SMALL_TILES
            }
            for name, make in (steps | {"shard": shard}).items():
                try:
                    verify(case, on_device(case, device, make), case.allowed_of_ours)
                except Wrong as error:
                    wrong += 1
                    print(name, dtype_name, divergence, vocab, error)
                except ValueError as error:
                    raise_unless_refused(error)  # registers hold KL divergences only
        wrong += check_tails(dtype, vocab, device)
    for tile in SMALL_TILES:
        try:
            run_options(device, "" if tile.startswith("registers") else tile)
        except ValueError as error:
            raise_unless_refused(error)  # without clusters there are streaming tiles only
    device.synchronize()
    print("check:", f"{wrong} wrong" if wrong else "all right")
    return wrong


def raise_unless_refused(error: ValueError) -> None:
    """A tile that cannot hold a row on this device is no failure."""
    if "cannot hold" not in str(error):
        raise error


def on_device(case: LogitsCase, device: Cpu | Cuda, make: Callable[[LogitsCase], Step]) -> Step:
    """The case's inputs go there and the result comes back: its answer is computed on the host.

    So what a sanitizer sees of a device is little but our kernels.
    """
    tensors = {name: getattr(case, name).to(device.torch_device) for name in ("student", "teacher")}
    step = make(dataclasses.replace(case, **tensors))

    def run():
        loss, gradients = step.run()
        return loss.cpu(), tuple(gradient.cpu() for gradient in gradients)

    return Step(run, step.prepare)


def check_tails(dtype: torch.dtype, vocab: int, device: Cpu | Cuda) -> int:
    """Kernels of a sparse teacher; returns how many of their results are wrong."""
    generator = torch.Generator().manual_seed(0)
    student = (3 * torch.randn(3, vocab, generator=generator)).to(dtype)
    listed = torch.stack([torch.randperm(vocab, generator=generator)[:9] for _ in range(3)])
    listed = listed.sort(-1).values
    grad_tails, grad_listed = torch.tensor([[1.0, -0.5, 0.0], [0.3, 0.0, 2.0]]), torch.ones(3, 9)
    options = 2.0, True, 1.5, 4.0, vocab - 2, BACKEND

    logits = student.double()[:, : vocab - 2].requires_grad_()
    listed = torch.where(listed < vocab - 2, listed, -1).sort(-1).values
    capped = 4.0 * torch.tanh(1.5 * logits / 4.0)
    is_listed = torch.zeros(3, vocab, dtype=torch.bool).scatter_(-1, listed % vocab, listed >= 0)
    tail = torch.where(is_listed[:, : vocab - 2], -torch.inf, capped)
    expected = torch.stack([(tail / temperature).logsumexp(-1) for temperature in (2.0, 1.0)])
    expected.backward(grad_tails.double())
    exact = torch.where(is_listed[:, : vocab - 2], 1.0, logits.grad)

    on_device = [x.to(device.torch_device) for x in (student, listed, grad_tails, grad_listed)]
    tails = torch.ops.kdkernels.tails(*on_device[:2], None, *options)
    gradients = tails, *on_device[2:]
    got = torch.ops.kdkernels.tails_gradient(*on_device[:2], *gradients, *options).cpu().double()
    base, *log_sums = tails.cpu().double()
    log_sum_exps = torch.stack([base / 2.0 + log_sums[0], base + log_sums[1]])
    errors = {
        "log-sum-exp": relative(log_sum_exps, expected.detach()),
        "gradient": relative(got[:, : vocab - 2], exact),
        "padding": float(got[:, vocab - 2 :].abs().max()),
    }
    allowed = max(APPROXIMATE, torch.finfo(dtype).eps)
    wrong = {name: error for name, error in errors.items() if not error <= allowed}
    if wrong:
        print("tails", dtype, vocab, wrong)
    return len(wrong)


def run_options(device: Cpu | Cuda, tile: str) -> None:
    """The rarer options in one call, for the sanitizers alone."""
    case = LogitsCase.make(Shape("", 3, 1003), torch.bfloat16, torch.device("cpu"))
    with forced(tile):
        loss, _ = kd_loss(
            case.student.to(device.torch_device).requires_grad_(),
            case.teacher.to(device.torch_device),
            labels=torch.tensor([5, -100, 7], device=device.torch_device),
            ce_weight=0.5,
            student_softcap=30.0,
            return_metrics=True,
            backend=BACKEND,
        )
        loss.backward()


def tune(device: Cpu | Cuda, arguments: argparse.Namespace, command: list[str]) -> dict:
    """Every tile beside the chosen one, and a shard; a tile that cannot hold a row says so."""
    tiles = {"chosen": "", **{tile: tile for tile in TILES}}
    providers = [
        Provider(
            name,
            functools.partial(with_tile, tile=tile),
            functools.partial(tile_why_not, tile=tile),
            ours=True,
        )
        for name, tile in tiles.items()
    ]
    providers.append(Provider("shard", shard, ours=True))
    budget = Budget(arguments.budget)
    report = {"environment": device.describe() | environment(command), "cases": [], "left_out": []}
    settings = list(itertools.product(("bfloat16", "float32"), arguments.vocab))
    divergences = ("forward_kl", "jsd")
    steps = len(settings) * len(divergences) * (len(providers) + 1 + arguments.rounds)
    progress = Progress(steps)

    def tune_inputs(dtype: str, vocab: int) -> None:
        rows = arguments.rows if dtype == "bfloat16" else arguments.rows // 2
        shape = Shape(str(vocab), rows, vocab)
        case = LogitsCase.make(shape, DTYPES[dtype], device.torch_device)
        for divergence in divergences:
            if not budget.allows():
                report["left_out"].append(f"{vocab} {dtype} {divergence}")
                continue
            variant = case.variant(divergence, case.what)
            result = run_case(variant, providers, device, arguments.rounds, budget, progress)
            report["cases"].append(result)
            print(f"{case_title(result)}\n{case_table(result)}\n", flush=True)
            if arguments.output:  # after every case: time may run out
                output.write(report, arguments.output, only=".json")

    for dtype, vocab in settings:
        tune_inputs(dtype, vocab)
    return report


def table(files: list[Path]) -> str:
    """A line for each case: milliseconds, speed of a copy (3U against 2U) and peak in tensors U."""
    lines = []
    for file in files:
        report = json.loads(file.read_text())
        if ceilings := report.get("ceilings"):
            lines.append(f"{file.stem}: " + ", ".join(f"{k} {v}" for k, v in ceilings.items()))
        for case in report["cases"]:
            lines.append(f"{case['vocab']} {case['dtype']} {case['divergence']}: {cells(case)}")
        if left_out := report["left_out"]:
            lines.append(f"left out: {len(left_out)}, the first: {left_out[0]}")
    return "\n".join(lines)


def cells(case: dict) -> str:
    """Every provider with a time, in order of it; of the others how they failed."""
    shown = []
    for name, result in case["results"].items():
        if name in FLOORS or "refused" in result:
            continue
        if "ms" not in result:
            shown.append((float("inf"), f"{name} {reason(result)[:60]}"))
            continue
        text = f"{name} {milliseconds(result['ms'])} ms"
        if "speed_of_copy" in result:
            text += f" {result['speed_of_copy']:.0%}"
        if "peak_mib" in result:
            text += f" {result['peak_mib'] / case['tensor_mib']:.1f}U"
        shown.append((result["ms"], text))
    return "; ".join(text for _, text in sorted(shown)[:TABLE_PROVIDERS])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("check", "tune", "table"))
    parser.add_argument("files", type=Path, nargs="*", help="of table")
    parser.add_argument("--rows", type=count, default=8192, help="of tune, with bfloat16")
    parser.add_argument("--rounds", type=count, default=7)
    parser.add_argument("--budget", type=float, metavar="SECONDS")
    parser.add_argument("--vocab", type=count, nargs="+", default=[128256, 32000, 151936, 256000])
    parser.add_argument("--output", type=Path, help="a JSON file to write")
    argv = sys.argv[1:] if argv is None else argv
    arguments = parser.parse_intermixed_args(argv)
    if arguments.what == "table":
        print(table(arguments.files))
        return
    try:
        device = device_of("cuda")
    except ValueError as error:
        parser.error(str(error))
    if arguments.what == "check":
        sys.exit(bool(check(device)))
    report = tune(device, arguments, ["benchmarks.gpu", *argv])
    if arguments.output:
        output.write(report, arguments.output)


if __name__ == "__main__":
    main()
