"""pytest-benchmark entry points over the cases of ``python -m benchmarks``.

    pytest benchmarks/bench_losses.py --benchmark-group-by=group -k "logits and float32"

Each provider is verified before it is timed. Ratios between providers are better taken from
``python -m benchmarks``, which interleaves them.
"""

from __future__ import annotations

import functools

import pytest
import torch

from kdkernels.divergences import DIVERGENCES

from . import shapes
from .case import DTYPES, Case, Step
from .cases import CASES
from .device import DEVICES, device_of
from .measure import verify
from .providers import choose, floors

PROVIDERS = ("floor", "kdkernels", "kdkernels-in-place", "eager", "torch.compile")


@functools.lru_cache(maxsize=1)
def device(name: str):
    return device_of(name)


@functools.lru_cache(maxsize=1)
def inputs(level: str, text: str, dtype: str, device_name: str) -> Case:
    (shape,) = shapes.parse([text], level, shapes.DEFAULT_ROWS[level, device_name])
    return CASES[level].make(shape, DTYPES[dtype], device(device_name).torch_device)


def step_of(case: Case, key: str) -> tuple[Step, dict[str, float]]:
    if key == "floor":
        return floors(case)["floor"], {}
    (provider,) = choose([key], case.level)
    if reason := provider.why_not(case):
        pytest.skip(reason)
    step = provider.make(case)
    return step, verify(case, step)


def time(benchmark, case: Case, key: str, on) -> None:
    step, errors = step_of(case, key)
    benchmark.extra_info |= errors
    benchmark.group = case.label

    def run() -> None:
        step.run()
        on.synchronize()

    def prepare() -> None:
        step.prepare()
        on.flush()
        on.synchronize()

    benchmark.pedantic(run, setup=prepare, rounds=5, warmup_rounds=1)


@pytest.fixture(params=DEVICES)
def on(request):
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("PyTorch sees no CUDA device here")
    return device(request.param)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("level", "shape"), [(level, text) for level, texts in shapes.DEFAULT.items() for text in texts]
)
@pytest.mark.parametrize("provider", PROVIDERS)
def test_forward_kl(benchmark, provider, level, shape, dtype, on):
    if level == "linear" and provider == "kdkernels-in-place":
        pytest.skip("hidden states are no logits to overwrite")
    time(benchmark, inputs(level, shape, dtype, on.torch_device.type), provider, on)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_divergence(benchmark, divergence, on):
    case = inputs("logits", "32000", "float32", on.torch_device.type)
    time(benchmark, case.variant(divergence, case.what), "kdkernels-in-place", on)
