"""Communication between processes that share a vocabulary, each holding a shard of its columns."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import watchers
from .divergences import Divergence, is_built_in
from .options import LogitsOptions, replaced


def _group_of(name: str) -> Any:
    resolve: Any = dist.distributed_c10d._resolve_process_group
    return resolve(name)


def all_gather(x: Tensor, group: str) -> Tensor:
    """The tensors of all processes, stacked in the order of their ranks."""
    processes = _group_of(group)
    size = dist.get_world_size(processes)
    result = x.new_empty((size * x.shape[0], *x.shape[1:]))
    # The newer name of the same function, where there is one.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(result, x.contiguous(), group=processes)
    return result.unflatten(0, (size, -1))


def all_sum(x: Tensor, group: str) -> Tensor:
    """The sum of the processes' tensors, added up in float32, or float64 where they are."""
    total = x.to(torch.promote_types(x.dtype, torch.float32), copy=True)
    dist.all_reduce(total, group=_group_of(group))
    return total.to(x.dtype)


#: The error where values per row differ.
ROWS_DIFFER = "labels, token_weight or normalizer: they differ between the group's processes"


def header_of(like: Tensor, o: LogitsOptions, *others: Divergence | str) -> Tensor:
    """Four numbers by which processes check each other: [start, checksum, end, checksum].

    ``start`` and ``end`` say which columns this process holds; the last one's end is written as the
    first one's start. The checksum is of all that processes have to agree on: the options, and
    ``others``.
    """
    # Filled one by one: a tensor made of a list would be copied to the device.
    header = like.new_full((4,), _checksum(o, others))
    header[0].fill_(o.vocab_start)
    header[2].fill_(o.vocab_start + o.vocab - (o.vocab_size if o.rank == o.processes - 1 else 0))
    return header


def _checksum(o: LogitsOptions, others: tuple[Divergence | str, ...]) -> float:
    """Of all that processes have to agree on, by arithmetic that torch.compile can trace too."""
    fields: list[Any] = list(replaced(o, vocab=0, group="", rank=0, vocab_start=0))
    for other in others:
        if isinstance(other, str):
            fields.append(other)
        elif is_built_in(other):
            fields += other.kernel()
        else:
            fields.append(other.name)
            if not torch.compiler.is_compiling():  # which cannot see fields in torch 2.8
                # Others than numbers might not be the same in all processes.
                fields += [x for x in vars(other).values() if isinstance(x, (bool, int, float))]
    total = 0.0
    for i, x in enumerate(fields):
        if isinstance(x, str):
            x = sum([(place + 1) * ord(letter) for place, letter in enumerate(x)])
        # Multiples of a fraction that no other place has: 3 here and 2 there differ from 2 and 3.
        total = total + x * ((i + 1) * (i + 1) * 0.6180339887498949 % 1)
    return total


def do_not_fit(headers: Tensor, o: LogitsOptions) -> Tensor:
    """(), whether the shards have gaps or belong to different calls; on a CPU raises instead."""
    here, following = headers.tensor_split(2, -1)
    differ = here != following.roll(1, 0)  # from what the process before says
    bad = differ.any()
    if watchers.may_look(headers) and bad:
        if not differ[:, 0].any():
            raise ValueError("group: its processes pass different options, expected the same")
        starts, ends = here[:, 0].long().tolist(), following[:, 0].long().tolist()
        ends[-1] += o.vocab_size
        shards = [f"{start} to {end}" for start, end in zip(starts, ends, strict=True)]
        raise ValueError(
            f"vocab_start: the processes of the group hold columns {', '.join(shards)}, "
            f"expected shards that follow each other up to vocab_size, {o.vocab_size}"
        )
    return bad


def told_by_all(own: dict[str, Tensor], group: str) -> dict[str, Tensor]:
    """What every process tells, ``(processes, ...)`` each in float64: one message."""
    everyone = all_gather(torch.cat([x.flatten().double() for x in own.values()]), group)
    parts = everyone.split([x.numel() for x in own.values()], -1)
    return {
        name: part.unflatten(-1, x.shape)
        for (name, x), part in zip(own.items(), parts, strict=True)
    }


def columns_of_all(per_row: list[Tensor], o: LogitsOptions, divergence: Divergence) -> list[int]:
    """How many columns each process has, for the reference backend; waits for a GPU.

    Raises where processes pass different options or values ``(...)`` per row.
    """
    message = torch.cat([x.double().nan_to_num().flatten() for x in per_row])
    header = header_of(message, o, divergence)
    everyone = all_gather(torch.cat([message, header]), o.group).cpu()
    message, headers = everyone.tensor_split([-len(header)], -1)
    do_not_fit(headers, o)
    if bool((message != message[0]).any()):
        raise ValueError(ROWS_DIFFER)
    starts = headers[:, 0].long().tolist()
    return [end - start for start, end in zip(starts, [*starts[1:], o.vocab_size], strict=True)]


def whole_logits(shard: Tensor, columns: list[int], o: LogitsOptions) -> Tensor:
    """(..., vocab_size) logits from every process's ``(..., width)``, for the reference backend."""
    return _WholeLogits.apply(shard, columns, o)


class _WholeLogits(torch.autograd.Function):
    """Every process computes the whole loss, so a shard's gradient is a part of its own, no sum."""

    @staticmethod
    def forward(ctx, shard, columns, o):
        ctx.width, ctx.o = shard.shape[-1], o
        padded = shard.new_zeros((*shard.shape[:-1], max(columns)))
        padded[..., : o.vocab] = shard[..., : o.vocab]
        rows = shard.shape[:-1].numel()
        shards = all_gather(padded.view(rows, max(columns)), o.group)
        shards = shards.view(o.processes, *padded.shape)
        return torch.cat([x[..., :n] for x, n in zip(shards, columns, strict=True)], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        o = ctx.o
        mine = gradient[..., o.vocab_start : o.vocab_start + o.vocab]
        return torch.nn.functional.pad(mine, (0, ctx.width - o.vocab)), None, None


# As operators, so that torch.compile sees shapes only.
library = torch.library.Library("kdkernels", "FRAGMENT")
library.define("all_gather(Tensor x, str group, int processes) -> Tensor")
library.define("all_sum(Tensor x, str group) -> Tensor")
library.impl("all_gather", lambda x, group, _: all_gather(x, group), "CompositeExplicitAutograd")
library.impl("all_sum", lambda x, group: all_sum(x, group), "CompositeExplicitAutograd")


@torch.library.register_fake("kdkernels::all_gather", lib=library)
def _(x, group, processes):
    return x.new_empty((processes, *x.shape))


@torch.library.register_fake("kdkernels::all_sum", lib=library)
def _(x, group):
    return torch.empty_like(x)


def gathered(x: Tensor, o: LogitsOptions) -> Tensor:
    """:func:`all_gather`, for a loss that every process computes: its gradient is x's part."""
    return _Gathered.apply(x, o)


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, o):
        ctx.rank = o.rank
        if torch.compiler.is_compiling():  # Inductor keeps the order of collectives that it knows
            from torch.distributed import _functional_collectives as functional

            whole = functional.all_gather_tensor(x.contiguous(), 0, o.group)
            return whole.view(o.processes, *x.shape)
        return torch.ops.kdkernels.all_gather.default(x, o.group, o.processes)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        return gradient[ctx.rank], None


def summed_in_backward(x: Tensor, o: LogitsOptions) -> Tensor:
    """The tensor, equal in all processes; its gradient is the sum over the processes."""
    return _SummedInBackward.apply(x, o.group) if o.group else x


class _SummedInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        return torch.ops.kdkernels.all_sum.default(gradient, ctx.group), None
