"""DTensors sharded along the vocabulary: their local tensors and which columns these hold.

For logits only. A head's weight that is sharded along the vocabulary may be FSDP's, whose processes
have different rows, so that its shards must not be taken for those of one call.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Where(NamedTuple):
    """Which shard of the vocabulary a process holds; three arguments of the losses."""

    group: Any
    vocab_start: int | None
    vocab_size: int | None


def is_distributed(x: Any) -> bool:
    """Whether it is a DTensor, whose class exists only once something has imported it."""
    if x is None or type(x) is Tensor:
        return False
    return isinstance(x, getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", ()))


def local_tensors(
    tensors: Sequence[tuple[str, Any, int | None]], where: Where
) -> tuple[list[Any], Where]:
    """Local tensors, and which columns they hold.

    Args:
        tensors: (name, tensor or None, dimension of the vocabulary or None). Tensors with such a
            dimension must be DTensors with the same sharding of it, others replicated or plain.
        where: what the caller passed.
    """
    if where.group is not None or where.vocab_start is not None:
        raise ValueError(
            "group or vocab_start is given, expected neither beside DTensors, which know their "
            "shards: pass to_local() of all of them"
        )
    shards = [(name, x, dim) for name, x, dim in tensors if dim is not None]
    for name, x, _ in shards:
        if not is_distributed(x):
            raise TypeError(
                f"{name} is a plain tensor beside DTensors, expected one that is sharded like "
                "them, or to_local() of all of them and group="
            )
    first_name, first, first_dim = shards[0]
    mesh, size = first.device_mesh, first.shape[first_dim]
    mesh_dim = _sharded_along(first_name, first, first_dim)
    for name, x, dim in shards[1:]:
        if x.device_mesh != mesh or _sharded_along(name, x, dim) != mesh_dim:
            raise ValueError(
                f"{name} has placements {x.placements} on {x.device_mesh}, expected the shards of "
                f"{first_name}, {first.placements} on {mesh}"
            )
        if x.shape[dim] != size:
            raise ValueError(
                f"{name} has a vocabulary of {x.shape[dim]}, expected {size} as {first_name} has, "
                "so that their shards lie alike"
            )
    coordinate, group = mesh.get_coordinate(), mesh.get_group(mesh_dim)
    if coordinate is None:
        raise ValueError(f"{first_name} is on {mesh}, expected one that has this process")
    if group.rank() != coordinate[mesh_dim]:
        raise ValueError(
            f"{first_name} is on {mesh}, expected processes in ascending order, as groups have them"
        )
    columns = -(-size // mesh.size(mesh_dim))  # as torch.chunk: the last ones may have fewer
    start = min(coordinate[mesh_dim] * columns, size)
    values = [_local(name, x, dim) for name, x, dim in tensors]
    vocab_size = size if where.vocab_size is None else where.vocab_size
    return values, Where(group, start, vocab_size)


def overwritten(logits: Tensor) -> None:
    """Marks the DTensor as modified, as its shard was, so that other uses of it fail loudly."""
    if logits.requires_grad and torch.is_grad_enabled():
        torch.autograd.graph.increment_version(logits)


def _sharded_along(name: str, x: Any, dim: int) -> int:
    """The dimension of the mesh that shards ``dim``; raises if anything else is sharded."""
    kinds = _kinds(x)
    sharded = [i for i, kind in enumerate(kinds) if kind == "Shard"]
    replicated = [kind for kind in kinds if kind == "Replicate"]
    alone = len(sharded) == 1 and len(replicated) == len(kinds) - 1
    if not alone or (x.placements[sharded[0]].dim - dim) % x.dim() != 0:
        raise ValueError(
            f"{name} is a DTensor with placements {x.placements}, expected Shard({dim}) in one "
            "dimension of its mesh and Replicate() in others: redistribute it, or pass to_local() "
            "of all tensors and group="
        )
    return sharded[0]


def _kinds(x: Any) -> list[str]:
    """Names of the placements' types; Dynamo cannot compare the types in every torch."""
    return [type(placement).__name__ for placement in x.placements]


def _local(name: str, x: Any, dim: int | None) -> Any:
    if not is_distributed(x):
        return x
    if dim is None and any(kind != "Replicate" for kind in _kinds(x)):
        raise ValueError(
            f"{name} is a DTensor with placements {x.placements}, expected Replicate() or a plain "
            "tensor"
        )
    return x.to_local()
