"""Checks of hidden states and heads; errors name the argument and what was got."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from . import checks, scalars, watchers


def terms(value: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """A tensor, or a sequence of tensors, as a list."""
    return list(value) if isinstance(value, Sequence) else [value]


def as_tensor(name: str, value: Tensor | np.ndarray | None) -> Tensor | None:
    """A NumPy array as a tensor that shares its memory; anything else unchanged."""
    if not isinstance(value, np.ndarray):
        return value
    if torch.compiler.is_compiling():  # Dynamo cannot trace catch_warnings
        return torch.from_numpy(value)
    try:
        with warnings.catch_warnings():  # a read-only file stays so: it is only read
            warnings.simplefilter("ignore", UserWarning)
            return torch.from_numpy(value)
    except (TypeError, ValueError) as error:  # of its dtype, byte order or negative strides
        raise type(error)(f"{name} is an array that torch cannot read: {error}") from None


def _autocast(device: torch.device) -> bool:
    return watchers.has_autocast(device) and torch.is_autocast_enabled(device.type)


def product_dtype(weight: Tensor) -> torch.dtype:
    """The dtype in which F.linear would compute."""
    if weight.dtype != torch.float64 and _autocast(weight.device):
        return torch.get_autocast_dtype(weight.device.type)
    return weight.dtype


def check_logits_dtype(logits_dtype: torch.dtype | None, student_dtype: torch.dtype) -> None:
    """Checks ``logits_dtype`` against the dtype of the products."""
    scalars.option("logits_dtype", logits_dtype)
    if logits_dtype is not None and student_dtype == torch.float16:
        raise ValueError(
            "logits_dtype is torch.float32, expected None where the student is float16: its "
            "gradients need the scale that float16 logits carry"
        )


def check_student(
    hidden: list[Tensor], weight: list[Tensor], bias: Tensor | None
) -> tuple[torch.Size, torch.device]:
    """Checks hidden states and heads; returns their leading shape and device."""
    if not hidden or len(hidden) != len(weight):
        message = (
            f"student_weight has {len(weight)} tensors, expected as many as student_hidden, "
            f"{len(hidden)}, and at least one"
        )
        if len(weight) == 1 and len(hidden) > 1:  # those of all layers
            message += ": the head takes a model's last hidden states, hidden_states[-1]"
        raise ValueError(message)
    for h, w in zip(hidden, weight, strict=True):
        _check_head("student", h, w)
        # Autocast casts both, save for float64.
        cast = _autocast(w.device) and torch.float64 not in (h.dtype, w.dtype)
        if h.dtype != w.dtype and not cast:
            raise TypeError(
                f"student_hidden is {h.dtype}, expected the dtype of student_weight, {w.dtype}: "
                "call under torch.autocast, which casts both, or cast one"
            )
        if h.shape[:-1] != hidden[0].shape[:-1] or w.shape[0] != weight[0].shape[0]:
            raise ValueError(
                f"student_hidden and student_weight of a later term have shapes {tuple(h.shape)} "
                f"and {tuple(w.shape)}, expected the leading shape and vocabulary of the first, "
                f"{tuple(hidden[0].shape[:-1])} and {weight[0].shape[0]}"
            )
        if h.device != weight[0].device or w.device != weight[0].device:
            raise ValueError(
                f"student_hidden is on {h.device} and student_weight on {w.device}, expected both "
                f"on {weight[0].device}"
            )
    _check_bias("student_bias", bias, weight[0])
    return hidden[0].shape[:-1], weight[0].device


def check_teacher(
    hidden: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    logits: Tensor | None,
    lead: torch.Size,
    device: torch.device,
) -> tuple[torch.dtype, int]:
    """Checks the teacher; returns the dtype of its products or logits, and its vocabulary."""
    if (hidden is None) == (logits is None):
        both = "neither is given" if hidden is None else "both are given"
        raise ValueError(f"teacher_hidden or teacher_logits: {both}, expected one of them")
    for name, tensor in (
        ("teacher_hidden", hidden),
        ("teacher_weight", weight),
        ("teacher_bias", bias),
        ("teacher_logits", logits),
    ):
        if isinstance(tensor, Tensor) and tensor.requires_grad:
            raise ValueError(
                f"{name} requires grad, expected a constant: freeze the teacher or pass "
                f"{name}.detach()"
            )
    if logits is not None:
        if weight is not None or bias is not None:
            raise ValueError(
                "teacher_weight or teacher_bias is given, expected neither beside teacher_logits"
            )
        checks.logits_tensor("teacher_logits", logits)
        _check_payload("teacher_logits", logits, lead, device)
        return logits.dtype, logits.shape[-1]
    assert hidden is not None
    if weight is None:
        raise ValueError(
            "teacher_weight is None, expected (vocab, hidden) beside teacher_hidden; logits are "
            "passed as teacher_logits="
        )
    _check_head("teacher", hidden, weight)
    if weight.device != device:
        raise ValueError(
            f"teacher_weight is on {weight.device}, expected the device of student_weight, {device}"
        )
    _check_bias("teacher_bias", bias, weight)
    _check_payload("teacher_hidden", hidden, lead, device)
    return product_dtype(weight), weight.shape[0]


def _check_payload(name: str, tensor: Tensor, lead: torch.Size, device: torch.device) -> None:
    if tensor.shape[:-1] != lead:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}, expected the leading shape of "
            f"student_hidden, {tuple(lead)}"
        )
    if tensor.device not in (device, torch.device("cpu")):
        raise ValueError(
            f"{name} is on {tensor.device}, expected the student's device, {device}, or cpu"
        )


def _check_head(model: str, hidden: Tensor, weight: Tensor) -> None:
    for name, tensor in ((f"{model}_hidden", hidden), (f"{model}_weight", weight)):
        checks.float_tensor(name, tensor)
    if hidden.dim() == 0:
        raise ValueError(f"{model}_hidden has shape (), expected (..., hidden)")
    if weight.dim() != 2:
        raise ValueError(
            f"{model}_weight has shape {tuple(weight.shape)}, expected (vocab, hidden); a head "
            "that is partitioned outside its module's call is reached through LinearKDHead or "
            "LinearSparseKDHead"
        )
    if weight.shape[0] == 0:
        raise ValueError(
            f"{model}_weight has shape {tuple(weight.shape)}, expected a vocabulary of at least 1"
        )
    if hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{model}_hidden has shape {tuple(hidden.shape)}, expected a last dimension of "
            f"{weight.shape[1]}, that of {model}_weight, {tuple(weight.shape)} for (vocab, hidden)"
        )


def _check_bias(name: str, bias: Tensor | None, weight: Tensor) -> None:
    if bias is None:
        return
    checks.float_tensor(name, bias)
    if bias.shape != weight.shape[:1]:
        raise ValueError(f"{name} has shape {tuple(bias.shape)}, expected ({weight.shape[0]},)")
    if bias.device != weight.device:
        raise ValueError(f"{name} is on {bias.device}, expected {weight.device}")
    if bias.dtype != weight.dtype and not _autocast(weight.device):
        raise TypeError(f"{name} is {bias.dtype}, expected {weight.dtype}, that of the weight")


def check_row_index(row_index: Tensor | None) -> None:
    """Checks its dtype, shape and device; of what it holds, see :func:`check_positions`."""
    if row_index is None:
        return
    if not isinstance(row_index, Tensor) or row_index.dtype != torch.int64:
        kind = row_index.dtype if isinstance(row_index, Tensor) else type(row_index).__name__
        raise TypeError(f"row_index is a {kind}, expected an int64 torch.Tensor")
    if row_index.dim() != 1 or row_index.device.type != "cpu":
        raise ValueError(
            f"row_index has shape {tuple(row_index.shape)} on {row_index.device}, expected (kept,) "
            "on cpu, so that using it does not wait for the device"
        )


def check_positions(row_index: Tensor, rows: int) -> None:
    """Checks that these are increasing positions of that many rows."""
    if row_index.numel() == 0:
        return
    first, last = int(row_index[0]), int(row_index[-1])
    if first < 0 or last >= rows or not bool((row_index.diff() > 0).all()):
        raise ValueError(
            f"row_index goes from {first} to {last}, expected increasing positions of {rows} rows"
        )
