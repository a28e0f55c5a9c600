"""The public functions: checks, then the chosen backend."""

from __future__ import annotations

import math
import numbers

import torch
from torch import Tensor

from . import autograd, backends, reference
from .divergences import Divergence, as_divergence
from .options import METRICS, REDUCTIONS, LogitsOptions

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

#: What ``return_metrics=True`` adds: per-token tensors of shape ``(...)``, None where undefined.
Metrics = dict[str, Tensor | None]


def kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
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
    inplace_grad: bool = False,
    return_metrics: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Metrics]:
    r"""Distillation loss between raw student and teacher logits, without materialised softmaxes.

    With p = softmax(teacher / T) and q = softmax(student / T), per token

    .. math:: kd\_weight \cdot T^2 \cdot D(p, q) + ce\_weight \cdot CE(student, label)

    The gradient is computed in the forward pass and is the only tensor saved for the backward.

    Args:
        student_logits: ``(..., vocab_s)``, float32, bfloat16 or float16 (float64 runs on the
            reference backend). Leading dimensions may have any strides, the last one is contiguous.
            Log-probabilities are logits too.
        teacher_logits: ``(..., vocab_t)``, the same leading shape, its own dtype and vocabulary
            padding. A constant: it must not require grad.
        divergence: a name (``forward_kl``, ``reverse_kl``, ``jsd``, ``skew_forward_kl``,
            ``skew_reverse_kl``, ``symmetric_kl``, ``tvd``, ``soft_cross_entropy``) or an instance
            such as ``JSD(beta=0.1)`` or ``AlphaBeta(0.2, 0.7)``;
            :func:`kdkernels.register_divergence` adds others.
        temperature: T > 0, dividing both logits in the divergence (not in the hard-label term).
        labels: ``(...)`` int64 token ids, already shifted. Rows equal to ``ignore_index`` drop out
            of both terms and of the mean. One outside the vocabulary raises on the CPU; on a GPU,
            where looking would wait for the device, it makes its row NaN.
        kd_weight: weight of the divergence; at 0 it is not evaluated.
        ce_weight: weight of the cross-entropy against ``labels``; at 0 it is not evaluated.
        ignore_index: the label of rows to leave out.
        token_weight: ``(...)``, bool or floating, constant. A row of weight 0 gives exactly 0 loss
            and gradient whatever its logits hold.
        reduction: ``"mean"``, the weighted sum over ``normalizer``; ``"sum"``; or ``"none"``, per
            token.
        normalizer: a positive number or 0-d tensor for ``"mean"``, such as the number of tokens of
            an accumulated batch. Default: the sum of the kept rows' weights (1 if not positive).
        temperature_squared: multiply the divergence by T^2 (Hinton et al. 2015), so that its
            gradient keeps its size as T grows.
        vocab_size: the number of leading columns that take part; the others get gradient 0.
            Default: the smaller of the two widths.
        student_scale: multiplies the student's logits before softcap and temperature.
        teacher_scale: the same for the teacher.
        student_softcap: cap of ``cap * tanh(x / cap)`` on the scaled student logits, None for none.
        teacher_softcap: the same for the teacher.
        inplace_grad: the gradient overwrites ``student_logits``, whose content is undefined
            afterwards; saves one (tokens, vocab) tensor. Not for leaves.
        return_metrics: also return a dict of detached float32 tensors ``(...)``: ``divergence``
            (before weights and T^2), ``cross_entropy`` (None without labels), ``teacher_entropy``,
            ``student_entropy``, ``agreement`` (1.0 where both have the same top token).
        backend: ``"auto"``, ``"cpu"``, ``"triton"`` or ``"reference"``. A named one never falls
            back.

    Returns:
        The loss, float32 (float64 for float64 logits), a scalar or ``(...)`` for ``"none"``; with
        ``return_metrics``, the pair of loss and metrics.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: an argument out of its range, or a backend that cannot serve the call.
        RuntimeError: in a second backward through the same loss, or with ``create_graph``.

    Example:
        >>> import torch
        >>> from kdkernels import kd_loss
        >>> student = torch.tensor([[2.0, 1.0, 0.0]], requires_grad=True)
        >>> teacher = torch.tensor([[1.0, 2.0, 0.0]])
        >>> loss = kd_loss(student, teacher, temperature=2.0)
        >>> loss.backward()
        >>> round(loss.item(), 4), [round(g, 4) for g in student.grad[0].tolist()]
        (0.3986, [0.3986, -0.3986, 0.0])
    """
    divergence = as_divergence(divergence)
    _check_logits(student_logits, teacher_logits)
    lead = student_logits.shape[:-1]
    _check_per_token("labels", labels, lead, student_logits, (torch.int64,))
    _check_per_token("token_weight", token_weight, lead, student_logits, (torch.bool, *_DTYPES))
    temperature = _number("temperature", temperature, positive=True)
    kd_weight = _number("kd_weight", kd_weight)
    ce_weight = _number("ce_weight", ce_weight)
    if ce_weight != 0 and labels is None:
        raise ValueError(f"ce_weight is {ce_weight}, which needs labels, and labels is None")
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index is a {type(ignore_index).__name__}, expected an int")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction is {reduction!r}, expected one of {', '.join(REDUCTIONS)}")
    if inplace_grad:
        _check_inplace(student_logits)
    if temperature_squared:
        kd_weight *= temperature * temperature
    if normalizer is not None and reduction == "mean":
        if isinstance(normalizer, Tensor):
            normalizer = _normalizer_tensor(normalizer, student_logits)
        else:
            normalizer = _number("normalizer", normalizer, positive=True)
            kd_weight, ce_weight, reduction = kd_weight / normalizer, ce_weight / normalizer, "sum"
            normalizer = None
    else:
        normalizer = None
    if token_weight is not None:
        token_weight = token_weight.detach()

    chosen = backends.choose(backend, student_logits, teacher_logits, divergence, inplace_grad)
    kernel, parameter_0, parameter_1 = (
        ("", 0.0, 0.0) if chosen == "reference" else divergence.kernel()
    )
    options = LogitsOptions(
        kernel,
        parameter_0,
        parameter_1,
        temperature,
        kd_weight,
        ce_weight,
        ignore_index,
        reduction,
        _vocab_size(vocab_size, student_logits.shape[-1], teacher_logits.shape[-1]),
        _number("student_scale", student_scale, positive=True),
        0.0
        if student_softcap is None
        else _number("student_softcap", student_softcap, positive=True),
        _number("teacher_scale", teacher_scale, positive=True),
        0.0
        if teacher_softcap is None
        else _number("teacher_softcap", teacher_softcap, positive=True),
        bool(return_metrics),
    )
    tensors = student_logits, teacher_logits, labels, token_weight, normalizer
    if chosen == "reference":
        loss, stacked = reference.kd_loss(*tensors, divergence, options)
    else:
        if token_weight is not None:
            token_weight = token_weight.to(torch.float32)
        loss, stacked = autograd.logits_loss(
            student_logits,
            teacher_logits,
            labels,
            token_weight,
            normalizer,
            chosen,
            inplace_grad,
            options,
        )
    if not return_metrics or stacked is None:
        return loss
    metrics: Metrics = dict(zip(METRICS, stacked.unbind(0), strict=True))
    if labels is None:
        metrics["cross_entropy"] = None
    return loss, metrics


def _number(name: str, value: float, *, positive: bool = False) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, numbers.Real)):
        raise TypeError(f"{name} is a {type(value).__name__}, expected a number")
    # Comparisons, since torch.compile cannot trace math.isfinite of a symbolic number.
    if not (0 if positive else -math.inf) < value < math.inf:
        kind = "positive and finite" if positive else "finite"
        raise ValueError(f"{name} is {value}, expected {kind}")
    return float(value)


def _check_logits(student: Tensor, teacher: Tensor) -> None:
    for name, logits in (("student_logits", student), ("teacher_logits", teacher)):
        if not isinstance(logits, Tensor):
            raise TypeError(f"{name} is a {type(logits).__name__}, expected a torch.Tensor")
        if logits.dtype not in _DTYPES:
            raise TypeError(
                f"{name} is {logits.dtype}, expected float32, bfloat16, float16 or float64"
            )
        if logits.dim() == 0:
            raise ValueError(f"{name} has shape (), expected (..., vocab)")
        if logits.shape[-1] > 1 and logits.stride(-1) != 1:
            raise ValueError(
                f"{name} has stride {logits.stride(-1)} in its last dimension, expected 1: pass "
                "logits whose vocabulary is contiguous"
            )
    if student.shape[:-1] != teacher.shape[:-1]:
        raise ValueError(
            f"teacher_logits has shape {tuple(teacher.shape)}, expected the leading shape of "
            f"student_logits, {tuple(student.shape[:-1])}"
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


def _check_per_token(
    name: str,
    tensor: Tensor | None,
    lead: torch.Size,
    student: Tensor,
    dtypes: tuple[torch.dtype, ...],
) -> None:
    if tensor is None:
        return
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
    if normalizer.dim() != 0:
        raise ValueError(f"normalizer has shape {tuple(normalizer.shape)}, expected a 0-d tensor")
    return normalizer.detach().to(device=student.device, dtype=torch.float32)


def _vocab_size(vocab_size: int | None, student: int, teacher: int) -> int:
    smaller = min(student, teacher)
    if vocab_size is None:
        if smaller == 0:
            raise ValueError("student_logits or teacher_logits has a vocabulary of 0")
        return smaller
    if isinstance(vocab_size, bool) or not isinstance(vocab_size, int):
        raise TypeError(f"vocab_size is a {type(vocab_size).__name__}, expected an int")
    if not 1 <= vocab_size <= smaller:
        raise ValueError(
            f"vocab_size is {vocab_size}, expected 1 to {smaller}: the logits have {student} "
            f"(student) and {teacher} (teacher) columns"
        )
    return vocab_size


def _check_inplace(student: Tensor) -> None:
    if not student.requires_grad:
        return
    if student.is_leaf:
        raise ValueError("inplace_grad: student_logits is a leaf, whose data would be overwritten")
    base = student._base
    if base is not None and base.is_leaf and base.requires_grad:
        raise ValueError("inplace_grad: student_logits is a view of a leaf that requires grad")
