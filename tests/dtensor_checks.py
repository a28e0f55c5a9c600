"""What test_process_groups.py runs in every one of its processes, of DTensors."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from kdkernels import kd_loss, linear_kd_loss, sparse_kd_loss

from .cases import correlated_pair, labels_for, normal
from .process_checks import OPTIONS, SIZE, distributed, run, same_when_compiled


def _replicated(x):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, distribute_tensor

    return distribute_tensor(x, init_device_mesh("cpu", (SIZE,)), [Replicate()])


def compiled_dtensors(rank):
    def loss_of(x, teacher, labels, inplace):
        return kd_loss(2 * x, teacher, labels=labels, ce_weight=0.5, inplace_grad=inplace)

    for rows, vocab, dynamic in ((7, 33, False), (6, 64, True)):
        student, teacher = correlated_pair(rows, vocab)
        leaf, shard = distributed(student, rank), distributed(teacher, rank)
        for inplace in (False, True):
            others = shard, labels_for(rows, vocab=vocab), inplace
            same_when_compiled(loss_of, leaf, *others, dynamic=dynamic)
    logprobs, indices = (_replicated(x) for x in teacher.log_softmax(-1).topk(5))
    same_when_compiled(lambda x: sparse_kd_loss(2 * x, indices, logprobs, inplace_grad=True), leaf)


def compiled_dtensors_in_place(rank):
    """What is overwritten may be the graph's input, which learns of it."""
    student, teacher = (distributed(x, rank) for x in correlated_pair(6, 64))

    def loss_of(x):
        return kd_loss(x[:-1], teacher[:-1], inplace_grad=True)

    compiled = torch.compile(loss_of, fullgraph=True, backend="aot_eager")
    leaf = student.requires_grad_()
    logits = 2 * leaf
    other = logits.square().sum()
    loss = compiled(logits)
    assert not torch.equal(logits.to_local(), 2 * leaf.to_local())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.backward()
    loss.backward()
    expected = student.detach().clone().requires_grad_()
    kd_loss(2 * expected[:-1], teacher[:-1]).backward()
    assert torch.equal(leaf.grad.to_local(), expected.grad.to_local())
    torch._dynamo.reset()  # a graph that is there does not ask again
    with pytest.raises(RuntimeError, match="inplace_grad: student_logits is a view of a leaf"):
        compiled(leaf)
    with pytest.raises(RuntimeError, match=r"student_logits .* expected Shard\(-1\)"):
        compiled(_replicated(normal(6, 64)))


def dtensors(rank):
    """They say how they are sharded, also unevenly, and down to a process without columns."""
    for vocab in (64, 33, 1):
        student, teacher = correlated_pair(6, vocab)
        options = {**OPTIONS, "labels": labels_for(6, vocab=vocab)}
        loss, gradient = run(kd_loss, [student], teacher, **options)
        mine = [distributed(student, rank)], distributed(teacher, rank)
        shared, shards = run(kd_loss, *mine, **options)
        torch.testing.assert_close(shared, loss, rtol=2e-6, atol=1e-7)
        torch.testing.assert_close(shards.full_tensor(), gradient, rtol=1e-5, atol=1e-7)


def sparse_dtensors(rank):
    for vocab in (33, 1):
        for backend in ("cpu", "reference"):
            options = {"backend": backend, "labels": labels_for(6, vocab=vocab), "ce_weight": 0.5}
            student, teacher = correlated_pair(6, vocab)
            listed = [_replicated(x) for x in teacher.log_softmax(-1).topk(min(5, vocab))]
            whole = student.clone().requires_grad_()
            loss = sparse_kd_loss(whole, listed[1].to_local(), listed[0].to_local(), **options)
            loss.backward()
            leaf = distributed(student, rank).requires_grad_()
            shared = sparse_kd_loss(leaf, listed[1], listed[0], return_metrics=True, **options)[0]
            shared.backward()
            torch.testing.assert_close(shared, loss, rtol=2e-6, atol=1e-7)
            torch.testing.assert_close(leaf.grad.full_tensor(), whole.grad, rtol=1e-5, atol=1e-7)


def dtensors_in_place(rank):
    """Their shards are overwritten, and they know: another consumer's backward fails."""
    student, teacher = correlated_pair(6, 64)
    shard = distributed(teacher, rank)
    logprobs, indices = teacher.log_softmax(-1).topk(5)
    losses = [
        lambda x, **options: kd_loss(x, shard, **options),
        lambda x, **options: kd_loss(x[:-1], shard[:-1], **options),
        lambda x, **options: sparse_kd_loss(x, indices, logprobs, **options),
    ]

    def of_shards(x, **options):  # as plain tensors, which the DTensor doesn't learn of
        return kd_loss(x.to_local(), shard.to_local(), group=dist.group.WORLD, **options)

    for loss_of in (*losses, of_shards):
        gradients = []
        for inplace in (False, True):
            leaf = distributed(student, rank).requires_grad_()
            logits = 2 * leaf
            loss_of(logits, inplace_grad=inplace).backward()
            assert torch.equal(logits.to_local(), 2 * leaf.to_local()) != inplace
            gradients.append(leaf.grad.to_local())
        assert torch.equal(*gradients)

    for loss_of in losses:
        logits = 2 * leaf
        other = logits.square().sum()
        loss_of(logits, inplace_grad=True)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            other.backward()

        logits = 2 * leaf
        other = logits.square().sum()
        with torch.no_grad():
            loss_of(logits, inplace_grad=True)  # overwrites nothing
        other.backward()


def dtensors_on_a_mesh_of_two_dimensions(rank):
    """Replicated over one of them."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (1, SIZE))
    student, teacher = correlated_pair(6, 64)
    sharded = (distribute_tensor(x, mesh, [Replicate(), Shard(1)]) for x in (student, teacher))
    torch.testing.assert_close(kd_loss(*sharded), kd_loss(student, teacher), rtol=2e-6, atol=0)


def refused_dtensors(rank):
    whole = correlated_pair(6, 64)
    student, teacher = (distributed(x, rank) for x in whole)
    with pytest.raises(TypeError, match="teacher_logits is a plain tensor"):
        kd_loss(student, teacher.to_local())
    with pytest.raises(ValueError, match=r"teacher_logits is a DTensor .*Replicate"):
        kd_loss(student, _replicated(whole[1]))
    with pytest.raises(ValueError, match=r"student_logits .* expected Shard\(-1\)"):
        kd_loss(*(_replicated(x) for x in whole))
    backwards = torch.distributed.device_mesh.DeviceMesh("cpu", [1, 0])
    descending = [
        type(student).from_local(x.to_local(), backwards, x.placements) for x in (student, teacher)
    ]
    with pytest.raises(ValueError, match="expected processes in ascending order"):
        kd_loss(*descending)
    with pytest.raises(ValueError, match="expected neither beside DTensors"):
        kd_loss(student, teacher, group=dist.group.WORLD)
    with pytest.raises(ValueError, match="so that their shards lie alike"):
        kd_loss(student, distributed(correlated_pair(6, 66)[1], rank))
    leaf = distributed(whole[0], rank).requires_grad_()
    with pytest.raises(ValueError, match="inplace_grad: student_logits is a leaf"):
        kd_loss(leaf, teacher, inplace_grad=True)
    plain = leaf.to_local().detach().requires_grad_()
    of_plain = type(leaf).from_local(plain, leaf.device_mesh, leaf.placements)
    with pytest.raises(ValueError, match="inplace_grad: student_logits is a view of a leaf"):
        kd_loss(of_plain, teacher, inplace_grad=True)
    with pytest.raises(ValueError, match="inplace_grad: student_logits is a view of a leaf"):
        kd_loss(leaf[:6], teacher, inplace_grad=True)
    weight = distributed(torch.ones(6), rank)
    with pytest.raises(ValueError, match=r"token_weight is a DTensor .* expected Replicate\(\)"):
        kd_loss(student, teacher, token_weight=weight)
    head = distributed(normal(30, 8), rank, 0)
    with pytest.raises(TypeError, match=r"student_weight is a DTensor.*to_local\(\) and group="):
        linear_kd_loss(normal(6, 8), head, teacher_logits=normal(6, 30))
    with pytest.raises(ValueError, match="vocab_size is 0"):
        kd_loss(student, teacher, vocab_size=0)
    with pytest.raises(TypeError, match="labels is a DTensor, expected a plain tensor"):
        kd_loss(*whole, labels=_replicated(labels_for(6, vocab=64)), ce_weight=1.0)
    with pytest.raises(TypeError, match="normalizer is a DTensor"):
        kd_loss(student, teacher, normalizer=weight.sum())


CHECKS = [
    compiled_dtensors,
    compiled_dtensors_in_place,
    dtensors,
    sparse_dtensors,
    dtensors_in_place,
    dtensors_on_a_mesh_of_two_dimensions,
    refused_dtensors,
]
