"""pytest-benchmark entry points over the cases of ``python -m benchmarks``.

    pytest benchmarks/bench_logits.py --benchmark-group-by=group

Each provider is verified before it is timed. Ratios between providers are better taken from
``python -m benchmarks``, which interleaves them.
"""

from __future__ import annotations

import functools

import pytest
import torch

from kdkernels.divergences import DIVERGENCES

from .measure import verify
from .providers import PROVIDERS, Case

ROWS = 512


@functools.lru_cache(maxsize=1)
def case_of(vocab: int, dtype: torch.dtype, divergence: str = "forward_kl") -> Case:
    return Case(ROWS, vocab, dtype, divergence)


def time(benchmark, case: Case, provider: str) -> None:
    step = PROVIDERS[provider](case)
    if provider != "floor":
        benchmark.extra_info |= verify(case, step)
    benchmark.group = f"{case.label} {case.divergence}"
    benchmark.pedantic(step.run, setup=step.prepare, rounds=5, warmup_rounds=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("vocab", [32000, 128256])
@pytest.mark.parametrize("provider", PROVIDERS)
def test_forward_kl(benchmark, provider, vocab, dtype):
    time(benchmark, case_of(vocab, dtype), provider)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_divergence(benchmark, divergence):
    time(benchmark, case_of(32000, torch.float32, divergence), "kdkernels in place")
