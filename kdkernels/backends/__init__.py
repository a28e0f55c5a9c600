"""Backends and the choice between them.

A backend says why it cannot serve a call, as a list of reasons that drives the choice, the errors
and the test skips; an explicit ``backend=`` never falls back.
"""

from __future__ import annotations

from torch import Tensor

from ..divergences import Divergence
from . import cpu, cuda, triton

#: The backends with kernels, in order of preference. Each refuses tensors of another device first,
#: which is the usual refusal and the cheapest.
IMPLEMENTATIONS = {"cpu": cpu, "cuda": cuda, "triton": triton}

BACKENDS = (*IMPLEMENTATIONS, "reference")


def why_not(
    backend: str, student: Tensor, teacher: Tensor, divergence: Divergence, inplace_grad: bool
) -> list[str]:
    """Why ``backend`` cannot serve a call; empty if it can."""
    if backend in IMPLEMENTATIONS:
        return IMPLEMENTATIONS[backend].why_not(student, teacher, divergence)
    if inplace_grad:
        return ["its gradient comes from autograd and cannot overwrite student_logits"]
    return []


def check_name(backend: str) -> str:
    """Returns the name; raises if it is neither a backend's nor ``"auto"``."""
    if not (isinstance(backend, str) and backend in ("auto", *BACKENDS)):
        raise ValueError(
            f"backend is {backend!r}, expected 'auto', {', '.join(map(repr, BACKENDS))}"
        )
    return backend


def choose(
    backend: str, student: Tensor, teacher: Tensor, divergence: Divergence, inplace_grad: bool
) -> str:
    """The backend that serves a call, or a ValueError with every refusal."""
    check_name(backend)
    refusals = []
    for name in BACKENDS if backend == "auto" else (backend,):
        reasons = why_not(name, student, teacher, divergence, inplace_grad)
        if not reasons:
            return name
        refusals.append(f"{name}: {'; '.join(reasons)}")
    raise ValueError("no backend can serve this call. " + ". ".join(refusals))
