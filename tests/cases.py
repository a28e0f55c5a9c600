"""Divergences and inputs that the tests share."""

from __future__ import annotations

import torch
from torch import Tensor

from kdkernels.divergences import (
    DIVERGENCES,
    JSD,
    AlphaBeta,
    Divergence,
    SkewForwardKL,
    SkewReverseKL,
    SymmetricKL,
)

#: Parameters worth a test, limits included; a divergence that is not here runs with its defaults.
VARIANTS: dict[str, list[Divergence]] = {
    "jsd": [JSD(0.5), JSD(0.1), JSD(0.9), JSD(0), JSD(1)],
    "skew_forward_kl": [SkewForwardKL(0.1), SkewForwardKL(0.9), SkewForwardKL(0)],
    "skew_reverse_kl": [SkewReverseKL(0.1), SkewReverseKL(0.9), SkewReverseKL(0)],
    "symmetric_kl": [SymmetricKL(0.5), SymmetricKL(0.3), SymmetricKL(0), SymmetricKL(1)],
    "alpha_beta": [
        AlphaBeta(0.2, 0.7),
        AlphaBeta(0.5, 0.5),
        AlphaBeta(1, 1),
        AlphaBeta(2, 0.5),
        AlphaBeta(0, 0),
        AlphaBeta(0, 0.7),
        AlphaBeta(0.7, 0),
        AlphaBeta(1, 0),
        AlphaBeta(0, 1),
        AlphaBeta(0.5, -0.5),
        AlphaBeta(-0.5, 0.5),
        AlphaBeta(-0.3, 0.8),
        AlphaBeta(0.8, -0.3),
        AlphaBeta(-0.3, 0),
        AlphaBeta(-0.2, -0.3),
    ],
}

ALL = [case for name, cls in DIVERGENCES.items() for case in VARIANTS.get(name) or [cls()]]
ONE_OF_EACH = [(VARIANTS.get(name) or [cls()])[0] for name, cls in DIVERGENCES.items()]

#: Finite whatever holds -inf; see the numerics page of the documentation.
BOUNDED = [
    case
    for case in ALL
    if (case.name == "jsd" and 0 < case.beta < 1)
    or (case.name.startswith("skew") and case.alpha > 0)
    or case.name == "tvd"
    or (case.name == "alpha_beta" and min(case.alpha, case.beta) > 0)
]


#: Those that kernels take.
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def correlated_pair(*shape: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Student and teacher as in training.

    Nearly disjoint distributions would test the input's conditioning instead: the gradients of
    bounded divergences vanish there as differences of rounded numbers.
    """
    teacher = 2 * normal(*shape, seed=seed)
    return 0.6 * teacher + 1.2 * normal(*shape, seed=seed + 1000), teacher


def close_pair(
    *shape: int, kl: float = 1e-4, temperature: float = 1.0, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """A student at about this KL of the teacher, in every row."""
    teacher = 2 * normal(*shape, seed=seed)
    noise = normal(*shape, seed=seed + 1000).double() * temperature
    log_p = torch.log_softmax(teacher.double() / temperature, -1)
    distance = torch.tensor(kl).sqrt()
    for _ in range(3):  # KL grows with the square of the distance
        log_q = torch.log_softmax((teacher + distance * noise) / temperature, -1)
        reached = (log_p.exp() * (log_p - log_q)).sum(-1, keepdim=True)
        distance = distance * (kl / reached).sqrt()
    return (teacher + distance * noise).float(), teacher


def without_ties(student: Tensor, teacher: Tensor, temperature: float, tie: float) -> Tensor:
    """The student with logits moved where p and q agree to ``tie``: TVD has no slope there."""
    for _ in range(10):
        log_q = torch.log_softmax(student.double() / temperature, -1)
        log_p = torch.log_softmax(teacher.double() / temperature, -1)
        tied = (log_q - log_p).abs() < tie
        if not bool(tied.any()):
            return student
        student = torch.where(tied, student + 300 * tie * temperature, student)
    raise AssertionError("ties remain")


def labels_for(*shape: int, vocab: int, seed: int = 0) -> Tensor:
    return torch.randint(vocab, shape, generator=torch.Generator().manual_seed(seed))
