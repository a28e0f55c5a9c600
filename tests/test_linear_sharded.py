"""Heads whose vocabulary several processes share, at the fused-linear level."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from . import tolerances
from .cases import DTYPES, ONE_OF_EACH, normal
from .harness import TRITON, Backend, assert_close, assert_metrics
from .linear_cases import (
    LEAD,
    TEACHER_VOCAB,
    VOCAB,
    Case,
    Result,
    assert_as_good_as_dense,
    dense,
    fused,
    make_case,
    oracle,
    run,
    some_labels,
)
from .processes import Processes

ENDS = [70, 71, VOCAB]
#: One chunk; several; one row at a time.
CHUNKS = [None, 3 * VOCAB * 4, 1]


def _shard(case: Case, rank: int) -> Case:
    begin = [0, *ENDS][rank]
    student = slice(begin, VOCAB if rank == 2 else ENDS[rank])
    teacher = slice(begin, TEACHER_VOCAB if rank == 2 else ENDS[rank])
    return case._replace(
        student_weight=case.student_weight[student],
        student_bias=None if case.student_bias is None else case.student_bias[student],
        teacher_weight=case.teacher_weight[teacher],
        teacher_bias=None if case.teacher_bias is None else case.teacher_bias[teacher],
    )


def _run(three: Processes, config: Backend, case: Case, **options: Any) -> Result:
    """The results of all processes, put together."""

    def one(rank: int) -> Result:
        return run(
            fused,
            _shard(case, rank),
            backend=config.backend,
            group=three.group,
            vocab_start=[0, *ENDS][rank],
            vocab_size=VOCAB,
            **options,
        )

    results = three.run(one)
    for other in results[1:]:
        assert torch.equal(other.loss, results[0].loss)
        assert torch.equal(other.hidden, results[0].hidden)
    bias = None if case.student_bias is None else torch.cat([r.bias for r in results])
    return results[0]._replace(weight=torch.cat([r.weight for r in results]), bias=bias)


def _check(actual: Result, case: Case, dtype: torch.dtype, **options: Any) -> None:
    exact, rival = oracle(case, **options), run(dense, case, **options)
    assert_as_good_as_dense(actual, rival, exact, dtype)
    if dtype == torch.float32:
        assert_close(actual.loss, exact.loss, tolerances.OTHER_LOSS)
    if exact.metrics is not None:
        assert_metrics(actual.metrics, exact.metrics, "jsd")


@pytest.mark.parametrize("divergence", ONE_OF_EACH, ids=str)
def test_a_shared_vocabulary(linear_backend, three, divergence):
    case, options = make_case(), {"divergence": divergence, "temperature": 1.5}
    for chunk_bytes in CHUNKS:
        actual = _run(three, linear_backend, case, chunk_bytes=chunk_bytes, **options)
        _check(actual, case, torch.float32, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("chunk_bytes", CHUNKS)
def test_dtypes_and_chunks(linear_kernel, three, dtype, chunk_bytes):
    case = make_case(dtype)
    options = {"divergence": "reverse_kl", "labels": some_labels(), "ce_weight": 0.5}
    actual = _run(three, linear_kernel, case, chunk_bytes=chunk_bytes, **options)
    _check(actual, case, dtype, **options)


OPTION_SETS = [
    {"reduction": "sum"},
    {"labels": some_labels(), "kd_weight": 0.0, "ce_weight": 1.0, "reduction": "none"},
    {"token_weight": normal(*LEAD) > 0, "divergence": "jsd", "reduction": "none"},
    {"normalizer": torch.tensor(40), "student_softcap": 3.0, "teacher_softcap": 5.0},
    {"return_metrics": True, "labels": some_labels(), "divergence": "jsd"},
]


@pytest.mark.parametrize("options", OPTION_SETS, ids=lambda o: "-".join(o))
def test_options(linear_backend, three, options):
    case = make_case(bias=False)
    if options.get("reduction") == "none":
        options = {**options, "grad_output": normal(*LEAD)}
    _check(_run(three, linear_backend, case, **options), case, torch.float32, **options)


def test_an_interpreted_backend(three):
    if TRITON.skip or not TRITON.interpreted:
        pytest.skip(TRITON.skip or "it runs among the others")
    case = make_case(lead=(3,))
    options = {"divergence": "jsd", "temperature": 2.0}
    _check(_run(three, TRITON, case, **options), case, torch.float32, **options)


def test_processes_split_rows_alike(linear_kernel, three):
    """Whatever their shards' widths: otherwise they would wait for each other forever."""
    case = make_case()
    _run(three, linear_kernel, case, chunk_bytes=2 * VOCAB * 4)
    assert three.gathers > 2 * 2
