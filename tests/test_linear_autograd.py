"""How the fused-linear level behaves inside autograd, autocast, checkpoints and torch.compile."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import kdkernels
from kdkernels import linear_kd_loss
from kdkernels.linear_ops import plan
from kdkernels.options import LinearOptions

from . import tolerances
from .cases import normal
from .harness import assert_close
from .linear_cases import (
    LEAD,
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
from .test_compile import COMPILER, options

CHUNK = 5 * 413 * 4
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


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
            call = functools.partial(fused, backend=linear_backend.backend)
            actual = run(call, case, chunk_bytes=chunk_bytes, **options)
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


def test_strided_per_token_arguments(linear_backend):
    """Expanded weights, as from `sum().backward()`, and every other label of a wider tensor."""
    case, labels = make_case(lead=(21,)), some_labels().view(21)
    weight = torch.tensor(0.5).expand(21)
    expected = run(fused, case, labels=labels, token_weight=weight.clone(), reduction="sum")
    wide = labels.repeat_interleave(2)
    call = functools.partial(fused, backend=linear_backend.backend)
    for reduction in ("sum", "none"):
        actual = run(
            call,
            case,
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
        call = functools.partial(fused, backend=linear_backend.backend)
        actual = run(call, odd, chunk_bytes=chunk_bytes)
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


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=COMPILER)])
@pytest.mark.parametrize(
    "changes", [{}, {"reduction": "none"}, {"autocast": torch.bfloat16}], ids=str
)
def test_compiles_into_one_graph(compiler, changes):
    changes = dict(changes)
    autocast = changes.pop("autocast", None)

    def step(hidden, weight, bias, case, labels):
        with torch.autocast("cpu", autocast, enabled=autocast is not None):
            inner = Case(hidden.tanh(), weight, bias, *case[3:])
            loss = fused(inner, labels=labels, divergence="jsd", ce_weight=0.5, **changes)
        return (loss * 2).sum()

    compiled = torch.compile(step, fullgraph=True, backend=compiler)
    for rows in (5, 6, 9):
        case, labels = make_case(lead=(rows,)), some_labels().view(-1)[:rows]
        results = []
        for function in (step, compiled):
            student = [x.clone().requires_grad_() for x in case[:3]]
            function(*student, case, labels).backward()
            results.append([x.grad for x in student])
        for actual, expected in zip(*results, strict=True):
            torch.testing.assert_close(actual, expected, rtol=2e-5, atol=1e-7)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype):
    case = make_case(dtype)
    labels, weight, count = some_labels(), normal(*LEAD).abs(), torch.tensor(3.0)
    for needs in ([True, True, True], [False, True, False], [False, False, False]):
        linear = LinearOptions(needs, dtype, dtype, False, 0, "cpu")
        for choice in (options(), options("forward_kl", "none", metrics=False)):
            torch.library.opcheck(
                torch.ops.kdkernels.linear_loss.default,
                (
                    [case.student_hidden],
                    [case.student_weight],
                    case.student_bias,
                    *(case.teacher_hidden, case.teacher_weight, case.teacher_bias, None),
                    *(labels, weight, count, None),
                    *linear,
                    *choice._replace(vocab=VOCAB),
                ),
            )


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("rows", [1, 63, 256, 1000, 8192])
@pytest.mark.parametrize("accumulator", [0, 2**20, 2**30])
@pytest.mark.parametrize("chunk_bytes", [0, 1, 2**20, 2**30])
def test_plan(device, rows, accumulator, chunk_bytes):
    for student, teacher in ((4000, 4000), (256512, 512), (256512, 0), (64000, 256512)):
        for gradient in (0, 2**24):
            split = plan(rows, student, teacher, gradient, accumulator, chunk_bytes, device)
            assert 1 <= split.block <= split.chunk <= rows
            assert split.chunk % split.block == 0 or split.chunk == rows
            limit = chunk_bytes or 2**30
            taken = split.chunk * student + (0 if split.lend else split.block * teacher)
            if split.chunk > 1:
                assert taken <= limit + (accumulator if split.chunk == rows else 0)
            if split.lend:
                assert split.block * teacher <= gradient
                assert split.chunk == rows
