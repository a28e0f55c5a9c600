"""Memory that large gradients and buffers on the CPU leave to the next call."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise, permutations

import pytest
import torch

from kdkernels import kd_loss, linear_kd_loss, memory, release_memory

from .cases import DTYPES, normal
from .harness import Result, assert_matches, oracle

CPU = torch.device("cpu")
MIB = 2**20


@pytest.fixture(autouse=True)
def nothing_kept():
    release_memory()
    yield
    release_memory()


def block(mebibytes: int) -> torch.Tensor:
    return memory.empty((mebibytes * MIB,), dtype=torch.uint8, device=CPU)


def test_freed_memory_serves_the_next_tensor():
    first, second = block(8), block(8)
    places = {first.data_ptr(), second.data_ptr()}
    assert len(places) == 2
    del first, second
    again, last = block(8), block(8)
    assert {again.data_ptr(), last.data_ptr()} == places


def test_memory_in_use_is_left_alone():
    first = block(8).fill_(1)
    view = first[MIB : 2 * MIB]
    del first
    assert release_memory() == 0
    block(8).fill_(2)
    assert (view == 1).all()


def test_parts_of_what_was_freed():
    """As where batches differ in size: a smaller one leaves the rest, and all of it comes back."""
    whole = block(32)
    begin = whole.data_ptr()
    del whole
    for _ in range(2):
        parts = [block(8), block(6), block(12)]
        for part in parts:
            assert begin <= part.data_ptr() <= begin + 32 * MIB - part.numel()
        order = sorted(parts, key=torch.Tensor.data_ptr)
        for part, after in pairwise(order):
            assert part.data_ptr() + part.numel() <= after.data_ptr()
        del parts, order, part, after
        assert block(32).data_ptr() == begin


@pytest.mark.parametrize("order", list(permutations(range(3))), ids=str)
def test_parts_freed_in_any_order_are_one_again(order):
    whole = block(40)
    begin = whole.data_ptr()
    del whole
    parts = [block(8), block(16), block(8)]
    for index in order:
        parts[index] = None
    assert block(40).data_ptr() == begin


def test_smallest_that_is_large_enough():
    large, wall, small = block(16), block(4), block(9)
    places = large.data_ptr(), small.data_ptr()
    del large, small
    assert block(8).data_ptr() == places[1]
    assert block(10).data_ptr() == places[0]
    del wall


def test_kept_and_used_are_never_more_than_was_used():
    a, wall, b = block(8), block(8), block(8)
    del a, b
    # Pieces are whole large pages, of 2 MiB: of 30 MiB that were in use, c has 14 and the wall 10.
    c = block(12)
    assert release_memory() <= 6 * MIB
    del c
    assert 12 * MIB <= release_memory() <= 14 * MIB
    assert release_memory() == 0
    del wall


def test_what_is_freed_counts_as_kept_alone():
    a, b = block(10), block(20)
    del a, b
    c = block(4)  # which leaves the rest of one and all of the other
    assert release_memory() >= 26 * MIB
    del c


def test_small_tensors_are_pytorchs():
    x = memory.empty((3, 5), dtype=torch.float32, device=CPU)
    assert x.shape == (3, 5)
    assert x.is_contiguous()
    del x
    assert release_memory() == 0


def test_a_tensor_like_any_other():
    x = memory.empty((2, MIB), dtype=torch.float32, device=CPU).fill_(3)
    assert torch.equal(copy.deepcopy(x), torch.full((2, MIB), 3.0))
    assert x.numpy()[1, -1] == 3
    x.requires_grad_().square().sum().backward()
    assert (x.grad == 6).all()


def test_threads():
    def work(tag: int) -> bool:
        right = True
        for _ in range(20):
            x = block(4 + tag % 3).fill_(tag)
            right &= bool((x == tag).all())
        return right

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(16)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_memory_held_is_never_seen(dtype):
    """Columns beyond the vocabulary, masked rows and unused entries between rows included."""
    rows, vocab, width = 40, 65537, 65543
    student = normal(rows + 1, width).to(dtype)[:-1, :-1]
    teacher = normal(rows, width, seed=1).to(dtype)
    labels = torch.arange(rows)
    labels[::3] = -100
    options = {"labels": labels, "vocab_size": vocab, "temperature": 2.0}
    expected = oracle(student, teacher, **options)
    places = set()
    for _ in range(2):
        leaf = student.detach().requires_grad_()
        loss = kd_loss(leaf, teacher, **options)
        (gradient,) = torch.autograd.grad(loss, leaf)
        assert_matches(Result(loss.detach(), gradient, None), expected, "forward_kl", dtype)
        places.add(gradient.data_ptr())
        gradient.untyped_storage().fill_(255)  # NaN in every dtype
        del gradient, loss
    assert len(places) == 1


def test_linear_buffers_and_gradients():
    hidden, weight = normal(256, 64).requires_grad_(), normal(33000, 64, seed=1).requires_grad_()
    teacher = normal(256, 32, seed=2), normal(33000, 32, seed=3)
    results = []
    for _ in range(3):
        hidden.grad = weight.grad = None
        linear_kd_loss(hidden, weight, *teacher, chunk_bytes=2**24).backward()
        results.append((hidden.grad.clone(), weight.grad.clone()))
        weight.grad.fill_(torch.nan)
    for again in results[1:]:
        for a, b in zip(again, results[0], strict=True):
            assert torch.equal(a, b)


def test_out_of_memory_is_pytorchs_error():
    with pytest.raises(RuntimeError, match=r"can't allocate memory|not enough memory"):
        memory.empty((2**46,), dtype=torch.uint8, device=CPU)
    # What there was no memory for was never in use: it lets no more be kept.
    smaller = block(8)
    del smaller
    larger = block(12)
    assert release_memory() == 0
    del larger
