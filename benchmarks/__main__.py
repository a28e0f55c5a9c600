"""Measures kdkernels, its peers and the physical floor side by side, verified before timed.

    python -m benchmarks                                   forward KL of logits, on the CPU
    python -m benchmarks --divergence all --providers kdkernels-in-place
    python -m benchmarks --level linear --shapes real --providers default peers --output out/linear

Every provider has its turn in every round, with cold caches and fresh inputs. The floor is
`torch.add(s, t, out=g)` for logits, which moves the bytes of a fused loss with gradient (3U, U one
tensor of logits), `torch.neg(s, out=g)` beside a sparse teacher (2U), and the bare matrix products
at the linear level. A provider's speed is the work a fused loss needs (3U, 2U for a loss alone, 2U
and U beside a sparse teacher, or FLOPs) over its time. A result beyond the rounding of its dtype
(`Case.allowed`; of kdkernels' own kernels `Case.allowed_of_ours`) is shown as wrong and not timed.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from pathlib import Path

import torch

from kdkernels.divergences import DIVERGENCES

from . import output, shapes
from .arguments import count
from .case import DTYPES, LOSS_AND_GRADIENT, WHAT
from .cases import CASES
from .device import DEVICES, Cpu, Cuda, device_of
from .environment import environment
from .measure import (
    WARM_UP_ROUNDS,
    Budget,
    Progress,
    first_line,
    measure_ceilings,
    run_case,
    small_call,
)
from .providers import Provider, choose, providers_of
from .tables import markdown


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="\n".join(
            f"providers of {level}: default, peers, {', '.join(providers_of(level))}"
            for level in CASES
        ),
    )
    add = result.add_argument
    add("--level", choices=CASES, default="logits")
    names, forward = ("all", *DIVERGENCES), ["forward_kl"]
    add(
        "--divergence",
        nargs="+",
        choices=names,
        default=forward,
        metavar="D",
        help=", ".join(names),
    )
    add("--dtype", nargs="+", choices=DTYPES, default=["float32", "bfloat16"])
    named = ", ".join(shapes.MODELS)
    add("--shapes", nargs="+", metavar="SHAPE", help=f"real, {named}, [ROWSx]VOCAB[xD_SxD_T]")
    add("--rows", type=count, help="of shapes without: 512, linear 128; on a GPU 8192")
    add("--close", action="store_true", help="a student next to its teacher: KL of about 1e-3")
    add("--providers", nargs="+", default=["default"], metavar="PROVIDER")
    add("--what", nargs="+", choices=WHAT, default=[LOSS_AND_GRADIENT])
    add("--device", choices=DEVICES, default="cpu")
    add("--rounds", type=count, default=9)
    add("--budget", type=float, metavar="SECONDS", help="stop in time and say what is left out")
    add("--threads", type=count, help="default: PyTorch's")
    add("--output", type=Path, help="FILE.json, .csv, .md or .png, or a stem for all four")
    return result


def run(
    arguments: argparse.Namespace,
    device: Cpu | Cuda,
    providers: list[Provider],
    chosen: list[shapes.Shape],
    command: list[str],
) -> dict:
    """The report of a run; JSON is written after every case."""
    budget = Budget(arguments.budget)
    level = arguments.level
    divergences = DIVERGENCES if "all" in arguments.divergence else arguments.divergence
    options = {"close": True} if arguments.close else {}

    packages = sorted({p.package for p in providers if p.package})
    report = {"environment": device.describe() | environment(command, packages)}
    report["ceilings"] = measure_ceilings(device)
    if level == "logits":
        report["small_call"] = small_call(device)
    report["cases"], report["left_out"] = [], []

    inputs = list(itertools.product(chosen, arguments.dtype))
    settings = list(itertools.product(divergences, arguments.what))
    steps = len(providers) + WARM_UP_ROUNDS + arguments.rounds
    progress = Progress(len(inputs) * len(settings) * steps)

    def run_inputs(shape: shapes.Shape, dtype: str) -> None:
        """A function of its own, so that its tensors are gone before the next ones are made."""
        case = None
        for divergence, what in settings:
            label = f"{shape.name} {dtype} {divergence} {what}"
            if not budget.allows():
                report["left_out"].append(f"{label}: the budget was spent")
                continue
            try:
                if case is None:
                    of = shape, DTYPES[dtype], device.torch_device
                    case = CASES[level].make(*of, **options)
                case = case.variant(divergence, what)
                result = run_case(case, providers, device, arguments.rounds, budget, progress)
            except Exception as error:  # such as a case too large for the device
                report["left_out"].append(f"{label}: {first_line(error)}")
                continue
            report["cases"].append(result)
            if result["rounds"] < arguments.rounds:
                report["left_out"].append(
                    f"{label}: {arguments.rounds - result['rounds']} of {arguments.rounds} rounds"
                )
            if arguments.output:  # the run may be ended before it is done
                output.write(report, arguments.output, only=".json")

    for shape, dtype in inputs:
        run_inputs(shape, dtype)
        device.release()
    progress.close()
    return report


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    arguments = parser().parse_args(argv)
    level = arguments.level
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.close and level == "linear":
        parser().error("--close is of logits: heads make those of the linear level")
    try:
        device = device_of(arguments.device)
        providers = choose(arguments.providers, level)
        rows = arguments.rows or shapes.DEFAULT_ROWS[level, arguments.device]
        chosen = shapes.parse(arguments.shapes or shapes.DEFAULT[level], level, rows)
    except ValueError as error:
        parser().error(str(error))
    report = run(arguments, device, providers, chosen, ["benchmarks", *argv])
    print(markdown(report))
    if arguments.output:
        for missing in output.write(report, arguments.output):
            print(missing, file=sys.stderr)
    ours = [
        (name, result)
        for case in report["cases"]
        for name, result in case["results"].items()
        if name.startswith("kdkernels")
    ]
    if bad := {name for name, result in ours if "wrong" in result or "failed" in result}:
        sys.exit(f"wrong or failed: {', '.join(sorted(bad))}")


if __name__ == "__main__":
    main()
