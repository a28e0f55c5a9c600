"""Shapes, strides and sizes: what lies where in memory must not matter."""

from __future__ import annotations

import itertools
import mmap

import pytest
import torch

from kdkernels import sparse_kd_loss
from kdkernels.backends.rows import check_in_place, gradient_like, in_rows

from . import tolerances
from .cases import DTYPES, ONE_OF_EACH, correlated_pair, labels_for, normal
from .harness import (
    InPlace,
    Relay,
    assert_as_oracle,
    assert_close,
    assert_gradient,
    assert_matches,
    assert_same,
    assert_same_bits,
    loss_of,
    oracle,
    run,
    run_backward,
)

VOCAB = 37


def transposed(x):
    """(B, S, V) whose memory is (S, B, V)."""
    return x.transpose(0, 1).contiguous().transpose(0, 1)


def wide(x):
    """The same values as a prefix of wider rows."""
    return torch.cat([x, torch.full_like(x, torch.nan)], -1)[..., : x.shape[-1]]


LAYOUTS = {
    "contiguous": lambda x: x,
    "without the last token": lambda x: torch.cat([x, x[:, :1]], 1)[:, :-1],
    "without the first token": lambda x: torch.cat([x[:, :1], x], 1)[:, 1:],
    "transposed": transposed,
    "every other token": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "wide rows": wide,
    "wide rows, transposed": lambda x: wide(transposed(x)),
    "permuted, too many strides": lambda x: (
        x.unflatten(1, (2, 2)).permute(2, 1, 0, 3).contiguous().permute(2, 1, 0, 3).flatten(1, 2)
    ),
}


@pytest.mark.parametrize("inplace", [False, True], ids=["fresh", "inplace"])
@pytest.mark.parametrize("teacher_layout", ["contiguous", "transposed", "without the last token"])
@pytest.mark.parametrize("student_layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_strides(kernel, student_layout, teacher_layout, dtype, inplace):
    student, teacher = (x.to(dtype) for x in correlated_pair(3, 4, VOCAB))
    options = {
        "labels": transposed(labels_for(3, 4, 1, vocab=VOCAB)).squeeze(-1),
        "token_weight": transposed(normal(3, 4, 1)).squeeze(-1),
        "ce_weight": 0.5,
        "reduction": "none",
        "return_metrics": True,
        # (3, 4), not contiguous either.
        "grad_output": transposed(normal(3, 4, 1, seed=5)).squeeze(-1),
    }
    expected = run(kernel, student, teacher, **options)
    strided = LAYOUTS[student_layout](student), LAYOUTS[teacher_layout](teacher)
    actual = run(kernel, *strided, inplace_grad=inplace, **options)
    assert_same(actual, expected, "forward_kl", kernel)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "layout",
    [
        *(pytest.param(function, id=name) for name, function in LAYOUTS.items()),
        pytest.param(lambda x: x[1:], id="without the first sequence"),
        pytest.param(lambda x: x[:1, :1].expand(3, 4, VOCAB), id="expanded"),
        pytest.param(lambda x: x[1, 1], id="one row"),
        pytest.param(lambda x: x[:, :, 1:-2], id="without some columns"),
    ],
)
def test_gradient_is_aligned_like_the_student(layout, dtype):
    student = layout(normal(3, 4, VOCAB).to(dtype))
    gradient = gradient_like(student)
    assert gradient.shape == student.shape
    copied = in_rows(student) is not student
    base = student.data_ptr() - gradient.data_ptr()
    rows = [range(n) for n in student.shape[:-1]]
    taken, entries = set(), 16 * student.element_size()
    for row in itertools.product(*rows):
        begin = gradient[row].data_ptr()
        assert copied or (student[row].data_ptr() - begin - base) % entries == 0
        taken |= set(range(begin, begin + student.shape[-1] * student.element_size()))
    assert len(taken) == student.numel() * student.element_size()  # no row overlaps another
    memory = gradient.untyped_storage()
    assert min(taken) >= memory.data_ptr()
    assert max(taken) < memory.data_ptr() + memory.nbytes()
    assert memory.nbytes() <= student.numel() * student.element_size() + entries * (3 * 4 + 1)


@pytest.mark.parametrize("shape", [(), (1,), (2, 3), (2, 1, 3), (2, 3, 2, 2)], ids=str)
def test_leading_shapes(backend, shape):
    student, teacher = correlated_pair(*shape, VOCAB)
    labels = labels_for(*shape, vocab=VOCAB)
    for reduction in ("none", "mean"):
        options = {"labels": labels, "ce_weight": 0.5, "reduction": reduction}
        options["return_metrics"] = True
        actual = run(backend, student, teacher, **options)
        assert actual.loss.shape == (shape if reduction == "none" else ())
        assert_as_oracle(actual, student, teacher, **options)
        assert actual.metrics["agreement"].shape == shape


@pytest.mark.parametrize(
    "rows",
    [
        pytest.param(wide(normal(2, 3, 2, VOCAB)), id="three dimensions at one stride"),
        pytest.param(wide(normal(2, 3, 2, VOCAB))[:, :2], id="three at two"),
        pytest.param(normal(2, 3, 5, VOCAB)[:, :2, :1], id="one of size 1"),
        pytest.param(normal(2, 3, VOCAB).unsqueeze(1).expand(2, 1, 3, VOCAB), id="expanded to 1"),
        pytest.param(normal(2, 3, VOCAB).as_strided((2, 1, VOCAB), (VOCAB, 0, 1)), id="stride 0"),
        pytest.param(normal(3, 2)[:, ::2], id="one column"),
    ],
)
def test_rows_at_two_strides_are_not_copied(rows):
    assert in_rows(rows) is rows
    check_in_place(rows)


@pytest.mark.parametrize(
    "rows",
    [
        pytest.param(normal(3, 2 * VOCAB)[:, ::2], id="columns apart"),
        pytest.param(torch.zeros(()).expand(3, VOCAB), id="zeros of autograd"),
        pytest.param(normal(4, 3, 2, VOCAB).permute(2, 1, 0, 3), id="three strides"),
    ],
)
def test_other_rows_are_copied(rows):
    copy = in_rows(rows)
    assert copy.is_contiguous()
    assert torch.equal(copy, rows)


def test_four_dimensions_that_are_no_rows_at_two_strides(kernel):
    student, teacher = correlated_pair(2, 3, 2, 4, VOCAB)
    expected = run(kernel, student, teacher)
    for order in ((3, 2, 1, 0, 4), (1, 0, 3, 2, 4), (2, 0, 3, 1, 4), (0, 2, 1, 3, 4)):
        back = [order.index(i) for i in range(5)]
        s, t = (x.permute(order).contiguous().permute(back) for x in (student, teacher))
        actual = run(kernel, s, t)
        assert_close(actual.loss, expected.loss, tolerances.PLAIN_LOSS)
        assert_same(actual._replace(loss=expected.loss), expected, "forward_kl", kernel)


def test_expanded_teacher_and_labels(backend):
    student, teacher = correlated_pair(3, 4, VOCAB)
    labels = torch.tensor([1, 2, 3, 4]).expand(3, 4)
    weight = torch.tensor([[1.0], [0.5], [2.0]]).expand(3, 4)
    with_labels = {"labels": labels, "ce_weight": 0.5, "token_weight": weight}
    one_weight = {"token_weight": torch.tensor(2.0).expand(3, 4), "reduction": "sum"}
    for expanded in (teacher[:1].expand(3, 4, VOCAB), teacher[:, :1].expand(3, 4, VOCAB)):
        for options in (with_labels, one_weight):
            copied = {
                n: v.clone() if isinstance(v, torch.Tensor) else v for n, v in options.items()
            }
            actual = run(backend, student, expanded, **options)
            expected = run(backend, student, expanded.clone(), **copied)
            assert_same(actual, expected, "forward_kl", backend)


def test_expanded_student(backend):
    student, teacher = correlated_pair(3, 4, VOCAB)
    expanded = student[:1].expand(3, 4, VOCAB)
    leaf = student[:1].clone().requires_grad_()
    loss = loss_of(backend, leaf.expand(3, 4, VOCAB), teacher)
    loss.backward()
    expected = oracle(expanded, teacher)
    assert_close(loss.detach(), expected.loss, tolerances.PLAIN_LOSS)
    gradient = expected.gradient.sum(0, keepdim=True)
    assert_gradient(leaf.grad, gradient, tolerances.OTHER_LOSS[0])


@pytest.mark.parametrize("vocab", [1, 2, 7, 15, 16, 17, 31, 63, 1023, 1025, 2047, 2048, 2049])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_vocabularies(backend, dtype, vocab):
    # Rows of a width that is no multiple of a vector, so that most are not aligned either.
    # In Triton's interpreter, slow with many rows, nothing is aligned.
    rows = 2 if backend.interpreted and backend.backend == "triton" else 5
    student, teacher = (x.to(dtype) for x in correlated_pair(rows, vocab + 3))
    for divergence in ONE_OF_EACH:
        options = {"divergence": divergence, "vocab_size": vocab, "reduction": "none"}
        expected = oracle(student, teacher, **options)
        actual = run(backend, student, teacher, **options)
        assert not actual.gradient[:, vocab:].any()
        if vocab > 1:
            assert_matches(actual, expected, divergence.name, dtype)
        else:  # p = q = 1 up to rounding
            assert_close(actual.loss, expected.loss, (0.0, tolerances.ROUNDING_OF_1))
            assert actual.gradient.abs().max() <= tolerances.ROUNDING_OF_1


@pytest.mark.parametrize("padding", [0, 7])
@pytest.mark.parametrize(("begin", "width"), [(1, 40), (16, 64)], ids=["odd", "aligned"])
def test_nothing_is_written_outside_the_rows(kernel, begin, width, padding):
    columns, options = slice(begin, begin + VOCAB), {"vocab_size": VOCAB - padding}
    for dtype in DTYPES:
        memory = torch.full((6, width), 7.0, dtype=dtype, device=kernel.device)
        before, of_teacher = memory.clone(), memory.clone()
        student, teacher = (x.to(dtype) for x in correlated_pair(4, VOCAB))
        view = memory[1:5, columns].copy_(student)
        teacher = of_teacher[1:5, columns].copy_(teacher)
        expected = run(kernel, view, teacher, **options)
        seed = torch.zeros((), device=kernel.device, requires_grad=True)
        logits = InPlace.apply(seed, view)
        loss_of(kernel, logits, teacher, inplace_grad=True, **options).backward()
        actual = expected._replace(gradient=view.cpu())
        # A fresh gradient's rows may lie otherwise, and Triton's threads share columns by that.
        assert_matches(actual, expected, "forward_kl", dtype)
        before[1:5, columns] = memory[1:5, columns] = 0
        assert torch.equal(memory, before)


def far_apart(x):
    """The rows of x in memory that is taken only where they lie: the last begins past 2^31."""
    stride, last = 2**30 + 1, len(x) - 1
    size = x.element_size() * (stride * last + x.shape[-1])
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
    memory = torch.frombuffer(mmap.mmap(-1, size, flags=flags), dtype=x.dtype)
    return memory.as_strided(x.shape, (stride, 1)).copy_(x)


def test_rows_more_than_2_to_the_31_elements_apart(kernel):
    if kernel.device != "cpu":
        pytest.skip("there untouched memory is memory too: test_gpu.py has so many elements")
    student, teacher = (x.bfloat16() for x in correlated_pair(3, VOCAB))
    logprobs, indices = teacher.float().log_softmax(-1).topk(5)

    def sparse(logits, **options):
        return sparse_kd_loss(logits, indices, logprobs, backend=kernel.backend, **options)

    def dense(logits, **options):
        return loss_of(kernel, logits, far_apart(teacher), divergence="jsd", **options)

    # The interpreter, which is given whole numbers of 64 bits, loops over some of 32.
    grad_output = torch.tensor(1.0 if kernel.backend == "triton" else 3.0)
    for loss_of_logits in (dense, sparse):
        expected = run_backward(kernel, student, loss_of_logits, grad_output=grad_output)
        rows, seed = far_apart(student), torch.zeros((), requires_grad=True)
        loss = loss_of_logits(InPlace.apply(seed, rows), inplace_grad=True)
        loss.backward(grad_output)
        actual = expected._replace(loss=loss.detach(), gradient=rows)
        assert_same(actual, expected, "jsd", kernel)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("shape", [(0,), (2, 0), (0, 3)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_empty_batch(backend, shape, reduction, dtype):
    student, teacher = correlated_pair(*shape, VOCAB)
    options = {
        "labels": torch.zeros(shape, dtype=torch.int64),
        "token_weight": torch.ones(shape),
        "ce_weight": 0.5,
        "reduction": reduction,
        "return_metrics": True,
    }
    actual = run(backend, student.to(dtype), teacher.to(dtype), **options)
    assert actual.loss.shape == (shape if reduction == "none" else ())
    assert not actual.loss.any()
    assert actual.gradient.shape == student.shape
    assert actual.metrics["divergence"].shape == shape


def test_more_rows_than_a_grid_dimension(kernel):
    if kernel.interpreted:
        pytest.skip("70,000 rows take the interpreter minutes; runs where kernels are compiled")
    student, teacher = correlated_pair(70_000, 4)
    labels = labels_for(70_000, vocab=4)
    for options in ({"reduction": "none"}, {}):
        options |= {"labels": labels, "ce_weight": 0.1, "return_metrics": True}
        actual = run(kernel, student, teacher, **options)
        assert_as_oracle(actual, student, teacher, **options)


def test_relay_keeps_strides():
    x = transposed(normal(3, 4, VOCAB))[:, :-1]
    assert Relay.apply(x).stride() == x.stride()


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [65536, 65544, 65537], ids=["aligned", "half of them", "few"])
def test_gradient_too_large_for_caches(kernel, vocab, dtype, divergence):
    """On a CPU it is stored past them, row by row or through a buffer, and in place never: the same
    bits."""
    if kernel.backend != "cpu":
        pytest.skip("only the CPU backend stores large gradients another way")
    rows = 2**24 // (vocab * dtype.itemsize) + 1
    student, teacher = (x.to(dtype) for x in correlated_pair(rows, vocab))
    options = {"temperature": 2.0, "divergence": divergence}
    options["token_weight"] = (torch.arange(rows) % 3).float()  # zeros are stored likewise
    fresh = run(kernel, student, teacher, **options)
    in_place = run(kernel, student, teacher, inplace_grad=True, **options)
    assert_same_bits(in_place, fresh)
