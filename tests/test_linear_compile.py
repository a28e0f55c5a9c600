"""The fused-linear level under torch.compile, and its operator's schema and fake."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kdkernels import linear_kd_loss, linear_sparse_kd_loss
from kdkernels.options import LinearOptions

from .cases import DTYPES, normal
from .linear_cases import (
    LEAD,
    VOCAB,
    Case,
    fused,
    make_case,
    some_labels,
)
from .test_compile import COMPILER, options


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
            _, _, _, *teacher = case  # torch 2.8 cannot trace a slice of a NamedTuple
            inner = Case(hidden.tanh(), weight, bias, *teacher)
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
        torch.testing.assert_close(*results, rtol=2e-5, atol=1e-7)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype):
    case = make_case(dtype)
    labels, weight, count = some_labels(), normal(*LEAD).abs(), torch.tensor(3.0)
    for needs in ([True, True, True], [False, True, False], [False, False, False]):
        linear = LinearOptions(dtype, dtype, False, 0, "cpu")
        for choice in (options(), options("forward_kl", "none", metrics=False)):
            torch.library.opcheck(
                torch.ops.kdkernels.linear_loss.default,
                (
                    [case.student_hidden],
                    [case.student_weight],
                    case.student_bias,
                    *(case.teacher_hidden, case.teacher_weight, case.teacher_bias, None),
                    *(labels, weight, count, None),
                    needs,
                    *linear,
                    *choice._replace(vocab=VOCAB, vocab_size=VOCAB),
                ),
            )


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(
    "shared",
    ["head", "hidden", "frozen head and adapter", "all of a module", "hidden of both terms"],
)
def test_models_that_share_tensors(shared, reduction):
    """A draft model's frozen head, features under two heads, an adapter beside its own base."""
    hidden, head, bias = normal(5, 8, seed=1), normal(VOCAB, 8, seed=2), normal(VOCAB, seed=3)
    low, up, other = normal(5, 2, seed=4), normal(VOCAB, 2, seed=5), normal(VOCAB, 8, seed=6)

    def step(x):
        if shared == "head":
            arguments = x, head, hidden, head
        elif shared == "hidden":
            arguments = hidden, x, hidden, other
        elif shared == "frozen head and adapter":
            arguments = (hidden, low), (head, x), hidden, head
        elif shared == "hidden of both terms":
            arguments = (x, x), (head, other), hidden, head
        else:
            arguments = x, head, x.detach(), other
        biases = {"student_bias": bias, "teacher_bias": bias} if shared == "head" else {}
        return linear_kd_loss(*arguments, **biases, reduction=reduction).sum()

    leaf = {"hidden": other + 1, "frozen head and adapter": up}.get(shared, hidden + 1)
    gradients = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        x = leaf.clone().requires_grad_()
        function(x).backward()
        gradients.append(x.grad)
    torch.testing.assert_close(*gradients)


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("shared", ["hidden", "weight"])
def test_terms_that_share_tensors_beside_a_sparse_teacher(shared):
    hidden, head, other = normal(5, 8, seed=1), normal(VOCAB, 8, seed=2), normal(VOCAB, 8, seed=3)
    logprobs, indices = normal(5, VOCAB).log_softmax(-1).topk(3)

    def step(x):
        terms = ((x, x), (head, other)) if shared == "hidden" else ((hidden, hidden + 1), (x, x))
        return linear_sparse_kd_loss(*terms, indices, logprobs)

    gradients = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        x = (hidden if shared == "hidden" else head).clone().requires_grad_()
        function(x).backward()
        gradients.append(x.grad)
    torch.testing.assert_close(*gradients)


@pytest.mark.usefixtures("fresh_dynamo")
def test_a_row_index_that_makes_no_sense():
    case = make_case(lead=(5,))
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    compiled(case, row_index=torch.tensor([0, 2, 3]))
    for wrong in ([0, 0, 3], [0, 3, 2], [1, 2, 5], [-1, 2, 3]):
        with pytest.raises(ValueError, match="expected increasing positions of 5 rows"):
            compiled(case, row_index=torch.tensor(wrong))


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_a_teacher_in_an_array(dtype):
    hidden, head, other = normal(5, 8, seed=1), normal(VOCAB, 8, seed=2), normal(VOCAB, 8, seed=3)
    array = normal(5, 8, seed=4).numpy().astype(dtype)
    expected = linear_kd_loss(hidden, head, array, other)
    compiled = torch.compile(linear_kd_loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(hidden, head, array, other), expected)
