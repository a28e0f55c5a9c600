"""A sparse teacher beside hidden states and a head, against the same on all logits in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from kdkernels import linear_sparse_kd_loss, sparse_kd_loss

from . import tolerances
from .cases import DTYPES, labels_for, normal
from .harness import TRITON, assert_close, assert_gradient, move
from .sparse_cases import top

ROWS, HIDDEN, VOCAB, K = 300, 24, 530, 7


def make(dtype=torch.float32, rows=ROWS, vocab=VOCAB):
    hidden = normal(rows, HIDDEN).to(dtype)
    weight = (normal(vocab, HIDDEN, seed=1) / 3).to(dtype)
    bias = (0.5 * normal(vocab, seed=2)).to(dtype)
    teacher = 0.7 * hidden.float() @ weight.float().T + normal(rows, vocab, seed=3)
    return hidden, weight, bias, *top(teacher, K)


def run(backend, hidden, weight, bias, indices, logprobs, *, grad_output=None, **options):
    leaves = [
        None if x is None else move(x, backend.device).detach().requires_grad_()
        for x in (hidden, weight, bias)
    ]
    options = {name: move(value, backend.device) for name, value in options.items()}
    entries = move(indices, backend.device), move(logprobs, backend.device)
    result = linear_sparse_kd_loss(
        *leaves[:2], *entries, student_bias=leaves[2], backend=backend.backend, **options
    )
    loss, metrics = result if options.get("return_metrics") else (result, None)
    loss.backward(torch.ones_like(loss) if grad_output is None else move(grad_output, loss.device))
    return loss.detach().cpu(), [None if x is None else x.grad.cpu() for x in leaves], metrics


def oracle(hidden, weight, bias, indices, logprobs, *, grad_output=None, **options):
    """On logits rounded as the product rounds them, in float64 otherwise."""
    dtype = options.pop("logits_dtype", None) or weight.dtype
    options.pop("chunk_bytes", None)
    leaves = [None if x is None else x.double().requires_grad_() for x in (hidden, weight, bias)]
    logits = F.linear(*leaves)
    rounded = logits + (logits.detach().to(dtype).double() - logits.detach())
    result = sparse_kd_loss(rounded, indices, logprobs, **options)
    loss, metrics = result if options.get("return_metrics") else (result, None)
    loss.backward(torch.ones_like(loss) if grad_output is None else grad_output.double())
    return loss.detach(), [None if x is None else x.grad for x in leaves], metrics


def check(backend, arguments, dtype, **options):
    loss, gradients, metrics = run(backend, *arguments, **options)
    expected, expected_gradients, expected_metrics = oracle(*arguments, **options)
    # 16-bit logits: a product may round to their other neighbour.
    tolerance = (1e-5, 1e-5) if dtype == torch.float32 else (2e-3, 2e-3)
    assert_close(loss, expected, tolerance)
    relative = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    for gradient, expected_gradient, leaf in zip(
        gradients, expected_gradients, arguments[:3], strict=True
    ):
        if leaf is not None:
            assert gradient.dtype == leaf.dtype
            assert_gradient(gradient, expected_gradient, relative, 1e-7)
    if metrics is not None:
        for name, value in expected_metrics.items():
            if value is not None:
                assert_close(metrics[name], value, (1e-3, 1e-3), name)


@pytest.mark.parametrize("tail", ["bucket", "renormalize", "drop", "sampled"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_the_definition(linear_backend, dtype, tail):
    arguments = make(dtype)
    check(linear_backend, arguments, dtype, tail=tail)
    check(linear_backend, arguments, dtype, tail=tail, chunk_bytes=100 * VOCAB * dtype.itemsize)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_options(linear_backend, dtype):
    hidden, weight, _, indices, logprobs = make(dtype)
    labels = labels_for(ROWS, vocab=VOCAB)
    labels[::3] = -100
    labels[1] = indices[1, 2]
    options = {"labels": labels, "ce_weight": 0.5, "temperature": 2.0, "student_softcap": 20.0}
    arguments = hidden, weight, None, indices, logprobs
    for more in (
        {"token_weight": normal(ROWS).abs(), "chunk_bytes": 40 * VOCAB * 4},
        {"reduction": "none", "grad_output": normal(ROWS), "divergence": "jsd"},
        {"normalizer": 1e5, "grad_output": torch.tensor(1024.0), "return_metrics": True},
    ):
        check(linear_backend, arguments, dtype, **options, **more)


def test_float32_logits_of_a_16_bit_head(linear_backend):
    arguments = make(torch.bfloat16)
    for chunk_bytes in (None, 100 * VOCAB * 4):
        loss, *_ = run(
            linear_backend, *arguments, logits_dtype=torch.float32, chunk_bytes=chunk_bytes
        )
        expected, *_ = oracle(*arguments, logits_dtype=torch.float32)
        assert_close(loss, expected, (1e-5, 1e-5))


def test_only_what_is_needed(linear_backend):
    hidden, weight, bias, indices, logprobs = (move(x, linear_backend.device) for x in make())
    _, expected, _ = run(linear_backend, hidden, weight, bias, indices, logprobs)
    for needed in range(3):
        leaves = [
            x.clone().requires_grad_(i == needed) for i, x in enumerate((hidden, weight, bias))
        ]
        loss = linear_sparse_kd_loss(
            *leaves[:2],
            indices,
            logprobs,
            student_bias=leaves[2],
            backend=linear_backend.backend,
        )
        loss.backward()
        assert_gradient(leaves[needed].grad.cpu(), expected[needed].double(), 1e-6)
        assert all(leaf.grad is None for i, leaf in enumerate(leaves) if i != needed)
    with torch.no_grad():
        frozen = linear_sparse_kd_loss(hidden, weight, indices, logprobs, student_bias=bias)
    assert not frozen.requires_grad


def test_a_sum_of_products(linear_kernel):
    hidden, weight, _, indices, logprobs = make()
    low, rank = normal(ROWS, 4, seed=5).requires_grad_(), normal(VOCAB, 4, seed=6).requires_grad_()
    device = linear_kernel.device
    tensors = [move(x, device) for x in (hidden, low, weight, rank, indices, logprobs)]
    a, b, c, d, *entries = tensors
    loss = linear_sparse_kd_loss([a, b], [c, d], *entries, backend=linear_kernel.backend)
    loss.backward()
    got = low.grad.clone(), rank.grad.clone()
    low.grad = rank.grad = None
    expected = sparse_kd_loss(
        hidden.double() @ weight.double().T + low.double() @ rank.double().T, indices, logprobs
    )
    expected.backward()
    assert_close(loss.detach().cpu(), expected.detach(), (1e-5, 1e-5))
    for actual, leaf in zip(got, (low, rank), strict=True):
        assert_gradient(actual, leaf.grad.double(), 1e-5)


def test_masked_rows_and_none(linear_backend):
    hidden, weight, bias, indices, logprobs = make(rows=6)
    token_weight = torch.tensor([1.0, 0.0, 1.0, 0.0, 2.0, 1.0])
    if linear_backend.device == "cpu":  # elsewhere they are multiplied like the others
        hidden[1] = torch.nan
    indices[3] = 10**6
    arguments = hidden, weight, bias, indices, logprobs
    loss, gradients, _ = run(linear_backend, *arguments, token_weight=token_weight)
    kept = token_weight != 0
    expected, expected_gradients, _ = oracle(
        hidden[kept], weight, bias, indices[kept], logprobs[kept], token_weight=token_weight[kept]
    )
    assert_close(loss, expected, (1e-5, 1e-5))
    assert not gradients[0][~kept].any()
    if linear_backend.kernel:
        assert_gradient(gradients[1], expected_gradients[1], 1e-5)
    nothing = run(linear_backend, *make(rows=3), token_weight=torch.zeros(3))
    assert nothing[0] == 0
    assert not any(gradient.any() for gradient in nothing[1])
    no_rows = run(linear_backend, *(x[:0] if x.shape[0] == 3 else x for x in make(rows=3)))
    assert no_rows[0] == 0
    assert not no_rows[1][1].any()


def test_a_single_row_without_leading_dimensions(linear_backend):
    hidden, weight, bias, indices, logprobs = make(rows=1)
    row = hidden[0], weight, bias, indices[0], logprobs[0]
    check(linear_backend, row, torch.float32, labels=torch.tensor(5), ce_weight=0.5)


def test_a_row_without_a_gradient_takes_no_digits_from_others(linear_kernel):
    """Rows of a float16 gradient have powers of two of their own, which the weight's shares."""
    hidden, weight, _, indices, logprobs = make(torch.float16, rows=40)
    indices[7] = -1
    others = torch.arange(40) != 7
    options = {"tail": "renormalize", "normalizer": 4e7}
    gradients = []
    # The gradient of a float32 weight shows all digits that there are.
    with torch.autocast(linear_kernel.device, torch.float16):
        for rows in (torch.full_like(others, True), others):
            tensors = hidden[rows].float(), weight.float(), None, indices[rows], logprobs[rows]
            gradients.append(run(linear_kernel, *tensors, **options)[1][1])
    assert_gradient(*gradients, 1e-6)


def test_logits_whose_gradient_float16_cannot_hold(linear_kernel):
    """In a mean over many rows it is less than the smallest one; what the head adds up is not."""
    check(linear_kernel, make(torch.float16), torch.float16, normalizer=2e4)


@pytest.mark.filterwarnings("ignore:Using backward")
@pytest.mark.parametrize(
    "options", [{"temperature": 0.02}, {"student_scale": 100.0}, {"temperature": 0.05}], ids=str
)
def test_steep_logits_in_float16(linear_backend, options):
    """A gradient's entry may be scale / temperature times that of a log-sum-exp."""
    hidden, weight, *_ = make(torch.float16, rows=5)
    least = (hidden.float() @ weight.float().T).argsort(-1)[
        :, :64
    ]  # the student's certainty is wrong
    entries = least, torch.full(least.shape, 1 / 64).log()
    check(linear_backend, (hidden, weight, None, *entries), torch.float16, **options)


def test_a_second_backward_gives_the_same(linear_kernel):
    hidden, weight, _, indices, logprobs = (move(x, linear_kernel.device) for x in make())
    hidden.requires_grad_()
    loss = linear_sparse_kd_loss(hidden, weight, indices, logprobs, backend=linear_kernel.backend)
    loss.backward(retain_graph=True)
    first = hidden.grad.clone()
    loss.backward(retain_graph=True)
    assert torch.equal(hidden.grad, 2 * first)
    with pytest.raises(RuntimeError, match="linear_sparse_kd_loss: its gradient is computed with"):
        loss.backward(create_graph=True)


def test_an_interpreted_backend():
    if TRITON.skip:
        pytest.skip(f"triton: {TRITON.skip}")
    for dtype in DTYPES:
        check(TRITON, make(dtype, rows=6), dtype, temperature=2.0, chunk_bytes=4 * VOCAB * 4)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.usefixtures("fresh_dynamo")
def test_compiles_without_a_break():
    def step(hidden, weight, indices, logprobs, labels):
        return linear_sparse_kd_loss(
            hidden, weight, indices, logprobs, labels=labels, ce_weight=0.5, backend="cpu"
        )

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    hidden, weight, _, *entries = make()
    labels = labels_for(ROWS, vocab=VOCAB)
    gradients = []
    for function in (step, compiled):
        leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        function(*leaves, *entries, labels).backward()
        gradients.append([leaf.grad for leaf in leaves])
    for expected, actual in zip(*gradients, strict=True):
        assert_gradient(actual, expected.double(), 1e-6)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype):
    ops = torch.ops.kdkernels
    hidden, weight, bias, indices, _ = make(dtype, rows=5)
    listed, kept = indices.sort(-1).values, torch.tensor([1, 0, 1, 1, 1]) != 0
    options = 2.0, True, 1.0, 0.0, VOCAB
    linear = dtype, dtype, False, 0, "cpu"
    head = [hidden], [weight], bias, listed, kept
    for with_top in (False, True):
        arguments = *head, with_top, *linear, *options
        torch.library.opcheck(ops.linear_tails.default, arguments)
    tails = ops.linear_tails(*head, False, *linear, *options)[1]
    gradients = torch.ones(2, 5), torch.ones(5, K)
    for needs in ([True, True, True], [True, False, False], [False, True, False]):
        arguments = *head, tails, *gradients, needs, *linear, *options
        torch.library.opcheck(ops.linear_tails_gradient.default, arguments)


H, W = torch.zeros(2, 3, 4), torch.zeros(8, 4)
IDS, P = torch.arange(2).repeat(2, 3, 1), torch.full((2, 3, 2), -1.0)
ERRORS = {
    r"student_hidden has shape \(2, 3, 4\), expected a last dim": (H, W[:, :3], IDS, P, {}),
    r"teacher_indices has shape \(3, 2\), expected .* of student_hidden": (H, W, IDS[0], P, {}),
    "teacher_indices: a row lists 0 twice": (H, W, IDS * 0, P, {}),
    "chunk_bytes is 0, expected at least 1": (H, W, IDS, P, {"chunk_bytes": 0}),
    "logits_dtype is torch.float16, expected None": (H, W, IDS, P, {"logits_dtype": torch.half}),
    "tail is 'all', expected one of": (H, W, IDS, P, {"tail": "all"}),
}


@pytest.mark.parametrize("message", ERRORS, ids=range(len(ERRORS)))
def test_bad_input_raises(message):
    *arguments, options = ERRORS[message]
    with pytest.raises(ValueError, match=message):
        linear_sparse_kd_loss(*arguments, **options)


def test_tolerances_are_those_of_the_suite():
    """The products' rounding dominates; without it the loss is as exact as on logits."""
    hidden, weight, _, indices, logprobs = make()
    exact = (hidden * 8).round() / 8, (weight * 8).round() / 8, None  # products are exact
    loss = linear_sparse_kd_loss(*exact[:2], indices, logprobs)
    expected = oracle(*exact, indices, logprobs)[0]
    assert_close(loss, expected, tolerances.PLAIN_LOSS)
