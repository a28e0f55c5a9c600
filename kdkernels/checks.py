"""Checks of the arguments that the losses share; errors name the argument and what was got."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import backends, scalars, watchers
from .columns import columns_of
from .divergences import Divergence, ForwardKL, as_divergence
from .dtensors import is_distributed
from .ops import library
from .options import LogitsOptions
from .scalars import Processes

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Call(NamedTuple):
    """The checked arguments that all losses share."""

    backend: str
    divergence: Divergence
    token_weight: Tensor | None  # (...), float32 where the backend is compiled
    normalizer: Tensor | None  # () float32, only for the reduction "mean"
    options: LogitsOptions


def call(
    student: Tensor,  # (..., vocab_s)
    teacher: Tensor | None,  # (..., vocab_t), None: it has no logits for kernels to read
    lead: torch.Size,
    *,
    divergence: str | Divergence,
    labels: Tensor | None,
    token_weight: Tensor | None,
    reduction: str,
    normalizer: float | Tensor | None,
    inplace_grad: bool = False,
    backend: str,
    group: Any,
    **others: Any,
) -> Call:
    """Checks a loss's options and chooses its backend.

    Of ``student`` and ``teacher`` only dtype, device and width count; ``lead`` is the shape of the
    per-token arguments; ``others`` are those of :func:`_options`.
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
    elif torch.compiler.is_compiling() and normalizer is not None and reduction == "mean":
        # As an option, each number would be compiled anew.
        number = scalars.number("normalizer", normalizer, positive=True)
        total = torch.full((), number, dtype=torch.float32, device=student.device)
        normalizer = None
    # Without a teacher's logits no kernel has to know the divergence, so any backend will do.
    known = ForwardKL() if teacher is None else divergence
    teacher = student if teacher is None else teacher
    chosen = backends.choose(backend, student, teacher, known, inplace_grad)
    compiled = chosen != "reference"
    if token_weight is not None:
        _constant("token_weight", token_weight)
        token_weight = token_weight.to(torch.float32) if compiled else token_weight
    options = _remembered(
        known.kernel() if compiled else ("", 0.0, 0.0),
        (student.shape[-1], teacher.shape[-1]),
        scalars.option("group", group),
        labels is not None,
        reduction,
        normalizer,
        **others,
    )
    return Call(chosen, divergence, token_weight, total, options)


def _options(
    kernel: tuple[str, float, float],
    widths: tuple[int, int],  # of student and teacher
    processes: Processes | None,
    with_labels: bool,
    reduction: str,
    normalizer: float | None,
    *,
    temperature: float,
    kd_weight: float,
    ce_weight: float,
    ignore_index: int,
    temperature_squared: bool,
    vocab_size: int | None,
    student_scale: float,
    teacher_scale: float = 1.0,
    student_softcap: float | None,
    teacher_softcap: float | None = None,
    return_metrics: bool,
    vocab_start: int | None,
) -> LogitsOptions:
    """Checks the arguments that are no tensors."""
    temperature = scalars.option("temperature", temperature)
    kd_weight = scalars.option("kd_weight", kd_weight)
    ce_weight = scalars.option("ce_weight", ce_weight)
    reduction = scalars.option("reduction", reduction)
    if ce_weight != 0 and not with_labels:
        raise ValueError(f"ce_weight is {ce_weight}, which needs labels, and labels is None")
    if scalars.option("temperature_squared", temperature_squared):
        kd_weight = scalars.number(
            "kd_weight * temperature ** 2", kd_weight * temperature * temperature
        )
    if normalizer is not None and reduction == "mean":
        normalizer = scalars.number("normalizer", normalizer, positive=True)
        kd_weight = scalars.number("kd_weight / normalizer", kd_weight / normalizer)
        ce_weight = scalars.number("ce_weight / normalizer", ce_weight / normalizer)
        reduction = "sum"
    columns = columns_of(processes, vocab_start, vocab_size, *widths)
    return LogitsOptions(
        *kernel,
        temperature,
        kd_weight,
        ce_weight,
        scalars.option("ignore_index", ignore_index),
        reduction,
        columns.vocab,
        scalars.option("student_scale", student_scale),
        scalars.option("student_softcap", student_softcap),
        scalars.option("teacher_scale", teacher_scale),
        scalars.option("teacher_softcap", teacher_softcap),
        scalars.option("return_metrics", return_metrics),
        columns.group,
        columns.rank,
        columns.processes,
        columns.vocab_start,
        columns.vocab_size,
    )


_cached_options = functools.lru_cache(maxsize=256, typed=True)(_options)


def _remembered(*arguments: Any, **options: Any) -> LogitsOptions:
    """:func:`_options`, checked once for the same arguments."""
    if not torch.compiler.is_compiling():  # which sees through the cache, and warns
        try:
            return _cached_options(*arguments, **options)
        except TypeError:  # of an argument without a hash, or raised anew below
            pass
    return _options(*arguments, **options)


#: What holds a tensor and is passed in its place, by the last word of the argument's name.
_ATTRIBUTES = {"logits": "logits", "hidden": "last_hidden_state", "weight": "weight"}


def _not_a_tensor(name: str, value: Any) -> TypeError:
    message = f"{name} is a {type(value).__name__}, expected a torch.Tensor"
    attribute = _ATTRIBUTES.get(name.split("_")[-1], "")
    if isinstance(getattr(value, attribute, None), Tensor):
        message += f": pass its .{attribute}"
    return TypeError(message)


def strided(name: str, tensor: Tensor) -> None:
    """Raises for sparse and nested tensors, whose memory kernels cannot read."""
    if tensor.is_nested or tensor.layout != torch.strided:
        kind = "a nested tensor" if tensor.is_nested else tensor.layout
        raise TypeError(f"{name} is {kind}, expected a plain tensor, of layout torch.strided")


def float_tensor(name: str, tensor: Tensor) -> None:
    """Raises for what is no tensor of a dtype that losses take."""
    if not isinstance(tensor, Tensor):
        raise _not_a_tensor(name, tensor)
    if tensor.dtype not in DTYPES:
        raise TypeError(f"{name} is {tensor.dtype}, expected float32, bfloat16, float16 or float64")
    strided(name, tensor)
    if is_distributed(tensor):
        raise TypeError(
            f"{name} is a DTensor, expected a plain tensor: gather it with full_tensor(), or where "
            "it shards the vocabulary pass to_local() and group=; a head that FSDP shards is "
            "reached through LinearKDHead or LinearSparseKDHead, inside a call of what FSDP wraps"
        )


def logits_tensor(name: str, logits: Tensor, *, least: int = 1) -> None:
    """Raises unless it is ``(..., vocab)`` with vocab >= least, contiguous within rows."""
    float_tensor(name, logits)
    if logits.dim() == 0:
        raise ValueError(f"{name} has shape (), expected (..., vocab)")
    if logits.shape[-1] < least:
        raise ValueError(
            f"{name} has shape {tuple(logits.shape)}, expected a vocabulary of at least 1"
        )
    if logits.stride(-1) != 1 and logits.shape[-1] > 1 and logits.numel() > 0:
        raise ValueError(
            f"{name} has stride {logits.stride(-1)} in its last dimension, expected 1: pass "
            f"{name}.contiguous()"
        )


def logits(student: Tensor, teacher: Tensor, *, shards: bool) -> torch.Size:
    """Checks the two tensors of :func:`kdkernels.kd_loss`; returns their leading shape."""
    least = 0 if shards else 1
    logits_tensor("student_logits", student, least=least)
    logits_tensor("teacher_logits", teacher, least=least)
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


def inplace_grad(value: bool, student: Tensor) -> None:
    """Raises where logits are used elsewhere and so must not be overwritten; also for a DTensor."""
    if not scalars.option("inplace_grad", value):
        return
    if not student.requires_grad or not torch.is_grad_enabled():
        return
    if student.is_leaf:
        raise ValueError(
            "inplace_grad: student_logits is a leaf, whose data would be overwritten; "
            "expected the output of an operation"
        )
    if torch.compiler.is_compiling():
        torch.ops.kdkernels.no_view_of_a_leaf.default(student)
    else:
        _no_view_of_a_leaf(student)


def _no_view_of_a_leaf(student: Tensor) -> None:
    base = student._base
    if base is not None and base.is_leaf and base.requires_grad:
        raise ValueError(
            "inplace_grad: student_logits is a view of a leaf that requires grad; "
            "expected the output of an operation"
        )


# Under torch.compile by an operator: tensors of a graph do not know their base.
library.define("no_view_of_a_leaf(Tensor student) -> ()")
library.impl("no_view_of_a_leaf", _no_view_of_a_leaf, "CompositeImplicitAutograd")


def _per_token(
    name: str,
    tensor: Tensor,
    lead: torch.Size,
    student: Tensor,
    dtypes: tuple[torch.dtype, ...],
) -> None:
    if not isinstance(tensor, Tensor):
        raise _not_a_tensor(name, tensor)
    _plain(name, tensor)
    if tensor.dtype not in dtypes:
        expected = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        if not (tensor.is_floating_point() or tensor.is_complex()):
            cast = "long" if torch.int64 in dtypes else "bool"  # token ids; a mask of 0 and 1
            expected += f": pass {name}.{cast}()"
        raise TypeError(f"{name} is {tensor.dtype}, expected {expected}")
    if tensor.shape != lead:
        expected = str(tuple(lead))
        if lead and tensor.shape == (*lead[:-1], lead[-1] + 1):
            expected += f": with logits[..., :-1, :] pass {name}[..., 1:]"
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {expected}")
    if tensor.device != student.device:
        raise ValueError(f"{name} is on {tensor.device}, expected {student.device}")


def _plain(name: str, tensor: Tensor) -> None:
    if is_distributed(tensor):
        raise TypeError(f"{name} is a DTensor, expected a plain tensor: pass full_tensor()")
    strided(name, tensor)


def _normalizer_tensor(normalizer: Tensor, student: Tensor) -> Tensor:
    _plain("normalizer", normalizer)
    if normalizer.is_complex() or normalizer.dtype == torch.bool:
        raise TypeError(f"normalizer is {normalizer.dtype}, expected a real dtype")
    if normalizer.dim() != 0:
        raise ValueError(f"normalizer has shape {tuple(normalizer.shape)}, expected a 0-d tensor")
    _constant("normalizer", normalizer)
    total = normalizer.to(torch.float32)
    if total.device != student.device and type(total) is Tensor and watchers.may_look(total):
        # Filled in on the device: copying it there would wait.
        return torch.full((), float(total), dtype=torch.float32, device=student.device)
    return total.to(student.device)


def _constant(name: str, tensor: Tensor) -> None:
    """Raises for a tensor that requires grad, as it would get none."""
    if tensor.requires_grad:
        raise ValueError(f"{name} requires grad, expected a constant: pass {name}.detach()")
