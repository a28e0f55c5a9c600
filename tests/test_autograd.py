"""How the loss behaves inside autograd."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import kdkernels
from kdkernels import kd_loss

from . import tolerances
from .cases import DTYPES, correlated_pair, labels_for, normal
from .harness import (
    assert_as_oracle,
    assert_close,
    assert_gradient,
    assert_same_bits,
    loss_of,
    move,
    oracle,
    run,
)

VOCAB, INF = 517, torch.inf


@pytest.mark.parametrize("grad_output", [0.0, 1.0, -3.0, 0.3, 1e-3, 1024.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_grad_output(backend, dtype, grad_output):
    student, teacher = (x.to(dtype) for x in correlated_pair(5, VOCAB))
    options = {"grad_output": torch.tensor(grad_output)}
    actual = run(backend, student, teacher, **options)
    assert_as_oracle(actual, student, teacher, **options)


@pytest.mark.parametrize("inplace", [False, True], ids=["fresh", "inplace"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_per_token_loss_weighted_later(kernel, dtype, inplace):
    student, teacher = (x.to(dtype) for x in correlated_pair(2, 4, VOCAB))
    options = {"reduction": "none", "grad_output": normal(2, 4), "token_weight": normal(2, 4).abs()}
    options |= {"labels": labels_for(2, 4, vocab=VOCAB), "ce_weight": 0.5}
    expected = oracle(student, teacher, **options)
    actual = run(kernel, student, teacher, inplace_grad=inplace, **options)
    assert_close(actual.loss, expected.loss, tolerances.PLAIN_LOSS)
    relative = tolerances.gradient_tolerance("forward_kl", dtype)
    if dtype == torch.bfloat16:
        relative = tolerances.BFLOAT16_RESCALED
    subnormal = tolerances.FLOAT16_SUBNORMAL if dtype == torch.float16 else 0.0
    assert_gradient(actual.gradient, expected.gradient, relative, subnormal)


def test_per_token_loss_weighted_by_an_expanded_tensor(backend):
    student, teacher = correlated_pair(3, VOCAB)
    leaf = student.clone().requires_grad_()
    loss_of(backend, leaf, teacher, reduction="none").sum().backward()  # expanded grad_output
    expected = oracle(student, teacher, reduction="sum")
    assert_gradient(leaf.grad, expected.gradient, tolerances.PLAIN_LOSS[0])


@pytest.mark.parametrize("mask", ["labels", "token_weight", "both"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masked_rows_whatever_gradient_their_losses_have(backend, dtype, mask):
    """As where a sequence without tokens is divided by their number."""
    student, teacher = (x.to(dtype) for x in correlated_pair(4, VOCAB))
    options = {"reduction": "none"}
    if mask != "token_weight":
        options["labels"] = torch.tensor([1, -100, 3, 4])
    if mask != "labels":
        options["token_weight"] = torch.tensor([1.0, 2.0, 0.0, 1.0])
    masked = {"labels": [1], "token_weight": [2], "both": [1, 2]}[mask]
    plain = run(backend, student, teacher, **options)
    for bad in (INF, torch.nan):
        grad_output = torch.ones(4).index_fill(0, torch.tensor(masked), bad)
        assert_same_bits(run(backend, student, teacher, grad_output=grad_output, **options), plain)


def test_second_backward_raises(kernel):
    student, teacher = correlated_pair(3, VOCAB)
    student.requires_grad_()
    loss = loss_of(kernel, student, teacher)
    loss.backward(retain_graph=True)
    first = student.grad.clone()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="kd_loss: a second backward"):
            loss.backward(retain_graph=True)
    assert torch.equal(student.grad, first)
    loss = loss_of(kernel, student, teacher)
    loss.backward()
    with pytest.raises(RuntimeError):
        loss.backward()


@pytest.mark.filterwarnings("ignore:Using backward")
def test_create_graph_raises(kernel):
    student, teacher = correlated_pair(3, VOCAB)
    student.requires_grad_()
    loss = loss_of(kernel, student, teacher)
    with pytest.raises(RuntimeError, match=r"kd_loss.*create_graph"):
        torch.autograd.grad(loss, student, create_graph=True)
    with pytest.raises(RuntimeError, match=r"kd_loss.*create_graph"):
        loss_of(kernel, student, teacher).backward(create_graph=True)


def test_forward_mode_raises(kernel):
    """Rather than return a derivative of 0."""
    student, teacher = (x.to(kernel.device) for x in correlated_pair(2, VOCAB))

    def derivative(loss):
        return torch.func.jvp(loss, (student,), (student,))[1]

    for loss in (
        lambda x: kdkernels.kd_loss(x, teacher, backend=kernel.backend),
        lambda x: kdkernels.kd_loss(teacher, x, backend=kernel.backend),
    ):
        with pytest.raises(RuntimeError, match=r"kd_loss.*forward-mode.*reference"):
            derivative(loss)
    assert derivative(lambda x: kdkernels.kd_loss(x, teacher, backend="reference")) != 0


def test_function_transforms_say_what_to_use(kernel):
    student, teacher = (x.to(kernel.device) for x in correlated_pair(2, VOCAB))

    def gradient(backend):
        return torch.func.grad(lambda x: kdkernels.kd_loss(x, teacher, backend=backend))(student)

    with pytest.raises(RuntimeError, match=r"kd_loss: torch.func.*reference"):
        gradient(kernel.backend)
    assert gradient("reference").abs().sum() > 0


def test_reference_can_be_differentiated_twice():
    student, teacher = correlated_pair(3, VOCAB)
    student.requires_grad_()
    loss = kdkernels.kd_loss(student, teacher, backend="reference")
    (gradient,) = torch.autograd.grad(loss, student, create_graph=True)
    gradient.square().sum().backward()
    assert student.grad.norm() > 0


def test_two_losses_accumulate(backend):
    student, teacher = correlated_pair(3, VOCAB)
    leaf = student.clone().requires_grad_()
    total = loss_of(backend, leaf, teacher) + 2 * loss_of(backend, leaf, teacher, divergence="jsd")
    total.backward()
    expected = (
        oracle(student, teacher).gradient + 2 * oracle(student, teacher, divergence="jsd").gradient
    )
    assert_gradient(leaf.grad, expected, tolerances.OTHER_LOSS[0])


def test_one_tensor_as_both_models_learns_from_a_detached_self(backend):
    logits = correlated_pair(3, VOCAB)[0].requires_grad_()
    loss = loss_of(backend, logits, logits.detach())
    loss.backward()
    assert 0 <= loss < tolerances.IDENTICAL_LOSS
    assert logits.grad.abs().max() < tolerances.IDENTICAL_LOSS


def test_micro_batches_with_a_common_normalizer_are_the_big_batch(backend):
    student, teacher = correlated_pair(6, VOCAB)
    labels = labels_for(6, vocab=VOCAB)
    labels[[1, 4]] = -100
    options = {"divergence": "jsd", "ce_weight": 0.5, "temperature": 2.0}
    big = run(backend, student, teacher, labels=labels, **options)
    count = (labels != -100).sum()
    leaf = student.clone().requires_grad_()
    total = 0.0
    for part in (slice(0, 1), slice(1, 2), slice(2, 6)):  # the second has no token at all
        loss = loss_of(
            backend, leaf[part], teacher[part], labels=labels[part], normalizer=count, **options
        )
        loss.backward()
        total += loss.detach()
    assert_close(total, big.loss, tolerances.OTHER_LOSS)
    assert_gradient(leaf.grad, big.gradient, tolerances.OTHER_LOSS[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_grad_and_inference_mode(backend, dtype):
    student, teacher = (x.to(dtype) for x in correlated_pair(3, VOCAB))
    expected = run(backend, student, teacher).loss
    leaf = student.clone().requires_grad_()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            loss, metrics = loss_of(backend, leaf, teacher, return_metrics=True)
        assert not loss.requires_grad
        assert torch.equal(loss.cpu(), expected)
        assert metrics["divergence"].shape == (3,)
    loss = loss_of(backend, student, teacher)  # a student that needs no gradient
    assert not loss.requires_grad
    with torch.inference_mode():
        loss_of(backend, student.clone(), teacher.clone())


def test_inference_tensors_as_the_teacher(backend):
    student, teacher = correlated_pair(3, VOCAB)
    expected = run(backend, student, teacher)
    with torch.inference_mode():
        teacher = teacher.clone()
    assert torch.equal(run(backend, student, teacher).gradient, expected.gradient)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_autocast_changes_nothing(backend, dtype):
    student, teacher = (x.to(dtype) for x in correlated_pair(3, VOCAB))
    options = {"labels": labels_for(3, vocab=VOCAB), "ce_weight": 0.5, "divergence": "jsd"}
    expected = run(backend, student, teacher, **options)
    with torch.autocast(backend.device, torch.bfloat16):
        actual = run(backend, student, teacher, **options)
    assert actual.loss.dtype == torch.float32
    assert_same_bits(actual, expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(backend, reentrant):
    hidden, head, teacher = normal(3, 8), normal(8, VOCAB, seed=1), normal(3, VOCAB, seed=2)
    gradients = []
    for wrapped in (False, True):
        leaf = hidden.clone().to(backend.device).requires_grad_()

        def step(x):
            return loss_of(backend, x @ head.to(x.device), teacher)

        loss = checkpoint(step, leaf, use_reentrant=reentrant) if wrapped else step(leaf)
        loss.backward()
        gradients.append(leaf.grad)
    assert torch.equal(*gradients)


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_hooks_and_anomaly_mode(backend):
    student, teacher = correlated_pair(3, VOCAB)
    seen = []
    leaf = student.clone().requires_grad_()
    logits = leaf * 1
    logits.register_hook(lambda gradient: seen.append(gradient.clone()))
    with torch.autograd.detect_anomaly(check_nan=True):
        loss_of(backend, logits, teacher).backward()
    assert torch.equal(seen[0], leaf.grad)


def test_metrics_are_detached(backend):
    student, teacher = correlated_pair(3, VOCAB)
    _, metrics = loss_of(backend, student.requires_grad_(), teacher, return_metrics=True)
    assert metrics["cross_entropy"] is None
    assert not any(m.requires_grad for m in metrics.values() if m is not None)


def test_saves_only_the_gradient(kernel):
    student, teacher = correlated_pair(3, VOCAB)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        loss_of(kernel, student.requires_grad_(), teacher)
    assert sum(x.numel() for x in saved) == student.numel()


def test_needs_no_copy_of_an_untouched_gradient(kernel):
    # grad_output of 1: the tensor written in the forward is the one handed out.
    student, teacher = (move(x, kernel.device) for x in correlated_pair(3, VOCAB))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        loss = loss_of(kernel, student.requires_grad_(), teacher)
    loss.backward()
    assert student.grad.data_ptr() in [x.data_ptr() for x in saved]


def test_a_backward_without_a_gradient_gives_none(kernel):
    """An unused loss of a row that is all -inf must not make NaN of its zero."""

    class Unused(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return None

    student = torch.randn(2, 4, device=kernel.device)
    student[0] = -torch.inf
    student.requires_grad_()
    Unused.apply(loss_of(kernel, student, torch.randn(2, 4))).backward()
    assert student.grad is None


def test_zeros_of_autograd(kernel):
    """Tensors of zeros without memory, such as forward-mode AD makes, reach operators expanded."""
    x, zeros, plain = (
        make.to(kernel.device)
        for make in (normal(5, 50), torch._efficientzerotensor((5, 50)), torch.zeros(5, 50))
    )
    options = {"reduction": "none", "backend": kernel.backend}
    assert torch.equal(kd_loss(zeros, x, **options), kd_loss(plain, x, **options))
    assert torch.equal(kd_loss(x, zeros, **options), kd_loss(x, plain, **options))
    loss = kd_loss(x.requires_grad_(), plain, **options)
    (gradient,) = torch.autograd.grad(loss, x, torch._efficientzerotensor((5,)).to(loss))
    assert not gradient.any()
