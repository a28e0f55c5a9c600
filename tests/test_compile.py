"""torch.compile without a break in the graph, and opcheck of every operator."""

from __future__ import annotations

import shutil

import pytest
import torch
import torch._dynamo.testing

import kdkernels
from kdkernels import kd_loss, linear_kd_loss, sparse_kd_loss
from kdkernels.options import LogitsOptions

from . import upstream
from .cases import DTYPES, correlated_pair, labels_for, normal

COMPILER = pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++")),
    reason="torch.compile needs a C++ compiler (g++ or clang++) on the CPU",
)
BACKENDS = ["aot_eager", pytest.param("inductor", marks=COMPILER)]
VOCAB = 37


def step(hidden, head, teacher, labels, inplace, options):
    """A loss of computed logits and the gradients of what they were computed from."""
    logits = hidden @ head
    loss = kd_loss(logits, teacher, labels=labels, inplace_grad=inplace, **options)
    return loss * 2


def gradients(function, rows, inplace, options, dtype=torch.float32, seed=0):
    hidden = normal(rows, 8, seed=seed).to(dtype).requires_grad_()
    head = normal(8, VOCAB, seed=seed + 1).to(dtype).requires_grad_()
    teacher = 2 * normal(rows, VOCAB, seed=seed + 2)
    labels = labels_for(rows, vocab=VOCAB, seed=seed)
    loss = function(hidden, head, teacher, labels, inplace, options)
    loss.sum().backward()
    return loss.detach(), hidden.grad, head.grad


# Inductor of torch 2.13 and opcheck use parts of torch that warn.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.usefixtures("fresh_dynamo"),
]


OPTION_SETS = [
    {},
    {"divergence": "jsd", "temperature": 2.0, "ce_weight": 0.5},
    {"divergence": kdkernels.AlphaBeta(0.2, 0.7), "reduction": "none", "student_softcap": 5.0},
]


@pytest.mark.parametrize("compiler", BACKENDS)
@pytest.mark.parametrize("inplace", [False, True], ids=["fresh", "inplace"])
@pytest.mark.parametrize("options", OPTION_SETS, ids=str)
def test_static_shapes(compiler, inplace, options):
    compiled = torch.compile(step, fullgraph=True, backend=compiler, dynamic=False)
    expected = gradients(step, 5, inplace, options)
    for _ in range(2):
        torch.testing.assert_close(gradients(compiled, 5, inplace, options), expected)


@pytest.mark.parametrize("compiler", BACKENDS)
@pytest.mark.parametrize("inplace", [False, True], ids=["fresh", "inplace"])
def test_dynamic_shapes(compiler, inplace):
    compiled = torch.compile(step, fullgraph=True, backend=compiler, dynamic=True)
    options = {"divergence": "jsd", "ce_weight": 0.5}
    for rows in (5, 6, 17):
        expected = gradients(step, rows, inplace, options)
        torch.testing.assert_close(gradients(compiled, rows, inplace, options), expected)


@pytest.mark.parametrize("compiler", BACKENDS)
def test_shapes_that_turn_out_to_be_dynamic(compiler):
    compiled = torch.compile(step, fullgraph=True, backend=compiler)
    for rows in (5, 6, 17):
        expected = gradients(step, rows, False, {"temperature": 2.0})
        torch.testing.assert_close(gradients(compiled, rows, False, {"temperature": 2.0}), expected)


@pytest.mark.parametrize("compiler", BACKENDS)
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_without_a_token(compiler, dynamic):
    """Rows of an odd vocabulary whose gradient is aligned like them, and so not contiguous."""

    def step(hidden, head, teacher):
        first, last = (hidden @ head)[:, :-1], (hidden @ head)[:, 1:]
        return kd_loss(first, teacher[:, :-1]) + kd_loss(last, teacher[:, 1:])

    compiled = torch.compile(step, fullgraph=True, backend=compiler, dynamic=dynamic)
    for tokens in (5, 6, 9) if dynamic else (5, 6):  # each a graph of its own where static
        results = []
        for function in (step, compiled):
            hidden = normal(5, tokens, 8).bfloat16().requires_grad_()
            loss = function(
                hidden, normal(8, VOCAB).bfloat16(), normal(5, tokens, VOCAB).bfloat16()
            )
            loss.backward()
            results.append((loss.detach(), hidden.grad))
        torch.testing.assert_close(*results)


def test_dynamic_shapes_compile_once():
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, backend=counter, dynamic=True)
    gradients(compiled, 5, False, {})
    first = counter.frame_count
    for rows in (6, 17):
        gradients(compiled, rows, False, {})
    assert counter.frame_count == first


def test_numbers_of_tokens_compile_once():
    """Where they turn out to differ; an option would be compiled anew each time."""
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(kd_loss, fullgraph=True, backend=counter)
    student, teacher = correlated_pair(5, VOCAB)
    for tokens in (3, 4, 5, 9):
        results = []
        for function in (kd_loss, compiled):
            leaf = student.clone().requires_grad_()
            loss = function(leaf, teacher, normalizer=tokens, divergence="jsd")
            loss.backward()
            results.append((loss.detach(), leaf.grad))
        torch.testing.assert_close(*results)
    assert counter.frame_count == 2


@upstream.before("torch", 2, 9, reason="hides what is wrong behind an error of Dynamo's")
@pytest.mark.parametrize("transform", ["grad", "jvp", "vmap of a leaf"])
def test_function_transforms_in_a_graph_say_what_to_use(transform):
    """Rather than give a derivative of 0."""
    student, teacher = correlated_pair(5, VOCAB)
    logprobs, indices = teacher.log_softmax(-1).topk(3)
    head = normal(VOCAB, VOCAB, seed=2)
    for loss_of in (
        lambda x: kd_loss(x, teacher),
        lambda x: sparse_kd_loss(x, indices, logprobs),
        lambda x: linear_kd_loss(x, head, teacher_logits=teacher),
    ):
        transformed = {
            "grad": lambda x, f=loss_of: torch.func.grad(f)(x),
            "jvp": lambda x, f=loss_of: torch.func.jvp(f, (x,), (x,)),
            "vmap of a leaf": lambda x, f=loss_of: torch.func.vmap(lambda y: f(x + y))(x),
        }[transform]
        given = student.clone().requires_grad_(transform == "vmap of a leaf")
        torch._dynamo.reset()
        with pytest.raises(RuntimeError, match=r"kd_loss: (torch.func|.*jvp).*reference"):
            torch.compile(transformed, fullgraph=True, backend="aot_eager")(given)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("inplace", [False, True], ids=["fresh", "inplace"])
def test_16_bits(dtype, inplace):
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    expected = gradients(step, 5, inplace, {}, dtype)
    torch.testing.assert_close(gradients(compiled, 5, inplace, {}, dtype), expected)


@pytest.mark.parametrize("compiler", BACKENDS)
@pytest.mark.parametrize(
    "loss",
    [
        kd_loss,
        pytest.param(
            sparse_kd_loss,
            marks=upstream.before(
                "torch", 2, 12, reason="cannot trace writes to a view it is given"
            ),
        ),
    ],
    ids=lambda loss: loss.__name__,
)
def test_in_place_of_a_view_that_the_graph_is_given(compiler, loss):
    """A graph asked for the view's base while it was compiled, when it has none."""
    student, teacher = correlated_pair(2, 5, VOCAB)
    logprobs, indices = teacher[:, :-1].log_softmax(-1).topk(3)
    target = (teacher[:, :-1],) if loss is kd_loss else (indices, logprobs)
    compiled = torch.compile(loss, fullgraph=True, backend=compiler)
    gradients = []
    for function in (loss, compiled):
        leaf = student.clone().requires_grad_()
        logits = 2 * leaf
        function(logits[:, :-1], *target, inplace_grad=True).backward()
        assert not torch.equal(logits, 2 * leaf)
        gradients.append(leaf.grad)
    assert torch.equal(*gradients)
    torch._dynamo.reset()  # a graph that is there does not ask again
    before = leaf.detach().clone()
    with pytest.raises(RuntimeError, match="inplace_grad: student_logits is a view of a leaf"):
        compiled(leaf[:, :-1], *target, inplace_grad=True)
    assert torch.equal(leaf, before)


@pytest.mark.parametrize("compiler", BACKENDS)
@pytest.mark.parametrize("other", ["square", "logsumexp", "relu", "sin"])
@pytest.mark.parametrize("loss", [kd_loss, sparse_kd_loss], ids=lambda loss: loss.__name__)
def test_in_place_of_logits_that_others_read(compiler, loss, other):
    """As in eager mode: right where the others had no need of the logits' values, else an error."""
    torch._dynamo.reset()
    student, teacher = correlated_pair(4, VOCAB)
    logprobs, indices = teacher.log_softmax(-1).topk(3)
    target = (teacher,) if loss is kd_loss else (indices, logprobs)

    def read(logits):
        values = logits.logsumexp(-1) if other == "logsumexp" else getattr(logits, other)()
        return values.square().sum() if other == "logsumexp" else values.sum()

    def step(leaf, inplace, last):
        logits = 2 * leaf
        before = 0 if last else read(logits)
        result = loss(logits, *target, inplace_grad=inplace) + before
        return result + read(logits) if last else result

    def gradient(function, *arguments):
        leaf = student.clone().requires_grad_()
        function(leaf, *arguments).backward()
        return leaf.grad

    compiled = torch.compile(step, fullgraph=True, backend=compiler)
    if other == "relu":  # needs its own result
        torch.testing.assert_close(gradient(compiled, True, False), gradient(step, False, False))
    else:
        with pytest.raises(Exception, match="modified by an inplace operation"):
            gradient(compiled, True, False)
    if loss is sparse_kd_loss:  # its backward overwrites, after that of what came later
        torch.testing.assert_close(gradient(compiled, True, True), gradient(step, False, True))


@pytest.mark.parametrize("compiler", BACKENDS)
@pytest.mark.parametrize("loss", [kd_loss, sparse_kd_loss], ids=lambda loss: loss.__name__)
def test_in_place_of_a_result_that_its_own_backward_needs(compiler, loss):
    student, teacher = correlated_pair(4, VOCAB)
    logprobs, indices = teacher.log_softmax(-1).topk(3)
    target = (teacher,) if loss is kd_loss else (indices, logprobs)

    def step(leaf):
        return loss(leaf.exp(), *target, inplace_grad=True)

    with pytest.raises(Exception, match="modified by an inplace operation"):
        torch.compile(step, fullgraph=True, backend=compiler)(student.requires_grad_()).backward()


def test_loss_only_metrics_and_module():
    student, teacher = correlated_pair(5, VOCAB)
    criterion = kdkernels.KDLoss(divergence="jsd", return_metrics=True)
    compiled = torch.compile(criterion, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        loss, metrics = compiled(student, teacher, labels=labels_for(5, vocab=VOCAB))
    expected_loss, expected = criterion(student, teacher, labels=labels_for(5, vocab=VOCAB))
    assert torch.equal(loss, expected_loss)
    for name, value in expected.items():
        assert torch.equal(metrics[name], value)


def test_normalizer_and_weights_as_tensors():
    def weighted(student, teacher, weight, count):
        return kd_loss(student, teacher, token_weight=weight, normalizer=count)

    student, teacher = correlated_pair(5, VOCAB)
    compiled = torch.compile(weighted, fullgraph=True, backend="aot_eager")
    arguments = teacher, normal(5).abs(), torch.tensor(3)
    leaves = [student.clone().requires_grad_() for _ in range(2)]
    for function, leaf in zip((weighted, compiled), leaves, strict=True):
        function(leaf, *arguments).backward()
    assert torch.equal(leaves[0].grad, leaves[1].grad)


def test_reference_backend_compiles():
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    options = {"backend": "reference", "divergence": "jsd"}
    expected = gradients(step, 5, False, options)
    torch.testing.assert_close(gradients(compiled, 5, False, options), expected)


def test_a_second_backward_is_never_silently_wrong():
    student, teacher = correlated_pair(5, VOCAB)
    compiled = torch.compile(kd_loss, fullgraph=True, backend="aot_eager")
    leaf = student.requires_grad_()
    loss = 3 * compiled(leaf, teacher)
    loss.backward(retain_graph=True)
    first = leaf.grad.clone()
    leaf.grad = None
    try:
        loss.backward()
    except RuntimeError:
        return  # as in eager mode
    torch.testing.assert_close(leaf.grad, first)


def options(divergence="jsd", reduction="mean", metrics=True, **changes):
    index = {"jsd": (0.5, 0.5), "alpha_beta": (0.2, 0.7)}.get(divergence, (0.0, 0.0))
    scalars = 2.0, 4.0, 0.5, -100, reduction, VOCAB, 1.0, 0.0, 1.0, 0.0, metrics
    base = LogitsOptions(divergence, *index, *scalars, "", 0, 1, 0, VOCAB)
    return base._replace(**changes)


def operands(dtype):
    student, teacher = correlated_pair(2, 3, VOCAB)
    labels = labels_for(2, 3, vocab=VOCAB)
    return student.to(dtype), teacher, labels, normal(2, 3).abs(), torch.tensor(3.0), "cpu"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["logits_loss", "logits_loss_and_grad", "logits_loss_and_grad_"])
def test_opcheck(name, dtype):
    operator = getattr(torch.ops.kdkernels, name).default
    for choice in (options(), options("forward_kl", "none", metrics=False, student_softcap=5.0)):
        torch.library.opcheck(operator, (*operands(dtype), *choice))
    student, teacher, *_ = operands(dtype)
    bare = options("alpha_beta", "sum", metrics=False, ce_weight=0.0)
    torch.library.opcheck(operator, (student, teacher, None, None, None, "cpu", *bare))
    for rows in (slice(None, -1), slice(1, None)):  # the gradient's strides follow these
        sliced = student[:, rows], teacher[:, rows], None, None, None, "cpu"
        torch.library.opcheck(operator, (*sliced, *bare))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck_of_scale_gradient(dtype):
    operator = torch.ops.kdkernels.scale_gradient_.default
    half = dtype == torch.float16
    for grad_output in (torch.tensor(3.0), normal(2, 3)):
        row_scale = normal(2, 3) if half else torch.empty(0)
        gradient = normal(2, 3, VOCAB).to(dtype)
        torch.library.opcheck(operator, (gradient, grad_output, row_scale, "cpu"))


def test_every_operator_is_checked():
    library = [n for n in torch._C._dispatch_get_all_op_names() if n.startswith("kdkernels::")]
    assert sorted(library) == [
        "kdkernels::all_gather",  # in test_process_groups.py
        "kdkernels::all_sum",
        "kdkernels::linear_loss",  # in test_linear_compile.py
        "kdkernels::linear_tails",  # in test_linear_sparse.py
        "kdkernels::linear_tails_gradient",
        "kdkernels::logits_loss",
        "kdkernels::logits_loss_and_grad",
        "kdkernels::logits_loss_and_grad_",
        "kdkernels::no_view_of_a_leaf",  # no more than a check
        "kdkernels::scale_gradient_",
        "kdkernels::tails",  # in test_sparse_calls.py
        "kdkernels::tails_gradient",
        "kdkernels::tails_gradient_",
        "kdkernels::touch_",  # does nothing
    ]
