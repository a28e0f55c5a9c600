"""A divergence added with ``register_divergence`` does what the built-in ones do."""

from __future__ import annotations

import math

import pytest
import torch

import kdkernels
from kdkernels import extension, kd_loss

from . import interpreter, tolerances
from .cases import close_pair, correlated_pair, labels_for
from .harness import (
    TRITON,
    assert_as_oracle,
    assert_close,
    loss_of,
    move,
    oracle,
    run,
)
from .processes import CUTS, sharded

pytestmark = pytest.mark.skipif(not interpreter.INSTALLED, reason="Triton is not installed")
INF = math.inf


@pytest.fixture(scope="module", autouse=True)
def hellinger():
    from . import hellinger as functions

    divergence = kdkernels.register_divergence(
        "squared_hellinger",
        value=functions.value,
        slope=functions.slope,
        reference=functions.reference,
    )
    yield divergence
    del kdkernels.divergences.REGISTERED["squared_hellinger"]


def check(student, teacher, close=False, **options):
    options["divergence"] = "squared_hellinger"
    actual = run(TRITON, student, teacher, **options)
    assert_as_oracle(actual, student, teacher, close=close, **options)
    options["return_metrics"] = False
    with torch.no_grad():
        loss = loss_of(TRITON, student, teacher, **options)
    assert_close(loss.cpu(), oracle(student, teacher, **options).loss, tolerances.OTHER_LOSS)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.5, 100.0])
def test_accuracy(temperature):
    check(*correlated_pair(3, 2503), temperature=temperature, reduction="none")
    close = close_pair(3, 2503, temperature=temperature)
    check(*close, temperature=temperature, reduction="none", close=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bits(dtype):
    check(*(x.to(dtype) for x in correlated_pair(3, 517)))
    check(*(x.to(dtype) for x in close_pair(3, 517)), close=True)


def test_options():
    student, teacher = correlated_pair(2, 4, 517)
    labels = torch.where(torch.arange(8).view(2, 4) % 3 == 0, -100, labels_for(2, 4, vocab=500))
    options = {
        "labels": labels,
        "ce_weight": 0.5,
        "temperature": 2.0,
        "student_softcap": 5.0,
        "teacher_scale": 0.7,
        "vocab_size": 500,
        "token_weight": torch.rand(2, 4),
    }
    for reduction in ("none", "sum", "mean"):
        check(student, teacher, reduction=reduction, return_metrics=True, **options)


def test_infinities():
    student, teacher = correlated_pair(4, 70)
    student[0, 3:6] = teacher[1, 7] = -INF
    student[2, :9] = teacher[2, :9] = -INF
    check(student, teacher, reduction="none")
    teacher[3, 5] = math.nan
    actual = run(TRITON, student, teacher, divergence="squared_hellinger", reduction="none")
    assert actual.loss[3].isnan()
    assert actual.gradient[3].isnan().all()
    assert actual.loss[:3].isfinite().all()


def test_identical_logits():
    logits = correlated_pair(2, 2503)[1].bfloat16()
    result = run(TRITON, logits, logits.clone(), divergence="squared_hellinger")
    assert 0 <= result.loss < tolerances.IDENTICAL_LOSS
    assert not result.gradient.any()


def test_a_shared_vocabulary(hellinger, three):
    student, teacher = correlated_pair(2, 96)
    options = {"divergence": hellinger, "temperature": 2.0}
    actual = sharded(three, TRITON, student, teacher, CUTS["uneven"], **options)
    assert_as_oracle(actual, student, teacher, **options)


def test_on_the_reference_backend(hellinger):
    student, teacher = correlated_pair(3, 70)
    loss = kd_loss(student.double(), teacher.double(), divergence=hellinger)
    p, q = (x.double().softmax(-1) for x in (teacher, student))
    expected = ((p.sqrt() - q.sqrt()).square() / 2).sum(-1).mean()
    torch.testing.assert_close(loss, expected)


def test_a_divergence_may_be_negative(three):
    from .triton_functions import minus_overlap, minus_overlap_slope

    def reference(log_p, log_q):
        return -((log_p + log_q) / 2).exp()

    divergence = kdkernels.register_divergence(
        "minus_overlap", value=minus_overlap, slope=minus_overlap_slope, reference=reference
    )
    student, teacher = correlated_pair(3, 96)
    log_p, log_q = (x.double().log_softmax(-1) for x in (teacher, student))
    expected = reference(log_p, log_q).sum(-1).mean()
    options = {"divergence": divergence}
    losses = {
        "reference": kd_loss(student.double(), teacher.double(), **options),
        "triton": loss_of(TRITON, student, teacher, **options).cpu(),
        "sharded": sharded(three, TRITON, student, teacher, CUTS["uneven"], **options).loss,
    }
    top, indices = log_p.topk(95)
    losses["sparse"] = kdkernels.sparse_kd_loss(student.double(), indices, top, **options)
    del kdkernels.divergences.REGISTERED["minus_overlap"]
    for backend, loss in losses.items():
        torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0, msg=backend)


def test_compiled(hellinger):
    compiled = torch.compile(kd_loss, fullgraph=True, backend="aot_eager")
    student, teacher = (move(x, TRITON.device) for x in correlated_pair(3, 70))
    options = {"divergence": hellinger, "backend": "triton"}
    leaves = [student.clone().requires_grad_() for _ in range(2)]
    for function, leaf in zip((kd_loss, compiled), leaves, strict=True):
        function(leaf, teacher, **options).backward()
    assert torch.equal(leaves[0].grad, leaves[1].grad)


@pytest.mark.skipif(bool(extension.missing), reason=extension.missing)
def test_other_backends_refuse(hellinger):
    student, teacher = correlated_pair(3, 70)
    for divergence in (hellinger, "squared_hellinger"):
        with pytest.raises(ValueError, match="cpu: divergence squared_hellinger is not compiled"):
            kd_loss(student, teacher, divergence=divergence, backend="cpu")


@pytest.mark.parametrize("its_name", ["custom", "squared_hellinger"])  # one that is another's
def test_an_unregistered_divergence_is_refused_with_advice(its_name):
    class Custom(kdkernels.Divergence):
        name = its_name

        def value(self, log_p, log_q):
            return log_p.exp() - log_q.exp()

    student, teacher = (move(x, TRITON.device) for x in correlated_pair(3, 70))
    with pytest.raises(ValueError, match=r"triton: divergence Custom .*register_divergence"):
        kd_loss(student, teacher, divergence=Custom(), backend="triton")


def test_bad_registrations(hellinger):
    from . import hellinger as functions

    good = {
        "value": functions.value,
        "slope": functions.slope,
        "reference": functions.reference,
    }
    bad = [
        ("jsd", {}, ValueError, "name is 'jsd', expected an identifier other than a built-in"),
        ("not a name", {}, ValueError, "name is 'not a name', expected an identifier"),
        (3, {}, TypeError, "name is a int, expected a str"),
        ("x", {"value": functions.reference}, TypeError, "value is a function.*@triton.jit"),
        ("x", {"slope": None}, TypeError, "slope is a NoneType.*@triton.jit"),
        ("x", {"reference": 1}, TypeError, "reference is a int, expected a function"),
    ]
    for name, changes, error, match in bad:
        with pytest.raises(error, match=match):
            kdkernels.register_divergence(name, **(good | changes))
    with pytest.raises(ValueError, match=r"value takes \['x'\], expected \(p, q, log_p"):
        kdkernels.register_divergence("x", **(good | {"value": functions.expm1}))
    assert "x" not in kdkernels.divergences.REGISTERED
    with pytest.raises(ValueError, match="squared_hellinger"):
        kd_loss(*correlated_pair(3, 70), divergence="hellinger")
