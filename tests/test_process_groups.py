"""Real processes and torch.distributed: groups, DTensors, compiled graphs, and what is refused.

The numbers are test_sharded.py's; here two processes with gloo run a few calls.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch
import torch.distributed as dist

from . import dtensor_checks, process_checks, upstream
from .process_checks import SIZE
from .test_compile import COMPILER

CHECKS = process_checks.CHECKS + dtensor_checks.CHECKS

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="torch has no gloo"
)


def _serve(rank: int, directory: str, pipe: Connection) -> None:
    """Runs the checks it is told of until it is told of none."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{directory}/meet", rank=rank, world_size=SIZE
    )
    while check := pipe.recv():
        try:
            check(rank)
            pipe.send(None)
        except BaseException:
            pipe.send(traceback.format_exc())
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """Calls a check in every process."""
    context = torch.multiprocessing.get_context("spawn")
    directory = str(tmp_path_factory.mktemp("gloo"))
    pipes, workers = [], []
    for rank in range(SIZE):
        here, there = context.Pipe()
        worker = context.Process(target=_serve, args=(rank, directory, there), daemon=True)
        worker.start()
        pipes.append(here)
        workers.append(worker)

    def check(function: Callable[[int], Any]) -> None:
        for pipe in pipes:
            pipe.send(function)
        answers = [pipe.recv() if pipe.poll(120) else "no answer in 120 s" for pipe in pipes]
        assert not any(answers), "\n".join(f"rank {i}: {x}" for i, x in enumerate(answers) if x)

    yield check
    for pipe in pipes:
        pipe.send(None)
    for worker in workers:
        worker.join(20)
        worker.terminate()


IN_PLACE = dtensor_checks.compiled_dtensors_in_place
OVERWRITES_NONE = upstream.before("torch", 2, 11, reason="cannot overwrite a DTensor it is given")


MARKS = {IN_PLACE: OVERWRITES_NONE, process_checks.compiled_losses_side_by_side: COMPILER}


@pytest.mark.parametrize(
    "check",
    [pytest.param(x, marks=MARKS[x]) if x in MARKS else x for x in CHECKS],
    ids=lambda check: check.__name__,
)
def test_two_processes(processes, check):
    processes(check)
