"""Threads that take each other for processes which share a vocabulary."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from kdkernels import collectives, scalars

from . import harness

#: Where shards end: of one width, uneven, with one of a single column, with an empty one.
CUTS = {"even": [32, 64, 96], "uneven": [50, 51, 96], "two": [7, 96], "empty": [96, 96]}


class Group(NamedTuple):
    """What stands for a process group."""

    size: int


class Processes:
    """Runs a function once per rank, one thread at a time: Triton's interpreter has global state.

    A thread rests where a process would wait for the others.
    """

    def __init__(self, size: int, monkeypatch: pytest.MonkeyPatch):
        self.group = Group(size)
        self._here = threading.local()
        self._turn = threading.Lock()
        self._barrier = threading.Barrier(size)
        self._told: list[Any] = [None] * size
        self.gathers = 0
        monkeypatch.setattr(scalars, "process_group", self._describe)
        monkeypatch.setattr(collectives, "all_gather", self._all_gather)
        monkeypatch.setattr(collectives, "all_sum", self._all_sum)

    def run(self, function: Callable[[int], Any]) -> list[Any]:
        """The results of ``function(rank)``; raises what the first rank that fails raises."""
        results: list[Any] = [None] * self.group.size
        errors: list[BaseException | None] = [None] * self.group.size

        def work(rank: int) -> None:
            self._here.rank = rank
            with self._turn:
                try:
                    results[rank] = function(rank)
                except BaseException as error:
                    errors[rank] = error
                    self._barrier.abort()

        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(self.group.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self._barrier.reset()
        for error in errors:
            if error is not None and not isinstance(error, threading.BrokenBarrierError):
                raise error
        return results

    def put_together(self, function: Callable[[int], harness.Result]) -> harness.Result:
        """Results for shards of the columns, whose losses are the same bits."""
        results = self.run(function)
        for other in results[1:]:
            assert torch.equal(other.loss.nan_to_num(7.0), results[0].loss.nan_to_num(7.0))
        gradient = torch.cat([result.gradient for result in results], -1)
        return harness.Result(results[0].loss, gradient, results[0].metrics)

    def _describe(self, name: str, group: Group) -> scalars.Processes:
        return scalars.Processes("threads", self._here.rank, group.size)

    def _all_gather(self, x: Tensor, group: str) -> Tensor:
        assert group == "threads"
        self._told[self._here.rank] = x.detach().clone()
        self._wait()
        assert len({(t.shape, t.dtype) for t in self._told}) == 1, "the others would hang"
        result = torch.stack(self._told)
        self._wait()
        if self._here.rank == 0:
            self.gathers += 1
        return result

    def _all_sum(self, x: Tensor, group: str) -> Tensor:
        return self._all_gather(x.float(), group).sum(0).to(x.dtype)

    def _wait(self) -> None:
        self._turn.release()
        try:
            self._barrier.wait(timeout=60)
        finally:
            self._turn.acquire()


def sharded(
    processes: Processes,
    backend: harness.Backend,
    student: Tensor,  # (..., width)
    teacher: Tensor,
    ends: list[int],
    **options: Any,
) -> harness.Result:
    """What :func:`harness.run` gives for shards of columns that end there, put together again.

    The last end is the vocabulary; wider tensors have padding in their last shard.
    """
    starts = [0, *ends[:-1]]
    stops = [*ends[:-1], student.shape[-1]], [*ends[:-1], teacher.shape[-1]]

    def one(rank: int) -> harness.Result:
        return harness.run(
            backend,
            student[..., starts[rank] : stops[0][rank]],
            teacher[..., starts[rank] : stops[1][rank]],
            group=processes.group,
            vocab_start=starts[rank],
            vocab_size=ends[-1],
            **options,
        )

    return processes.put_together(one)
