"""Rows on both sides of where kernels change from formulas for near rows to those for far ones.

Near its teacher a row's terms cancel in the textbook's formulas; from a divergence of 1/32 on the
kernels take those, being shorter. Nothing of that may be seen from outside.
"""

from __future__ import annotations

import functools
import re

import pytest
import torch

from kdkernels import ForwardKL, ReverseKL, SymmetricKL, constants

from . import tolerances
from .cases import ALL, BOUNDED, ONE_OF_EACH, close_pair, normal, without_ties
from .documents import ROOT
from .harness import (
    Result,
    assert_as_oracle,
    assert_close,
    assert_matches,
    assert_same,
    loss_of,
    oracle,
    run,
)
from .processes import sharded

VOCAB = 2503
LEVELS = (0.01, 0.02, 0.03, 0.035, 0.05, 0.1, 0.3, 1.0)


def rows_at(levels, temperature, divergence):
    """A row for each level of KL, and the largest logits of the models far apart in the last."""
    pairs = [
        close_pair(1, VOCAB, kl=level, temperature=temperature, seed=seed)
        for seed, level in enumerate(levels)
    ]
    student, teacher = (torch.cat(rows) for rows in zip(*pairs, strict=True))
    student[-1] -= 30
    if divergence.name == "tvd":
        student = without_ties(student, teacher, temperature, tolerances.TVD_TIE)
    return student, teacher


@functools.lru_cache(maxsize=100)
def border(divergence, dtype, temperature):
    """Inputs and the oracle's answer, computed once for all backends."""
    student, teacher = (x.to(dtype) for x in rows_at(LEVELS, temperature, divergence))
    options = {"divergence": divergence, "temperature": temperature, "reduction": "none"}
    return student, teacher, options, oracle(student, teacher, **options)


@pytest.mark.parametrize(
    ("dtype", "temperature"),
    [(torch.float32, 1.0), (torch.bfloat16, 3.0)],
    ids=["float32", "bfloat16-T=3"],
)
@pytest.mark.parametrize("divergence", ALL, ids=str)
def test_rows_about_the_border(kernel, divergence, dtype, temperature):
    student, teacher, options, expected = border(divergence, dtype, temperature)
    # Near rows of float32 have the gradient's tolerance for close ones.
    actual = run(kernel, student, teacher, **options)
    assert_matches(actual, expected, divergence.name, dtype, close=True)
    with torch.no_grad():
        loss = loss_of(kernel, student, teacher, **options)
    assert_close(loss.cpu(), expected.loss, tolerances.loss_tolerance(divergence.name))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("divergence", ONE_OF_EACH, ids=str)
def test_shards_of_rows_about_the_border(kernel, three, divergence, dtype):
    """Also where the largest logits of each model are another shard's."""
    student, teacher, options, expected = border(divergence, dtype, 1.0)
    for inplace, ends in ((False, [700, 701, VOCAB]), (True, [VOCAB - 1, VOCAB, VOCAB])):
        actual = sharded(three, kernel, student, teacher, ends, inplace_grad=inplace, **options)
        assert_matches(actual, expected, divergence.name, dtype, close=True)


@pytest.mark.parametrize("teacher_first", [True, False])
@pytest.mark.parametrize("divergence", [ForwardKL(), ReverseKL(), SymmetricKL()], ids=str)
def test_top_tokens_far_above_the_first_logits(kernel, divergence, teacher_first):
    """A kernel may take exponentials relative to those, which then cancels in a KL divergence."""
    student = normal(4, VOCAB)
    student[:, 600:602] = torch.tensor([[26.0, 18.4], [25.0, 17.4], [26.0, 25.0], [25.5, 24.5]])
    teacher = student + 0.05 * normal(4, VOCAB, seed=1)
    teacher[:, 601] += torch.tensor([3.6, 3.6, 0.7, -0.7])
    student[:, :512] -= torch.tensor([[3.0], [20.0], [14.0], [20.0]])
    if not teacher_first:
        student, teacher = teacher, student
    options = {"divergence": divergence, "reduction": "none"}
    actual = run(kernel, student, teacher, **options)
    assert_as_oracle(actual, student, teacher, **options, close=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("divergence", BOUNDED, ids=str)
def test_one_rare_token_apart(kernel, divergence, dtype):
    # The KL is far, by one token that the student all but excludes; bounded divergences are not.
    kl = 1e-4 if divergence.name == "tvd" else 1e-8  # as nearer the sign of its terms is rounding
    student, teacher = (x.to(dtype).float() for x in close_pair(4, VOCAB, kl=kl))
    teacher[:, 7] = teacher.logsumexp(-1) - 5.8
    student[:, 7] = student.logsumexp(-1) - torch.tensor([15.0, 20.0, 30.0, 90.0])
    if divergence.name == "tvd":
        student = without_ties(student, teacher, 1.0, tolerances.TVD_TIE)
    student, teacher = student.to(dtype), teacher.to(dtype)
    for options in ({}, {"inplace_grad": True}):
        options |= {"divergence": divergence, "reduction": "none"}
        actual = run(kernel, student, teacher, **options)
        assert_as_oracle(actual, student, teacher, **options, close=True)


def test_a_row_does_not_depend_on_its_neighbours(kernel):
    for divergence in ONE_OF_EACH:
        student, teacher = rows_at(LEVELS, 1.0, divergence)
        options = {"divergence": divergence, "reduction": "none"}
        together = run(kernel, student, teacher, **options)
        for row in (0, 3, 7):
            alone = run(kernel, student[row : row + 1], teacher[row : row + 1], **options)
            of_row = Result(*(x[row : row + 1] for x in together[:2]), None)
            assert_same(alone, of_row, divergence.name, kernel)


def test_constants_agree():
    for name, path in {
        "kLowestLogit": "core/softmax_state.h",
        "kFarFrom": "core/point.h",
        "kLeastShare": "core/point.h",
        "kMostCancelled": "cpu/softmax.h",
    }.items():
        header = (ROOT / "csrc" / path).read_text()
        (value,) = re.findall(rf"constexpr \w+ {name} = ([-\d.e]+)f?(?: / (\d+))?;", header)
        python = re.sub(r"(?<!^)([A-Z])", r"_\1", name.removeprefix("k")).upper()
        assert getattr(constants, python) == float(value[0]) / float(value[1] or 1), name
