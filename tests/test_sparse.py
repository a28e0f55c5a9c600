"""A sparse teacher, against its definition on whole softmaxes in float64: see sparse_cases.py."""

from __future__ import annotations

import pytest
import torch

from kdkernels import JSD, AlphaBeta, ForwardKL, kd_loss, sparse_kd_loss
from kdkernels.options import TAILS

from . import tolerances
from .cases import DTYPES, ONE_OF_EACH, correlated_pair, labels_for, normal
from .harness import Result, assert_close, assert_gradient, assert_matches, assert_same_bits
from .sparse_cases import PAIRS, check, compared, oracle, run, top


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tail", "divergence"), PAIRS, ids=str)
def test_matches_the_definition(backend, tail, divergence, dtype):
    student, teacher = correlated_pair(3, 600)
    student = student.to(dtype)
    for temperature in (1.0, 2.0):
        indices, logprobs = top(teacher, 9, temperature)
        options = {"tail": tail, "divergence": divergence, "temperature": temperature}
        check(backend, student, indices, logprobs, **options)


@pytest.mark.parametrize("vocab", [1, 2, 7, 50257])
@pytest.mark.parametrize("tail", TAILS)
def test_vocabularies(backend, tail, vocab):
    student, teacher = correlated_pair(2, vocab)
    for k in {1, min(vocab, 5)}:
        check(backend, student, *top(teacher, k), tail=tail)


OPTIONS = {
    "labels": {"ce_weight": 0.5},
    "labels, T": {"ce_weight": 0.5, "temperature": 2.0},
    "labels alone": {"ce_weight": 0.7, "kd_weight": 0.0, "temperature": 2.0},
    "softcap": {"ce_weight": 0.5, "temperature": 2.0, "student_softcap": 4.0},
    "scale": {"student_scale": 1.5, "temperature": 0.7, "vocab_size": 61},
    "weights": {"token_weight": torch.tensor([[1.0, 0.5, 0.0], [2.0, 1.0, 1.0]])},
    "sum": {"reduction": "sum", "token_weight": torch.tensor([[True, False, True]] * 2)},
    "none": {"reduction": "none", "grad_output": torch.tensor([[1.0, 2.0, 3.0], [-1.0, 0.5, 0.0]])},
    "normalizer": {"normalizer": 7.0, "grad_output": torch.tensor(3.0)},
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("tail", TAILS)
def test_options(backend, tail, name):
    options = dict(OPTIONS[name])
    student, teacher = correlated_pair(2, 3, 70)
    vocab = options.get("vocab_size", 70)
    indices, logprobs = top(teacher[..., :vocab], 6, options.get("temperature", 1.0))
    indices[0, 1, 2] = indices[1, 0, 4] = -1  # empty slots
    if "ce_weight" in options:
        labels = labels_for(2, 3, vocab=70)
        labels[0, 0] = indices[0, 0, 3]  # one that the teacher lists, and one to leave out
        labels[1, 2] = -100
        options["labels"] = labels
    actual = check(backend, student, indices, logprobs, tail=tail, **options)
    if not backend.kernel:
        return
    inplace = run(backend, student, indices, logprobs, tail=tail, inplace_grad=True, **options)
    assert_same_bits(inplace, actual)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 5, 641), (3, 4, 650)], ids=str)
def test_strides(backend, shape, dtype):
    student, teacher = correlated_pair(*shape)
    student = student.to(dtype)[:, :-1]
    indices, logprobs = top(teacher[:, :-1], 7)
    labels = labels_for(shape[0], shape[1] - 1, vocab=shape[-1])
    options = {"labels": labels, "ce_weight": 0.5, "temperature": 1.5}
    expected = oracle(student, indices, logprobs, **options)
    for view in (student, student.transpose(0, 1).contiguous().transpose(0, 1)):
        actual = run(backend, view, indices.to(torch.int32), logprobs, **options)
        assert_matches(actual, expected, "forward_kl", dtype)


def test_rows_at_more_than_two_strides(backend):
    """Kernels read a copy, which has to last as long as they do."""
    student, teacher = correlated_pair(4, 3, 2, 2048)
    entries = top(teacher, 7)
    expected = oracle(student, *entries)
    view = student.permute(2, 1, 0, 3).contiguous().permute(2, 1, 0, 3)
    actual = run(backend, view, *entries)
    assert_matches(actual, expected, "forward_kl", torch.float32)


@pytest.mark.parametrize("tail", ["bucket", "renormalize", "drop"])
@pytest.mark.parametrize("divergence", ["jsd", "forward_kl", "reverse_kl"])
def test_a_whole_teacher_is_an_ordinary_one(backend, tail, divergence):
    student, teacher = correlated_pair(20, 33)  # whose probabilities sum to more than 1 or to less
    indices = torch.stack([torch.randperm(33) for _ in range(20)])
    logprobs = teacher.log_softmax(-1).gather(-1, indices)
    actual = run(backend, student, indices, logprobs, tail=tail, divergence=divergence)
    leaf = student.double().requires_grad_()
    expected = kd_loss(leaf, teacher.double(), divergence=divergence)
    expected.backward()
    result = Result(expected.detach(), leaf.grad, None)
    assert_matches(actual, result, divergence, torch.float32)
    if tail == "bucket":
        rounded = run(backend, student, indices, logprobs.bfloat16(), divergence=divergence)
        assert_close(rounded.loss, result.loss, (0.05, 0.0))


def test_alpha_beta_of_dropped_tails_is_that_of_measures(backend):
    student, teacher = correlated_pair(3, 50)
    indices, logprobs = top(teacher, 6)
    leaf = student.double().requires_grad_()
    q, p = leaf.softmax(-1).gather(-1, indices), logprobs.double().exp()
    (p * (p / q).log() - p + q).sum(-1).mean().backward()
    expected = (p * (p / q).log() - p + q).sum(-1).mean().detach()
    options = {"tail": "drop", "divergence": AlphaBeta(1, 0)}
    actual = run(backend, student, indices, logprobs, **options)
    assert_matches(actual, Result(expected, leaf.grad, None), "forward_kl", torch.float32)
    of_itself = run(backend, teacher, indices, logprobs, **options)
    assert of_itself.loss.abs() < tolerances.PLAIN_LOSS[1]
    assert of_itself.gradient.abs().max() < tolerances.PLAIN_LOSS[1]


@pytest.mark.parametrize("divergence", [d for d in ONE_OF_EACH if d.name != "soft_cross_entropy"])
@pytest.mark.parametrize("tail", ["bucket", "renormalize"])
def test_identical_models(backend, tail, divergence):
    logits = correlated_pair(4, 3000)[1]
    indices, logprobs = top(logits, 20)
    result = run(backend, logits, indices, logprobs, tail=tail, divergence=divergence)
    # The log-probabilities of the teacher are rounded, and so differ from the student's.
    assert 0 <= result.loss < (1e-6 if divergence.name == "tvd" else 1e-12)
    if divergence.name != "tvd":
        assert result.gradient.abs().max() < 1e-6


def test_metrics(backend):
    student, teacher = correlated_pair(5, 90)
    indices, logprobs = top(teacher, 8, 2.0)
    labels = torch.tensor([1, 2, -100, 4, 5])
    student[3, indices[3, logprobs[3].argmax()]] = 30
    options = {"temperature": 2.0, "labels": labels, "return_metrics": True, "reduction": "none"}
    result = run(backend, student, indices, logprobs, ce_weight=0.5, **options)
    log_q = (student.double() / 2).log_softmax(-1)
    pairs = [compared(log_q[i], indices[i], logprobs[i].double(), "bucket") for i in (0, 1, 3, 4)]
    kept = torch.tensor([0, 1, 3, 4])
    divergence = torch.stack([ForwardKL().value(*pair).sum() for pair in pairs])
    assert_close(result.metrics["divergence"][kept], divergence, tolerances.PLAIN_LOSS)
    for which, name in enumerate(("teacher_entropy", "student_entropy")):
        entropy = torch.stack([-(pair[which].exp() * pair[which]).sum() for pair in pairs])
        assert_close(result.metrics[name][kept], entropy, tolerances.METRIC)
    cross_entropy = -student.double().log_softmax(-1)[kept, labels[kept]]
    assert_close(result.metrics["cross_entropy"][kept], cross_entropy, tolerances.METRIC)
    best = indices.gather(-1, logprobs.argmax(-1, keepdim=True)).squeeze(-1)
    assert torch.equal(
        result.metrics["agreement"][kept], (student.argmax(-1) == best)[kept].float()
    )
    assert result.metrics["agreement"][3] == 1
    assert all(metric[2] == 0 for metric in result.metrics.values())
    loss = 4 * result.metrics["divergence"] + 0.5 * result.metrics["cross_entropy"]
    assert_close(result.loss, loss.double(), tolerances.PLAIN_LOSS)
    alone = run(backend, student, indices, logprobs, return_metrics=True)
    assert alone.metrics["cross_entropy"] is None


def test_agreement_of_tokens_that_a_teacher_lists_as_equal(backend):
    """Its top token is the first in the vocabulary, wherever it is listed."""
    student = torch.zeros(2, 40)
    student[0, 3] = student[1, 7] = 2.0
    indices, logprobs = torch.tensor([7, 3, 9]).expand(2, 3), torch.tensor([-1.0, -1, -2])
    actual = run(backend, student, indices, logprobs.expand(2, 3), return_metrics=True)
    assert actual.metrics["agreement"].tolist() == [1, 0]


def test_tokens_may_be_drawn_twice(backend):
    student, _ = correlated_pair(2, 40)
    indices = torch.tensor([[3, 7, 3, -1, 3], [9, 9, 9, 9, 9]])
    logprobs = torch.tensor([[0.0, 0.3, 0.0, 5.0, -1.0], [0.0] * 5])
    for divergence in ("forward_kl", "soft_cross_entropy"):
        check(backend, student, indices, logprobs, tail="sampled", divergence=divergence)


def test_samples_of_the_teacher_estimate_its_gradient(backend):
    """Exactly, where every token is drawn as often as its probability says."""
    counts = torch.tensor([5, 2, 2, 1, 0, 0])
    student = normal(1, 6)
    indices = torch.repeat_interleave(torch.arange(6), counts).unsqueeze(0)
    logprobs = torch.zeros(1, 10)
    actual = run(backend, student, indices, logprobs, tail="sampled")
    gradient = student.softmax(-1) - counts / 10
    assert_gradient(actual.gradient, gradient.double(), 2e-6)


@pytest.mark.parametrize("shape", [(0, 9), (2, 0, 9)], ids=str)
def test_no_rows(backend, shape):
    student = torch.zeros(shape)
    entries = torch.zeros((*shape[:-1], 3), dtype=torch.int64), torch.zeros((*shape[:-1], 3))
    result = run(backend, student, *entries)
    assert result.loss == 0
    assert result.gradient.shape == shape


def test_float16_gradient_is_rounded_once(kernel):
    """A loss scale reaches the gradient before it is rounded."""
    student, teacher = correlated_pair(3, 700)
    options = {"normalizer": 5000.0, "grad_output": torch.tensor(1024.0)}
    check(kernel, student.half(), *top(teacher, 9), **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [65536, 65537], ids=["aligned", "few"])
def test_gradient_too_large_for_caches(kernel, vocab, dtype):
    """On a CPU it is stored past them, listed columns after, and in place never: the same bits."""
    if kernel.backend != "cpu":
        pytest.skip("only the CPU backend stores large gradients another way")
    student, teacher = correlated_pair(2**24 // (vocab * dtype.itemsize) + 1, vocab)
    indices, logprobs = top(teacher, 9)
    fresh = run(kernel, student.to(dtype), indices, logprobs)
    in_place = run(kernel, student.to(dtype), indices, logprobs, inplace_grad=True)
    assert_same_bits(in_place, fresh)


def test_threads_do_not_change_bits(threads):
    student, teacher = correlated_pair(37, 3000)
    indices, logprobs = top(teacher, 9)
    results = []
    for count in (1, 2, 5):
        threads(count)
        leaf = student.clone().requires_grad_()
        loss = sparse_kd_loss(leaf, indices, logprobs, divergence=JSD(0.1))
        loss.backward()
        results.append((loss.detach(), leaf.grad))
    for loss, gradient in results[1:]:
        assert torch.equal(loss, results[0][0])
        assert torch.equal(gradient, results[0][1])


@pytest.mark.parametrize("tail", ["bucket", "drop"])
def test_a_first_row_that_takes_no_part(backend, tail):
    student, teacher = correlated_pair(3, 90)
    weight = torch.tensor([0.0, 1.0, 2.0])
    check(backend, student, *top(teacher, 5), tail=tail, token_weight=weight)


@pytest.mark.parametrize(
    ("height", "temperature"), [(300.0, 2.0), (14.0, 2.0), (300.0, 100.0)], ids=str
)
@pytest.mark.parametrize("tail", ["bucket", "drop"])
def test_a_late_logit_far_above_the_first(backend, tail, height, temperature):
    """At one of both temperatures, or at both; all others together may weigh as much."""
    student, teacher = correlated_pair(2, 2500)
    entries = top(teacher, 5, temperature)
    student[0, next(i for i in range(2100, 2500) if i not in entries[0][0])] = height
    options = {"temperature": temperature, "labels": torch.tensor([0, 7]), "ce_weight": 0.5}
    check(backend, student, *entries, tail=tail, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [{}, {"temperature": 2.0, "ce_weight": 0.5}], ids=str)
def test_softcap_and_scale_of_whole_vectors(kernel, dtype, options):
    student, teacher = correlated_pair(3, 128)
    student = student.to(dtype)
    entries = top(teacher, 6, options.get("temperature", 1.0))
    options = options | {"student_softcap": 4.0, "student_scale": 1.5}
    if "ce_weight" in options:
        options["labels"] = labels_for(3, vocab=128)
    actual = check(kernel, student, *entries, **options)
    assert_same_bits(run(kernel, student, *entries, inplace_grad=True, **options), actual)


def test_many_listed_tokens_about_borders_of_blocks(backend):
    student, teacher = correlated_pair(2, 4200)
    teacher[:, [2047, 2048, 4095, 4096]] += 30.0
    for tail in ("bucket", "drop"):
        check(backend, student, *top(teacher, 150), tail=tail)
    teacher[:, 2049:] -= 100.0
    check(backend, student, *top(teacher, 5))


@pytest.mark.parametrize("options", [{"student_scale": 1.5}, {"student_softcap": 3.0}], ids=str)
def test_transformed_bfloat16_in_whole_blocks(backend, options):
    student, teacher = correlated_pair(2, 4224)
    check(backend, student.bfloat16(), *top(teacher, 3), **options)
