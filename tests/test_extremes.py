"""Extreme values: logits, distances between models and temperatures, and where models agree."""

from __future__ import annotations

import math

import pytest
import torch

from kdkernels import AlphaBeta, ForwardKL, kd_loss
from kdkernels.backends import cuda
from kdkernels.backends.rows import gradient_scale

from . import tolerances
from .cases import ALL, ONE_OF_EACH, close_pair, correlated_pair, labels_for, normal
from .harness import (
    assert_as_oracle,
    assert_close,
    assert_gradient,
    assert_matches,
    loss_of,
    oracle,
    run,
)
from .test_compile import options as operator_options

INF = math.inf


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


@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
def test_top_tokens_that_come_late(backend, masked):
    """Two tokens have almost all of the probability, far above what the row began with."""
    student = 0.5 * normal(3, 4096)
    student[:, 3000:3002] = torch.tensor([[10.0, 9.0], [13.0, 12.0], [26.0, 25.0]])
    teacher = student + 3e-3 * normal(3, 4096)
    if masked:  # a kernel may take blocks with -inf another way
        student[:, 3002] = teacher[:, 3002] = -INF
    options = {"reduction": "none", "labels": torch.full((3,), 3000), "ce_weight": 1.0}
    options["return_metrics"] = True
    expected = oracle(student, teacher, **options)
    actual = run(backend, student, teacher, **options)
    assert_matches(actual, expected, "forward_kl", torch.float32)
    for name in ("teacher_entropy", "student_entropy", "cross_entropy"):
        assert_close(actual.metrics[name], expected.metrics[name], tolerances.METRIC, name)


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("whose", [0, 1], ids=["student", "teacher"])
def test_a_late_logit_far_above_the_first_ones(backend, divergence, whose):
    """Gradients of certain students are below rounding, others as exact as float32 beside 300."""
    pair = correlated_pair(2, 2400)
    pair[whose][:, 2300] = 300.0
    options = {"divergence": divergence, "reduction": "none"}
    actual = run(backend, *pair, **options)
    assert_close(actual.loss, oracle(*pair, **options).loss, tolerances.OTHER_LOSS)
    assert actual.gradient.isfinite().all()


def test_a_late_logit_of_a_hot_softmax(backend):
    """Far above the first ones at temperature 1 alone."""
    student, teacher = correlated_pair(2, 2400)
    student[:, 2300] = 300.0
    options = {"temperature": 100.0, "temperature_squared": False, "ce_weight": 0.5}
    options |= {"labels": torch.tensor([2300, 4]), "reduction": "none"}
    assert_as_oracle(run(backend, student, teacher, **options), student, teacher, **options)


def test_a_temperature_that_float32_rounds(backend):
    # Far from what exponentials are relative to, 1 / T and its rounding differ by digits.
    student, teacher = correlated_pair(4, 2503)
    for logits in (student, teacher):
        logits[:, 2000] += 18
    options = {"temperature": 1.3, "reduction": "none", "return_metrics": True}
    expected = oracle(student, teacher, **options)
    actual = run(backend, student, teacher, **options)
    for name in ("teacher_entropy", "student_entropy"):
        assert_close(actual.metrics[name], expected.metrics[name], tolerances.METRIC, name)


@pytest.mark.parametrize("shift", [3.0, -40.0, 300.0])
@pytest.mark.parametrize("divergence", ONE_OF_EACH, ids=str)
def test_close_models_up_to_a_constant(backend, divergence, shift):
    # In multiples of 2**-16, so that float32 has the sum.
    student, teacher = ((x * 2**16).round() / 2**16 for x in correlated_pair(3, 601))
    student = teacher + ((student - teacher) * 2**6).round() / 2**16
    options = {"divergence": divergence, "temperature": 2.0, "reduction": "none"}
    expected = oracle(student + shift, teacher, **options)
    actual = run(backend, student + shift, teacher, **options)
    assert_close(actual.loss, expected.loss, (tolerances.SHIFT, 0))
    assert_gradient(actual.gradient, expected.gradient, tolerances.CLOSE_GRADIENT)


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


@pytest.mark.parametrize("gap", [0.5, 3.0])
@pytest.mark.parametrize("divergence", ONE_OF_EACH, ids=str)
def test_tokens_that_neither_model_tells_apart(backend, divergence, gap):
    """Sums of thousands of equal terms, which rounding moves the same way each time."""
    if divergence.name == "tvd" and gap < 1:
        pytest.skip("its terms are rounding: the softmax sums differ by 2e-4")
    student, teacher = torch.full((1, 2621), 0.0137), torch.zeros(1, 2621)
    student[0, 0] += gap
    options = {"divergence": divergence, "return_metrics": True}
    expected = oracle(student, teacher, **options)
    actual = run(backend, student, teacher, **options)
    assert_close(actual.loss, expected.loss, tolerances.loss_tolerance(divergence.name))
    for name in ("student_entropy", "teacher_entropy"):
        assert_close(actual.metrics[name], expected.metrics[name], tolerances.METRIC, name)


@pytest.mark.parametrize(
    ("parameters", "gap", "top"),
    [
        ((1.0, 1.0), 14.0, 5.5),
        ((0.5, 1.0), 14.0, 5.5),
        ((0.5, 1.5), 10.0, 5.5),
        ((0.2, 0.7), 20.0, 3.5),
        ((0.05, 0.9), 14.0, 5.5),
        ((0.0, 1.5), 14.0, 5.5),
        ((0.0, 0.7), 18.0, 5.5),
        ((-0.3, 1.2), 14.0, 5.5),
    ],
    ids=str,
)
def test_alpha_beta_of_a_token_that_the_student_rules_out(backend, parameters, gap, top):
    """Its gradient is a difference of powers of the ratio, both of which are next to nothing."""
    student, teacher = torch.zeros(2, 1, 1000)
    teacher[0, 0], student[0, 0] = top, top + 1.5 - gap
    divergence = AlphaBeta(*parameters)
    expected = oracle(student, teacher, divergence=divergence)
    actual = run(backend, student, teacher, divergence=divergence)
    assert_gradient(actual.gradient[:, :1], expected.gradient[:, :1], tolerances.OTHER_LOSS[0])


@pytest.mark.parametrize("vocab", [6, 96], ids=["far", "near"])
def test_tvd_where_models_agree_on_all_other_tokens(backend, vocab):
    """It has no slope there: in exact sums of exponentials of 0 and of next to none."""
    student, teacher = torch.zeros(2, 1, vocab)
    student[0, 2] = teacher[0, 5] = -1000.0
    actual = run(backend, student, teacher, divergence="tvd")
    assert_as_oracle(actual, student, teacher, divergence="tvd")


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


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("kl", [1e-6, 1e-4, None])
def test_float16_gradient_over_many_tokens(backend, divergence, kl):
    # q - p itself is subnormal near the teacher.
    pair = close_pair(2, 50257, kl=kl) if kl else correlated_pair(2, 50257)
    student, teacher = (x.half() for x in pair)
    for scale in (1.0, 1024.0) if kl != 1e-6 else (1.0,):
        options = {"divergence": divergence, "grad_output": torch.tensor(scale)}
        actual = run(backend, student, teacher, **options)
        assert_as_oracle(actual, student, teacher, **options, close=True)


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
    student[0, 5:7], teacher[0, 5:7] = 60.0, torch.tensor([0.0, -1000.0])
    options = {"divergence": "reverse_kl", "labels": labels_for(3, vocab=517), "ce_weight": 0.5}
    actual = run(backend, student, teacher, **options)
    assert_as_oracle(actual, student, teacher, **options)


def test_cuda_counts_columns_in_32_bits():
    narrow, wide = (torch.empty(1, 2**30 + more, device="meta") for more in (0, 1))
    above = "the vocabulary is above 2**30"
    assert above in cuda.why_not(wide, wide, ForwardKL())
    # What the wider one has beyond the other takes no part.
    assert above not in cuda.why_not(narrow, wide, ForwardKL())
    (refusal,) = (x for x in cuda.why_not(narrow, narrow.double(), ForwardKL()) if "float64" in x)
    assert "teacher_logits" in refusal


OPTIONS = operator_options(metrics=False, temperature=1.0, kd_weight=1.0, ce_weight=0.0)


@pytest.mark.parametrize(
    ("changes", "bound"),
    [
        ({}, 2.0),
        ({"kd_weight": 0.7, "ce_weight": 0.3, "temperature": 4.0}, 0.65),
        ({"kd_weight": -1.0, "ce_weight": 2.0}, 4.0),
        ({"kd_weight": 1.0, "ce_weight": -2.0, "student_scale": 0.25}, 1.0),
        ({"kd_weight": 1e-4, "student_scale": 8.0}, 1.6e-3),
    ],
)
def test_largest_entry_of_a_float16_gradient(changes, bound):
    power = gradient_scale(OPTIONS._replace(**changes))
    assert math.frexp(power)[0] == 0.5
    assert 2.0**11 <= bound * power < 2.0**12


@pytest.mark.parametrize(("kd_weight", "exponent"), [(1e-60, 100), (1e60, -100)])
def test_power_of_a_float16_gradient_is_a_float32(kd_weight, exponent):
    options = OPTIONS._replace(kd_weight=kd_weight)
    assert gradient_scale(options) == 2.0**exponent
