"""Knowledge-distillation losses for PyTorch as fused kernels: raw logits in, loss and gradient out.

See :func:`kd_loss`.
"""

from . import ops as _ops  # noqa: F401  registers the operators
from ._version import __version__
from .divergences import (
    JSD,
    TVD,
    AlphaBeta,
    Divergence,
    ForwardKL,
    ReverseKL,
    SkewForwardKL,
    SkewReverseKL,
    SoftCrossEntropy,
    SymmetricKL,
    register_divergence,
)
from .functional import kd_loss
from .modules import KDLoss

__all__ = [
    "JSD",
    "TVD",
    "AlphaBeta",
    "Divergence",
    "ForwardKL",
    "KDLoss",
    "ReverseKL",
    "SkewForwardKL",
    "SkewReverseKL",
    "SoftCrossEntropy",
    "SymmetricKL",
    "__version__",
    "kd_loss",
    "register_divergence",
]
