"""The loss of logits: checks, then the chosen backend."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, overload

from torch import Tensor

from . import autograd, checks, reference
from .divergences import Divergence
from .dtensors import Where, is_distributed, local_tensors, overwritten
from .options import Metrics, with_metrics

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from typing_extensions import Unpack

    from .keywords import KDKeywords


@overload
def kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    return_metrics: Literal[False] = ...,
    **keywords: Unpack[KDKeywords],
) -> Tensor: ...


@overload
def kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    return_metrics: Literal[True],
    **keywords: Unpack[KDKeywords],
) -> tuple[Tensor, Metrics]: ...


@overload
def kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    return_metrics: bool,
    **keywords: Unpack[KDKeywords],
) -> Tensor | tuple[Tensor, Metrics]: ...


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
    group: ProcessGroup | None = None,
    vocab_start: int | None = None,
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
            padding. A constant: it must not require grad. A float64 teacher, NumPy's default, sends
            the whole call to the reference backend, many times slower: cast it first.
        divergence: a name (``forward_kl``, ``reverse_kl``, ``jsd``, ``skew_forward_kl``,
            ``skew_reverse_kl``, ``symmetric_kl``, ``tvd``, ``soft_cross_entropy``) or an instance
            such as ``JSD(beta=0.1)`` or ``AlphaBeta(0.2, 0.7)``;
            :func:`kdkernels.register_divergence` adds others.
        temperature: T > 0, dividing both logits in the divergence (not in the hard-label term).
        labels: ``(...)`` int64 token ids, already shifted. Rows equal to ``ignore_index`` drop out
            of both terms and of the mean. A label outside the vocabulary raises on the CPU; on a
            GPU, where checking would wait for the device, it makes its row NaN.
        kd_weight: weight of the divergence; at 0 it is not evaluated.
        ce_weight: weight of the cross-entropy against ``labels``; at 0 it is not evaluated.
        ignore_index: the label of rows to leave out.
        token_weight: ``(...)``, bool or of a logits dtype, constant. A row of weight 0 gives
            exactly 0 loss and gradient whatever its logits hold.
        reduction: ``"mean"``, the weighted sum over ``normalizer``; ``"sum"``; or ``"none"``, per
            token.
        normalizer: a positive number or 0-d tensor for ``"mean"``, such as the number of tokens of
            an accumulated batch; the other reductions ignore it. Default: the sum of the kept rows'
            weights (1 if not positive).
            Under torch.compile each new float compiles anew; an int or a tensor does not.
        temperature_squared: multiply the divergence by T^2 (Hinton et al. 2015), so that its
            gradient keeps its size as T grows.
        vocab_size: the number of leading columns that take part; the others get gradient 0.
            Default: the smaller of the two widths; with ``group``, of all shards together.
        student_scale: multiplies the student's logits before softcap and temperature.
        teacher_scale: the same for the teacher.
        student_softcap: cap of ``cap * tanh(x / cap)`` on the scaled student logits, None for none.
            A logit of -inf stays -inf, one of inf becomes the cap.
        teacher_softcap: the same for the teacher.
        group: a process group over which the vocabulary is sharded, as tensor-parallel heads leave
            it: both logits hold this process's columns, all other arguments are the same
            everywhere, and so is the loss. DTensors sharded over their last dimension say so
            themselves.
        vocab_start: the first column of this process's shard in the whole vocabulary, of
            ``vocab_size``; shards follow each other in the order of ranks. Default: rank * width,
            which needs shards of equal width.
        inplace_grad: the gradient overwrites ``student_logits``, whose content is undefined
            afterwards; saves one (tokens, vocab) tensor. Not for leaves (a compiled graph checks
            this only while it is compiled), and rows have to lie at two strides at most, as those
            of a slice do.
        return_metrics: also return a dict of detached float32 tensors ``(...)``: ``divergence``
            (before weights and T^2), ``cross_entropy`` (None without labels), ``teacher_entropy``,
            ``student_entropy``, ``agreement`` (1.0 where both have the same top token). All are 0
            in rows that take no part.
        backend: ``"auto"``, ``"cpu"``, ``"cuda"``, ``"triton"`` or ``"reference"``. ``"auto"``
            takes the first that can serve the call: on a GPU of the last three, in this order, on a
            CPU ``"cpu"`` or ``"reference"``. A named one never falls back.

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
        >>> teacher = torch.tensor([[1.0, 3.0, 0.0]])
        >>> loss = kd_loss(student, teacher, temperature=2.0)
        >>> loss.backward()
        >>> round(loss.item(), 4), [round(g, 4) for g in student.grad[0].tolist()]
        (0.9153, [0.5505, -0.6427, 0.0922])
    """
    where, given = Where(group, vocab_start, vocab_size), student_logits
    if is_distributed(student_logits) or is_distributed(teacher_logits):
        (student_logits, teacher_logits, labels, token_weight), where = local_tensors(
            (
                ("student_logits", student_logits, -1),
                ("teacher_logits", teacher_logits, -1),
                ("labels", labels, None),
                ("token_weight", token_weight, None),
            ),
            where,
        )
        checks.inplace_grad(inplace_grad, given)
    lead = checks.logits(student_logits, teacher_logits, shards=where.group is not None)
    checks.inplace_grad(inplace_grad, student_logits)
    call = checks.call(
        student_logits,
        teacher_logits,
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
        vocab_size=where.vocab_size,
        student_scale=student_scale,
        teacher_scale=teacher_scale,
        student_softcap=student_softcap,
        teacher_softcap=teacher_softcap,
        inplace_grad=inplace_grad,
        return_metrics=return_metrics,
        backend=backend,
        group=where.group,
        vocab_start=where.vocab_start,
    )
    constants = teacher_logits, labels, call.token_weight, call.normalizer
    if call.backend == "reference":
        loss, stacked = reference.kd_loss(student_logits, *constants, call.divergence, call.options)
    else:
        loss, stacked = autograd.logits_loss(
            student_logits, constants, call.backend, inplace_grad, call.options
        )
    if inplace_grad and given is not student_logits:
        overwritten(given)
    return with_metrics(loss, stacked, labels) if return_metrics else loss
