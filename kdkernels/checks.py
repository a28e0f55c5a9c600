"""Checks of the arguments that the losses share; errors name the argument and what was got."""

from __future__ import annotations

import functools
import math
import numbers
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from . import backends
from .divergences import Divergence, as_divergence
from .options import REDUCTIONS, TAILS, LogitsOptions

_FLOAT32 = torch.finfo(torch.float32)  # what kernels compute in
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Call(NamedTuple):
    """The checked arguments that all losses share."""

    backend: str
    divergence: Divergence
    token_weight: Tensor | None  # (...), detached; float32 where the backend is compiled
    normalizer: Tensor | None  # () float32, only for the reduction "mean"
    options: LogitsOptions


def call(
    student: Tensor,  # (..., vocab_s)
    teacher: Tensor,  # (..., vocab_t)
    lead: torch.Size,
    *,
    divergence: str | Divergence,
    temperature: float,
    labels: Tensor | None,
    kd_weight: float,
    ce_weight: float,
    ignore_index: int,
    token_weight: Tensor | None,
    reduction: str,
    normalizer: float | Tensor | None,
    temperature_squared: bool,
    vocab_size: int | None,
    student_scale: float,
    teacher_scale: float,
    student_softcap: float | None,
    teacher_softcap: float | None,
    inplace_grad: bool,
    return_metrics: bool,
    backend: str,
) -> Call:
    """Checks a loss's options and chooses its backend.

    Of ``student`` and ``teacher`` only dtype, device and width count; ``lead`` is the shape of the
    per-token arguments.
    """
    divergence = as_divergence(divergence)
    if labels is not None:
        _per_token("labels", labels, lead, student, (torch.int64,))
    if token_weight is not None:
        _per_token("token_weight", token_weight, lead, student, (torch.bool, *DTYPES))
    total = None
    if isinstance(normalizer, Tensor):
        total = _normalizer_tensor(normalizer, student) if reduction == "mean" else None
        normalizer = None
    chosen = backends.choose(backend, student, teacher, divergence, inplace_grad)
    compiled = chosen != "reference"
    if token_weight is not None:
        token_weight = token_weight.detach()
        token_weight = token_weight.to(torch.float32) if compiled else token_weight
    options = _remembered(
        divergence.kernel() if compiled else ("", 0.0, 0.0),
        temperature,
        kd_weight,
        ce_weight,
        labels is not None,
        ignore_index,
        reduction,
        normalizer,
        temperature_squared,
        vocab_size,
        student.shape[-1],
        teacher.shape[-1],
        student_scale,
        teacher_scale,
        student_softcap,
        teacher_softcap,
        return_metrics,
    )
    return Call(chosen, divergence, token_weight, total, options)


def _options(
    kernel: tuple[str, float, float],
    temperature: float,
    kd_weight: float,
    ce_weight: float,
    with_labels: bool,
    ignore_index: int,
    reduction: str,
    normalizer: float | None,
    temperature_squared: bool,
    vocab_size: int | None,
    student_width: int,
    teacher_width: int,
    student_scale: float,
    teacher_scale: float,
    student_softcap: float | None,
    teacher_softcap: float | None,
    return_metrics: bool,
) -> LogitsOptions:
    """Checks the arguments that are no tensors."""
    temperature = option("temperature", temperature)
    kd_weight = option("kd_weight", kd_weight)
    ce_weight = option("ce_weight", ce_weight)
    reduction = option("reduction", reduction)
    if ce_weight != 0 and not with_labels:
        raise ValueError(f"ce_weight is {ce_weight}, which needs labels, and labels is None")
    if option("temperature_squared", temperature_squared):
        kd_weight = number("kd_weight * temperature ** 2", kd_weight * temperature * temperature)
    if normalizer is not None and reduction == "mean":
        normalizer = number("normalizer", normalizer, positive=True)
        kd_weight = number("kd_weight / normalizer", kd_weight / normalizer)
        ce_weight = number("ce_weight / normalizer", ce_weight / normalizer)
        reduction = "sum"
    return LogitsOptions(
        *kernel,
        temperature,
        kd_weight,
        ce_weight,
        option("ignore_index", ignore_index),
        reduction,
        _vocab_size(vocab_size, student_width, teacher_width),
        option("student_scale", student_scale),
        option("student_softcap", student_softcap),
        option("teacher_scale", teacher_scale),
        option("teacher_softcap", teacher_softcap),
        option("return_metrics", return_metrics),
    )


_cached_options = functools.lru_cache(maxsize=256, typed=True)(_options)


def _remembered(*arguments: Any) -> LogitsOptions:
    """:func:`_options`, checked once for the same arguments."""
    if not torch.compiler.is_compiling():  # which sees through the cache, and warns
        try:
            return _cached_options(*arguments)
        except TypeError:  # of an argument without a hash, or raised anew below
            pass
    return _options(*arguments)


def number(name: str, value: float, *, positive: bool = False) -> float:
    """The value as a float, finite, and positive where asked for, also in float32."""
    if type(value) is not float and (
        isinstance(value, bool) or not isinstance(value, (int, numbers.Real))
    ):
        raise TypeError(f"{name} is a {type(value).__name__}, expected a number")
    # Comparisons, since torch.compile cannot trace math.isfinite of a symbolic number.
    if not (0 if positive else -math.inf) < value < math.inf:
        kind = "positive and finite" if positive else "finite"
        raise ValueError(f"{name} is {value}, expected {kind}")
    if abs(value) > _FLOAT32.max or (positive and value < _FLOAT32.tiny):
        raise ValueError(f"{name} is {value}, expected what float32 can hold")
    return float(value)


def integer(name: str, value: int, *, positive: bool = False) -> int:
    """The value as an int of 64 bits, and positive where asked for."""
    if isinstance(value, bool) or not isinstance(value, (int, numbers.Integral)):
        raise TypeError(f"{name} is a {type(value).__name__}, expected an int")
    if positive and value < 1:
        raise ValueError(f"{name} is {value}, expected at least 1")
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"{name} is {value}, expected an int of 64 bits")
    return int(value)


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
        if value not in known:
            raise ValueError(f"{name} is {value!r}, expected one of {', '.join(known)}")
        return value

    return check


def _size(name: str, value: int | None) -> int | None:
    return None if value is None else integer(name, value, positive=True)


def _chunk_bytes(name: str, value: int | None) -> int:
    return _size(name, value) or 0


def _logits_dtype(name: str, value: torch.dtype | None) -> torch.dtype | None:
    if value not in (None, torch.float32):
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
    """An option's value as calls use it, or what is wrong with it whatever the tensors are."""
    return _OPTIONS[name](name, value)


def float_tensor(name: str, tensor: Tensor) -> None:
    """A tensor of a dtype that losses take."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} is a {type(tensor).__name__}, expected a torch.Tensor")
    if tensor.dtype not in DTYPES:
        raise TypeError(f"{name} is {tensor.dtype}, expected float32, bfloat16, float16 or float64")
    if tensor.is_nested or tensor.layout != torch.strided:
        kind = "a nested tensor" if tensor.is_nested else tensor.layout
        raise TypeError(f"{name} is {kind}, expected a plain tensor, of layout torch.strided")
    if type(tensor) is not Tensor and isinstance(tensor, _distributed_tensor()):
        raise TypeError(
            f"{name} is a DTensor, expected a plain tensor: gather it with full_tensor(), and "
            "reach a head that FSDP shards through LinearKDHead"
        )


def _distributed_tensor() -> Any:
    """torch's class, which exists only once something has imported it, or no class."""
    return getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", ())


def logits_tensor(name: str, logits: Tensor) -> None:
    """(..., vocab) whose last dimension is contiguous."""
    float_tensor(name, logits)
    if logits.dim() == 0:
        raise ValueError(f"{name} has shape (), expected (..., vocab)")
    if logits.shape[-1] == 0:
        raise ValueError(f"{name} has shape {tuple(logits.shape)}, a vocabulary of 0")
    if logits.stride(-1) != 1 and logits.shape[-1] > 1:
        raise ValueError(
            f"{name} has stride {logits.stride(-1)} in its last dimension, expected 1: pass "
            "logits whose vocabulary is contiguous"
        )


def logits(student: Tensor, teacher: Tensor) -> torch.Size:
    """Checks the two tensors of :func:`kdkernels.kd_loss`; returns their leading shape."""
    logits_tensor("student_logits", student)
    logits_tensor("teacher_logits", teacher)
    lead = student.shape[:-1]
    if lead != teacher.shape[:-1]:
        raise ValueError(
            f"teacher_logits has shape {tuple(teacher.shape)}, expected the leading shape of "
            f"student_logits, {tuple(lead)}"
        )
    if student.device != teacher.device:
        raise ValueError(
            f"teacher_logits is on {teacher.device}, expected the device of student_logits, "
            f"{student.device}"
        )
    if teacher.requires_grad:
        raise ValueError(
            "teacher_logits requires grad, expected a constant: compute it under torch.no_grad() "
            "or pass teacher_logits.detach()"
        )
    return lead


def _per_token(
    name: str,
    tensor: Tensor,
    lead: torch.Size,
    student: Tensor,
    dtypes: tuple[torch.dtype, ...],
) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} is a {type(tensor).__name__}, expected a torch.Tensor")
    if tensor.dtype not in dtypes:
        expected = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name} is {tensor.dtype}, expected {expected}")
    if tensor.shape != lead:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {tuple(lead)}")
    if tensor.device != student.device:
        raise ValueError(f"{name} is on {tensor.device}, expected {student.device}")


def _normalizer_tensor(normalizer: Tensor, student: Tensor) -> Tensor:
    if normalizer.is_complex() or normalizer.dtype == torch.bool:
        raise TypeError(f"normalizer is {normalizer.dtype}, expected a real dtype")
    if normalizer.dim() != 0:
        raise ValueError(f"normalizer has shape {tuple(normalizer.shape)}, expected a 0-d tensor")
    return normalizer.detach().to(device=student.device, dtype=torch.float32)


def _vocab_size(vocab_size: int | None, student: int, teacher: int) -> int:
    smaller = min(student, teacher)
    if vocab_size is None:
        return smaller
    vocab_size = integer("vocab_size", vocab_size)
    if not 1 <= vocab_size <= smaller:
        raise ValueError(
            f"vocab_size is {vocab_size}, expected 1 to {smaller}: the logits have {student} "
            f"(student) and {teacher} (teacher) columns"
        )
    return vocab_size
