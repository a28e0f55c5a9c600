"""The reference backend against textbook formulas, their limits, and numerical derivatives."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import kdkernels
from kdkernels import (
    JSD,
    TVD,
    AlphaBeta,
    ForwardKL,
    ReverseKL,
    SkewForwardKL,
    SkewReverseKL,
    SoftCrossEntropy,
    SymmetricKL,
)
from kdkernels.options import TAILS

from .cases import ALL, correlated_pair, labels_for


def pair(*shape):
    student, teacher = correlated_pair(*shape)
    return student.double(), teacher.double()


def per_token(student, teacher, divergence, **options):
    return kdkernels.kd_loss(
        student, teacher, divergence=divergence, reduction="none", backend="reference", **options
    )


def kl(p, q):
    """KL(p || q) of probabilities."""
    return F.kl_div(q.log(), p, reduction="none").sum(-1)


def alpha_beta(p, q, a, b):
    terms = p**a * q**b - a / (a + b) * p ** (a + b) - b / (a + b) * q ** (a + b)
    return -terms.sum(-1) / (a * b)


def mix(p, q, share):
    return share * p + (1 - share) * q


TEXTBOOK = [
    (ForwardKL(), kl),
    (ReverseKL(), lambda p, q: kl(q, p)),
    (JSD(), lambda p, q: (kl(p, (p + q) / 2) + kl(q, (p + q) / 2)) / 2),
    (JSD(0.1), lambda p, q: 0.1 * kl(p, mix(p, q, 0.1)) + 0.9 * kl(q, mix(p, q, 0.1))),
    (JSD(0), kl),
    (JSD(1), lambda p, q: kl(q, p)),
    (SkewForwardKL(0.1), lambda p, q: kl(p, mix(p, q, 0.1))),
    (SkewForwardKL(0), kl),
    (SkewReverseKL(0.9), lambda p, q: kl(q, mix(q, p, 0.9))),
    (SkewReverseKL(0), lambda p, q: kl(q, p)),
    (SymmetricKL(), lambda p, q: (kl(p, q) + kl(q, p)) / 2),
    (SymmetricKL(0.3), lambda p, q: 0.3 * kl(p, q) + 0.7 * kl(q, p)),
    (SymmetricKL(1), kl),
    (SymmetricKL(0), lambda p, q: kl(q, p)),
    (TVD(), lambda p, q: (p - q).abs().sum(-1) / 2),
    (SoftCrossEntropy(), lambda p, q: -(p * q.log()).sum(-1)),
    (AlphaBeta(0.2, 0.7), lambda p, q: alpha_beta(p, q, 0.2, 0.7)),
    (AlphaBeta(-0.3, 0.8), lambda p, q: alpha_beta(p, q, -0.3, 0.8)),
    (AlphaBeta(0.8, -0.3), lambda p, q: alpha_beta(p, q, 0.8, -0.3)),
    (AlphaBeta(-0.2, -0.3), lambda p, q: alpha_beta(p, q, -0.2, -0.3)),
    (AlphaBeta(1, 1), lambda p, q: (p - q).square().sum(-1) / 2),
    # Four times the squared Hellinger distance.
    (AlphaBeta(0.5, 0.5), lambda p, q: 2 * (p.sqrt() - q.sqrt()).square().sum(-1)),
    # Half of Pearson's chi-squared.
    (AlphaBeta(2, -1), lambda p, q: ((p - q).square() / q).sum(-1) / 2),
    # Itakura-Saito.
    (AlphaBeta(1, -1), lambda p, q: (p / q - (p / q).log() - 1).sum(-1)),
    (AlphaBeta(0, 0), lambda p, q: (p.log() - q.log()).square().sum(-1) / 2),
    (AlphaBeta(1, 0), kl),
    (AlphaBeta(0, 1), lambda p, q: kl(q, p)),
]


@pytest.mark.parametrize(
    ("divergence", "formula"), TEXTBOOK, ids=lambda x: "" if callable(x) else str(x)
)
def test_textbook(divergence, formula):
    student, teacher = pair(2, 3, 50)
    for temperature in (1.0, 2.0):
        q, p = (student / temperature).softmax(-1), (teacher / temperature).softmax(-1)
        loss = per_token(student, teacher, divergence, temperature=temperature)
        assert loss.dtype == torch.float64
        torch.testing.assert_close(loss, temperature**2 * formula(p, q), rtol=1e-10, atol=1e-13)


def test_every_divergence_has_a_textbook_formula():
    assert {d.name for d, _ in TEXTBOOK} == set(kdkernels.divergences.DIVERGENCES)


@pytest.mark.parametrize(
    ("a", "b"), [(0, 0.7), (0.7, 0), (0.5, -0.5), (-0.5, 0.5), (0, 0), (1, 0), (0, 1), (0, -0.4)]
)
def test_limits_of_alpha_beta(a, b):
    student, teacher = pair(3, 50)
    q, p = student.softmax(-1), teacher.softmax(-1)
    near = alpha_beta(p, q, a + 1e-5, b + 2e-5)  # the formula itself is undefined at the limit
    torch.testing.assert_close(
        per_token(student, teacher, AlphaBeta(a, b)), near, rtol=1e-3, atol=1e-5
    )


def test_limits_of_jsd_and_skew():
    student, teacher = pair(3, 50)
    # JSD tends to 0 at the ends; divided by beta (1 - beta), to the KLs.
    for beta, limit in ((1e-6, ForwardKL()), (1 - 1e-6, ReverseKL())):
        scaled = per_token(student, teacher, JSD(beta)) / (beta * (1 - beta))
        expected = per_token(student, teacher, limit)
        torch.testing.assert_close(scaled, expected, rtol=1e-4, atol=1e-6)
    for skew, limit in ((SkewForwardKL, ForwardKL()), (SkewReverseKL, ReverseKL())):
        near = per_token(student, teacher, skew(1e-7))
        expected = per_token(student, teacher, limit)
        torch.testing.assert_close(near, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("divergence", ALL, ids=str)
def test_gradcheck(divergence):
    student, teacher = pair(2, 6)
    options = {"divergence": divergence, "temperature": 1.7, "backend": "reference"}
    student.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda s: kdkernels.kd_loss(s, teacher, reduction="none", **options), student
    )
    if divergence.name != "tvd":  # has no second derivative where p = q
        assert torch.autograd.gradgradcheck(
            lambda s: kdkernels.kd_loss(s, teacher, **options), student
        )


def test_gradcheck_of_every_option():
    student, teacher = pair(4, 9)
    options = {
        "divergence": JSD(0.3),
        "temperature": 1.7,
        "labels": torch.tensor([0, -1, 5, 6]),
        "kd_weight": 0.7,
        "ce_weight": 0.4,
        "ignore_index": -1,
        "token_weight": torch.tensor([0.5, 1.0, -2.0, 1.5], dtype=torch.float64),
        "normalizer": 3.0,
        "vocab_size": 7,
        "student_scale": 1.3,
        "teacher_scale": 0.6,
        "student_softcap": 2.0,
        "teacher_softcap": 3.0,
        "backend": "reference",
    }
    student.requires_grad_()
    for reduction in ("none", "sum", "mean"):
        assert torch.autograd.gradcheck(
            lambda s, r=reduction: kdkernels.kd_loss(s, teacher, reduction=r, **options), student
        )


def test_hard_labels_are_cross_entropy_at_temperature_1():
    student, teacher = pair(2, 4, 30)
    labels = labels_for(2, 4, vocab=30)
    labels[0, 1] = -100
    student.requires_grad_()
    loss = kdkernels.kd_loss(
        student, teacher, labels=labels, kd_weight=0, ce_weight=0.8, temperature=3.0
    )
    expected = 0.8 * F.cross_entropy(student.flatten(0, 1), labels.flatten())
    torch.testing.assert_close(loss, expected)
    gradients = [torch.autograd.grad(x, student)[0] for x in (loss, expected)]
    torch.testing.assert_close(*gradients)


def test_hard_label_mix():
    student, teacher = pair(5, 30)
    labels = labels_for(5, vocab=30)
    mixed = per_token(
        student, teacher, ForwardKL(), labels=labels, kd_weight=0.7, ce_weight=0.3, temperature=2.0
    )
    q, p = (student / 2).softmax(-1), (teacher / 2).softmax(-1)
    hard = F.cross_entropy(student, labels, reduction="none")
    torch.testing.assert_close(mixed, 0.7 * 4 * kl(p, q) + 0.3 * hard)


def test_reductions():
    student, teacher = pair(2, 3, 30)
    weight = torch.tensor([[0.5, 1, 0], [2, 3, 0.25]], dtype=torch.float64)
    options = {"token_weight": weight, "backend": "reference"}
    none = kdkernels.kd_loss(student, teacher, reduction="none", **options)
    plain = per_token(student, teacher, ForwardKL())
    torch.testing.assert_close(none, plain * weight)
    total = kdkernels.kd_loss(student, teacher, reduction="sum", **options)
    torch.testing.assert_close(total, none.sum())
    mean = kdkernels.kd_loss(student, teacher, **options)
    torch.testing.assert_close(mean, none.sum() / weight.sum())
    for normalizer in (5, torch.tensor(5)):
        mean = kdkernels.kd_loss(student, teacher, normalizer=normalizer, **options)
        torch.testing.assert_close(mean, none.sum() / 5)


def test_scale_and_softcap():
    student, teacher = pair(5, 30)
    student[0, 3] = teacher[0, 3] = -math.inf
    capped = per_token(
        student,
        teacher,
        ForwardKL(),
        student_scale=1.5,
        teacher_scale=0.5,
        student_softcap=3.0,
        teacher_softcap=2.0,
    )
    by_hand_student = 3 * torch.tanh(1.5 * student / 3)
    by_hand_teacher = 2 * torch.tanh(0.5 * teacher / 2)
    by_hand_student[0, 3] = by_hand_teacher[0, 3] = -math.inf
    expected = per_token(by_hand_student, by_hand_teacher, ForwardKL())
    torch.testing.assert_close(capped, expected)


def test_vocabulary_prefix():
    student, teacher = pair(5, 30)
    expected = per_token(student[:, :20], teacher[:, :20], JSD())
    assert torch.equal(per_token(student, teacher, JSD(), vocab_size=20), expected)
    assert torch.equal(per_token(student, teacher[:, :20], JSD()), expected)
    assert torch.equal(per_token(student[:, :20], teacher, JSD()), expected)


def test_metrics():
    student, teacher = pair(4, 30)
    labels = labels_for(4, vocab=30)
    teacher[0] = student[0]
    _, metrics = kdkernels.kd_loss(
        student, teacher, labels=labels, kd_weight=3, temperature=2.0, return_metrics=True
    )
    q, p = (student / 2).softmax(-1), (teacher / 2).softmax(-1)
    expected = {
        "divergence": kl(p, q),
        "cross_entropy": F.cross_entropy(student, labels, reduction="none"),
        "teacher_entropy": torch.distributions.Categorical(p).entropy(),
        "student_entropy": torch.distributions.Categorical(q).entropy(),
        "agreement": (student.argmax(-1) == teacher.argmax(-1)).double(),
    }
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(metrics[name], value.float(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtypes", [(torch.float64, torch.float32), (torch.float32, torch.float64)])
def test_float64_goes_to_the_reference(dtypes):
    student, teacher = pair(3, 30)
    student, teacher = student.to(dtypes[0]).requires_grad_(), teacher.to(dtypes[1])
    loss = kdkernels.kd_loss(student, teacher)
    assert loss.dtype == torch.float64
    loss.backward()
    assert student.grad.dtype == student.dtype


def test_custom_divergence():
    class SquaredDistance(kdkernels.Divergence):
        name = "squared_distance"

        def value(self, log_p, log_q):
            return (log_p.exp() - log_q.exp()).square()

    student, teacher = correlated_pair(3, 30)
    loss = kdkernels.kd_loss(student, teacher, divergence=SquaredDistance())
    q, p = student.double().softmax(-1), teacher.double().softmax(-1)
    torch.testing.assert_close(loss, (p - q).square().sum(-1).mean().float())
    with pytest.raises(ValueError, match="SquaredDistance is not compiled"):
        kdkernels.kd_loss(student, teacher, divergence=SquaredDistance(), backend="cpu")


def test_a_subclass_with_another_value_is_not_taken_for_its_base():
    class Doubled(kdkernels.ForwardKL):
        def value(self, log_p, log_q):
            return 2 * super().value(log_p, log_q)

    student, teacher = correlated_pair(3, 30)
    doubled = kdkernels.kd_loss(student, teacher, divergence=Doubled())
    torch.testing.assert_close(doubled, 2 * kdkernels.kd_loss(student, teacher))


def test_meta_tensors():
    """A device without autocast; shapes and dtypes only."""
    student = torch.empty(3, 8, device="meta", requires_grad=True)
    loss = kdkernels.kd_loss(student, torch.empty(3, 8, device="meta"), reduction="none")
    loss.sum().backward()
    assert (loss.shape, loss.dtype, student.grad.shape) == ((3,), torch.float32, (3, 8))


class NoFloat64(TorchDispatchMode):
    """Refuses what Apple's GPUs do not have."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            assert not isinstance(x, torch.Tensor) or x.dtype != torch.float64, function
        return result


def losses_of_every_level(student, teacher, **options):
    """Of logits, of hidden states and a head, and of both beside a sparse teacher."""
    head = torch.eye(student.shape[-1]).to(student.dtype)
    logprobs, indices = teacher.log_softmax(-1).topk(7)
    indices = indices.index_fill(0, torch.tensor(1), -1)  # a row that lists nothing
    yield kdkernels.kd_loss(student, teacher, **options)
    yield kdkernels.linear_kd_loss(student, head, teacher, head, **options)
    for tail in TAILS:
        entries = indices, torch.zeros_like(logprobs) if tail == "sampled" else logprobs
        yield kdkernels.sparse_kd_loss(student, *entries, tail=tail, **options)
        yield kdkernels.linear_sparse_kd_loss(student, head, *entries, tail=tail, **options)


def test_devices_without_float64(monkeypatch):
    student, teacher = correlated_pair(5, 41)
    options = {"labels": labels_for(5, vocab=41), "ce_weight": 0.5, "temperature": 2.0}
    options |= {"backend": "reference", "return_metrics": True, "student_softcap": 30.0}
    expected = list(losses_of_every_level(student.double(), teacher.double(), **options))
    monkeypatch.setattr(kdkernels.reference, "compute_dtype", lambda _: torch.float32)
    student.requires_grad_()
    with NoFloat64():
        actual = list(losses_of_every_level(student, teacher, **options))
        for loss, _ in actual:
            loss.backward()
    assert student.grad.isfinite().all()
    for (loss, metrics), (wanted, wanted_metrics) in zip(actual, expected, strict=True):
        torch.testing.assert_close(loss.double(), wanted, rtol=1e-5, atol=0)
        for name, metric in metrics.items():
            torch.testing.assert_close(
                metric.double(), wanted_metrics[name].double(), rtol=1e-5, atol=1e-6
            )
