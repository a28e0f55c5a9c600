"""Properties that hold for any logits."""

from __future__ import annotations

import ctypes
import platform
import sys

import pytest
import torch

pytest.importorskip("hypothesis")

from hypothesis import given
from hypothesis import strategies as st

from kdkernels import JSD, SkewForwardKL, SkewReverseKL

from . import tolerances
from .cases import ALL, DTYPES, ONE_OF_EACH, correlated_pair, labels_for, normal
from .harness import assert_close, assert_gradient, assert_same, assert_same_bits, loss_of, run

divergences = st.sampled_from(
    [d for d in ALL if d.name != "alpha_beta" or min(d.alpha, d.beta) >= 0]
)
seeds = st.integers(0, 10_000)
vocabularies = st.one_of(st.integers(2, 70), st.integers(500, 2200))


@given(divergence=divergences, seed=seeds, vocab=vocabularies, shift=st.integers(-500, 500))
def test_shift_invariance(backend, divergence, seed, vocab, shift):
    # Multiples of 1/64, so that the shifted logits are exact in float32.
    student, teacher = ((x * 64).round() / 64 for x in correlated_pair(3, vocab, seed=seed))
    options = {"divergence": divergence, "reduction": "none"}
    expected = run(backend, student, teacher, **options)
    for shifted in ((student + shift, teacher), (student, teacher + shift)):
        actual = run(backend, *shifted, **options)
        assert_close(actual.loss, expected.loss, (tolerances.SHIFT, tolerances.OTHER_LOSS[1]))
        assert_gradient(actual.gradient, expected.gradient, 3 * tolerances.SHIFT)


@given(divergence=divergences, seed=seeds, vocab=vocabularies)
def test_permutation_equivariance(backend, divergence, seed, vocab):
    student, teacher = correlated_pair(3, vocab, seed=seed)
    order = torch.randperm(vocab, generator=torch.Generator().manual_seed(seed))
    options = {"divergence": divergence, "reduction": "none"}
    expected = run(backend, student, teacher, **options)
    actual = run(backend, student[:, order], teacher[:, order], **options)
    assert_close(actual.loss, expected.loss, tolerances.OTHER_LOSS)
    assert_gradient(actual.gradient, expected.gradient[:, order], tolerances.OTHER_LOSS[0])


@given(
    divergence=st.sampled_from(ALL),
    seed=seeds,
    vocab=vocabularies,
    dtype=st.sampled_from(DTYPES),
    spread=st.sampled_from([0.0, 1e-3, 1.0, 20.0]),
)
def test_non_negativity(backend, divergence, seed, vocab, dtype, spread):
    teacher = 3 * normal(4, vocab, seed=seed)
    student = teacher + spread * normal(4, vocab, seed=seed + 1)
    loss = run(
        backend, student.to(dtype), teacher.to(dtype), divergence=divergence, reduction="none"
    ).loss
    # The reference adds terms of both signs, in float64.
    assert (loss >= (0 if backend.kernel else -tolerances.IDENTICAL_LOSS)).all()


@given(divergence=divergences, seed=seeds, vocab=vocabularies, dtype=st.sampled_from(DTYPES))
def test_a_row_does_not_depend_on_the_others(backend, divergence, seed, vocab, dtype):
    student, teacher = (x.to(dtype) for x in correlated_pair(5, vocab, seed=seed))
    options = {"divergence": divergence, "reduction": "none"}
    labels = labels_for(5, vocab=vocab, seed=seed)
    together = run(backend, student, teacher, labels=labels, ce_weight=0.5, **options)
    for i in (0, 3):
        alone = run(
            backend,
            student[i : i + 1],
            teacher[i : i + 1],
            labels=labels[i : i + 1],
            ce_weight=0.5,
            **options,
        )
        row = together._replace(
            loss=together.loss[i : i + 1], gradient=together.gradient[i : i + 1]
        )
        assert_same(alone, row, divergence.name, backend)


@given(divergence=divergences, seed=seeds, vocab=vocabularies)
def test_gradient_of_a_row_sums_to_0(backend, divergence, seed, vocab):
    student, teacher = correlated_pair(3, vocab, seed=seed)
    options = {"labels": labels_for(3, vocab=vocab, seed=seed), "ce_weight": 0.5}
    gradient = run(
        backend, student, teacher, divergence=divergence, reduction="sum", **options
    ).gradient.double()
    # The scale is that of the terms, probabilities: the gradient may be much smaller.
    assert (gradient.sum(-1).abs() <= tolerances.ROW_SUM * (1 + gradient.abs().sum(-1))).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("divergence", ONE_OF_EACH, ids=str)
def test_same_bits_with_any_number_of_threads(kernel, threads, divergence, dtype):
    rows = 5 if kernel.interpreted else 23  # it has no threads, and takes rows one by one
    student, teacher = (x.to(dtype) for x in correlated_pair(rows, 5003))
    labels = labels_for(rows, vocab=5003)
    labels[::3] = -100
    options = {
        "divergence": divergence,
        "labels": labels,
        "ce_weight": 0.5,
        "token_weight": normal(rows).abs(),
        "return_metrics": True,
        "grad_output": torch.tensor(3.0),
    }
    results = []
    for count in (1, 2) if kernel.interpreted else (1, 2, 3, 2):
        threads(count)
        results.append(run(kernel, student, teacher, **options))
    for other in results[1:]:
        assert_same_bits(other, results[0])


@pytest.mark.parametrize("divergence", ONE_OF_EACH, ids=str)
def test_same_bits_where_subnormals_are_flushed(kernel, threads, divergence):
    """Whether they are belongs to a thread: those that work take it from the one that calls."""
    if kernel.backend != "cpu" or not torch.set_flush_denormal(False):
        pytest.skip(f"{kernel.name}: it has no such mode")
    student, teacher = (30 * x for x in correlated_pair(23, 5003))
    threads(2)
    run(kernel, student, teacher, divergence=divergence)  # its threads have started now
    torch.set_flush_denormal(True)
    try:
        results = []
        for count in (1, 2, 2, 2, 2):
            threads(count)
            results.append(run(kernel, student, teacher, divergence=divergence))
    finally:
        torch.set_flush_denormal(False)
    for other in results[1:]:
        assert_same_bits(other, results[0])


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
def test_same_bits_where_the_caller_rounds_upward(kernel, threads, divergence):
    """That belongs to a thread likewise."""
    if kernel.backend != "cpu" or (sys.platform, platform.machine()) != ("linux", "x86_64"):
        pytest.skip(f"{kernel.name}: FE_UPWARD is that of x86-64 Linux, for its CPU kernels")
    student, teacher = correlated_pair(600, 5003)  # more than one thread takes before others begin
    threads(3)
    nearest = run(kernel, student, teacher, divergence=divergence)  # all threads have started now
    set_rounding, upward = ctypes.CDLL("libm.so.6").fesetround, 0x800
    assert set_rounding(upward) == 0
    try:
        results = []
        for count in (1, 2, 3):
            threads(count)
            results.append(run(kernel, student, teacher, divergence=divergence))
    finally:
        set_rounding(0)
    assert not torch.equal(results[0].gradient, nearest.gradient)
    for other in results[1:]:
        assert_same_bits(other, results[0])


def test_the_caller_keeps_its_subnormals(kernel):
    run(kernel, *correlated_pair(3, 96))
    assert (torch.full((8,), 1e-38) * 0.1 > 0).all()


@given(divergence=divergences, seed=seeds, vocab=vocabularies)
def test_loss_without_gradient_has_the_same_bits(kernel, divergence, seed, vocab):
    student, teacher = correlated_pair(3, vocab, seed=seed)
    with_gradient = run(kernel, student, teacher, divergence=divergence, reduction="none")
    loss = loss_of(kernel, student, teacher, divergence=divergence, reduction="none")
    assert torch.equal(with_gradient.loss, loss.cpu())


@pytest.mark.parametrize("close", [False, True], ids=["apart", "close"])
@pytest.mark.parametrize("divergence", [JSD(), SkewForwardKL(), SkewReverseKL()], ids=str)
def test_mixtures_have_the_same_bits_without_gradient_in_many_rows(kernel, divergence, close):
    # JSD's slopes enter its value: one that is stored is rounded, one only added may be fused.
    rows = 5 if kernel.interpreted else 300
    student, teacher = correlated_pair(rows, 37)
    student = teacher + 0.05 * student if close else student
    options = {"divergence": divergence, "reduction": "none"}
    with_gradient = run(kernel, student, teacher, **options)
    assert torch.equal(with_gradient.loss, loss_of(kernel, student, teacher, **options).cpu())
