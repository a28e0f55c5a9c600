"""The student's side of a sparse teacher where processes share the student's vocabulary.

Each process has the log-sum-exp of its own columns and some of the listed logits. The loss needs
the log-sum-exp of all columns and all listed logits, so these are exchanged.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import collectives, reference, watchers
from .divergences import Divergence
from .options import LogitsOptions, TailOptions
from .tail import Student
from .top import Top


@dataclass(frozen=True)
class ShardedStudent:
    """A student of which this process has some columns."""

    shard: Student
    o: LogitsOptions
    same_everywhere: Tensor  # (..., n), what all processes must hold of a row besides its list
    arguments: tuple[Divergence, str]  # which all processes must pass

    @property
    def like(self) -> Tensor:
        """See :attr:`kdkernels.tail.Student.like`."""
        return self.shard.like

    def listed_and_tails(
        self,
        listed: Tensor,
        kept: Tensor,
        options: TailOptions,
        *,
        with_tails: bool,
        with_top: bool,
    ) -> tuple[Tensor, Tensor, Top | None]:
        """See :meth:`kdkernels.tail.Student.listed_and_tails`."""
        o = self.o
        local = listed - o.vocab_start
        here = (listed >= 0) & (local >= 0) & (local < o.vocab)
        ascending, order = torch.where(here, local, -1).sort(-1)
        stored, tails, top = self.shard.listed_and_tails(
            ascending, kept, options, with_tails=with_tails, with_top=with_top
        )
        stored = torch.zeros_like(stored).scatter(-1, order, stored)
        numbers = torch.cat(
            [listed.double(), self.same_everywhere.double().nan_to_num(0.0, 1e4, -1e4)], -1
        )
        # Of no whole numbers, of which different tokens might well have the same sum.
        slot = torch.arange(1, numbers.shape[-1] + 1, device=listed.device).double().sin()
        checksum = (numbers * slot).sum(-1, keepdim=True)
        told = [torch.where(here, stored, 0.0), tails.movedim(0, -1), checksum]
        if top is not None:
            told += [top.logit.unsqueeze(-1), (top.token + o.vocab_start).unsqueeze(-1)]
        rows = kept.numel()
        message = torch.cat([x.double().reshape(rows, x.shape[-1]) for x in told], -1)
        header = collectives.header_of(message, o, *self.arguments)
        everyone = collectives.gathered(torch.cat([message.flatten(), header]), o)
        everyone, headers = everyone.tensor_split([message.numel()], -1)
        apart = collectives.do_not_fit(headers.detach(), o)
        everyone = everyone.reshape(o.processes, *kept.shape, message.shape[-1])

        # Split again; the first dimension is that of the processes.
        stored, tails, checksum, *tops = everyone.split([x.shape[-1] for x in told], -1)
        checksum = checksum.detach().squeeze(-1)
        bad = apart | (checksum != checksum[0]).any(0)
        if watchers.may_look(bad) and bool(bad.any()):
            raise ValueError(f"teacher_indices, teacher_logprobs, {collectives.ROWS_DIFFER}")
        nan = torch.where(bad, torch.nan, 1.0)
        stored = stored.sum(0) * nan.unsqueeze(-1)
        tails = reference.log_sum_exp(tails.movedim(0, -1).movedim(-2, 0)) * nan
        if top is not None:
            top = Top(*(x.detach().squeeze(-1) for x in tops)).of_all()
        return stored, tails, top
