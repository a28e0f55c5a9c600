"""What a device adds: work that is queued and not waited for, graphs, sizes beyond 2^31.

Skipped without a GPU, but for labels, which Triton's interpreter serves as a device does.
"""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch

from kdkernels import kd_loss, linear_kd_loss, linear_sparse_kd_loss, sparse_kd_loss

from . import tolerances
from .cases import DTYPES, ONE_OF_EACH, correlated_pair, labels_for, normal
from .harness import (
    Backend,
    InPlace,
    assert_as_oracle,
    assert_close,
    assert_gradient,
    assert_gradient_of,
    move,
    oracle,
    run,
)
from .linear_cases import CHUNK, Case, make_case, some_labels
from .linear_cases import oracle as linear_oracle
from .processes import Processes
from .sparse_cases import oracle as sparse_oracle
from .sparse_cases import top

VOCAB = 2051
ROWS = 7
LABELS = labels_for(ROWS, vocab=VOCAB).index_fill(0, torch.tensor([2]), -100)

#: Calls that take every way through the adapters, and through the kernels' options.
CALLS = {
    "plain": {},
    "sums of slopes": {"divergence": "jsd", "temperature": 2.0},
    "labels, weights": {
        "labels": LABELS,
        "ce_weight": 0.5,
        "token_weight": normal(ROWS).abs(),
        "normalizer": torch.tensor(5.0),
    },
    "labels, per token": {"labels": LABELS, "ce_weight": 0.5, "reduction": "none"},
    "softcap, metrics": {"labels": LABELS, "student_softcap": 5.0, "return_metrics": True},
}


def to_device(value):
    return move(value, "cuda")


def pair(dtype: torch.dtype = torch.float32, rows: int = ROWS, seed: int = 0):
    return tuple(x.to(dtype).cuda() for x in correlated_pair(rows, VOCAB, seed=seed))


def step(gpu: Backend, student, teacher, options, inplace: bool = False):
    """Loss, metrics and gradient of a loss that a later one multiplies, without a look at any."""
    leaf = student.detach().requires_grad_()
    logits = leaf * 1 if inplace else leaf
    result = kd_loss(logits, teacher, backend=gpu.backend, inplace_grad=inplace, **options)
    loss, metrics = result if options.get("return_metrics") else (result, {})
    (gradient,) = torch.autograd.grad(3 * loss.sum(), leaf)
    return loss.detach(), gradient, *(x for x in metrics.values() if x is not None)


def linear_step(gpu: Backend, case: Case, labels, chunk_bytes: int | None):
    """Loss and gradients of hidden states, weight and bias."""
    student = [x.detach().requires_grad_() for x in case[:3]]
    loss = linear_kd_loss(
        *student[:2],
        *case[3:5],
        student_bias=student[2],
        teacher_bias=case.teacher_bias,
        labels=labels,
        ce_weight=0.5,
        chunk_bytes=chunk_bytes,
        backend=gpu.backend,
    )
    return loss.detach(), *torch.autograd.grad(3 * loss, student)


@contextmanager
def no_waiting():
    """Fails where PyTorch would wait for the device."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("inplace", [False, True], ids=["fresh", "inplace"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_nothing_waits_for_the_device(gpu, name, dtype, inplace):
    student, teacher = pair(dtype)
    options = {key: to_device(value) for key, value in CALLS[name].items()}
    with no_waiting():  # the first call too, which compiles
        step(gpu, student, teacher, options, inplace)
        with torch.no_grad():
            kd_loss(student, teacher, backend=gpu.backend, **options)


@pytest.mark.parametrize("loss", [kd_loss, sparse_kd_loss])
def test_a_normalizer_on_the_host_is_not_waited_for(gpu, loss):
    student, teacher = pair()
    rest = [x.cuda() for x in top(teacher.cpu(), 9)] if loss is sparse_kd_loss else [teacher]
    for total in (torch.tensor(5), torch.tensor(5.0)):
        with no_waiting():
            actual = loss(student, *rest, normalizer=total, backend=gpu.backend)
        assert actual == loss(student, *rest, normalizer=total.cuda(), backend=gpu.backend)


@pytest.mark.parametrize("name", CALLS)
def test_nothing_waits_where_a_vocabulary_is_shared(gpu, monkeypatch, name):
    two = Processes(2, monkeypatch)
    shards = [x.chunk(2, -1) for x in correlated_pair(ROWS, 2 * VOCAB)]
    shards = [[to_device(shard) for shard in both] for both in shards]
    options = {key: to_device(value) for key, value in CALLS[name].items()}

    def one(rank):
        step(gpu, *(both[rank] for both in shards), {**options, "group": two.group})

    with no_waiting():
        two.run(one)


CHUNKS = [None, CHUNK]


def without_last(case: Case) -> Case:
    """Hidden states that lie as those of ``hidden[:, :-1]`` do."""
    longer = (torch.cat([x, x[:, :1]], 1) for x in (case.student_hidden, case.teacher_hidden))
    student, teacher = (x[:, :-1] for x in longer)
    return case._replace(student_hidden=student, teacher_hidden=teacher)


@pytest.mark.parametrize("shift", [False, True], ids=["dense", "shifted"])
@pytest.mark.parametrize("chunk_bytes", CHUNKS, ids=["one chunk", "chunks"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_waits_in_fused_linear(gpu, dtype, chunk_bytes, shift):
    case, labels = make_case(dtype).to("cuda"), some_labels().cuda()
    case = without_last(case) if shift else case
    linear_step(gpu, case, labels, chunk_bytes)  # libraries load
    with no_waiting():
        linear_step(gpu, case, labels, chunk_bytes)


def captured(function):
    """What the function returns, in memory that a replay writes again."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles, loads, asks
        function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = function()
    return graph, results


@pytest.mark.parametrize("inplace", [False, True], ids=["fresh", "inplace"])
@pytest.mark.parametrize("name", CALLS)
def test_a_graph_repeats_forward_and_backward(gpu, name, inplace):
    student, teacher = pair()
    options = {key: to_device(value) for key, value in CALLS[name].items()}
    graph, (loss, gradient, *_) = captured(lambda: step(gpu, student, teacher, options, inplace))
    for seed in (1, 2):  # other values where the captured ones were
        for tensor, values in zip((student, teacher), pair(seed=seed), strict=True):
            tensor.copy_(values)
        graph.replay()
        scale = torch.full_like(loss, 3.0).cpu()
        expected = oracle(student.cpu(), teacher.cpu(), **CALLS[name] | {"grad_output": scale})
        divergence = CALLS[name].get("divergence", "forward_kl")
        assert_close(loss, expected.loss, tolerances.loss_tolerance(divergence))
        assert_gradient_of(divergence, torch.float32, gradient, expected.gradient)


@pytest.mark.parametrize("shift", [False, True], ids=["dense", "shifted"])
@pytest.mark.parametrize("chunk_bytes", CHUNKS, ids=["one chunk", "chunks"])
def test_a_graph_repeats_fused_linear(gpu, chunk_bytes, shift):
    case, labels = make_case().to("cuda"), some_labels().cuda()
    case = without_last(case) if shift else case
    graph, results = captured(lambda: linear_step(gpu, case, labels, chunk_bytes))
    case.student_hidden.mul_(1.5)
    graph.replay()
    options = {"labels": some_labels(), "ce_weight": 0.5, "grad_output": torch.tensor(3.0)}
    exact = linear_oracle(case.to("cpu"), **options)
    for got, wanted in zip(results, exact[:4], strict=True):
        assert_close(got, wanted, (1e-4, 1e-5))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("divergence", ONE_OF_EACH, ids=str)
def test_the_same_bits_again(gpu, divergence, dtype):
    """Whatever order a busy device takes rows in."""
    student, teacher = pair(dtype, rows=600)
    options = {"divergence": divergence, "labels": labels_for(600, vocab=VOCAB).cuda()}
    options |= {"ce_weight": 0.5, "return_metrics": True}
    for inplace in (False, True):
        first, second = (step(gpu, student, teacher, options, inplace) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.xdist_group("large")  # one at a time
@pytest.mark.parametrize("inplace", [False, True], ids=["fresh", "inplace"])
@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
def test_more_than_2_to_the_31_elements(gpu, divergence, inplace):
    vocab, rows = 2**17 + 3, 2**14 + 2
    assert rows * vocab > 2**31
    needed = (2 if inplace else 3) * 2 * rows * vocab + 2**30
    free, _ = torch.cuda.mem_get_info()
    if free < needed:
        pytest.skip(f"needs {needed >> 30} GiB of free memory, {free >> 30} GiB are")
    few = [x.bfloat16() for x in correlated_pair(2, vocab)]
    student, teacher = (x.cuda().repeat(rows // 2, 1) for x in few)
    seed = torch.zeros((), device="cuda", requires_grad=True)
    leaf = InPlace.apply(seed, student) if inplace else student.requires_grad_()
    options = {"divergence": divergence, "inplace_grad": inplace, "normalizer": 2}
    loss = kd_loss(leaf, teacher, backend=gpu.backend, **options)
    loss.backward()
    gradient = student if inplace else student.grad
    expected = oracle(*few, divergence=divergence)
    # Their two rows, rows / 2 times.
    assert_close(loss.detach() / (rows // 2), expected.loss, tolerances.OTHER_LOSS)
    for i in (0, rows // 4 * 2, rows - 2):
        assert_gradient(gradient[i : i + 2], expected.gradient, tolerances.BFLOAT16_GRADIENT)


@pytest.mark.xdist_group("large")
@pytest.mark.usefixtures("poison")
def test_more_than_2_to_the_24_rows(gpu):
    """More CTAs than a float can number."""
    few = [x.bfloat16() for x in correlated_pair(8, 8)]
    expected = oracle(*few, reduction="none")
    student, teacher = (x.cuda().repeat(2**21 + 1, 1) for x in few)
    loss = kd_loss(student.requires_grad_(), teacher, reduction="none", backend=gpu.backend)
    loss.sum().backward()
    for result in (loss, student.grad):
        parts = result.view(-1, 8, *result.shape[1:])
        assert torch.equal(parts, parts[:1].expand_as(parts))
    assert_close(loss[:8].detach(), expected.loss, tolerances.PLAIN_LOSS)
    assert_gradient(student.grad[:8], expected.gradient, tolerances.BFLOAT16_GRADIENT)


def test_follows_the_current_stream(gpu):
    """Logits that another stream is still computing."""
    student, teacher = pair()
    expected = oracle(student.cpu(), teacher.cpu())
    late = torch.full_like(student, torch.nan)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(10_000_000)
        late.copy_(student)
        loss, gradient = step(gpu, late, teacher, {})
    side.synchronize()
    assert_close(loss, expected.loss, tolerances.PLAIN_LOSS)
    assert_gradient(gradient / 3, expected.gradient, tolerances.PLAIN_LOSS[0])


@pytest.mark.parametrize("label", [-1, -99, 37, 38, 2**40, -(2**40)])
@pytest.mark.parametrize("options", [{}, {"ce_weight": 1.0}, {"student_scale": 0.5}], ids=str)
def test_a_label_outside_the_vocabulary_makes_its_row_nan(kernel, label, options):
    if kernel.checks_labels:
        pytest.skip("refuses it before anything is written: test_errors.py")
    # Looking at labels before the launch would wait for the device.
    student, teacher = correlated_pair(3, 43)
    options = options | {"reduction": "none", "vocab_size": 37}
    clean = run(kernel, student, teacher, labels=torch.tensor([1, 2, 3]), **options)
    bad = run(kernel, student, teacher, labels=torch.tensor([1, label, 3]), **options)
    assert bad.loss[1].isnan()
    assert bad.gradient[1, :37].isnan().all()
    assert not bad.gradient[1, 37:].any()
    for i in (0, 2):
        assert torch.equal(bad.loss[i], clean.loss[i])
        assert torch.equal(bad.gradient[i], clean.gradient[i])
    options |= {"labels": torch.tensor([1, label, 3]), "token_weight": torch.tensor([1.0, 0, 1])}
    masked = run(kernel, student, teacher, **options)
    assert masked.loss[1] == 0
    assert not masked.gradient[1].any()


def test_matches_on_rows_of_several_clusters(gpu):
    """A vocabulary of every resident size, whose last columns are no vector."""
    for vocab in (32003, 128259, 256003):
        student, teacher = (x.bfloat16() for x in correlated_pair(5, vocab))
        assert_as_oracle(run(gpu, student, teacher), student, teacher)


def skip_without_clusters(gpu: Backend) -> None:
    if gpu.name != "cuda" or torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("they are of the CUDA backend and devices from 9.0 on")


@pytest.mark.parametrize("tile", ["registers:2x256", "shared:2x256"])
def test_what_is_fetched_ahead_changes_no_bit(gpu, monkeypatch, tile):
    """Rows beyond those that any device works on at once, aligned and not, some without weight."""
    skip_without_clusters(gpu)
    for vocab in (4096, 4099):
        pair_of_rows = [x.bfloat16() for x in correlated_pair(1000, vocab)]
        weight = (torch.arange(1000) % 3).float()
        results = []
        for ahead in ("", "+ahead"):
            monkeypatch.setenv("KDKERNELS_CUDA_TILE", tile + ahead)
            results.append(run(gpu, *pair_of_rows, token_weight=weight))
        assert torch.equal(results[0].loss, results[1].loss)
        assert torch.equal(results[0].gradient, results[1].gradient)


@pytest.mark.parametrize("tile", ["registers:1x64", "registers:8x512", "shared:8x256"])
def test_this_build_has_clusters_for_this_device(gpu, monkeypatch, tile):
    skip_without_clusters(gpu)
    monkeypatch.setenv("KDKERNELS_CUDA_TILE", tile)  # raises where it cannot be had
    pair_of_rows = correlated_pair(ROWS, 517 if "1x" in tile else VOCAB)
    assert_as_oracle(run(gpu, *pair_of_rows), *pair_of_rows)


#: Of a sparse teacher: every tail, a second temperature for the labels, a softcap.
SPARSE_CALLS = {
    "bucket": {"labels": LABELS, "ce_weight": 0.5, "temperature": 2.0},
    "renormalize": {"tail": "renormalize", "divergence": "jsd"},
    "sampled": {"tail": "sampled", "student_softcap": 5.0, "token_weight": normal(ROWS).abs()},
}


def sparse_step(gpu: Backend, student, entries, options, inplace: bool = False):
    leaf = student.detach().requires_grad_()
    logits = leaf * 1 if inplace else leaf
    options = options | {"backend": gpu.backend, "inplace_grad": inplace}
    loss = sparse_kd_loss(logits, *entries, **options)
    return loss.detach(), *torch.autograd.grad(3 * loss, leaf)


@pytest.mark.parametrize("inplace", [False, True], ids=["fresh", "inplace"])
@pytest.mark.parametrize("name", SPARSE_CALLS)
def test_a_sparse_teacher_waits_for_nothing_and_repeats(gpu, name, inplace):
    student, teacher = pair()
    options = {key: to_device(value) for key, value in SPARSE_CALLS[name].items()}
    temperature = options.get("temperature", 1.0)
    entries = [x.cuda() for x in top(teacher.cpu(), 9, temperature)]
    with no_waiting():
        sparse_step(gpu, student, entries, options, inplace)
    graph, (loss, gradient) = captured(lambda: sparse_step(gpu, student, entries, options, inplace))
    student.mul_(1.5)
    graph.replay()
    again = sparse_step(gpu, student, entries, options, inplace)
    assert torch.equal(loss, again[0])
    assert torch.equal(gradient, again[1])
    expected = sparse_oracle(
        student.cpu(),
        *(x.cpu() for x in entries),
        **SPARSE_CALLS[name],
        grad_output=torch.tensor(3.0),
    )
    assert_close(loss.cpu(), expected.loss, tolerances.OTHER_LOSS)
    assert_gradient(gradient.cpu(), expected.gradient, tolerances.OTHER_LOSS[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_sparse_teacher_of_a_head_waits_for_nothing(gpu, dtype):
    hidden, weight = normal(ROWS, 64).to(dtype).cuda(), normal(VOCAB, 64, seed=1).to(dtype).cuda()
    entries = [x.cuda() for x in top(correlated_pair(ROWS, VOCAB)[1], 9)]
    options = {"labels": LABELS.cuda(), "ce_weight": 0.5, "backend": gpu.backend}

    def head_step():
        leaves = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
        loss = linear_sparse_kd_loss(*leaves, *entries, chunk_bytes=3 * VOCAB * 4, **options)
        return loss.detach(), *torch.autograd.grad(3 * loss, leaves)

    first = head_step()  # libraries load
    with no_waiting():
        second = head_step()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.xdist_group("large")
def test_a_sparse_teacher_of_more_than_2_to_the_31_elements(gpu):
    vocab, rows = 2**17 + 3, 2**14 + 2
    needed = 2 * 2 * rows * vocab + 2**30
    free, _ = torch.cuda.mem_get_info()
    if free < needed:
        pytest.skip(f"needs {needed >> 30} GiB of free memory, {free >> 30} GiB are")
    few, teacher = correlated_pair(2, vocab)
    few, entries = few.bfloat16(), top(teacher, 9)
    student = few.cuda().repeat(rows // 2, 1).requires_grad_()
    repeated = [x.cuda().repeat(rows // 2, 1) for x in entries]
    loss = sparse_kd_loss(student, *repeated, normalizer=2, backend=gpu.backend)
    loss.backward()
    expected = sparse_oracle(few, *entries)
    assert_close(loss.detach().cpu() / (rows // 2), expected.loss, tolerances.PLAIN_LOSS)
    for i in (0, rows // 4 * 2, rows - 2):
        gradient = student.grad[i : i + 2].cpu()
        assert_gradient(gradient, expected.gradient, tolerances.BFLOAT16_GRADIENT)
