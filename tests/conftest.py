"""Fixtures: the backends under test, and memory that shows what was not written."""

from __future__ import annotations

import os

# Compiled graphs on disk know nothing of a change of our operators' fakes: each run makes its own.
os.environ["TORCHINDUCTOR_FX_GRAPH_CACHE"] = "0"
os.environ["TORCHINDUCTOR_AUTOGRAD_CACHE"] = "0"
# Inductor's own loops need not be fast, and without vectors they compile sooner; no processes start
# to compile them.
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "0")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

import pytest
import torch

from . import emulated  # noqa: F401  first: it may put another extension in the place of ours
from .harness import BACKENDS
from .processes import Processes

try:
    from hypothesis import HealthCheck, settings
except ImportError:  # a bare GPU machine: test_properties.py says so
    pass
else:
    settings.register_profile(
        "kdkernels",
        deadline=None,
        max_examples=15,
        derandomize=True,
        # The backend fixture only sets the environment, the same for every example.
        suppress_health_check=[HealthCheck.function_scoped_fixture],
    )
    settings.load_profile("kdkernels")

# Small tensors gain nothing from more; test_properties.py shows that the bits are the same.
torch.set_num_threads(1)


def _poisoned(function):
    def allocate(*args, **kwargs):
        tensor = function(*args, **kwargs)
        if tensor.is_floating_point():
            tensor.detach().fill_(torch.nan)  # detached: a leaf that requires grad is not written
        return tensor

    return allocate


@pytest.fixture
def poison(monkeypatch):
    """Memory from torch.empty and torch.empty_like holds NaN: an unwritten output fails."""
    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, _poisoned(getattr(torch, name)))


def _enter(config, monkeypatch):
    if config.skip:
        pytest.skip(f"{config.name}: {config.skip}")
    for name, value in config.environment.items():
        monkeypatch.setenv(name, value)
    return config


@pytest.fixture(params=BACKENDS, ids=str)
def backend(request, monkeypatch, poison):
    """Each backend in turn, with poisoned outputs."""
    return _enter(request.param, monkeypatch)


@pytest.fixture(params=[config for config in BACKENDS if config.kernel], ids=str)
def kernel(request, monkeypatch, poison):
    """The backends with kernels of their own: in-place gradients, consumed by one backward."""
    return _enter(request.param, monkeypatch)


@pytest.fixture(params=[c for c in BACKENDS if c.backend in ("cuda", "triton")], ids=str)
def gpu(request, monkeypatch):
    """The backends of GPUs on one, where there is one."""
    config = _enter(request.param, monkeypatch)
    if not torch.cuda.is_available():
        pytest.skip(f"{config.name}: there is no GPU")
    return config


def _first_of_each(configs):
    """The fused-linear level runs products around whatever the backend is: one of each will do.

    The interpreter's speed allows for test_an_interpreted_backend only.
    """
    runnable = [config for config in configs if not config.skip and not config.interpreted]
    return list({config.backend: config for config in reversed(runnable)}.values())


@pytest.fixture(params=_first_of_each(BACKENDS), ids=lambda config: config.backend)
def linear_backend(request, monkeypatch, poison):
    """One configuration of each backend."""
    return _enter(request.param, monkeypatch)


@pytest.fixture(
    params=_first_of_each(config for config in BACKENDS if config.kernel),
    ids=lambda config: config.backend,
)
def linear_kernel(request, monkeypatch, poison):
    """One configuration of each backend that has kernels of its own."""
    return _enter(request.param, monkeypatch)


@pytest.fixture
def fresh_dynamo():
    """Nothing compiled before counts, nor stays."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def three(monkeypatch):
    """Three threads that take each other for processes."""
    return Processes(3, monkeypatch)


@pytest.fixture
def threads():
    """Sets the number of threads for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
