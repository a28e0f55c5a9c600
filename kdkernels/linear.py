"""The fused-linear level: hidden states and LM heads in, loss and gradients out."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from . import autograd, checks, reference
from .divergences import Divergence
from .functional import Metrics, with_metrics
from .options import LinearOptions


def linear_kd_loss(
    student_hidden: Tensor | Sequence[Tensor],
    student_weight: Tensor | Sequence[Tensor],
    teacher_hidden: Tensor | np.ndarray | None = None,
    teacher_weight: Tensor | None = None,
    *,
    teacher_logits: Tensor | np.ndarray | None = None,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    row_index: Tensor | None = None,
    chunk_bytes: int | None = None,
    logits_dtype: torch.dtype | None = None,
    divergence: str | Divergence = "forward_kl",
    temperature: float = 1.0,
    labels: Tensor | None = None,
    kd_weight: float = 1.0,
    ce_weight: float = 0.0,
    ignore_index: int = -100,
    token_weight: Tensor | None = None,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    temperature_squared: bool = True,
    vocab_size: int | None = None,
    student_scale: float = 1.0,
    teacher_scale: float = 1.0,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    return_metrics: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Metrics]:
    """Distillation loss between two LM heads; their logits never exist beyond a chunk of rows.

    Means ``kd_loss(F.linear(student_hidden, student_weight, student_bias),
    F.linear(teacher_hidden, teacher_weight, teacher_bias), ...)``. The gradients of hidden states,
    weight and bias are computed in the forward: four matrix products in all. With
    ``reduction="none"`` the backward computes the two products of the logits again, since a weight
    gradient can't be weighted per token afterwards.

    Under autocast both heads run in its dtype, as :func:`torch.nn.functional.linear` does.

    Args:
        student_hidden: ``(..., hidden_s)``, float32, bfloat16 or float16 (float64 runs on the
            reference backend).
        student_weight: ``(vocab_s, hidden_s)``, such as ``model.lm_head.weight``. No work is done
            for its gradient where it needs none, nor for that of ``student_hidden``. Sequences of
            hidden states and weights mean the sum of their products, such as a frozen head and a
            low-rank adapter. A head that FSDP, DeepSpeed or an adapter wraps is best reached
            through :class:`kdkernels.LinearKDHead`.
        teacher_hidden: ``(..., hidden_t)``, the same leading shape; a tensor or NumPy array on the
            student's device or, also memory-mapped, on the host, from where it's streamed by
            blocks; of any floating dtype, cast to that of the weight. A constant, as all of the
            teacher: it must not require grad.
        teacher_weight: ``(vocab_t, hidden_t)``, on the student's device.
        teacher_logits: ``(..., vocab_t)`` instead of hidden states and weight, also on the host.
        student_bias: ``(vocab_s,)``.
        teacher_bias: ``(vocab_t,)``.
        row_index: int64 ``(kept,)`` positions in the flattened leading shape, increasing; on the
            host. Other rows take no part, as if ignored, and cost nothing. On a CPU rows that
            labels or weights mask cost nothing anyway; on a GPU finding them would wait for it.
        chunk_bytes: what both models' logits may take at a time. Default: on a GPU 1 GiB; on a CPU
            a quarter of all of them, but at least 128 rows and at most 1 GiB. With a 16-bit weight
            whose gradient is needed, more than one chunk takes ``4 * vocab_s * hidden_s`` bytes
            for float32 sums besides, or the student's logits stay whole where that takes less.
        logits_dtype: ``torch.float32`` keeps the logits of 16-bit heads in float32, for a lower
            floor of the loss. Default: the dtype of the product. Not for float16.
        divergence: this and the options below as in :func:`kdkernels.kd_loss`.
        temperature: see there.
        labels: see there.
        kd_weight: see there.
        ce_weight: see there.
        ignore_index: see there.
        token_weight: see there.
        reduction: see there.
        normalizer: see there.
        temperature_squared: see there.
        vocab_size: see there.
        student_scale: see there.
        teacher_scale: see there.
        student_softcap: see there.
        teacher_softcap: see there.
        return_metrics: see there.
        backend: see there; ``"reference"`` computes all logits at once.

    Returns:
        As :func:`kdkernels.kd_loss`.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: an argument out of its range, or a backend that cannot serve the call.
        RuntimeError: in a second backward through the same loss, or with ``create_graph``.

    Example:
        >>> import torch
        >>> from kdkernels import linear_kd_loss
        >>> student_head, teacher_head = torch.eye(3, 2).requires_grad_(), torch.eye(3)
        >>> student, teacher = torch.tensor([[2.0, 1.0]]), torch.tensor([[1.0, 2.0, 0.0]])
        >>> loss = linear_kd_loss(student, student_head, teacher, teacher_head, temperature=2.0)
        >>> loss.backward()
        >>> round(loss.item(), 4), student_head.grad.shape
        (0.3986, torch.Size([3, 2]))
    """
    hidden, weight = terms(student_hidden), terms(student_weight)
    lead, device = check_student(hidden, weight, student_bias)
    teacher_hidden = _as_tensor("teacher_hidden", teacher_hidden)
    teacher_logits = _as_tensor("teacher_logits", teacher_logits)
    teacher = teacher_hidden, teacher_weight, teacher_bias, teacher_logits
    teacher_dtype, teacher_vocab = _check_teacher(*teacher, lead, device)
    _check_row_index(row_index, lead)
    chunk_bytes = checks.option("chunk_bytes", chunk_bytes)
    student_dtype = product_dtype(weight[0])
    check_logits_dtype(logits_dtype, student_dtype)
    # Logits without rows: their dtype, device and width are checked.
    student_like = weight[0].new_empty(0, weight[0].shape[0], dtype=logits_dtype or student_dtype)
    teacher_like = student_like.new_empty(
        0,
        teacher_vocab,
        dtype=teacher_dtype if teacher_logits is not None else logits_dtype or teacher_dtype,
    )
    call = checks.call(
        student_like,
        teacher_like,
        lead,
        divergence=divergence,
        temperature=temperature,
        labels=labels,
        kd_weight=kd_weight,
        ce_weight=ce_weight,
        ignore_index=ignore_index,
        token_weight=token_weight,
        reduction=reduction,
        normalizer=normalizer,
        temperature_squared=temperature_squared,
        vocab_size=vocab_size,
        student_scale=student_scale,
        teacher_scale=teacher_scale,
        student_softcap=student_softcap,
        teacher_softcap=teacher_softcap,
        inplace_grad=False,
        return_metrics=return_metrics,
        backend=backend,
    )
    if call.backend == "reference":
        token_weight = _only(row_index, call.token_weight, lead, device)
        s = logits_of(hidden, weight, student_bias, logits_dtype)
        t = _teacher_logits(*teacher, logits_dtype, device)
        loss, stacked = reference.kd_loss(
            s, t, labels, token_weight, call.normalizer, call.divergence, call.options
        )
    else:
        wide = logits_dtype is not None
        linear = LinearOptions([], student_dtype, teacher_dtype, wide, chunk_bytes, call.backend)
        loss, stacked = autograd.linear_loss(
            hidden,
            weight,
            student_bias,
            teacher,
            (labels, call.token_weight),
            call.normalizer,
            row_index,
            linear,
            call.options,
        )
    return with_metrics(loss, stacked, labels) if return_metrics else loss


def check_logits_dtype(logits_dtype: torch.dtype | None, student_dtype: torch.dtype) -> None:
    """Checks it beside the dtype of the products."""
    checks.option("logits_dtype", logits_dtype)
    if logits_dtype is not None and student_dtype == torch.float16:
        raise ValueError(
            "logits_dtype is torch.float32, expected None where the student is float16: its "
            "gradients need the scale that float16 logits carry"
        )


def logits_of(
    hidden: list[Tensor], weight: list[Tensor], bias: Tensor | None, dtype: torch.dtype | None
) -> Tensor:
    """The sum of products as PyTorch computes it; the definition of what the operator computes."""
    if dtype is not None:
        hidden, weight = [h.to(dtype) for h in hidden], [w.to(dtype) for w in weight]
        bias = None if bias is None else bias.to(dtype)
    logits = F.linear(hidden[0], weight[0], bias)
    for h, w in zip(hidden[1:], weight[1:], strict=True):
        logits = logits + F.linear(h, w)
    return logits


def _teacher_logits(
    hidden: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    logits: Tensor | None,
    dtype: torch.dtype | None,
    device: torch.device,
) -> Tensor:
    if logits is not None:
        return logits.to(device)
    assert hidden is not None
    assert weight is not None
    with torch.no_grad():
        return logits_of([hidden.to(device, weight.dtype)], [weight], bias, dtype)


def _only(
    row_index: Tensor | None, token_weight: Tensor | None, lead: torch.Size, device: torch.device
) -> Tensor | None:
    """The token weights, 0 outside the index."""
    if row_index is None:
        return token_weight
    kept = torch.zeros(lead.numel(), dtype=torch.bool, device=device)
    kept = kept.index_fill(0, row_index.to(device), True).view(lead)
    return kept if token_weight is None else torch.where(kept, token_weight, 0)


def terms(value: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """One tensor or several as a list."""
    return list(value) if isinstance(value, Sequence) else [value]


def _as_tensor(name: str, value: Tensor | np.ndarray | None) -> Tensor | None:
    if not isinstance(value, np.ndarray):
        return value
    try:
        with warnings.catch_warnings():  # a read-only file stays so: it is only read
            warnings.simplefilter("ignore", UserWarning)
            return torch.from_numpy(value)
    except (TypeError, ValueError) as error:  # of its dtype, byte order or negative strides
        raise type(error)(f"{name} is an array that torch cannot read: {error}") from None


def _autocast(device: str) -> bool:
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def product_dtype(weight: Tensor) -> torch.dtype:
    """What F.linear would compute in."""
    if weight.dtype != torch.float64 and _autocast(weight.device.type):
        return torch.get_autocast_dtype(weight.device.type)
    return weight.dtype


def check_student(
    hidden: list[Tensor], weight: list[Tensor], bias: Tensor | None
) -> tuple[torch.Size, torch.device]:
    """Checks hidden states and heads; returns their leading shape and device."""
    if not hidden or len(hidden) != len(weight):
        raise ValueError(
            f"student_weight has {len(weight)} tensors, expected as many as student_hidden, "
            f"{len(hidden)}, and at least one"
        )
    for h, w in zip(hidden, weight, strict=True):
        _check_head("student", h, w)
        # Autocast casts both, save for float64.
        cast = _autocast(w.device.type) and torch.float64 not in (h.dtype, w.dtype)
        if h.dtype != w.dtype and not cast:
            raise TypeError(
                f"student_hidden is {h.dtype}, expected the dtype of student_weight, {w.dtype}"
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


def _check_teacher(
    hidden: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    logits: Tensor | None,
    lead: torch.Size,
    device: torch.device,
) -> tuple[torch.dtype, int]:
    """Returns the dtype of the teacher's products, or of its logits, and its vocabulary."""
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
            "that is partitioned outside its module's call is reached through LinearKDHead"
        )
    if weight.shape[0] == 0:
        raise ValueError(f"{model}_weight has shape {tuple(weight.shape)}, a vocabulary of 0")
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
    if bias.dtype != weight.dtype and not _autocast(weight.device.type):
        raise TypeError(f"{name} is {bias.dtype}, expected {weight.dtype}, that of the weight")


def _check_row_index(row_index: Tensor | None, lead: torch.Size) -> None:
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
    if torch.compiler.is_compiling() or row_index.numel() == 0:
        return
    first, last = int(row_index[0]), int(row_index[-1])
    if first < 0 or last >= lead.numel() or not bool((row_index.diff() > 0).all()):
        raise ValueError(
            f"row_index goes from {first} to {last}, expected increasing positions of "
            f"{lead.numel()} rows"
        )
