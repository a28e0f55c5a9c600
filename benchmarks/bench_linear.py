"""pytest-benchmark entry points over the cases of ``python -m benchmarks --level linear``.

    pytest benchmarks/bench_linear.py --benchmark-group-by=group

Each provider is verified before it is timed. Ratios between providers are better taken from
``python -m benchmarks --level linear``, which interleaves them.
"""

from __future__ import annotations

import functools

import pytest
import torch

from .linear import LINEAR_PROVIDERS, LINEAR_SHAPES, LinearCase, verify_linear


@functools.lru_cache(maxsize=1)
def case_of(shape: tuple[int, int, int, int], dtype: torch.dtype) -> LinearCase:
    return LinearCase(*shape, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", LINEAR_SHAPES, ids=str)
@pytest.mark.parametrize("provider", LINEAR_PROVIDERS)
def test_forward_kl(benchmark, provider, shape, dtype):
    case = case_of(shape, dtype)
    step = LINEAR_PROVIDERS[provider](case)
    if provider != "floor":
        benchmark.extra_info |= verify_linear(case, step)
    benchmark.group = case.label
    benchmark.pedantic(step.run, setup=step.prepare, rounds=5, warmup_rounds=1)
