"""How the fused-linear level behaves inside autograd, autocast and checkpoints."""

from __future__ import annotations

import functools

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import kdkernels

from .cases import DTYPES
from .harness import assert_close
from .linear_cases import (
    CHUNK,
    VOCAB,
    Case,
    dense,
    fused,
    make_case,
    oracle,
    relative_error,
    run,
    some_labels,
)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("needs", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1)], ids=str)
def test_only_what_needs_a_gradient_is_computed(linear_kernel, monkeypatch, needs, reduction):
    """A frozen head costs no weight gradient, a detached student no hidden gradient."""
    case = make_case()
    full = run(fused, case, reduction=reduction)
    products = []
    for name in ("write_hidden_gradient", "add_weight_gradient", "add_bias_gradient"):
        product = getattr(kdkernels.gemm, name)

        def counted(*args, name=name, product=product, **kwargs):
            products.append(name)
            return product(*args, **kwargs)

        monkeypatch.setattr(kdkernels.gemm, name, counted)
    student = [x.clone().requires_grad_(bool(n)) for x, n in zip(case[:3], needs, strict=True)]
    fused(Case(*student, *case[3:]), linear_kernel.backend, reduction=reduction).sum().backward()
    names = ("write_hidden_gradient", "add_weight_gradient", "add_bias_gradient")
    assert products == [name for name, needed in zip(names, needs, strict=True) if needed]
    for tensor, needed, expected in zip(student, needs, full[1:4], strict=True):
        assert (tensor.grad is None) == (not needed)
        if needed:
            assert relative_error(tensor.grad, expected) < 1e-6


def test_saves_only_small_results(linear_kernel):
    case = make_case().to(linear_kernel.device)
    student = [x.clone().requires_grad_() for x in case[:3]]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        loss = fused(Case(*student, *case[3:]), linear_kernel.backend)
    assert sorted(x.shape for x in saved) == sorted(x.shape for x in student)
    loss.backward()
    assert {x.data_ptr() for x in saved} == {x.grad.data_ptr() for x in student}


@pytest.mark.filterwarnings("ignore:Using backward")
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_second_backward_and_create_graph(linear_kernel, reduction):
    case = make_case()
    leaf = case.student_weight.clone().requires_grad_()
    case = case._replace(student_weight=leaf)

    def loss():
        return fused(case, linear_kernel.backend, reduction=reduction).sum()

    with pytest.raises(RuntimeError, match=r"linear_kd_loss.*create_graph"):
        torch.autograd.grad(loss(), leaf, create_graph=True)
    twice = loss()
    (first,) = torch.autograd.grad(twice, leaf, retain_graph=True)
    first = first.clone()
    if reduction == "none":  # computed in the backward, as often as one likes
        assert torch.equal(torch.autograd.grad(twice, leaf)[0], first)
        return
    with pytest.raises(RuntimeError, match="linear_kd_loss: a second backward"):
        torch.autograd.grad(twice, leaf)


def test_function_transforms_say_what_to_use(linear_kernel):
    case = make_case().to(linear_kernel.device)

    def loss(weight):
        return fused(case._replace(student_weight=weight), linear_kernel.backend)

    with pytest.raises(RuntimeError, match=r"linear_kd_loss: torch.func.*reference"):
        torch.func.grad(loss)(case.student_weight)


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_a_teacher_of_inference_mode(linear_kernel, reduction):
    """Its tensors cannot be saved for the backward."""
    case = make_case().to(linear_kernel.device)
    weight = case.student_weight.clone().requires_grad_()
    with torch.inference_mode():
        hidden = case.teacher_hidden.clone()
    gradients = []
    for teacher_hidden in (hidden, case.teacher_hidden):
        changed = case._replace(student_weight=weight, teacher_hidden=teacher_hidden)
        loss = fused(changed, linear_kernel.backend, reduction=reduction)
        gradients += torch.autograd.grad(loss.sum(), weight)
    assert torch.equal(*gradients)


def test_forward_mode_raises(linear_kernel):
    case = make_case().to(linear_kernel.device)

    def loss(weight):
        return fused(case._replace(student_weight=weight), linear_kernel.backend)

    with pytest.raises(RuntimeError, match=r"linear_kd_loss.*forward-mode.*reference"):
        torch.func.jvp(loss, (case.student_weight,), (case.student_weight,))


def test_inputs_changed_before_the_backward_are_noticed(linear_kernel):
    """A loss per token reads them again."""
    case = make_case().to(linear_kernel.device)
    hidden = case.student_hidden.clone().requires_grad_()
    weight = case.student_weight.clone()
    changed = case._replace(student_hidden=hidden, student_weight=weight)
    loss = fused(changed, linear_kernel.backend, reduction="none").sum()
    weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_tied_embeddings_get_the_sum_of_both_gradients(linear_backend):
    tokens, case = some_labels().clamp(min=0), make_case(bias=False)
    gradients = []
    for loss in (functools.partial(fused, backend=linear_backend.backend), dense):
        embedding = torch.nn.Embedding(VOCAB, 16, _weight=case.student_weight.clone())
        hidden = embedding(tokens).tanh()
        tied = case._replace(student_hidden=hidden, student_weight=embedding.weight)
        loss(tied).backward()
        gradients.append(embedding.weight.grad)
    assert relative_error(*gradients) < 1e-6


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_micro_batches_with_a_common_normalizer_are_the_big_batch(linear_backend, dtype):
    case, labels = make_case(dtype, lead=(21,)), some_labels().view(21)
    options = {"divergence": "jsd", "ce_weight": 0.5, "temperature": 2.0}
    count = (labels != -100).sum()
    exact = oracle(case, labels=labels, **options)
    student = [x.clone().float().requires_grad_() for x in case[:3]]
    total = 0.0
    for part in (slice(0, 1), slice(1, 2), slice(2, 12), slice(12, 21)):  # the second is masked
        hidden, weight, bias = (x.to(dtype) for x in student)
        micro = Case(hidden[part], weight, bias, case.teacher_hidden[part], *case[4:])
        loss = fused(
            micro, linear_backend.backend, labels=labels[part], normalizer=count, **options
        )
        loss.backward()
        total += loss.detach()
    tolerance = {torch.float32: 5e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
    assert_close(total, exact.loss, (tolerance, 0))
    for tensor, wanted in zip(student, exact[1:4], strict=True):
        assert relative_error(tensor.grad, wanted) < tolerance


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_over_float32_weights(linear_backend, dtype):
    """As F.linear under autocast; the float32 weight gets a gradient that was never rounded."""
    case, options = make_case(), {"labels": some_labels(), "ce_weight": 0.5}
    rounded = case.to(dtype)
    exact, rival = oracle(rounded, **options), run(dense, rounded, **options)
    for chunk_bytes in (None, CHUNK):
        with torch.autocast(linear_backend.device, dtype):
            where = {"backend": linear_backend.backend, "chunk_bytes": chunk_bytes}
            actual = run(fused, case, **where, **options)
        assert actual.loss.dtype == torch.float32
        for name in ("hidden", "weight", "bias"):
            got, wanted = getattr(actual, name), getattr(exact, name)
            assert got.dtype == torch.float32
            bound = relative_error(getattr(rival, name), wanted)
            assert relative_error(got, wanted) <= 2 * bound
    mixed = case._replace(student_hidden=case.student_hidden.to(dtype))
    with torch.autocast(linear_backend.device, dtype):
        loss = fused(mixed, linear_backend.backend)
    assert torch.isfinite(loss)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_checkpoint(linear_backend, reentrant, reduction):
    case = make_case()
    gradients = []
    for wrapped in (False, True):
        hidden = case.student_hidden.clone().requires_grad_()
        weight = case.student_weight.clone().requires_grad_()

        def step(hidden, weight):
            inner = case._replace(student_hidden=hidden.tanh(), student_weight=weight)
            return fused(inner, linear_backend.backend, reduction=reduction).sum()

        if wrapped:
            loss = checkpoint(step, hidden, weight, use_reentrant=reentrant)
        else:
            loss = step(hidden, weight)
        loss.backward()
        gradients.append((hidden.grad, weight.grad))
    assert torch.equal(gradients[0][0], gradients[1][0])
    assert torch.equal(gradients[0][1], gradients[1][1])
