"""Infinities, padding, NaN and masks."""

from __future__ import annotations

import math

import pytest
import torch

from kdkernels import JSD, AlphaBeta, ForwardKL, SkewForwardKL

from . import tolerances
from .cases import ALL, BOUNDED, DTYPES, ONE_OF_EACH, correlated_pair
from .harness import (
    assert_as_oracle,
    assert_close,
    assert_gradient,
    assert_gradient_of,
    oracle,
    run,
)

INF = math.inf
#: Powers of probabilities of nearly 0 that are nearly 0 themselves.
PADDABLE = [
    d for d in ALL if d.name != "alpha_beta" or (min(d.alpha, d.beta) >= 0 and d.alpha + d.beta > 0)
]
COLUMNS = [0, 3, 15, 16, 31, 40, 69]


PADDING = [(torch.float32, -INF), (torch.bfloat16, -INF), (torch.float16, -INF)]
PADDING += [(dtype, torch.finfo(dtype).min) for dtype in (torch.float32, torch.bfloat16)]
PADDED = [(d, *pair) for d in ALL for pair in PADDING if d in PADDABLE or pair[1] == -INF]
LOWEST = [(torch.float32, torch.float16), (torch.bfloat16, torch.float16)]
LOWEST += [(torch.float16, torch.float32), (torch.float16, torch.bfloat16)]


@pytest.mark.parametrize(("divergence", "dtype", "padding"), PADDED, ids=str)
def test_shared_padding_is_as_if_absent(backend, divergence, dtype, padding):
    student, teacher = (x.to(dtype) for x in correlated_pair(3, 70))
    student[:, COLUMNS] = teacher[:, COLUMNS] = padding
    kept = [i for i in range(70) if i not in COLUMNS]
    for temperature in (1.0, 2.0):
        options = {"divergence": divergence, "temperature": temperature, "reduction": "none"}
        expected = oracle(student[:, kept], teacher[:, kept], **options)
        actual = run(backend, student, teacher, **options)
        assert_close(actual.loss, expected.loss, tolerances.loss_tolerance(divergence.name))
        assert not actual.gradient[:, COLUMNS].any()
        assert_gradient_of(divergence.name, dtype, actual.gradient[:, kept], expected.gradient)


@pytest.mark.parametrize(("dtype", "teacher_dtype"), LOWEST, ids=str)
@pytest.mark.parametrize("divergence", PADDABLE, ids=str)
def test_the_lowest_floats_of_two_dtypes(backend, divergence, dtype, teacher_dtype):
    """What both models mask has no gradient, though weights or a float16's scale are large."""
    student, teacher = correlated_pair(3, 70)
    student, teacher = student.to(dtype), teacher.to(teacher_dtype)
    student[:, COLUMNS] = torch.finfo(dtype).min
    teacher[:, COLUMNS] = torch.finfo(teacher_dtype).min
    for temperature in (1.0, 2.0):
        options = {"divergence": divergence, "temperature": temperature, "reduction": "none"}
        actual = run(backend, student, teacher, kd_weight=100.0, **options)
        assert_as_oracle(actual, student, teacher, kd_weight=100.0, **options)
        assert not actual.gradient[:, COLUMNS].any()


def one_sided(side):
    """-inf at some columns of one model in row 0; the other rows are ordinary."""
    student, teacher = correlated_pair(3, 70)
    (student if side == "student" else teacher)[0, COLUMNS] = -INF
    return student, teacher


def check_one_sided(backend, divergence, side, infinite, nan_gradient=False):
    student, teacher = one_sided(side)
    options = {"divergence": divergence, "temperature": 2.0, "reduction": "none"}
    expected = oracle(student, teacher, **options)
    actual = run(backend, student, teacher, **options)
    assert actual.loss[1:].isfinite().all()
    assert (actual.loss[0] == INF) == infinite
    assert_close(actual.loss, expected.loss, tolerances.loss_tolerance(divergence.name))
    if nan_gradient:
        assert not actual.gradient[0].isfinite().any()
    gradients = [result.gradient[int(nan_gradient) :] for result in (actual, expected)]
    assert gradients[0].isfinite().all()
    assert_gradient_of(divergence.name, torch.float32, *gradients)


KL_WITH_TEACHER_FIRST = [d for d in ALL if d.name in ("forward_kl", "soft_cross_entropy")]
SYMMETRIC = [d for d in ALL if d.name == "symmetric_kl" and 0 < d.weight < 1]
KL_WITH_STUDENT_FIRST = [d for d in ALL if d.name == "reverse_kl"]


@pytest.mark.parametrize("divergence", [*KL_WITH_TEACHER_FIRST, *SYMMETRIC], ids=str)
def test_student_excludes_what_the_teacher_has(backend, divergence):
    check_one_sided(backend, divergence, "student", infinite=True)


@pytest.mark.parametrize("divergence", [*KL_WITH_STUDENT_FIRST, *BOUNDED], ids=str)
def test_student_excludes_and_the_divergence_is_finite(backend, divergence):
    check_one_sided(backend, divergence, "student", infinite=False)


def test_student_excludes_and_a_power_of_the_teacher_is_finite(backend):
    check_one_sided(backend, AlphaBeta(0, 0.7), "student", infinite=False)


#: Parameters of alpha-beta and who excludes tokens: the loss is infinite, its slopes are not.
FINITE_SLOPES = [(0.7, 0.0, "student"), (1.5, 0.0, "student"), (-0.5, 0.5, "student")]
FINITE_SLOPES += [(0.5, -0.5, "teacher"), (0.3, -0.8, "teacher")]


@pytest.mark.parametrize(("a", "b", "side"), FINITE_SLOPES)
def test_alpha_beta_is_infinite_and_its_gradient_finite(backend, a, b, side):
    student, teacher = one_sided(side)
    actual = run(backend, student, teacher, divergence=AlphaBeta(a, b), reduction="none")
    assert actual.loss[0] == INF
    assert actual.loss[1:].isfinite().all()
    # q^b (q^a - p^a) / a, by the definition's derivative.
    q, p = student.double().softmax(-1), teacher.double().softmax(-1)
    slope = (q ** (a + b) - (p**a if b == 0 else p**a * q**b)) / a
    gradient = slope - q * slope.sum(-1, keepdim=True)
    assert_gradient(actual.gradient, gradient, tolerances.OTHER_LOSS[0])


@pytest.mark.parametrize("divergence", [*KL_WITH_STUDENT_FIRST, *SYMMETRIC], ids=str)
def test_teacher_excludes_what_the_student_has(backend, divergence):
    check_one_sided(backend, divergence, "teacher", infinite=True, nan_gradient=True)


@pytest.mark.parametrize("divergence", ["reverse_kl", "symmetric_kl"])
def test_an_infinite_divergence_has_no_gradient(kernel, divergence):
    student, teacher = correlated_pair(2, 96)
    teacher[0, 3] = -math.inf
    actual = run(kernel, student, teacher, divergence=divergence, reduction="none")
    assert actual.loss[0].isposinf()
    assert actual.gradient[0].isnan().all()


@pytest.mark.parametrize("divergence", [*KL_WITH_TEACHER_FIRST, *BOUNDED], ids=str)
def test_teacher_excludes_and_the_divergence_is_finite(backend, divergence):
    check_one_sided(backend, divergence, "teacher", infinite=False)


@pytest.mark.parametrize("side", ["student", "teacher", "both"])
@pytest.mark.parametrize("value", [math.nan, INF, "all -inf"], ids=str)
@pytest.mark.parametrize("divergence", ONE_OF_EACH, ids=str)
def test_a_bad_row_is_nan_and_leaves_the_others_alone(backend, divergence, value, side):
    student, teacher = correlated_pair(4, 37)
    options = {"divergence": divergence, "reduction": "none", "return_metrics": True}
    clean = run(backend, student, teacher, **options)
    for logits in {"student": [student], "teacher": [teacher], "both": [student, teacher]}[side]:
        if value == "all -inf":
            logits[2] = -INF
        else:
            logits[2, 33] = value
    actual = run(backend, student, teacher, **options)
    assert actual.loss[2].isnan()
    assert actual.gradient[2].isnan().all()
    assert actual.metrics["divergence"][2].isnan()
    others = [0, 1, 3]
    assert torch.equal(actual.loss[others], clean.loss[others])
    assert torch.equal(actual.gradient[others], clean.gradient[others])
    for name in ("divergence", "teacher_entropy", "student_entropy", "agreement"):
        assert torch.equal(actual.metrics[name][others], clean.metrics[name][others])


def test_metrics_of_a_bad_row_are_the_same_everywhere(backend):
    student, teacher = correlated_pair(3, 37)
    student[0, 3] = teacher[1, 3] = math.nan
    options = {"return_metrics": True, "labels": torch.tensor([1, 2, 3])}
    expected = oracle(student, teacher, **options)
    actual = run(backend, student, teacher, **options)
    for name, value in expected.metrics.items():
        assert_close(actual.metrics[name], value, tolerances.METRIC, name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("inplace", [False, True], ids=["fresh", "inplace"])
def test_masked_rows_give_exactly_nothing(kernel, dtype, inplace):
    student, teacher = (x.to(dtype) for x in correlated_pair(5, 37))
    student[1] = teacher[1] = math.nan
    student[3], teacher[4] = INF, -INF
    labels = torch.tensor([5, -100, 7, -100, 2])
    weight = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0])
    options = {"labels": labels, "token_weight": weight, "ce_weight": 0.5, "divergence": JSD()}
    kept = [0, 2]
    for reduction in ("none", "sum", "mean"):
        options |= {"reduction": reduction, "return_metrics": True}
        expected = oracle(
            student[kept],
            teacher[kept],
            **(options | {"labels": labels[kept], "token_weight": weight[kept]}),
        )
        actual = run(kernel, student, teacher, inplace_grad=inplace, **options)
        loss = actual.loss
        if reduction == "none":
            assert not loss[[1, 3, 4]].any()
            loss = loss[kept]
        assert_close(loss, expected.loss, tolerances.OTHER_LOSS)
        assert not actual.gradient[[1, 3, 4]].any()
        assert_gradient_of("jsd", dtype, actual.gradient[kept], expected.gradient)
        for metric in actual.metrics.values():
            assert not metric[[1, 3, 4]].any()


@pytest.mark.parametrize("mask", ["labels", "token_weight"])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_all_rows_masked(backend, reduction, mask):
    student, teacher = correlated_pair(2, 3, 37)
    student[0], teacher[1] = math.nan, -INF
    options = {"reduction": reduction}
    if mask == "labels":
        options |= {"labels": torch.full((2, 3), -100), "ce_weight": 1.0}
    else:
        options |= {"token_weight": torch.zeros(2, 3, dtype=torch.bool)}
    result = run(backend, student, teacher, **options)
    assert not result.loss.any()
    assert not result.gradient.any()


def test_the_weight_of_a_row_may_be_nan_without_touching_others(backend):
    student, teacher = correlated_pair(3, 37)
    clean = run(backend, student, teacher, reduction="none")
    weight = torch.tensor([1.0, math.nan, 1.0])
    actual = run(backend, student, teacher, reduction="none", token_weight=weight)
    assert actual.loss[1].isnan()
    assert torch.equal(actual.loss[[0, 2]], clean.loss[[0, 2]])
    assert torch.equal(actual.gradient[[0, 2]], clean.gradient[[0, 2]])


def test_the_weight_of_an_ignored_row_may_be_anything(backend):
    student, teacher = correlated_pair(4, 37)
    options = {"labels": torch.tensor([5, -100, -100, 6]), "ce_weight": 0.5}
    expected = run(backend, student, teacher, token_weight=torch.tensor([2.0, 0, 0, 1]), **options)
    weight = torch.tensor([2.0, math.nan, math.inf, 1.0])
    actual = run(backend, student, teacher, token_weight=weight, **options)
    assert torch.equal(actual.loss, expected.loss)
    assert torch.equal(actual.gradient, expected.gradient)


@pytest.mark.parametrize("divergence", [ForwardKL(), SkewForwardKL(), AlphaBeta(0.2, 0.7)], ids=str)
def test_infinities_with_scale_softcap_and_labels(backend, divergence):
    student, teacher = correlated_pair(3, 70)
    student[0, COLUMNS] = teacher[0, COLUMNS] = -INF
    labels = torch.tensor([5, 6, 7])
    options = {
        "divergence": divergence,
        "student_scale": 1.5,
        "student_softcap": 6.0,
        "teacher_softcap": 20.0,
        "labels": labels,
        "ce_weight": 0.5,
    }
    actual = run(backend, student, teacher, **options)
    assert_as_oracle(actual, student, teacher, **options)


@pytest.mark.parametrize("why", ["a NaN", "an infinite divergence"])
def test_a_row_without_a_gradient_is_nan_where_a_softcap_has_no_slope(kernel, why):
    student, teacher = correlated_pair(3, 70)
    student[1, 5] = -1e4
    if why == "a NaN":
        student[1, 3] = math.nan
    else:
        teacher[1, 3] = -INF
    options = {"divergence": "reverse_kl", "student_softcap": 5.0, "reduction": "none"}
    gradient = run(kernel, student, teacher, **options).gradient
    assert gradient.isnan().all(-1).tolist() == [False, True, False]
    assert gradient.isnan().any(-1).tolist() == [False, True, False]


def test_columns_beyond_the_vocabulary_get_nothing_of_a_row_without_a_gradient(backend):
    """Also where a float16 gradient is yet to be multiplied by a power of two."""
    student, teacher = (x.half() for x in correlated_pair(2, 70))
    teacher[1, 3] = -INF
    options = {"divergence": "reverse_kl", "vocab_size": 60, "reduction": "none"}
    gradient = run(backend, student, teacher, **options).gradient
    assert not gradient[1, :60].isfinite().all()
    assert not gradient[:, 60:].any()


def test_label_of_probability_0(backend):
    student, teacher = correlated_pair(2, 70)
    student[0, 5] = teacher[0, 5] = -INF
    options = {"labels": torch.tensor([5, 6]), "ce_weight": 0.5, "reduction": "none"}
    actual = run(backend, student, teacher, **options)
    assert actual.loss[0] == INF
    assert_as_oracle(actual, student, teacher, **options)


@pytest.mark.parametrize("beta", [0.5, 0.99])
def test_jsd_of_what_the_teacher_masks_and_the_student_all_but_masks(backend, beta):
    """(1 - beta) q underflows in some row before q does."""
    masked = torch.linspace(-105.0, -80.0, 11 if backend.interpreted else 201)
    student = torch.tensor([[0.0, -1.0, 0.0]]).repeat(len(masked), 1)
    student[:, 2] = masked
    teacher = torch.tensor([[0.0, -1.5, -INF]]).repeat(len(masked), 1)
    options = {"divergence": JSD(beta), "reduction": "none"}
    actual = run(backend, student, teacher, **options)
    assert_as_oracle(actual, student, teacher, **options)
