"""Checks of options by themselves; errors name the option and what was got."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from . import backends
from .divergences import as_divergence, check_number
from .options import REDUCTIONS, TAILS

_FLOAT32 = torch.finfo(torch.float32)  # what kernels compute in


def number(name: str, value: float, *, positive: bool = False) -> float:
    """The value as a float; raises unless it is finite (and positive, if asked for) in float32."""
    if type(value) is not float:
        check_number(name, value)
    # Comparisons, since torch.compile cannot trace math.isfinite of a symbolic number.
    if not (0 if positive else -math.inf) < value < math.inf:
        kind = "positive and finite" if positive else "finite"
        raise ValueError(f"{name} is {value}, expected {kind}")
    if abs(value) > _FLOAT32.max or (positive and value < _FLOAT32.tiny):
        raise ValueError(f"{name} is {value}, expected what float32 can hold")
    return float(value)


def integer(name: str, value: int, *, positive: bool = False) -> int:
    """The value as an int; raises unless it fits 64 bits (and is positive, if asked for)."""
    if isinstance(value, bool) or not isinstance(value, (int, numbers.Integral)):
        raise TypeError(f"{name} is a {type(value).__name__}, expected an int")
    if positive and value < 1:
        raise ValueError(f"{name} is {value}, expected at least 1")
    # Compiled, a symbolic size would get a bound that the sum of its shards' sizes need not keep.
    if not torch.compiler.is_compiling() and not -(2**63) <= value < 2**63:
        raise ValueError(f"{name} is {value}, expected an int of 64 bits")
    return int(value)


class Processes(NamedTuple):
    """A process group of torch.distributed as this process sees it."""

    name: str
    rank: int
    size: int


def process_group(name: str, group: Any) -> Processes:
    """Checks that ``group`` is a process group with this process in it."""
    if not dist.is_available() or not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"{name} is a {type(group).__name__}, expected a torch.distributed.ProcessGroup that "
            "this process is in"
        )
    return Processes(group.group_name, dist.get_rank(group), dist.get_world_size(group))


def _positive(name: str, value: float) -> float:
    return number(name, value, positive=True)


def _softcap(name: str, value: float | None) -> float:
    return 0.0 if value is None else _positive(name, value)


def _flag(name: str, value: bool) -> bool:
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} is a {type(value).__name__}, expected a bool")
    return bool(value)


def _one_of(known: tuple[str, ...]) -> Callable[[str, str], str]:
    def check(name: str, value: str) -> str:
        if not (isinstance(value, str) and value in known):  # an array compares entries
            raise ValueError(f"{name} is {value!r}, expected one of {', '.join(known)}")
        return value

    return check


def _size(name: str, value: int | None) -> int | None:
    return None if value is None else integer(name, value, positive=True)


def _start(name: str, value: int | None) -> int | None:
    if value is not None and integer(name, value) < 0:
        raise ValueError(f"{name} is {value}, expected at least 0")
    return value


def _group(name: str, value: Any) -> Processes | None:
    return None if value is None else process_group(name, value)


def _chunk_bytes(name: str, value: int | None) -> int:
    return _size(name, value) or 0


def _logits_dtype(name: str, value: torch.dtype | None) -> torch.dtype | None:
    if value is not None and value is not torch.float32:
        raise ValueError(f"{name} is {value}, expected None or torch.float32")
    return value


_OPTIONS: dict[str, Callable[[str, Any], Any]] = {
    "divergence": lambda _, value: as_divergence(value),
    "temperature": _positive,
    "kd_weight": number,
    "ce_weight": number,
    "ignore_index": integer,
    "reduction": _one_of(REDUCTIONS),
    "temperature_squared": _flag,
    "vocab_size": _size,
    "vocab_start": _start,
    "group": _group,
    "student_scale": _positive,
    "teacher_scale": _positive,
    "student_softcap": _softcap,
    "teacher_softcap": _softcap,
    "inplace_grad": _flag,
    "return_metrics": _flag,
    "backend": lambda _, value: backends.check_name(value),
    "chunk_bytes": _chunk_bytes,
    "logits_dtype": _logits_dtype,
    "tail": _one_of(TAILS),
}


def option(name: str, value: Any) -> Any:
    """The checked value of an option; raises if it is wrong whatever the tensors are."""
    return _OPTIONS[name](name, value)
