"""What test_process_groups.py runs in every one of its processes."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from kdkernels import JSD, KDLoss, kd_loss, linear_kd_loss, linear_sparse_kd_loss, sparse_kd_loss

from .cases import correlated_pair, labels_for, normal
from .documents import defined

SIZE = 2


def columns(x: torch.Tensor, rank: int, dim: int = -1) -> torch.Tensor:
    """This process's half, a tensor of its own."""
    return x.chunk(SIZE, dim)[rank].clone()


def run(loss_of, leaves, *constants, **options):
    """The loss of these tensors, and the gradients of the leaves."""
    leaves = [x.clone().requires_grad_() for x in leaves]
    loss = loss_of(*leaves, *constants, **options)
    loss.backward()
    return loss.detach(), *(leaf.grad for leaf in leaves)


def assert_shared(shared, whole, rank, dims, *, rtol=2e-6, atol=1e-8):
    """The same loss, and this process's half of each gradient along its dim, all of it for None."""
    torch.testing.assert_close(shared[0], whole[0], rtol=rtol, atol=0)
    for mine, gradient, dim in zip(shared[1:], whole[1:], dims, strict=True):
        expected = gradient if dim is None else columns(gradient, rank, dim)
        torch.testing.assert_close(mine, expected, rtol=1e-5, atol=atol)


OPTIONS = {
    "labels": labels_for(6, vocab=64),
    "ce_weight": 0.5,
    "divergence": "jsd",
    "temperature": 2.0,
}
HIDDEN, TEACHER_HIDDEN = normal(5, 8, seed=1), normal(5, 12, seed=2)
WEIGHT, TEACHER_WEIGHT = normal(30, 8, seed=3), normal(30, 12, seed=4)


def logits(rank):
    student, teacher = correlated_pair(6, 64)
    whole = run(kd_loss, [student], teacher, **OPTIONS)
    mine = [columns(student, rank)], columns(teacher, rank)
    for group in (dist.group.WORLD, dist.new_group([0, 1])):
        assert_shared(run(kd_loss, *mine, group=group, **OPTIONS), whole, rank, [-1])


def linear(rank):
    whole = run(linear_kd_loss, [HIDDEN, WEIGHT], TEACHER_HIDDEN, TEACHER_WEIGHT)
    mine = [HIDDEN, columns(WEIGHT, rank, 0)], TEACHER_HIDDEN, columns(TEACHER_WEIGHT, rank, 0)
    shared = run(linear_kd_loss, *mine, group=dist.group.WORLD)
    assert_shared(shared, whole, rank, [None, 0], atol=1e-7)


def reference(rank):
    """The definition in float64, the hidden gradient of its heads included."""
    hidden, weight = HIDDEN.double(), WEIGHT.double()
    teacher = normal(5, 30, seed=2).double()
    whole = run(linear_kd_loss, [hidden, weight], teacher_logits=teacher)
    mine = [hidden, columns(weight, rank, 0)]
    shared = run(
        linear_kd_loss, mine, teacher_logits=columns(teacher, rank), group=dist.group.WORLD
    )
    torch.testing.assert_close(shared[1], whole[1])
    torch.testing.assert_close(shared[2], columns(whole[2], rank, 0))


def module(rank):
    student, teacher = correlated_pair(6, 64)
    criterion = KDLoss(group=dist.group.WORLD, divergence="reverse_kl")
    shared = criterion(columns(student, rank), columns(teacher, rank))
    torch.testing.assert_close(shared, kd_loss(student, teacher, divergence="reverse_kl"))


def documented(rank):
    """The code of docs/parallel.md, as it stands."""
    names = defined("docs/parallel.md")
    group = dist.group.WORLD
    student, teacher = correlated_pair(6, 64)
    labels = OPTIONS["labels"]
    mine = columns(student, rank), columns(teacher, rank)
    listed = teacher.log_softmax(-1).topk(5)
    heads = columns(WEIGHT, rank, 0), columns(TEACHER_WEIGHT, rank, 0)
    whole_heads = linear_kd_loss(HIDDEN, WEIGHT, TEACHER_HIDDEN, TEACHER_WEIGHT)
    sharded = distributed(WEIGHT, rank, 0).requires_grad_()
    pairs = [
        (
            names["loss_of_shards"](*mine, labels, group),
            kd_loss(student, teacher, labels=labels, ce_weight=0.5, temperature=2.0),
        ),
        (
            names["loss_of_heads"](HIDDEN, heads[0], TEACHER_HIDDEN, heads[1], group),
            whole_heads,
        ),
        (
            names["loss_of_lists"](mine[0], listed.indices, listed.values, group),
            sparse_kd_loss(student, listed.indices, listed.values),
        ),
        (
            names["loss_of_uneven_shards"](*mine, 32 * rank, 64, group),
            kd_loss(student, teacher),
        ),
        (
            names["loss_of_dtensors"](
                distributed(student, rank), distributed(teacher, rank), labels
            ),
            kd_loss(student, teacher, labels=labels, ce_weight=0.5),
        ),
        (
            of_heads := names["loss_of_dtensor_heads"](
                HIDDEN, sharded, TEACHER_HIDDEN, distributed(TEACHER_WEIGHT, rank, 0)
            ),
            whole_heads,
        ),
    ]
    for shared, whole in pairs:
        torch.testing.assert_close(shared, whole, rtol=5e-6, atol=0)
    of_heads.backward()
    assert type(sharded.grad) is names["DTensor"]


def sparse(rank):
    student, teacher = correlated_pair(6, 64)
    logprobs, indices = teacher.log_softmax(-1).topk(5)
    call = {"teacher_indices": indices, "teacher_logprobs": logprobs, "divergence": "jsd"}
    whole = run(sparse_kd_loss, [student], **call)
    shared = run(sparse_kd_loss, [columns(student, rank)], group=dist.group.WORLD, **call)
    assert_shared(shared, whole, rank, [-1], rtol=5e-6)


def operators(rank):
    x, name = normal(3, 4) + rank, dist.group.WORLD.group_name
    torch.library.opcheck(torch.ops.kdkernels.all_gather.default, (x, name, SIZE))
    torch.library.opcheck(torch.ops.kdkernels.all_sum.default, (x, name))


def same_when_compiled(loss_of, student, *others, dynamic=None):
    """In one graph: operators are opaque, and what they tell others is inside."""
    compiled = torch.compile(loss_of, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    results = (run(function, [student], *others) for function in (loss_of, compiled))
    for eager, graph in zip(*results, strict=True):
        assert torch.equal(_plain(eager), _plain(graph))


def compiled(rank):
    student, teacher = (columns(x, rank) for x in correlated_pair(6, 64))
    group = dist.group.WORLD
    same_when_compiled(lambda x: kd_loss(2 * x, teacher, group=group, divergence="jsd"), student)


def compiled_heads(rank):
    weight, teacher = (columns(normal(30, 8, seed=i), rank, 0) for i in (3, 4))
    hidden, group = normal(5, 8), dist.group.WORLD
    same_when_compiled(
        lambda x: linear_kd_loss(2 * x, weight, hidden, teacher, group=group), hidden
    )


def compiled_sparse(rank):
    logprobs, indices = correlated_pair(6, 30)[1].log_softmax(-1).topk(5)
    weight, group = columns(normal(30, 8, seed=3), rank, 0), dist.group.WORLD
    same_when_compiled(
        lambda x: linear_sparse_kd_loss(2 * x, weight, indices, logprobs, group=group),
        normal(6, 8),
    )


def distributed(x, rank, dim=-1):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    return distribute_tensor(x, init_device_mesh("cpu", (SIZE,)), [Shard(dim)])


def _plain(x):
    return x.to_local() if hasattr(x, "to_local") else x


def shards_that_are_no_whole(rank):
    student, teacher = correlated_pair(6, 64)
    for backend in ("cpu", "reference"):
        call = {"group": dist.group.WORLD, "vocab_start": 32 * rank, "backend": backend}
        with pytest.raises(ValueError, match=r"hold columns 0 to 32, 32 to 64, expected .* 66"):
            kd_loss(columns(student, rank), columns(teacher, rank), vocab_size=66, **call)
        call["vocab_start"] = 30 * rank
        with pytest.raises(ValueError, match="hold columns 0 to 32, 30 to 62"):
            kd_loss(columns(student, rank), columns(teacher, rank), vocab_size=64, **call)
        call["vocab_start"] = 2 + 32 * rank
        with pytest.raises(ValueError, match="hold columns 2 to 34, 34 to 66"):
            kd_loss(columns(student, rank), columns(teacher, rank), vocab_size=66, **call)


def calls_that_are_not_alike(rank):
    student, teacher = (columns(x, rank) for x in correlated_pair(6, 64))
    for backend in ("cpu", "reference"):
        call = {"group": dist.group.WORLD, "backend": backend}
        with pytest.raises(ValueError, match="pass different options"):
            kd_loss(student, teacher, temperature=1.0 + rank, **call)
        with pytest.raises(ValueError, match="pass different options"):
            kd_loss(student, teacher, divergence=("jsd", "tvd")[rank], **call)
        labels = torch.full((6,), 10 + 32 * rank)
        with pytest.raises(ValueError, match="labels, token_weight or normalizer: they differ"):
            kd_loss(student, teacher, labels=labels, ce_weight=1.0, **call)
        weight = torch.tensor([1.0, 1.0, float(rank), 1.0, 1.0, 1.0])
        with pytest.raises(ValueError, match="labels, token_weight or normalizer: they differ"):
            kd_loss(student, teacher, token_weight=weight, **call)
        with pytest.raises(ValueError, match="labels, token_weight or normalizer: they differ"):
            kd_loss(student, teacher, normalizer=torch.tensor(2.0 + rank), **call)
        labels = torch.full((6,), 64)
        with pytest.raises(ValueError, match="expected 0 to 63"):
            kd_loss(student, teacher, labels=labels, **call)


def sparse_calls_that_are_not_alike(rank):
    """Everything that is not a shard, of which every process computes the same loss."""
    student, teacher = correlated_pair(6, 64)
    student = columns(student, rank)
    logprobs, indices = teacher.log_softmax(-1).topk(5)
    weight = torch.tensor([1.0, 1.0, float(rank), 1.0, 1.0, 1.0])
    for backend in ("cpu", "reference"):
        call = {"group": dist.group.WORLD, "backend": backend}
        for options in (
            {"divergence": ("jsd", "tvd")[rank]},
            {"divergence": JSD(0.1 + 0.1 * rank)},
            {"tail": ("bucket", "drop")[rank]},
        ):
            with pytest.raises(ValueError, match="pass different options"):
                sparse_kd_loss(student, indices, logprobs, **options, **call)
        with pytest.raises(ValueError, match=r"teacher_logprobs, .*: they differ"):
            sparse_kd_loss(student, indices, logprobs - 0.01 * rank, **call)
        for options in (
            {"labels": indices[:, rank], "ce_weight": 1.0},  # both are listed
            {"token_weight": weight},
            {"normalizer": torch.tensor(2.0 + rank)},
        ):
            with pytest.raises(ValueError, match="they differ"):
                sparse_kd_loss(student, indices, logprobs, **options, **call)
        # Sums by place, 10 + 2 * 20 and 8 + 2 * 21, are the same.
        listed, equal = torch.tensor([[[10, 20]], [[8, 21]]])[rank], torch.full((1, 2), -1.0)
        for tail in ("bucket", "sampled"):
            with pytest.raises(ValueError, match="they differ"):
                sparse_kd_loss(student[:1], listed, equal, tail=tail, **call)


def compiled_sparse_calls_that_are_not_alike(rank):
    student, teacher = correlated_pair(6, 64)
    student, (logprobs, indices) = columns(student, rank), teacher.log_softmax(-1).topk(5)
    call = {"group": dist.group.WORLD, "tail": "drop"}
    compiled = torch.compile(sparse_kd_loss, fullgraph=True, backend="aot_eager")
    for options in (
        {"temperature": 1.0 + rank},
        {"divergence": ("jsd", "tvd")[rank]},
        {"divergence": JSD((0.2, 0.4)[rank])},
        {"tail": ("bucket", "drop")[rank]},
    ):
        assert compiled(student, indices, logprobs, **call | options).isnan()
    # One process may run eagerly what another has compiled.
    for temperature in (1.0, 1.5, 2.5):  # the last ones perhaps by one graph
        loss = (sparse_kd_loss, compiled)[rank]
        shared = loss(student, indices, logprobs, temperature=temperature, **call)
        assert shared == sparse_kd_loss(student, indices, logprobs, temperature=temperature, **call)


def compiled_losses_side_by_side(rank):
    """Inductor orders operators by their sizes, which differ here: processes have to agree."""
    ends = {4000: (0, 3990, 4000), 64: (0, 32, 64)}
    pairs = {vocab: correlated_pair(6, vocab) for vocab in ends}
    lists = {vocab: pairs[vocab][1].log_softmax(-1).topk(5) for vocab in ends}

    def step(*shards, **of_all):
        losses = []
        for x, vocab in zip(shards, ends, strict=True):
            where = {"vocab_start": ends[vocab][rank], "vocab_size": vocab} if of_all else {}
            logprobs, indices = lists[vocab]
            losses.append(sparse_kd_loss(2 * x, indices, logprobs, **where, **of_all))
        return losses[0] + losses[1]

    whole = [student.clone().requires_grad_() for student, _ in pairs.values()]
    expected = step(*whole)
    expected.backward()
    cuts = [slice(*at[rank : rank + 2]) for at in ends.values()]
    mine = [x.detach()[:, cut].clone().requires_grad_() for x, cut in zip(whole, cuts, strict=True)]
    shared = torch.compile(step, fullgraph=True)(*mine, group=dist.group.WORLD)
    shared.backward()
    torch.testing.assert_close(shared, expected, rtol=5e-6, atol=0)
    for x, all_of_it, cut in zip(mine, whole, cuts, strict=True):
        torch.testing.assert_close(x.grad, all_of_it.grad[:, cut], rtol=1e-5, atol=1e-7)


def no_second_derivative(rank):
    """It would miss what other shards' gradients have to do with this one's logits."""
    student, teacher = (columns(x, rank).double() for x in correlated_pair(6, 64))
    logprobs, indices = correlated_pair(6, 64)[1].log_softmax(-1).topk(5)
    leaf, group = student.requires_grad_(), dist.group.WORLD
    losses = (
        kd_loss(leaf, teacher, group=group),
        sparse_kd_loss(leaf, indices, logprobs, group=group),
    )
    for loss in losses:
        (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiate twice"):
            gradient.square().sum().backward()


def gradients_are_consumed(rank):
    student, teacher = (columns(x, rank) for x in correlated_pair(6, 64))
    loss = kd_loss(student.requires_grad_(), teacher, group=dist.group.WORLD, backend="cpu")
    loss.backward()
    with pytest.raises(RuntimeError, match="a second backward"):
        loss.backward()


CHECKS = [
    documented,
    logits,
    linear,
    reference,
    module,
    sparse,
    operators,
    compiled,
    compiled_heads,
    compiled_sparse,
    shards_that_are_no_whole,
    calls_that_are_not_alike,
    sparse_calls_that_are_not_alike,
    compiled_sparse_calls_that_are_not_alike,
    compiled_losses_side_by_side,
    no_second_derivative,
    gradients_are_consumed,
]
