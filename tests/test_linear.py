"""The fused-linear level against float64, beside dense PyTorch in the same dtype."""

from __future__ import annotations

import functools

import pytest
import torch

import kdkernels
from kdkernels import linear_kd_loss

from . import tolerances
from .cases import ALL, DTYPES, ONE_OF_EACH, normal
from .harness import BACKENDS, assert_close, assert_metrics
from .linear_cases import (
    CHUNK,
    LEAD,
    TEACHER_VOCAB,
    VOCAB,
    assert_as_good_as_dense,
    dense,
    fused,
    make_case,
    oracle,
    plain,
    relative_error,
    run,
    some_labels,
)

#: One chunk; several; one row at a time.
CHUNKS = [None, CHUNK, 1]


def call(config):
    return functools.partial(fused, backend=config.backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("divergence", ALL, ids=str)
def test_as_good_as_dense(linear_kernel, divergence, dtype):
    case = make_case(dtype)
    options = {"divergence": divergence, "temperature": 1.5}
    exact = oracle(case, **options)
    # Stricter in 16 bits: rounded logits, exact arithmetic, rounded gradient of the logits.
    rival = run(plain if dtype == torch.float32 else dense, case, **options)
    for chunk_bytes in CHUNKS:
        actual = run(call(linear_kernel), case, chunk_bytes=chunk_bytes, **options)
        # In float32 all errors are a few roundings; the kernels' own tolerance is the floor.
        floor = tolerances.PLAIN_LOSS[0] if dtype == torch.float32 else torch.finfo(dtype).eps / 2
        assert_as_good_as_dense(actual, rival, exact, dtype, floor)
        error = abs(actual.loss.double() - exact.loss)
        rounding = tolerances.loss_tolerance(divergence.name)[0] * abs(exact.loss)
        assert error <= max(2 * abs(rival.loss.double() - exact.loss), rounding)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("config", [c for c in BACKENDS if c.interpreted and not c.skip], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_interpreted_backend(config, dtype):
    case, labels = make_case(dtype, lead=(5,)), some_labels().view(-1)[:5]
    for options in (
        {"divergence": "reverse_kl", "labels": labels, "ce_weight": 0.5},
        {"reduction": "none", "labels": labels, "token_weight": normal(5).abs()},
    ):
        exact, rival = oracle(case, **options), run(dense, case, **options)
        actual = run(call(config), case, chunk_bytes=CHUNKS[1] // 2, **options)
        assert_as_good_as_dense(actual, rival, exact, dtype)


OPTION_SETS = [
    {"reduction": "sum"},
    {"labels": some_labels(), "ce_weight": 0.5, "divergence": "jsd", "temperature": 2.0},
    {"labels": some_labels(), "token_weight": normal(*LEAD).abs(), "kd_weight": 0.7},
    {"labels": some_labels(), "kd_weight": 0.0, "ce_weight": 1.0},
    {"token_weight": normal(*LEAD) > 0, "divergence": "reverse_kl"},
    {"normalizer": 40, "temperature_squared": False, "temperature": 3.0},
    {"normalizer": torch.tensor(40), "student_softcap": 3.0, "teacher_softcap": 5.0},
    {"vocab_size": 200, "student_scale": 0.5, "teacher_scale": 1.5},
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTION_SETS, ids=lambda o: "-".join(o))
def test_options(linear_backend, options, dtype):
    case = make_case(dtype)
    exact, rival = oracle(case, **options), run(dense, case, **options)
    for chunk_bytes in CHUNKS[:2]:
        actual = run(call(linear_backend), case, chunk_bytes=chunk_bytes, **options)
        assert_as_good_as_dense(actual, rival, exact, dtype)


@pytest.mark.parametrize("grad_output", [1.0, -3.0, 1e-3, 65536.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_grad_output(linear_backend, dtype, grad_output):
    case = make_case(dtype)
    options = {"grad_output": torch.tensor(grad_output), "normalizer": 1e3}
    exact, rival = oracle(case, **options), run(dense, case, **options)
    for chunk_bytes in CHUNKS:
        actual = run(call(linear_backend), case, chunk_bytes=chunk_bytes, **options)
        if dtype == torch.bfloat16:  # rounded when stored and again when scaled
            for name in ("hidden", "weight", "bias"):
                error = relative_error(getattr(actual, name), getattr(exact, name))
                bound = relative_error(getattr(rival, name), getattr(exact, name))
                assert error <= 2 * bound + 2.0**-9
        else:
            assert_as_good_as_dense(actual, rival, exact, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_per_token_loss_weighted_later(linear_backend, dtype):
    case = make_case(dtype)
    options = {"reduction": "none", "grad_output": normal(*LEAD), "labels": some_labels()}
    options |= {"token_weight": normal(*LEAD).abs(), "ce_weight": 0.5, "divergence": "jsd"}
    exact, rival = oracle(case, **options), run(dense, case, **options)
    for chunk_bytes in CHUNKS[:2]:
        actual = run(call(linear_backend), case, chunk_bytes=chunk_bytes, **options)
        assert actual.loss.shape == LEAD
        assert not actual.loss[some_labels() == -100].any()
        assert_as_good_as_dense(actual, rival, exact, dtype)


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_masked_rows_whatever_gradient_their_losses_have(linear_backend, bad):
    case, keeps = make_case(), some_labels() != -100
    for options in ({"labels": some_labels()}, {"token_weight": keeps.float()}):
        options |= {"reduction": "none"}
        plain = run(call(linear_backend), case, grad_output=keeps.float(), **options)
        grad_output = keeps.float().masked_fill(~keeps, bad)
        actual = run(call(linear_backend), case, grad_output=grad_output, **options)
        for result, expected in zip(actual, plain, strict=True):
            if expected is not None:
                torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_metrics(linear_backend, reduction):
    case = make_case()
    options = {"labels": some_labels(), "return_metrics": True, "divergence": "jsd"}
    options["reduction"] = reduction
    exact = oracle(case, **options)
    for chunk_bytes in CHUNKS:
        actual = run(call(linear_backend), case, chunk_bytes=chunk_bytes, **options)
        # Products of float32 round logits of size 10 to 1e-6.
        for name, value in exact.metrics.items():
            assert actual.metrics[name].shape == LEAD
            assert_close(actual.metrics[name], value, (1e-5, 3e-6), name)
    del options["labels"]
    assert run(call(linear_backend), case, **options).metrics["cross_entropy"] is None


def test_metrics_of_identical_models(linear_kernel):
    case = make_case()
    same = case._replace(
        teacher_hidden=case.student_hidden,
        teacher_weight=case.student_weight,
        teacher_bias=case.student_bias,
    )
    loss, metrics = call(linear_kernel)(same, return_metrics=True)
    assert 0 <= loss < tolerances.IDENTICAL_LOSS
    assert bool((metrics["agreement"] == 1).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("divergence", ONE_OF_EACH, ids=str)
def test_loss_only_is_the_same_loss(linear_kernel, divergence, dtype):
    case = make_case(dtype)
    for chunk_bytes in CHUNKS[:2]:
        options = {"divergence": divergence, "chunk_bytes": chunk_bytes}
        expected = run(call(linear_kernel), case, **options).loss
        leaf = case._replace(student_weight=case.student_weight.clone().requires_grad_())
        with torch.no_grad():
            loss = call(linear_kernel)(leaf, **options)
        assert not loss.requires_grad
        assert_close(loss, expected, tolerances.loss_tolerance(divergence.name))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bitwise_reproducible(linear_kernel, dtype):
    case = make_case(dtype)
    options = {"labels": some_labels(), "ce_weight": 0.5, "chunk_bytes": CHUNKS[1]}
    first, second = (run(call(linear_kernel), case, **options) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first[:4], second[:4], strict=True))


def test_float32_logits_lower_the_floor_of_the_loss(linear_kernel):
    """The student's and the teacher's bfloat16 heads agree but for rounding of their logits."""
    case = make_case(torch.bfloat16)
    teacher = (case.student_hidden, case.student_weight + 0.002, case.student_bias)
    case = case._replace(
        teacher_hidden=teacher[0], teacher_weight=teacher[1], teacher_bias=teacher[2]
    )
    exact, rival = oracle(case), run(dense, case)
    for chunk_bytes in CHUNKS:
        actual = run(call(linear_kernel), case, logits_dtype=torch.float32, chunk_bytes=chunk_bytes)
        assert_as_good_as_dense(actual, rival, exact, torch.bfloat16)
        error = abs(actual.loss.double() - exact.loss)
        assert error < 1e-2 * abs(rival.loss.double() - exact.loss)


def test_float32_logits_of_the_reference_and_of_float32(linear_backend):
    for dtype in (torch.float32, torch.bfloat16):
        case = make_case(dtype)
        options = {"logits_dtype": torch.float32}
        loss = call(linear_backend)(case, **options)
        assert_close(loss, oracle(case).loss, (1e-5, 1e-6))


def test_float64_runs_on_the_reference():
    case = make_case(torch.float64)
    actual, expected = run(fused, case), oracle(case)
    assert actual.loss.dtype == torch.float64
    torch.testing.assert_close(actual[:4], expected[:4])


def test_teacher_logits(linear_backend):
    case = make_case()
    _, logits = case.logits()
    options = {"labels": some_labels(), "ce_weight": 0.5}
    exact = oracle(case, **options)
    options["labels"] = options["labels"].to(linear_backend.device)
    wide = torch.zeros(LEAD[0], LEAD[1] + 1, TEACHER_VOCAB)
    wide[:, 1:] = logits
    for given in (logits, wide[:, 1:], logits.numpy(), logits.double(), logits.double().numpy()):
        for chunk_bytes in CHUNKS[:2]:
            student = [x.to(linear_backend.device, copy=True).requires_grad_() for x in case[:3]]
            loss = linear_kd_loss(
                *student[:2],
                student_bias=student[2],
                teacher_logits=given,
                chunk_bytes=chunk_bytes,
                backend=linear_backend.backend,
                **options,
            )
            loss.backward()
            assert_close(loss.detach(), exact.loss, (2e-6, 1e-6))
            for tensor, wanted in zip(student, exact[1:4], strict=True):
                assert relative_error(tensor.grad, wanted) < 2e-6


def test_rows_of_an_index_only(linear_backend):
    case = make_case()
    labels = some_labels()
    kept = (labels.view(-1) != -100).nonzero().squeeze(1)[::2]
    only = torch.full_like(labels, -100).view(-1).index_copy(0, kept, labels.view(-1)[kept])
    for options in ({"ce_weight": 0.5}, {"reduction": "none", "token_weight": normal(*LEAD).abs()}):
        exact = oracle(case, labels=only.view(LEAD), **options)
        for chunk_bytes in CHUNKS[:2]:
            actual = run(
                call(linear_backend),
                case,
                labels=labels,
                row_index=kept,
                chunk_bytes=chunk_bytes,
                **options,
            )
            assert_close(actual.loss, exact.loss, (5e-6, 1e-6))
            assert relative_error(actual.weight, exact.weight) < 2e-6
            assert relative_error(actual.hidden, exact.hidden) < 2e-6


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_all_rows_masked(linear_backend, reduction, dtype):
    case = make_case(dtype)
    actual = run(
        call(linear_backend),
        case,
        labels=torch.full(LEAD, -100),
        ce_weight=1.0,
        reduction=reduction,
        return_metrics=True,
    )
    assert not actual.loss.any()
    assert not any(x.any() for x in (*actual[1:4], *actual.metrics.values()))


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("lead", [(0,), (2, 0), ()])
def test_few_rows(linear_backend, lead, reduction):
    case = make_case(lead=lead)
    options = {"reduction": reduction, "return_metrics": True}
    actual, exact = run(call(linear_backend), case, **options), oracle(case, **options)
    assert actual.loss.shape == exact.loss.shape
    assert_metrics(actual.metrics, exact.metrics, "forward_kl")
    assert actual.hidden.shape == case.student_hidden.shape
    assert_close(actual.loss, exact.loss, (2e-6, 1e-6))
    assert_close(actual.weight, exact.weight, (1e-4, 1e-6))


def test_masked_rows_may_hold_anything(linear_kernel):
    if linear_kernel.device != "cpu":
        pytest.skip("a GPU multiplies masked rows too, unless row_index leaves them out")
    case, labels = make_case(), some_labels()
    expected = run(call(linear_kernel), case, labels=labels)
    hidden, teacher = case.student_hidden.clone(), case.teacher_hidden.clone()
    hidden[labels == -100], teacher[labels == -100] = torch.nan, torch.inf
    dirty = case._replace(student_hidden=hidden, teacher_hidden=teacher)
    actual = run(call(linear_kernel), dirty, labels=labels)
    assert all(torch.equal(a, b) for a, b in zip(actual[:4], expected[:4], strict=True))


def test_a_row_of_nan_spoils_what_it_must(linear_backend):
    case = make_case()
    hidden = case.student_hidden.clone()
    hidden[0, 2] = torch.nan
    actual = run(call(linear_backend), case._replace(student_hidden=hidden), chunk_bytes=CHUNKS[1])
    assert actual.loss.isnan()
    assert actual.weight.isnan().all()
    finite = torch.ones(LEAD, dtype=torch.bool)
    finite[0, 2] = False
    assert actual.hidden[finite].isfinite().all()
    assert actual.hidden[0, 2].isnan().all()


@pytest.mark.parametrize("chunk_bytes", CHUNKS)
def test_labels_outside_the_vocabulary(linear_backend, chunk_bytes):
    labels = some_labels()
    labels[2, 6] = VOCAB
    if not linear_backend.checks_labels:  # looking at them would wait for the device
        options = {"ce_weight": 1.0, "chunk_bytes": chunk_bytes}
        assert call(linear_backend)(make_case(), labels=labels, **options).isnan()
        return
    with pytest.raises(ValueError, match=f"labels.*{VOCAB}, expected 0 to {VOCAB - 1}"):
        call(linear_backend)(make_case(), labels=labels, ce_weight=1.0, chunk_bytes=chunk_bytes)


def test_float16_rows_of_very_different_weight(linear_kernel):
    """Rows of a float16 gradient have scales of their own, which the sum over rows must undo."""
    case = make_case(torch.float16)
    weight = torch.logspace(-3, 3, 21).view(LEAD)
    weight = weight.view(-1)[torch.randperm(21, generator=torch.Generator().manual_seed(0))]
    for divergence in ("forward_kl", "reverse_kl"):
        options = {"token_weight": weight.view(LEAD), "divergence": divergence}
        exact = oracle(case, **options)
        for chunk_bytes in CHUNKS:
            actual = run(call(linear_kernel), case, chunk_bytes=chunk_bytes, **options)
            for name in ("hidden", "weight", "bias"):
                error = relative_error(getattr(actual, name), getattr(exact, name))
                assert error < 3 * tolerances.FLOAT16_GRADIENT, name


def test_module_is_the_function():
    case = make_case()
    criterion = kdkernels.LinearKDLoss(divergence="jsd", temperature=2.0, return_metrics=True)
    loss, metrics = criterion(**case._asdict(), labels=some_labels())
    expected, expected_metrics = fused(
        case, divergence="jsd", temperature=2.0, return_metrics=True, labels=some_labels()
    )
    assert torch.equal(loss, expected)
    assert_metrics(metrics, expected_metrics, "jsd")
    with pytest.raises(TypeError, match="temprature"):
        kdkernels.LinearKDLoss(temprature=2.0)
