"""Infinities, padding, NaN, masks and extreme values."""

from __future__ import annotations

import math

import pytest
import torch

from kdkernels import JSD, AlphaBeta, ForwardKL, SkewForwardKL, kd_loss

from . import tolerances
from .cases import ALL, BOUNDED, DTYPES, ONE_OF_EACH, close_pair, correlated_pair, labels_for
from .harness import assert_close, assert_gradient, assert_matches, loss_of, oracle, run

INF = math.inf
#: Powers of probabilities of nearly 0 that are nearly 0 themselves.
PADDABLE = [
    d for d in ALL if d.name != "alpha_beta" or (min(d.alpha, d.beta) >= 0 and d.alpha + d.beta > 0)
]
COLUMNS = [0, 3, 15, 16, 31, 40, 69]


PADDING = [(torch.float32, -INF), (torch.bfloat16, -INF), (torch.float16, -INF)]
PADDING += [(dtype, torch.finfo(dtype).min) for dtype in (torch.float32, torch.bfloat16)]
LOWEST = [(torch.float32, torch.float16), (torch.bfloat16, torch.float16)]
LOWEST += [(torch.float16, torch.float32), (torch.float16, torch.bfloat16)]


@pytest.mark.parametrize(("dtype", "padding"), PADDING, ids=str)
@pytest.mark.parametrize("divergence", ALL, ids=str)
def test_shared_padding_is_as_if_absent(backend, divergence, dtype, padding):
    if divergence not in PADDABLE and padding != -INF:
        return
    student, teacher = (x.to(dtype) for x in correlated_pair(3, 70))
    student[:, COLUMNS] = teacher[:, COLUMNS] = padding
    kept = [i for i in range(70) if i not in COLUMNS]
    for temperature in (1.0, 2.0):
        options = {"divergence": divergence, "temperature": temperature, "reduction": "none"}
        expected = oracle(student[:, kept], teacher[:, kept], **options)
        actual = run(backend, student, teacher, **options)
        assert_close(actual.loss, expected.loss, tolerances.loss_tolerance(divergence.name))
        assert not actual.gradient[:, COLUMNS].any()
        relative = tolerances.gradient_tolerance(divergence.name, dtype)
        subnormal = tolerances.FLOAT16_SUBNORMAL if dtype == torch.float16 else 0.0
        assert_gradient(actual.gradient[:, kept], expected.gradient, relative, subnormal)


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
        expected = oracle(student, teacher, kd_weight=100.0, **options)
        actual = run(backend, student, teacher, kd_weight=100.0, **options)
        assert_matches(actual, expected, divergence.name, dtype)
        assert not actual.gradient[:, COLUMNS].any()


def one_sided(side):
    """-inf at some columns of one model in row 0; the other rows are ordinary."""
    student, teacher = correlated_pair(3, 70)
    (student if side == "student" else teacher)[0, COLUMNS] = -INF
    return student, teacher


def check_one_sided(backend, divergence, side, infinite, gradient_of_infinite=None):
    student, teacher = one_sided(side)
    options = {"divergence": divergence, "temperature": 2.0, "reduction": "none"}
    expected = oracle(student, teacher, **options)
    actual = run(backend, student, teacher, **options)
    assert actual.loss[1:].isfinite().all()
    assert (actual.loss[0] == INF) == infinite
    assert_close(actual.loss, expected.loss, tolerances.loss_tolerance(divergence.name))
    relative = tolerances.gradient_tolerance(divergence.name, torch.float32)
    if gradient_of_infinite == "nan":
        assert not actual.gradient[0].isfinite().any()
        assert_gradient(actual.gradient[1:], expected.gradient[1:], relative)
    else:
        assert actual.gradient.isfinite().all()
        assert_gradient(actual.gradient, expected.gradient, relative)


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
    check_one_sided(backend, divergence, "teacher", infinite=True, gradient_of_infinite="nan")


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
        relative = tolerances.gradient_tolerance("jsd", dtype)
        subnormal = tolerances.FLOAT16_SUBNORMAL if dtype == torch.float16 else 0.0
        assert_gradient(actual.gradient[kept], expected.gradient, relative, subnormal)
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("divergence", ONE_OF_EACH, ids=str)
def test_largest_logits_come_late(backend, divergence, dtype):
    # A kernel that guesses the size of a row's logits from the first ones has to notice.
    student, teacher = correlated_pair(5, 2503)
    for logits in (student, teacher):
        logits[0, 2000:2040] += 90
        logits[2, :600] -= 300
        logits[3, 2502] += 40  # alone, in the tail of the last block
    student[1, 2000:2040] += 90
    teacher[1, 2000:2040] += 70
    student, teacher = student.to(dtype), teacher.to(dtype)
    options = {"divergence": divergence, "temperature": 2.0, "reduction": "none"}
    options |= {"labels": labels_for(5, vocab=2503), "ce_weight": 0.1, "return_metrics": True}
    expected = oracle(student, teacher, **options)
    actual = run(backend, student, teacher, **options)
    assert_matches(actual, expected, divergence.name, dtype)
    for name, value in expected.metrics.items():
        tolerance = tolerances.loss_tolerance(divergence.name)
        assert_close(actual.metrics[name], value, tolerance, name)


@pytest.mark.parametrize("divergence", ONE_OF_EACH, ids=str)
def test_huge_logits(backend, divergence):
    student, teacher = correlated_pair(6, 37)
    student[0, 20], teacher[0, 20] = 1e4, 1e4  # both certain, of the same token
    student[1, 33], teacher[1, 33] = -1e4, -1e4
    student[2] += 1e4  # a constant shift between the models
    teacher[3] += 1e4
    student[4] -= 1e4
    student[5], teacher[5] = student[5] * 30, teacher[5] * 30
    options = {"divergence": divergence, "reduction": "none"}
    expected = oracle(student, teacher, **options)
    actual = run(backend, student, teacher, **options)
    assert_close(actual.loss, expected.loss, tolerances.loss_tolerance(divergence.name))
    assert actual.gradient.isfinite().all()
    assert_gradient(actual.gradient[1:], expected.gradient[1:], 3 * tolerances.OTHER_LOSS[0])
    # Both certain: no gradient but the rounding of probabilities of 1.
    assert actual.gradient[0].abs().max() <= tolerances.ROUNDING_OF_1


@pytest.mark.parametrize("size", [1e4, -1e4])
def test_certain_of_different_tokens(backend, size):
    student, teacher = torch.zeros(2, 37), torch.zeros(2, 37)
    student[:, 20] = teacher[:, 36] = size
    for divergence in ("forward_kl", "reverse_kl", "jsd", "tvd", "skew_reverse_kl"):
        options = {"divergence": divergence, "reduction": "none"}
        expected = oracle(student, teacher, **options)
        actual = run(backend, student, teacher, **options)
        assert_close(actual.loss, expected.loss, tolerances.loss_tolerance(divergence))
        assert actual.gradient.isfinite().all()


@pytest.mark.parametrize("vocab", [1, 2, 5, 17, 24, 33, 47, 63, 64, 65, 517, 2047, 2049, 4100])
def test_the_largest_logit_counts_wherever_it_lies(backend, vocab):
    spread, last = (40 if backend.interpreted else 130), 33
    if backend.backend == "triton" and backend.interpreted:  # no vectors; rows one by one
        spread, last = 16, 5
    positions = torch.arange(vocab)[:: max(1, vocab // spread)]
    positions = torch.cat([positions, torch.arange(max(0, vocab - last), vocab)]).unique()
    rows = torch.arange(len(positions))
    student, teacher = correlated_pair(len(positions), vocab)
    student[rows, positions] = 1e4
    teacher[rows, positions] = 9e3
    loss, metrics = loss_of(backend, student, teacher, return_metrics=True)
    assert 0 <= loss < tolerances.IDENTICAL_LOSS
    assert metrics["agreement"].all()
    student[rows, positions] = 9.0
    teacher[rows, positions] = 5.0
    expected = oracle(student, teacher, reduction="none")
    actual = run(backend, student, teacher, reduction="none")
    assert_close(actual.loss, expected.loss, tolerances.PLAIN_LOSS)
    if vocab > 1:
        assert_gradient(actual.gradient, expected.gradient, tolerances.CLOSE_GRADIENT)


def test_a_maximum_that_moves_along_the_row(backend):
    student, teacher = correlated_pair(8, 5003)
    climb = torch.linspace(0, 1, 5003)
    student[0], teacher[0] = student[0] + 20 * climb, teacher[0] + 20 * climb
    student[1], teacher[1] = student[1] + 90 * climb, teacher[1] + 90 * climb
    student[2], teacher[2] = student[2] - 90 * climb, teacher[2] - 90 * climb
    for row, padding in ((3, -INF), (4, torch.finfo(torch.float32).min), (5, -1e4)):
        student[row, :4200] = teacher[row, :4200] = padding
        student[row + 1, -1] = teacher[row + 1, -1] = 60.0
    student[7, :2100] = -INF
    teacher[7, :2100] = -30.0
    for divergence in ("forward_kl", "jsd"):
        options = {"divergence": divergence, "reduction": "none"}
        expected = oracle(student, teacher, **options)
        actual = run(backend, student, teacher, **options)
        tolerance = tolerances.loss_tolerance(divergence)
        assert_close(actual.loss, expected.loss, tolerance)
        assert_gradient(actual.gradient, expected.gradient, tolerances.OTHER_LOSS[0])


@pytest.mark.parametrize("temperature", [0.05, 100.0])
@pytest.mark.parametrize("divergence", ONE_OF_EACH, ids=str)
def test_extreme_temperatures(backend, divergence, temperature):
    student, teacher = correlated_pair(4, 2503)
    options = {"divergence": divergence, "temperature": temperature, "reduction": "none"}
    expected = oracle(student, teacher, **options)
    actual = run(backend, student, teacher, **options)
    # Logits of 8 at T = 0.05 are exponents of 160: 16 times the rounding of T = 1.
    relative = 16 * tolerances.OTHER_LOSS[0]
    assert_close(actual.loss, expected.loss, (relative, tolerances.OTHER_LOSS[1]))
    assert actual.gradient.isfinite().all()
    # Models certain of different tokens have gradients of nearly 0, as differences of terms of 1.
    error = (actual.gradient.double() - expected.gradient).norm(dim=-1)
    assert (error <= relative * (expected.gradient.norm(dim=-1) + temperature)).all()


@pytest.mark.parametrize("vocab", [1, 3, 37, 1030])
@pytest.mark.parametrize("divergence", ONE_OF_EACH, ids=str)
def test_identical_logits_on_the_cpu(divergence, vocab):
    """Exactly 0, also where the vocabulary does not fill the last vector."""
    logits = correlated_pair(2, vocab)[1]
    loss = kd_loss(logits, logits.clone(), divergence=divergence, backend="cpu")
    assert loss == 0 or divergence.name == "soft_cross_entropy"


@pytest.mark.parametrize("divergence", ONE_OF_EACH, ids=str)
def test_identical_logits(kernel, divergence):
    logits = correlated_pair(2, 248320)[1].bfloat16()
    logits[1] *= 4
    options = {"divergence": divergence, "temperature": 2.0}
    result = run(kernel, logits, logits.clone(), **options)
    assert not result.gradient.any()
    if divergence.name != "soft_cross_entropy":  # which is the entropy then
        assert 0 <= result.loss < tolerances.IDENTICAL_LOSS
        with torch.no_grad():
            loss_only = loss_of(kernel, logits, logits.clone(), **options)
        assert 0 <= loss_only < tolerances.IDENTICAL_LOSS


@pytest.mark.parametrize("kl", [1e-13, 1e-11, 1e-8, 1e-4])
def test_never_negative(backend, kl):
    student, teacher = close_pair(20 if backend.interpreted else 300, 101, kl=kl)
    for divergence in ONE_OF_EACH if backend.interpreted else ALL:
        with torch.no_grad():
            loss = loss_of(backend, student, teacher, divergence=divergence, reduction="none")
        assert (loss >= 0).all(), divergence


def test_the_weight_of_a_row_may_be_nan_without_touching_others(backend):
    student, teacher = correlated_pair(3, 37)
    clean = run(backend, student, teacher, reduction="none")
    weight = torch.tensor([1.0, math.nan, 1.0])
    actual = run(backend, student, teacher, reduction="none", token_weight=weight)
    assert actual.loss[1].isnan()
    assert torch.equal(actual.loss[[0, 2]], clean.loss[[0, 2]])
    assert torch.equal(actual.gradient[[0, 2]], clean.gradient[[0, 2]])


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
    expected = oracle(student, teacher, **options)
    actual = run(backend, student, teacher, **options)
    assert_matches(actual, expected, divergence.name, torch.float32)


def test_label_of_probability_0(backend):
    student, teacher = correlated_pair(2, 70)
    student[0, 5] = teacher[0, 5] = -INF
    options = {"labels": torch.tensor([5, 6]), "ce_weight": 0.5, "reduction": "none"}
    expected = oracle(student, teacher, **options)
    actual = run(backend, student, teacher, **options)
    assert actual.loss[0] == INF
    assert_matches(actual, expected, "forward_kl", torch.float32)


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("kl", [1e-6, 1e-4, None])
def test_float16_gradient_over_many_tokens(backend, divergence, kl):
    # q - p itself is subnormal near the teacher.
    pair = close_pair(2, 50257, kl=kl) if kl else correlated_pair(2, 50257)
    student, teacher = (x.half() for x in pair)
    for scale in (1.0, 1024.0) if kl != 1e-6 else (1.0,):
        grad_output = torch.tensor(scale)
        expected = oracle(student, teacher, divergence=divergence, grad_output=grad_output)
        actual = run(backend, student, teacher, divergence=divergence, grad_output=grad_output)
        assert_matches(actual, expected, divergence, torch.float16, close=True)


def test_float16_gradient_beyond_its_range_is_infinite(backend):
    # As in eager PyTorch: torch.amp.GradScaler lowers its scale when it meets infinities.
    student, teacher = correlated_pair(2, 37)
    result = run(backend, student.half(), teacher, grad_output=torch.tensor(2.0**22))
    assert result.gradient.isinf().any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_reverse_kl_of_models_far_apart(backend, dtype):
    student, teacher = (x.to(dtype) for x in correlated_pair(3, 517))
    student, teacher = student * 4, -teacher * 4
    # Its slopes have no bound: a fixed power of two would not fit a float16 gradient.
    options = {"divergence": "reverse_kl", "labels": labels_for(3, vocab=517), "ce_weight": 0.5}
    expected = oracle(student, teacher, **options)
    actual = run(backend, student, teacher, **options)
    assert_matches(actual, expected, "reverse_kl", dtype)
