"""Errors of loss and gradient against float64, ours and the peers', on the same inputs.

    python -m benchmarks.numerics --output benchmarks/results/numerics.json --plot docs/numerics.png

Inputs are float32, bfloat16 and float16 logits whose forward KL goes from 1e-9 to 10 nats at
temperatures from 0.5 to 20. Kernels in Triton run under its interpreter where there is no GPU, in a
process of their own.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import math
import os
import re
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch

from kdkernels import kd_loss, linear_kd_loss

from . import behaviour, dense
from .arguments import count
from .case import DTYPES, relative
from .environment import ROOT, environment
from .pairs import Pair, compare
from .peers import PEERS, Loss, why_not

DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "tvd")
TARGETS = tuple(10.0**exponent for exponent in range(-9, 2))  # of the KL, in nats
TEMPERATURES = (0.5, 1.0, 2.0, 5.0, 20.0)
#: float16 gradients are computed from a scaled loss, as every training in float16 does.
LOSS_SCALE = 2.0**13  # over T², 0.25 at least: float16 ends at 65504


class Provider(NamedTuple):
    """A loss to judge."""

    level: str
    divergences: tuple[str, ...]
    load: Callable[[str], Loss]
    dtypes: tuple[str, ...] = tuple(DTYPES)


def _kdkernels(divergence: str) -> Loss:
    def loss(student, teacher, temperature):
        return kd_loss(student, teacher, divergence=divergence, temperature=temperature)

    return loss


def _kdkernels_linear(divergence: str) -> Loss:
    def loss(*heads_and_temperature):
        *heads, temperature = heads_and_temperature
        return linear_kd_loss(*heads, divergence=divergence, temperature=temperature)

    return loss


def _eager_float32(divergence: str) -> Loss:
    loss = dense.logits_loss(divergence)
    return lambda student, teacher, temperature: loss(student.float(), teacher.float(), temperature)


OURS = {
    "kd_loss": Provider("logits", DIVERGENCES, _kdkernels),
    "linear_kd_loss": Provider("linear", DIVERGENCES, _kdkernels_linear),
    "eager": Provider("logits", DIVERGENCES, dense.logits_loss),
    "eager, .float()": Provider("logits", DIVERGENCES, _eager_float32),
}

#: The interpreter computes on the bits of bfloat16 what a kernel doesn't convert first.
INTERPRETED_DTYPES = {"fla": ("float32",)}
#: Its kernels convert a number, which the interpreter hands them as Python's.
NOT_INTERPRETED = ("Liger KL", "Liger TVD")


def peers(device: torch.device, interpreted: bool) -> tuple[dict[str, Provider], dict[str, str]]:
    """Those that run here, or under the interpreter; and why the others don't."""
    found, refused = {}, {}
    for name, peer in PEERS.items():
        if peer.triton != interpreted and device.type == "cpu":
            continue
        if interpreted and name in NOT_INTERPRETED:
            refused[name] = "its kernels don't run under Triton's interpreter"
        elif reason := why_not(peer, torch.device("cuda") if interpreted else device):
            refused[name] = reason
        else:
            dtypes = INTERPRETED_DTYPES.get(name, tuple(DTYPES)) if interpreted else tuple(DTYPES)
            found[name] = Provider(peer.level, peer.divergences, peer.load, dtypes)
    return found, refused


@dataclass
class Grid:
    """Pairs of every dtype, temperature and KL."""

    vocab: int = 1024
    rows: int = 8
    dtypes: Sequence[str] = tuple(DTYPES)
    temperatures: Sequence[float] = TEMPERATURES
    targets: Sequence[float] = TARGETS
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        teacher = 2 * torch.randn(self.rows, self.vocab, generator=generator, dtype=torch.float64)
        noise = torch.randn(self.rows, self.vocab, generator=generator, dtype=torch.float64)
        self.pairs = {
            dtype: [
                [self._pair(teacher, noise, DTYPES[dtype], t, target) for target in self.targets]
                for t in self.temperatures
            ]
            for dtype in self.dtypes
        }

    def _pair(self, teacher, noise, dtype: torch.dtype, temperature: float, target: float) -> Pair:
        """A student whose KL, after rounding, is next to the target."""
        teacher = teacher.to(dtype)
        low, high = 1e-6, 1e4
        for _ in range(40):
            distance = (low * high) ** 0.5
            pair = Pair((teacher.double() + distance * noise).to(dtype), teacher)
            if self.kl(pair, temperature) < target:
                low = distance
            else:
                high = distance
        return pair.to(self.device)

    @staticmethod
    def kl(pair: Pair, temperature: float) -> float:
        """In nats, without the square of the temperature."""
        log_q, log_p = (
            (x.double() / temperature).log_softmax(-1) for x in (pair.student, pair.teacher)
        )
        return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())


def scale_of(dtype: str, temperature: float) -> float:
    return LOSS_SCALE / temperature**2 if dtype == "float16" else 1.0


def errors(
    provider: Provider, grid: Grid, dtype: str, divergence: str
) -> dict[str, list[list[float | None]]]:
    """Relative errors of loss and gradient by temperature and KL; None: not finite."""
    loss = provider.load(divergence)
    table: dict[str, list[list[float | None]]] = {"loss": [], "gradient": []}
    for temperature, pairs in zip(grid.temperatures, grid.pairs[dtype], strict=True):
        row = []
        for pair in pairs:
            got, exact = compare(
                loss,
                provider.level,
                pair,
                divergence,
                temperature,
                scale_of(dtype, temperature),
            )
            row.append((abs(got.loss / exact.loss - 1), relative(got.gradient, exact.gradient)))
        for name, column in zip(table, zip(*row, strict=True), strict=True):
            table[name].append([float(f"{x:.1e}") if math.isfinite(x) else None for x in column])
    return table


def rounding(grid: Grid, dtype: str, divergence: str) -> list[list[float]]:
    """The error of the exact gradient when it is rounded to the dtype: none can be below."""
    table = []
    for temperature, pairs in zip(grid.temperatures, grid.pairs[dtype], strict=True):
        scale = scale_of(dtype, temperature)
        exact = [pair.exact(divergence, temperature).gradient for pair in pairs]
        rounded = [(x * scale).to(DTYPES[dtype]).double() / scale for x in exact]
        table.append([float(f"{relative(*x):.1e}") for x in zip(rounded, exact, strict=True)])
    return table


def results(providers: dict[str, Provider], grid: Grid, log: Callable[[str], None]) -> dict:
    """Errors of every provider on the grid, and its behaviour on every case."""
    cases = {name: make().to(grid.device) for name, make in behaviour.CASES.items()}
    accuracy: dict[str, dict] = {}
    behaves: dict[str, dict] = {}
    for name, provider in providers.items():
        log(name)
        accuracy[name] = {
            dtype: {
                divergence: errors(provider, grid, dtype, divergence)
                for divergence in provider.divergences
                if divergence in DIVERGENCES
            }
            for dtype in grid.dtypes
            if dtype in provider.dtypes
        }
        behaves[name] = {
            case: {
                divergence: behaviour.judge(provider.load, provider.level, pair, divergence)
                for divergence in provider.divergences
            }
            for case, pair in cases.items()
            if str(pair.student.dtype).removeprefix("torch.") in provider.dtypes
        }
    return {
        "grid": {
            "rows": grid.rows,
            "vocab": grid.vocab,
            "temperatures": list(grid.temperatures),
            "targets": list(grid.targets),
            "kl": {
                dtype: [
                    [float(f"{grid.kl(pair, t):.1e}") for pair in row]
                    for t, row in zip(grid.temperatures, rows, strict=True)
                ]
                for dtype, rows in grid.pairs.items()
            },
        },
        "rounding": {
            dtype: {name: rounding(grid, dtype, name) for name in DIVERGENCES}
            for dtype in grid.dtypes
        },
        "accuracy": accuracy,
        "behaviour": behaves,
    }


def _interpret() -> None:
    """Before any kernel is imported, where the environment has TRITON_INTERPRET=1."""
    from triton.runtime.autotuner import Autotuner

    import tests.interpreter  # noqa: F401

    # Autotuning would look for a GPU; the largest block is interpreted fastest.
    Autotuner._bench = lambda self, *_, config, **__: [-config.kwargs["BLOCK_SIZE"]]


def start_interpreted(arguments: argparse.Namespace, output: Path) -> subprocess.Popen:
    """This module in a process whose Triton interprets, for the peers that are Triton."""
    command = [sys.executable, "-m", "benchmarks.numerics", "--interpreted"]
    command += ["--vocab", str(arguments.vocab), "--output", str(output)]
    return subprocess.Popen(command, cwd=ROOT, env=os.environ | {"TRITON_INTERPRET": "1"})


def text_of(report: dict) -> str:
    """JSON with a list of numbers a line."""
    text = json.dumps(report, indent=1)
    return re.sub(r"\[\s+([^\[\]{}]*?)\s+\]", lambda m: f"[{' '.join(m[1].split())}]", text) + "\n"


def measure(arguments: argparse.Namespace) -> dict:
    """What this process can run: everything, or the interpreted peers."""
    device = torch.device(arguments.device)
    found, refused = peers(device, arguments.interpreted)
    providers = found if arguments.interpreted else OURS | found
    grid = Grid(arguments.vocab, device=device)
    start = time.monotonic()

    def log(name: str) -> None:
        print(f"{time.monotonic() - start:4.0f} s  {name}", file=sys.stderr, flush=True)

    with torch.compiler.set_stance("force_eager"):  # a peer's compilation is not its arithmetic
        return {"refused": refused, **results(providers, grid, log)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--vocab", type=count, default=1024)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, required=True, help="a JSON file to write")
    parser.add_argument("--plot", type=Path, help="a picture to draw")
    parser.add_argument("--interpreted", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")  # of foreign packages, about each other's versions
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    if arguments.interpreted:
        _interpret()
        arguments.output.write_text(text_of(measure(arguments)))
        return

    with tempfile.TemporaryDirectory() as directory:
        output = Path(directory) / "interpreted.json"
        child = None
        if arguments.device == "cpu" and importlib.util.find_spec("triton"):
            child = start_interpreted(arguments, output)
        report = measure(arguments)
        if child and child.wait():
            sys.exit(f"the interpreted peers ended with {child.returncode}")
        if child:
            other = json.loads(output.read_text())
            for key in ("refused", "accuracy", "behaviour"):
                report[key] |= other[key]
            report["interpreted"] = list(other["accuracy"])
    packages = dict.fromkeys(peer.package for peer in PEERS.values())
    command = ["benchmarks.numerics", *sys.argv[1:]]
    report = {"environment": environment(command, packages), **report}
    arguments.output.write_text(text_of(report))
    if arguments.plot:
        from .numerics_report import draw

        draw(report, arguments.plot)


if __name__ == "__main__":
    main()
