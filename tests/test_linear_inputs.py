"""What the fused-linear level takes: strides, teachers on disk, sums of products."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import kdkernels
from kdkernels import linear_kd_loss

from . import tolerances
from .cases import normal
from .harness import assert_close
from .linear_cases import (
    CHUNK,
    VOCAB,
    Case,
    fused,
    make_case,
    relative_error,
    run,
    some_labels,
)


def test_strided_per_token_arguments(linear_backend):
    """Expanded weights, as from `sum().backward()`, and every other label of a wider tensor."""
    case, labels = make_case(lead=(21,)), some_labels().view(21)
    weight = torch.tensor(0.5).expand(21)
    expected = run(fused, case, labels=labels, token_weight=weight.clone(), reduction="sum")
    wide = labels.repeat_interleave(2)
    for reduction in ("sum", "none"):
        actual = run(
            fused,
            case,
            backend=linear_backend.backend,
            labels=wide[::2],
            token_weight=weight,
            reduction=reduction,
            chunk_bytes=CHUNK,
            grad_output=torch.ones(()).expand(21 if reduction == "none" else ()),
        )
        for name in ("hidden", "weight", "bias"):
            assert relative_error(getattr(actual, name), getattr(expected, name)) < 1e-6


def test_strides(linear_backend):
    """`hidden[:, :-1]` of both models, transposed weights, shapes that cannot be flattened."""
    case = make_case(bias=False)
    expected = run(fused, case)
    wide = [
        torch.cat([x, torch.full_like(x[:, :1], torch.nan)], 1)[:, :-1]
        for x in (case.student_hidden, case.teacher_hidden)
    ]
    odd = Case(
        wide[0],
        case.student_weight.t().contiguous().t(),
        None,
        wide[1],
        case.teacher_weight.t().contiguous().t(),
        None,
    )
    for chunk_bytes in (None, CHUNK, 1):
        actual = run(fused, odd, backend=linear_backend.backend, chunk_bytes=chunk_bytes)
        assert_close(actual.loss, expected.loss, tolerances.PLAIN_LOSS)
        assert relative_error(actual.hidden, expected.hidden) < 1e-6
        assert relative_error(actual.weight, expected.weight) < 1e-6


@pytest.mark.parametrize("kind", ["numpy", "memmap", "safetensors-like"])
def test_teacher_payload_on_disk(linear_backend, kind, tmp_path):
    import numpy as np

    case, device = make_case(bias=False), linear_backend.device
    expected = run(fused, case, labels=some_labels())
    array = case.teacher_hidden.numpy()
    if kind == "memmap":
        path = tmp_path / "teacher.npy"
        np.save(path, array)
        array = np.load(path, mmap_mode="r")
        assert not array.flags.writeable
    elif kind == "safetensors-like":
        path = tmp_path / "teacher.bin"
        path.write_bytes(array.tobytes())
        storage = torch.from_file(str(path), shared=True, size=array.size)
        array = storage.view(array.shape)
    for chunk_bytes in (None, CHUNK):
        student = [x.to(device, copy=True).requires_grad_() for x in case[:2]]
        loss = linear_kd_loss(
            *student,
            array,
            case.teacher_weight.to(device),
            labels=some_labels().to(device),
            chunk_bytes=chunk_bytes,
            backend=linear_backend.backend,
        )
        loss.backward()
        assert_close(loss.detach(), expected.loss, tolerances.PLAIN_LOSS)
        assert relative_error(student[1].grad, expected.weight) < 1e-6


def test_an_array_without_rows(linear_backend):
    """NumPy's own have strides of 0."""
    case = make_case(lead=(0,))
    student = case.student_hidden.requires_grad_(), case.student_weight
    logits = torch.zeros(0, VOCAB).numpy()
    assert logits.strides == (0, 0)
    loss = linear_kd_loss(*student, teacher_logits=logits, backend=linear_backend.backend)
    loss.backward()
    assert loss == 0


def test_a_teacher_head_in_float64(linear_kernel):
    case = make_case()
    expected = run(fused, case, backend=linear_kernel.backend)
    wide = {f"teacher_{x}": getattr(case, f"teacher_{x}").double() for x in ("hidden", "weight")}
    actual = run(
        fused,
        case._replace(**wide, teacher_bias=case.teacher_bias.double()),
        backend=linear_kernel.backend,
    )
    assert torch.equal(actual.loss, expected.loss)
    assert torch.equal(actual.weight, expected.weight)


def test_teacher_payload_of_another_dtype(linear_backend):
    case = make_case(torch.bfloat16, bias=False)
    cached = case.teacher_hidden.float().to(torch.float16)
    expected = run(fused, case._replace(teacher_hidden=cached.bfloat16()))
    case = case.to(linear_backend.device)
    for payload in (cached, cached.numpy(), cached.double()):
        loss = linear_kd_loss(
            case.student_hidden,
            case.student_weight,
            payload,
            case.teacher_weight,
            backend=linear_backend.backend,
        )
        assert_close(loss, expected.loss, (1e-5, 1e-6))


def test_sums_of_products(linear_backend):
    """A frozen head and an adapter: no gradient work for the head's weight."""
    case = make_case(bias=False).to(linear_backend.device)
    down, up = (
        x.to(linear_backend.device)
        for x in (normal(4, 16, seed=7) / 4, normal(VOCAB, 4, seed=8) / 4)
    )
    gradients = []
    for fusing in (True, False):
        hidden = case.student_hidden.clone().requires_grad_()
        a, b = down.clone().requires_grad_(), up.clone().requires_grad_()
        adapted = hidden @ a.t()
        if fusing:
            loss = linear_kd_loss(
                [hidden, adapted],
                [case.student_weight, b],
                case.teacher_hidden,
                case.teacher_weight,
                chunk_bytes=CHUNK,
                backend=linear_backend.backend,
            )
        else:
            logits = F.linear(hidden, case.student_weight) + F.linear(adapted, b)
            teacher = F.linear(case.teacher_hidden, case.teacher_weight)
            loss = kdkernels.kd_loss(logits, teacher, backend="reference")
        loss.backward()
        gradients.append([x.grad for x in (hidden, a, b)])
    for fused_gradient, expected in zip(*gradients, strict=True):
        assert relative_error(fused_gradient, expected) < 2e-6
