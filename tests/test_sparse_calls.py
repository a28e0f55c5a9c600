"""How sparse_kd_loss behaves as a PyTorch function: autograd, compilers, bad input."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

import kdkernels
from kdkernels import sparse_kd_loss
from kdkernels.divergences import Divergence

from . import tolerances
from .cases import DTYPES, ONE_OF_EACH, correlated_pair, labels_for, normal
from .documents import defined
from .harness import REFERENCE, Operators, assert_gradient, assert_same_bits, default_dtype, move
from .sparse_cases import oracle, run, top
from .test_compile import COMPILER

VOCAB, K = 130, 6


def entries(*shape, temperature=1.0, seed=0):
    student, teacher = correlated_pair(*shape, VOCAB, seed=seed)
    return student, *top(teacher, K, temperature)


def loss_of(backend, student, indices, logprobs, **options):
    tensors = (move(x, backend.device) for x in (student, indices, logprobs))
    return sparse_kd_loss(*tensors, backend=backend.backend, **options)


def test_a_second_backward_gives_the_same(backend):
    student, indices, logprobs = entries(3)
    leaf = move(student, backend.device).requires_grad_()
    loss = loss_of(backend, leaf, indices, logprobs)
    loss.backward(retain_graph=True)
    first = leaf.grad.clone()
    loss.backward()
    assert torch.equal(leaf.grad, 2 * first)


@pytest.mark.parametrize("tail", ["bucket", "renormalize"])
def test_in_place_a_second_backward_raises(kernel, tail):
    student, indices, logprobs = entries(3)
    logits = move(student, kernel.device).requires_grad_() * 1.0
    memory = logits.data_ptr()
    loss = loss_of(kernel, logits, indices, logprobs, tail=tail, inplace_grad=True)
    (gradient,) = torch.autograd.grad(loss, logits, retain_graph=True)
    assert gradient.data_ptr() == memory
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_in_place_tells_who_else_needs_the_logits(kernel):
    student, indices, logprobs = entries(3)
    logits = move(student, kernel.device).requires_grad_() * 1.0
    other = logits.square().sum()
    loss_of(kernel, logits, indices, logprobs, inplace_grad=True).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.backward()


def test_in_place_refuses_memory_that_overlaps_itself(kernel):
    student, indices, logprobs = entries(3)
    logits = (move(student[:1], kernel.device).requires_grad_() * 1.0).expand(3, VOCAB)
    loss = loss_of(kernel, logits, indices, logprobs, inplace_grad=True)
    with pytest.raises(ValueError, match=r"inplace_grad: student_logits .* overlap themselves"):
        loss.backward()


@pytest.mark.filterwarnings("ignore:Using backward")
def test_create_graph(kernel):
    student, indices, logprobs = entries(3)
    leaf = move(student, kernel.device).requires_grad_()
    with pytest.raises(RuntimeError, match="sparse_kd_loss: its gradient is computed without a gr"):
        loss_of(kernel, leaf, indices, logprobs).backward(create_graph=True)
    loss = loss_of(REFERENCE, student.double().requires_grad_(), indices, logprobs)
    loss.backward(create_graph=True)


def test_without_gradient(backend):
    student, indices, logprobs = entries(3)
    expected = run(backend, student, indices, logprobs).loss
    for student_ in (student, student.clone().requires_grad_()):
        with torch.no_grad():
            loss = loss_of(backend, student_, indices, logprobs)
        assert not loss.requires_grad
        assert torch.equal(loss.cpu(), expected)
    assert not loss_of(backend, student, indices, logprobs).requires_grad


def test_under_autocast(backend):
    student, indices, logprobs = entries(3)
    expected = run(backend, student, indices, logprobs)
    with torch.autocast(backend.device, torch.bfloat16):
        actual = run(backend, student, indices, logprobs)
    assert_same_bits(actual, expected)


def test_default_dtype_does_not_count(backend):
    student, indices, logprobs = entries(3)
    expected = run(backend, student, indices, logprobs)
    with default_dtype(torch.bfloat16):
        actual = run(backend, student, indices, logprobs)
    assert torch.equal(actual.gradient, expected.gradient)


def test_float64_runs_on_the_reference():
    student, indices, logprobs = entries(3)
    expected = oracle(student, indices, logprobs)
    leaf = student.double().requires_grad_()
    loss = sparse_kd_loss(leaf, indices, logprobs)
    loss.backward()
    assert loss.dtype == torch.float64
    assert_gradient(leaf.grad, expected.gradient, 1e-12)
    with pytest.raises(ValueError, match=r"student_logits is torch\.float64, it takes float32"):
        sparse_kd_loss(leaf, indices, logprobs, backend="cpu")


class NotForward(kdkernels.ForwardKL):
    """Of a built-in one's name."""

    def value(self, log_p, log_q):
        return super().value(log_q, log_p)


class Summed(Divergence):
    def value(self, log_p, log_q):
        return (log_p - log_q).square().sum(-1)


class Squares(Divergence):
    """Of one's own."""

    name = "squares"

    def value(self, log_p, log_q):
        return (log_p.exp() - log_q.exp()).square()


def test_a_divergence_of_ones_own_runs_on_every_backend(backend):
    student, indices, logprobs = entries(3)
    actual = run(backend, student, indices, logprobs, divergence=Squares())
    expected = oracle(student, indices, logprobs, divergence=Squares())
    assert_gradient(actual.gradient, expected.gradient, 2e-6)
    reverse = run(backend, student, indices, logprobs, divergence="reverse_kl")
    other = run(backend, student, indices, logprobs, divergence=NotForward())
    assert_gradient(other.gradient, reverse.gradient.double(), 2e-6)
    with pytest.raises(ValueError, match="value of Summed has shape"):
        loss_of(backend, student, indices, logprobs, divergence=Summed())


def test_few_operators():
    student, indices, logprobs = entries(3)
    leaf = student.requires_grad_()
    with Operators() as operators:
        sparse_kd_loss(leaf, indices, logprobs, backend="cpu").backward()
    assert len(operators.seen) < 105


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=COMPILER)])
@pytest.mark.parametrize("tail", ["bucket", "sampled"])
def test_compiles_without_a_break(tail, compiler):
    options = {"tail": tail, "temperature": 2.0, "ce_weight": 0.5, "backend": "cpu"}

    def step(student, indices, logprobs, labels):
        return 3 * sparse_kd_loss(student * 1.0, indices, logprobs, labels=labels, **options)

    compiled = torch.compile(step, fullgraph=True, backend=compiler)
    for rows in (3, 5):
        student, indices, logprobs = entries(rows, temperature=2.0)
        labels = labels_for(rows, vocab=VOCAB)
        expected, actual = student.clone().requires_grad_(), student.clone().requires_grad_()
        step(expected, indices, logprobs, labels).backward()
        compiled(actual, indices, logprobs, labels).backward()
        assert_gradient(actual.grad, expected.grad.double(), 1e-6)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype):
    ops = torch.ops.kdkernels
    student, indices, _ = entries(3)
    student, listed, kept = student.to(dtype), indices.sort(-1).values, torch.tensor([1, 0, 1]) != 0
    for at_1 in (False, True):
        options = 2.0, at_1, 1.0, 5.0 * at_1, VOCAB, "cpu"
        for mask in (kept, None):
            torch.library.opcheck(ops.tails.default, (student, listed, mask, *options))
        tails = ops.tails(student, listed, kept, *options)
        gradients = torch.ones_like(tails[1:]), torch.ones(3, K)
        arguments = student, listed, tails, *gradients, *options
        torch.library.opcheck(ops.tails_gradient.default, arguments)
        torch.library.opcheck(ops.tails_gradient_.default, arguments)


def test_modules_hold_options():
    student, indices, logprobs = entries(3, temperature=2.0)
    labels = labels_for(3, vocab=VOCAB)
    options = {"tail": "bucket", "divergence": "jsd", "temperature": 2.0, "ce_weight": 0.5}
    expected = sparse_kd_loss(student, indices, logprobs, labels=labels, **options)
    criterion = kdkernels.SparseKDLoss(**options)
    assert torch.equal(criterion(student, indices, logprobs, labels=labels), expected)
    assert "tail='bucket'" in repr(criterion)
    hidden, weight = torch.eye(VOCAB)[:3], student.T @ torch.eye(3, VOCAB)
    criterion = kdkernels.LinearSparseKDLoss(**options)
    loss = criterion(hidden, weight, indices, logprobs, labels=labels)
    torch.testing.assert_close(loss, expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.usefixtures("fresh_dynamo")
def test_bad_input_is_nan_where_nobody_may_look():
    """Under a compiler, as on a GPU, where a look would wait."""
    student, indices, logprobs = entries(4)
    expected = sparse_kd_loss(student, indices, logprobs, reduction="none")
    indices[0, 1] = VOCAB
    indices[1, 1] = indices[1, 2]
    logprobs[2] = 0.0
    leaf = student.clone().requires_grad_()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def loss_of_rows(student):
        return sparse_kd_loss(student, indices, logprobs, reduction="none", backend="cpu")

    loss = loss_of_rows(leaf)
    loss.sum().backward()
    assert loss[:3].isnan().all()
    assert leaf.grad[:3].isnan().all()
    assert torch.equal(loss[3], expected[3])
    assert leaf.grad[3].isfinite().all()


class Bigram(torch.nn.Module):
    def __init__(self, seed):
        super().__init__()
        self.table = torch.nn.Parameter(2 * normal(VOCAB, VOCAB, seed=seed))

    def forward(self, ids):
        return SimpleNamespace(logits=self.table[ids])


def test_the_documented_loop(tmp_path):
    """The code of docs/sparse.md, as it stands: the student comes nearer to the stored teacher."""
    names = defined("docs/sparse.md", "From disk")
    ids = labels_for(6, 20, vocab=VOCAB)
    teacher, student = Bigram(0), Bigram(1)
    names["store"](teacher, list(ids), tmp_path)
    optimizer = torch.optim.Adam(student.parameters(), lr=0.1)
    which = [4, 0, 5]
    losses = [
        float(names["train_step"](student, optimizer, ids[which], which, tmp_path))
        for _ in range(60)
    ]
    student_loss = kdkernels.kd_loss(
        Bigram(1)(ids[which]).logits[:, :-1],
        teacher(ids[which]).logits[:, :-1].detach(),
        labels=ids[which][:, 1:],
        ce_weight=0.5,
        temperature=2.0,
    )
    assert losses[0] == pytest.approx(float(student_loss.detach()), rel=0.2)  # 64 of 130 tokens
    assert losses[-1] < 0.5 * losses[0]


def test_the_documented_bound():
    """A bucket hides differences: its divergence is at most that of the whole vocabulary."""
    student, teacher = correlated_pair(50, VOCAB)
    whole = kdkernels.kd_loss(student, teacher, reduction="none")
    parts = [
        sparse_kd_loss(student, *top(teacher, k), reduction="none") for k in (1, 5, 30, VOCAB - 1)
    ]
    for smaller, larger in zip(parts, [*parts[1:], whole], strict=True):
        assert (smaller <= larger * (1 + tolerances.PLAIN_LOSS[0])).all()


@pytest.mark.parametrize("divergence", ONE_OF_EACH, ids=str)
def test_the_documented_bound_for_all_divergences(divergence):
    """Of an alpha-beta divergence only where its parameters sum to no more than 1."""
    student, teacher = correlated_pair(50, VOCAB)
    options = {"divergence": divergence, "reduction": "none"}
    whole = kdkernels.kd_loss(student, teacher, **options)
    parts = [sparse_kd_loss(student, *top(teacher, k), **options) for k in (1, 5, 30, 90)]
    for smaller, larger in zip(parts, [*parts[1:], whole], strict=True):
        assert (smaller <= larger * (1 + tolerances.OTHER_LOSS[0])).all()
    if divergence.name == "alpha_beta":
        above = kdkernels.AlphaBeta(2.0, 1.0)
        whole = kdkernels.kd_loss(student, teacher, divergence=above)
        assert sparse_kd_loss(student, *top(teacher, 5), divergence=above) > whole
