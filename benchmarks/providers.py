"""What is timed: the same distillation loss and gradient, each as a user would write it.

A provider says why it cannot serve a case, or makes a step of it; only then what it needs is
imported. The floors are no losses: they do the least that any loss has to.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kdkernels import backends, kd_loss, linear_kd_loss, sparse_kd_loss

from . import dense, peers
from .case import Case, Result, Step
from .cases import LinearCase, LogitsCase, SparseCase


@dataclass(frozen=True)
class Provider:
    """One implementation at one level."""

    name: str
    make: Callable[[Case], Step]
    why_not: Callable[[Case], str | None] = lambda case: None
    package: str | None = None  # whose version is recorded
    ours: bool = False  # kernels that round nothing but the gradient

    @property
    def key(self) -> str:
        """Its name on the command line."""
        return self.name.lower().replace(" ", "-")


class _Produce(torch.autograd.Function):
    """Hands out a tensor as if a layer had computed it, so that it is no leaf."""

    @staticmethod
    def forward(ctx, _, tensor):
        return tensor.detach()

    @staticmethod
    def backward(ctx, gradient):
        return None, None  # what launches nothing


OURS = {"logits": kd_loss, "sparse": sparse_kd_loss, "linear": linear_kd_loss}


def in_place(case: LogitsCase, backend: str) -> Step:
    """The gradient overwrites the logits, which are fresh in every run."""
    buffer = torch.empty_like(case.student)
    anchor = torch.zeros((), device=case.device, requires_grad=True)
    student = buffer

    def prepare() -> None:
        nonlocal student
        buffer.copy_(case.student)
        student = _Produce.apply(anchor, buffer)

    def run() -> Result:
        loss = OURS[case.level](
            student,
            *case.of_teacher(),
            divergence=case.instance,
            temperature=case.temperature,
            inplace_grad=True,
            backend=backend,
        )
        case.backward(loss)
        return loss.detach(), (buffer,)

    return Step(run, prepare)


def kdkernels(case: Case, backend: str) -> Step:
    def loss(*tensors_and_temperature) -> Tensor:
        *tensors, temperature = tensors_and_temperature
        options = {"divergence": case.instance, "backend": backend}
        return OURS[case.level](*tensors, temperature=temperature, **options)

    return case.step(loss)


def kdkernels_why_not(case: Case, backend: str, in_place: bool) -> str | None:
    if in_place and not case.with_gradient:
        return "a loss alone has no gradient to put in place"
    if backend == "auto":
        return None
    like = torch.empty(0, case.vocab, dtype=case.dtype, device=case.device)
    return "; ".join(backends.why_not(backend, like, like, case.instance, in_place)) or None


def textbook(case: Case) -> Callable[..., Tensor]:
    return dense.LOSSES[case.level](case.divergence)


def compiled(case: Case) -> Step:
    # Anew for every case: what was compiled for other shapes would make this one's dynamic.
    torch.compiler.reset()
    return case.step(torch.compile(textbook(case), dynamic=False))


def of_kdkernels(level: str) -> list[Provider]:
    """kdkernels with the backend it chooses, and with each; in place where there are logits."""
    providers = []
    for backend in ("auto", *backends.BACKENDS):
        name = "kdkernels" if backend == "auto" else f"kdkernels {backend}"
        why_not = functools.partial(kdkernels_why_not, backend=backend)
        providers.append(
            Provider(
                name,
                functools.partial(kdkernels, backend=backend),
                functools.partial(why_not, in_place=False),
                ours=backend != "reference",
            )
        )
        if level != "linear" and backend != "reference":
            providers.append(
                Provider(
                    f"{name} in place",
                    functools.partial(in_place, backend=backend),
                    functools.partial(why_not, in_place=True),
                    ours=True,
                )
            )
    return providers


def of_peer(peer: peers.Peer) -> Provider:
    def why_not(case: Case) -> str | None:
        if case.divergence not in peer.divergences:
            return f"it does not compute {case.divergence}"
        return peers.why_not(peer, case.device)

    def make(case: Case) -> Step:
        return case.step(peer.load(case.divergence))

    return Provider(peer.name, make, why_not, peer.package)


def providers_of(level: str) -> dict[str, Provider]:
    """All of a level by their names on the command line."""
    providers = [
        *of_kdkernels(level),
        Provider("eager", lambda case: case.step(textbook(case))),
        Provider("torch.compile", compiled),
        *(of_peer(peer) for peer in peers.PEERS.values() if peer.level == level),
    ]
    return {provider.key: provider for provider in providers}


def choose(names: list[str], level: str) -> list[Provider]:
    """The providers of ``names``: their keys, ``default`` and ``peers``; each once, in order."""
    known = providers_of(level)
    of_peers = [name for name, provider in known.items() if provider.package]
    default = ("kdkernels", "kdkernels-in-place", "eager", "torch.compile")
    groups = {"default": [name for name in default if name in known], "peers": of_peers}
    chosen: dict[str, Provider] = {}
    for name in names:
        for key in groups.get(name, [name]):
            if key not in known:
                raise ValueError(
                    f"provider {key!r} is unknown at the {level} level, expected one of "
                    f"{', '.join([*groups, *known])}"
                )
            chosen[key] = known[key]
    return list(chosen.values())


def floors(case: Case) -> dict[str, Step]:
    """What bounds a case from below: ``floor`` at every level, ``copy`` for logits."""
    if isinstance(case, SparseCase):
        out = torch.empty_like(case.student)
        return {"floor": Step(lambda: (torch.neg(case.student, out=out), ()))}
    return floors_of_logits(case) if isinstance(case, LogitsCase) else floors_of_linear(case)


def floors_of_logits(case: LogitsCase) -> dict[str, Step]:
    """``add`` reads both logits tensors and writes one: 3U. ``copy`` moves 2U."""
    out = torch.empty_like(case.student)
    return {
        "floor": Step(lambda: (torch.add(case.student, case.teacher, out=out), ())),
        "copy": Step(lambda: (out.copy_(case.student), ())),
    }


def floors_of_linear(case: LinearCase) -> dict[str, Step]:
    """The products that any loss needs, over all rows at once, into logits that are there."""
    student = torch.full((case.rows, case.vocab), 0.5, dtype=case.dtype, device=case.device)
    teacher = torch.empty_like(student)
    hidden, weight = case.student_hidden.detach(), case.student_weight.detach()

    def run() -> Result:
        torch.mm(hidden, weight.t(), out=student)
        torch.mm(case.teacher_hidden, case.teacher_weight.t(), out=teacher)
        if case.with_gradient:  # the student's logits stand in for their gradient
            return student, (student @ weight, student.t() @ hidden)
        return student, ()

    return {"floor": Step(run)}
