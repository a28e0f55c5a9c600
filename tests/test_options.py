"""Every option alone, and random mixtures of them, against the oracle."""

from __future__ import annotations

import random

import pytest
import torch

import kdkernels

from . import tolerances
from .cases import ALL, DTYPES, ONE_OF_EACH, correlated_pair, labels_for, normal
from .harness import (
    assert_as_oracle,
    assert_close,
    assert_gradient_of,
    assert_matches,
    assert_metrics,
    assert_same_bits,
    loss_of,
    move,
    oracle,
    run,
)

VOCAB = 517
LABELS = labels_for(2, 4, vocab=VOCAB)
SOME_IGNORED = torch.where(torch.arange(8).view(2, 4) % 3 == 0, -100, LABELS)
WEIGHT = torch.tensor([[0.5, 1.0, 0.0, 3.0], [0.25, 0.0, 2.0, 1.0]])

SINGLE = {
    "labels without ce_weight": {"labels": SOME_IGNORED},
    "ce_weight": {"labels": LABELS, "ce_weight": 0.5},
    "ce_weight, T = 2": {"labels": SOME_IGNORED, "ce_weight": 0.5, "temperature": 2.0},
    "ce_weight alone": {"labels": SOME_IGNORED, "kd_weight": 0, "ce_weight": 2, "temperature": 3.0},
    "negative ce_weight": {"labels": LABELS, "ce_weight": -0.1},
    "kd_weight": {"kd_weight": 0.3},
    "negative kd_weight": {"kd_weight": -0.3},
    "ignore_index": {"labels": LABELS, "ignore_index": int(LABELS[0, 0]), "ce_weight": 1.0},
    "token_weight": {"token_weight": WEIGHT},
    "token_weight, bool": {"token_weight": WEIGHT > 0.4},
    "token_weight, bfloat16": {"token_weight": WEIGHT.bfloat16()},
    "token_weight, float64": {"token_weight": WEIGHT.double()},
    "token_weight, transposed": {"token_weight": WEIGHT.t().contiguous().t()},
    "token_weight, negative": {"token_weight": -WEIGHT},
    "token_weight, of both signs": {"token_weight": WEIGHT - 0.5},
    "token_weight and labels": {"token_weight": WEIGHT, "labels": SOME_IGNORED, "ce_weight": 1.0},
    "normalizer": {"normalizer": 5},
    "normalizer, tensor": {"normalizer": torch.tensor(5.0)},
    "normalizer, int64 tensor": {"normalizer": torch.tensor(5)},
    "normalizer and weights": {"normalizer": torch.tensor(5.0), "token_weight": WEIGHT},
    "temperature": {"temperature": 3.0},
    "temperature_squared": {"temperature": 3.0, "temperature_squared": False},
    "vocab_size": {"vocab_size": 500},
    "vocab_size of 2": {"vocab_size": 2},
    "student_scale": {"student_scale": 0.7},
    "teacher_scale": {"teacher_scale": 1.7},
    "student_softcap": {"student_softcap": 5.0},
    "teacher_softcap": {"teacher_softcap": 5.0},
    "scale and softcap, hard labels": {
        "student_scale": 1.5,
        "student_softcap": 4.0,
        "teacher_softcap": 30.0,
        "labels": LABELS,
        "ce_weight": 0.5,
        "temperature": 2.0,
    },
}


def check(backend, student, teacher, divergence, **options):
    """All reductions; metrics in one of them."""
    for reduction in ("none", "sum", "mean"):
        options["reduction"] = reduction
        options["return_metrics"] = reduction == "none"
        expected = oracle(student, teacher, divergence=divergence, **options)
        actual = run(backend, student, teacher, divergence=divergence, **options)
        if options.get("token_weight") is None:
            assert_matches(actual, expected, divergence.name, student.dtype)
        else:  # weights of both signs cancel in a sum: it is as exact as its terms
            tolerance = tolerances.loss_tolerance(divergence.name)
            weight = options["token_weight"].double().abs()
            terms = options | {"reduction": "none", "token_weight": weight}
            size = oracle(student, teacher, divergence=divergence, **terms).loss.sum().item()
            assert_close(actual.loss, expected.loss, (tolerance[0], tolerance[0] * size))
            gradients = actual.gradient, expected.gradient
            assert_gradient_of(divergence.name, student.dtype, *gradients)
        if actual.metrics is not None:
            assert_metrics(actual.metrics, expected.metrics, divergence.name)


@pytest.mark.parametrize("options", SINGLE.values(), ids=SINGLE.keys())
def test_one_option(backend, options):
    student, teacher = correlated_pair(2, 4, VOCAB)
    for divergence in (kdkernels.ForwardKL(), kdkernels.JSD(0.3)):
        check(backend, student, teacher, divergence, **options)


def mixture(seed):
    """A divergence, a pair and options, drawn at random."""
    draw = random.Random(seed)
    lead = draw.choice([(3,), (2, 2), (1, 2, 2)])
    vocab = draw.choice([5, 16, 33, 300, 1100])
    student, teacher = correlated_pair(*lead, vocab, seed=seed)
    student = torch.cat([student, normal(*lead, draw.choice([0, 3]), seed=seed)], -1)
    teacher = torch.cat([teacher, normal(*lead, draw.choice([0, 5]), seed=seed)], -1)
    limit = min(student.shape[-1], teacher.shape[-1])
    options = {"temperature": draw.choice([1.0, 1.0, 0.8, 2.0])}

    def maybe(name, *values):
        if draw.random() < 0.5:
            options[name] = draw.choice(values)

    maybe("kd_weight", 0.5, 2, 0)
    maybe("temperature_squared", False)
    maybe("vocab_size", limit, limit - 1)
    maybe("student_scale", 0.8)
    maybe("teacher_scale", 1.2)
    maybe("student_softcap", 4.0)
    maybe("teacher_softcap", 5.0)
    maybe("token_weight", normal(*lead, seed=seed).abs(), normal(*lead, seed=seed) > 0)
    maybe("normalizer", 7.5, torch.tensor(3.0))
    labels = labels_for(*lead, vocab=options.get("vocab_size", limit), seed=seed)
    maybe("labels", labels, torch.where(labels % 2 == 0, -100, labels))
    if "labels" in options:
        maybe("ce_weight", 0.3, 1.0)
    return draw.choice(ALL), student, teacher, options


@pytest.mark.parametrize("seed", range(50))
def test_mixture_of_options(backend, seed):
    divergence, student, teacher, options = mixture(seed)
    if divergence.name == "alpha_beta" and min(divergence.alpha, divergence.beta) < 0:
        divergence = kdkernels.AlphaBeta(0.2, 0.7)  # powers of small p magnify every rounding
    if options.get("kd_weight") == 0 and not options.get("ce_weight"):
        options.pop("kd_weight")
    check(backend, student, teacher, divergence, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seed", range(20))
def test_inplace_is_the_same_to_the_bit(kernel, seed, dtype):
    divergence, student, teacher, options = mixture(seed)
    student = student.to(dtype)
    options |= {"divergence": divergence, "return_metrics": True}
    fresh = run(kernel, student, teacher, **options)
    inplace = run(kernel, student, teacher, inplace_grad=True, **options)
    assert_same_bits(inplace, fresh)


@pytest.mark.parametrize("divergence", ONE_OF_EACH, ids=str)
@pytest.mark.parametrize("options", [{}, {"ce_weight": 0.5}, {"student_softcap": 3.0}], ids=str)
def test_inplace_of_every_divergence(kernel, divergence, options):
    student, teacher = correlated_pair(3, 2500)
    options = options | {"divergence": divergence, "labels": labels_for(3, vocab=2500)}
    fresh = run(kernel, student, teacher, **options)
    inplace = run(kernel, student, teacher, inplace_grad=True, **options)
    assert_same_bits(inplace, fresh)


@pytest.mark.parametrize("inplace", [False, True], ids=["fresh", "inplace"])
def test_metrics_with_hard_labels(kernel, inplace):
    student, teacher = correlated_pair(2, 4, VOCAB)
    options = {
        "labels": SOME_IGNORED,
        "ce_weight": 0.5,
        "temperature": 2.0,
        "return_metrics": True,
    }
    actual = run(kernel, student, teacher, inplace_grad=inplace, **options)
    assert_as_oracle(actual, student, teacher, **options)
    for metric in actual.metrics.values():
        assert not metric[SOME_IGNORED == -100].any()


@pytest.mark.parametrize("vocab", [1, 2, 7, 300])
def test_a_certain_row_has_no_negative_entropy(backend, vocab):
    student = 10 * normal(40, vocab)
    student[:, 0] += 40
    options = {"labels": torch.zeros(40, dtype=torch.int64), "return_metrics": True}
    for temperature in (0.7, 1.0, 2.0):
        options |= {"temperature": temperature, "ce_weight": 1.0, "reduction": "none"}
        loss, metrics = loss_of(backend, student, student + 1, **options)
        assert (loss >= 0).all()
        for name in ("cross_entropy", "student_entropy", "teacher_entropy"):
            assert (metrics[name] >= 0).all(), name


def test_metrics_without_gradient_or_divergence(backend):
    student, teacher = correlated_pair(2, 4, VOCAB)
    for options in ({"kd_weight": 0, "ce_weight": 1.0}, {"ce_weight": 0}, {"temperature": 2.0}):
        options = {"labels": SOME_IGNORED, "return_metrics": True, **options}
        _, actual = loss_of(backend, student, teacher, **options)
        _, expected = kdkernels.kd_loss(student.double(), teacher.double(), **options)
        assert_metrics({n: m.cpu() for n, m in actual.items()}, expected, "forward_kl")


def test_agreement_takes_the_lowest_index_of_a_tie(backend):
    student = torch.zeros(4, 40)
    teacher = torch.zeros(4, 40)
    student[0, [3, 30]] = 1.0
    teacher[0, 3] = 2.0  # the first of the student's two
    student[1, [3, 30]] = 1.0
    teacher[1, 30] = 2.0  # the second
    student[2, [5, 6]] = teacher[2, [5, 39]] = 1.0  # the firsts are the same
    student[3, [5, 6]] = teacher[3, [4, 6]] = 1.0  # only a later one is
    _, metrics = loss_of(backend, student, teacher, return_metrics=True)
    assert metrics["agreement"].tolist() == [1.0, 0.0, 1.0, 0.0]


def test_agreement_of_ties_far_apart(backend):
    student, teacher = correlated_pair(2, 4200)
    student[:, [30, 2100, 4150]] = 40.0
    teacher[:, 30] = 40.0
    teacher[1, 4150] = 41.0
    _, metrics = loss_of(backend, student, teacher, return_metrics=True)
    assert metrics["agreement"].tolist() == [1.0, 0.0]


@pytest.mark.parametrize(
    "widths", [(151936, 152064), (152064, 151936)], ids=["teacher wider", "student wider"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_unequal_vocabularies(backend, widths, dtype):
    student, teacher = correlated_pair(1, max(widths))
    student, teacher = student[:, : widths[0]].to(dtype), teacher[:, : widths[1]].to(dtype)
    # What lies beyond takes no part, even if it is not a number.
    (student if widths[0] > widths[1] else teacher)[:, min(widths) :] = torch.nan
    actual = run(backend, student, teacher)
    assert_as_oracle(actual, student, teacher)
    assert actual.gradient.shape == student.shape
    assert not actual.gradient[:, min(widths) :].any()


@pytest.mark.parametrize("of", ["student", "teacher"])
@pytest.mark.parametrize("name", ["scale", "softcap"])
def test_transformed_bfloat16_of_whole_vectors(backend, of, name):
    student, teacher = (x.bfloat16() for x in correlated_pair(2, 128))
    options = {f"{of}_{name}": 1.5}
    assert_as_oracle(run(backend, student, teacher, **options), student, teacher, **options)


def test_softcap_of_huge_logits(backend):
    student, teacher = correlated_pair(3, 300)
    student[0, :3] = torch.tensor([1e4, -1e4, 3e38])
    teacher[0, :3] = torch.tensor([-1e4, 1e4, -3e38])
    student[1, 7] = teacher[1, 7] = -torch.inf
    student[2] *= 1e-6  # where tanh must not lose digits
    for options in ({"student_softcap": 30.0}, {"student_softcap": 30.0, "teacher_softcap": 5.0}):
        actual = run(backend, student, teacher, **options)
        assert_as_oracle(actual, student, teacher, **options)
        assert actual.gradient[0].isfinite().all()


def test_a_term_of_weight_0_is_not_evaluated(backend):
    student, teacher = correlated_pair(3, 300)
    labels = labels_for(3, vocab=300)
    options = {"labels": labels, "kd_weight": 0.0, "ce_weight": 0.5}
    clean = run(backend, student, teacher, **options)
    poisoned = run(backend, student, torch.full_like(teacher, torch.nan), **options)
    assert_same_bits(poisoned, clean)

    # A label of probability 0: infinite cross-entropy.
    student[torch.arange(3), labels] = teacher[torch.arange(3), labels] = -torch.inf
    without = run(backend, student, teacher, labels=labels, ce_weight=0.0)
    assert without.loss.isfinite()
    assert torch.equal(without.gradient, run(backend, student, teacher).gradient)


@pytest.mark.parametrize(
    ("options", "metric"),
    [
        ({"kd_weight": 0.0, "ce_weight": 1.0, "labels": torch.tensor([5, 5])}, "divergence"),
        ({"divergence": "jsd", "labels": torch.tensor([3, 5])}, "cross_entropy"),
    ],
    ids=["divergence", "cross-entropy"],
)
def test_an_infinite_term_of_weight_0_that_metrics_ask_for(backend, options, metric):
    student, teacher = correlated_pair(2, 96)
    student[0, 3] = -torch.inf
    options = options | {"return_metrics": True, "reduction": "none"}
    actual = run(backend, student, teacher, **options)
    assert actual.metrics[metric][0].isposinf()
    assert actual.loss.isfinite().all()
    assert_as_oracle(actual, student, teacher, **options)


def test_a_sum_of_weights_that_divides_nothing(backend):
    """0, as of rows that all take no part, or less."""
    student, teacher = correlated_pair(2, 96)
    for weight in (torch.tensor([1.0, -1.0]), torch.tensor([1.0, -3.0])):
        mean = run(backend, student, teacher, token_weight=weight)
        total = run(backend, student, teacher, token_weight=weight, reduction="sum")
        assert_same_bits(mean, total)
        assert total.loss.isfinite()


@pytest.mark.parametrize(
    "options",
    [{"kd_weight": 1e-4, "ce_weight": 32.0}, {"student_scale": 1024.0}, {"temperature": 2.0**-10}],
    ids=str,
)
def test_float16_gradient_of_terms_of_any_size(backend, options):
    """A row's power of two has to leave room for them."""
    student, teacher = correlated_pair(3, 96)
    temperature = options.get("temperature", 1.0)
    student = (student * temperature / options.get("student_scale", 1.0)).half()
    teacher = (teacher * temperature).half()
    options = options | {"labels": labels_for(3, vocab=96)}
    assert_as_oracle(run(backend, student, teacher, **options), student, teacher, **options)


def test_both_weights_0(backend):
    student, teacher = correlated_pair(3, 300)
    student[1, 7] = torch.nan
    result = run(backend, student, teacher, kd_weight=0)
    assert result.loss == 0
    assert not result.gradient.any()


def test_module(backend):
    student, teacher = correlated_pair(2, 4, VOCAB)
    options = {"divergence": "jsd", "temperature": 2.0, "ce_weight": 0.5, "reduction": "sum"}
    criterion = kdkernels.KDLoss(backend=backend.backend, **options)
    per_call = {"labels": SOME_IGNORED, "token_weight": WEIGHT}
    expected = loss_of(backend, student, teacher, **options, **per_call)
    student, teacher = (move(x, backend.device) for x in (student, teacher))
    per_call = {name: move(value, backend.device) for name, value in per_call.items()}
    assert torch.equal(criterion(student, teacher, **per_call), expected)
    assert "temperature=2.0" in repr(criterion)
    assert not list(criterion.parameters())


def test_ignored_rows_are_as_those_of_weight_0(backend):
    """Not by the oracle, which asks the same function as Triton which rows take part."""
    student, teacher = correlated_pair(4, VOCAB)
    labels = torch.tensor([3, 5, 3, 1])
    ignored = run(backend, student, teacher, labels=labels, ignore_index=3)
    weighted = run(backend, student, teacher, token_weight=(labels != 3).float())
    assert torch.equal(ignored.loss, weighted.loss)
    assert torch.equal(ignored.gradient, weighted.gradient)
