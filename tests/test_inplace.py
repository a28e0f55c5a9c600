"""``inplace_grad``: what it overwrites, and what it refuses."""

from __future__ import annotations

import pytest
import torch

import kdkernels
from kdkernels.backends.rows import check_in_place

from .cases import correlated_pair, labels_for
from .harness import Backend, loss_of, move, run

VOCAB = 517


def pair(kernel: Backend, *shape: int):
    """Student and teacher on the kernel's device, where they can be overwritten."""
    return tuple(move(x, kernel.device) for x in correlated_pair(*shape))


def computed(student):
    """A student that is the result of a computation, and its leaf."""
    leaf = student.clone().requires_grad_()
    return leaf, leaf * 1


def test_writes_into_the_student(kernel):
    student, teacher = pair(kernel, 3, VOCAB)
    expected = run(kernel, student, teacher)
    leaf, logits = computed(student)
    loss = loss_of(kernel, logits, teacher, inplace_grad=True)
    assert torch.equal(logits.detach().cpu(), expected.gradient)
    loss.backward()
    assert torch.equal(leaf.grad.cpu(), expected.gradient)


def test_writes_the_scaled_gradient(kernel):
    student, teacher = pair(kernel, 3, VOCAB)
    expected = run(kernel, student, teacher, grad_output=torch.tensor(3.0))
    leaf, logits = computed(student)
    (3 * loss_of(kernel, logits, teacher, inplace_grad=True)).backward()
    assert torch.equal(leaf.grad.cpu(), expected.gradient)


def test_bumps_the_version(kernel):
    student, teacher = pair(kernel, 3, VOCAB)
    _, logits = computed(student)
    version = logits._version
    loss_of(kernel, logits, teacher, inplace_grad=True)
    assert logits._version > version


@pytest.mark.parametrize("consumer", ["exp", "square", "log_softmax", "kd_loss before"])
def test_another_consumer_fails_loudly(kernel, consumer):
    student, teacher = pair(kernel, 3, VOCAB)
    leaf = student.clone().requires_grad_()
    logits = leaf.exp() if consumer == "exp" else leaf * 1
    if consumer == "square":
        other = logits.square().sum()  # saved its input
    elif consumer == "log_softmax":
        other = (logits * logits.log_softmax(-1)).sum()
    elif consumer == "kd_loss before":
        other = loss_of(kernel, logits, teacher, inplace_grad=True)
    else:
        other = logits.sum() * 0  # exp saved its output, which is the student
    loss = loss_of(kernel, logits, teacher, inplace_grad=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (loss + other).backward()


def test_views_of_computed_logits(kernel):
    student, teacher = pair(kernel, 2, 5, VOCAB)
    expected = run(kernel, student[:, :-1], teacher[:, 1:])
    leaf, logits = computed(student)
    loss_of(kernel, logits[:, :-1], teacher[:, 1:], inplace_grad=True).backward()
    assert torch.equal(leaf.grad[:, :-1].cpu(), expected.gradient)
    assert not leaf.grad[:, -1].any()


def test_no_grad_writes_nothing(kernel):
    student, teacher = pair(kernel, 3, VOCAB)
    before = student.clone()
    loss_of(kernel, student, teacher, inplace_grad=True)  # needs no gradient
    assert torch.equal(student, before)
    _, logits = computed(student)
    with torch.no_grad():
        loss_of(kernel, logits, teacher, inplace_grad=True)
    assert torch.equal(logits.detach(), before)


def refused(kernel, logits, teacher, match, error=ValueError, **options):
    """Raises, and writes nothing."""
    before = logits.detach().clone()
    version = logits._version
    with pytest.raises(error, match=match):
        loss_of(kernel, logits, teacher, inplace_grad=True, **options)
    assert torch.equal(logits.detach(), before)
    assert logits._version == version


def test_refuses_leaves(kernel):
    student, teacher = pair(kernel, 3, VOCAB)
    refused(kernel, student.requires_grad_(), teacher, "inplace_grad.*student_logits is a leaf")


def test_a_leaf_where_nothing_is_written(kernel):
    student, teacher = pair(kernel, 3, VOCAB)
    with torch.no_grad():
        assert loss_of(kernel, student.requires_grad_(), teacher, inplace_grad=True) > 0


def test_refuses_views_of_leaves(kernel):
    student, teacher = pair(kernel, 3, VOCAB)
    leaf = student.requires_grad_()
    for view in (leaf[:], leaf.view(3, 1, VOCAB).squeeze(1), leaf[:, :500][:, :400]):
        other = teacher[:, : view.shape[-1]]
        refused(kernel, view, other, "inplace_grad.*student_logits is a view of a leaf")


def test_refuses_memory_that_overlaps_itself(kernel):
    _, teacher = pair(kernel, 3, VOCAB)
    leaf = teacher[:1].clone().requires_grad_()
    computed_row = leaf * 1
    refused(kernel, computed_row.expand(3, VOCAB), teacher, "inplace_grad.*student_logits.*overlap")
    flat = torch.zeros(VOCAB + 2, device=kernel.device).requires_grad_() * 1
    refused(kernel, flat.as_strided((3, VOCAB), (1, 1)), teacher, "inplace_grad.*overlap")


@pytest.mark.parametrize(
    "strides",
    [
        *((1554, 518), (1551, 517), (1550, 517), (1033, 517), (516, 2000), (1553, 518)),
        *((517, 1034), (517, 1033), (518, 1034), (600, 1200), (2000, 517), (2000, 516)),
    ],
    ids=str,
)
def test_memory_overlaps_itself_where_a_number_has_two_places(strides):
    memory = torch.arange(6000)
    places = memory.as_strided((2, 3, VOCAB), (*strides, 1))
    if places.unique().numel() == places.numel():
        check_in_place(places)
    else:
        with pytest.raises(ValueError, match="overlap themselves"):
            check_in_place(places)


def test_refuses_memory_shared_with_the_teacher(kernel):
    student, _ = pair(kernel, 3, VOCAB)
    _, logits = computed(student)
    refused(kernel, logits, logits.detach(), "inplace_grad.*share their memory")
    _, both = computed(torch.cat([student, student]))
    refused(kernel, both[:3], both[3:].detach(), "inplace_grad.*share their memory")


def test_refuses_labels_before_it_writes(kernel):
    if not kernel.checks_labels:
        pytest.skip("a label outside the vocabulary is NaN on a device: test_gpu.py")
    student, teacher = pair(kernel, 3, VOCAB)
    labels = labels_for(3, vocab=VOCAB)
    labels[2] = VOCAB
    _, logits = computed(student)
    refused(kernel, logits, teacher, f"labels.*{VOCAB}", labels=labels, ce_weight=1.0)


def test_refuses_rows_at_three_strides(kernel):
    student, teacher = pair(kernel, 2, 3, 2, VOCAB)
    leaf = student.permute(2, 1, 0, 3).contiguous().requires_grad_()
    logits = (leaf * 1).permute(2, 1, 0, 3)
    refused(kernel, logits, teacher, "inplace_grad.*student_logits.*strides")


def test_refused_by_the_reference():
    student, teacher = correlated_pair(3, VOCAB)
    _, logits = computed(student)
    with pytest.raises(ValueError, match=r"reference.*cannot overwrite student_logits"):
        kdkernels.kd_loss(logits, teacher, inplace_grad=True, backend="reference")
