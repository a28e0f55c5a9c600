"""Knowledge-distillation losses for PyTorch as fused kernels: raw logits in, loss and gradient out.

See :func:`kd_loss` for logits and :func:`linear_kd_loss` for hidden states and LM heads; and
:func:`sparse_kd_loss` and :func:`linear_sparse_kd_loss` for teachers known by a few tokens a row.
"""

from . import linear_ops as _linear_ops  # noqa: F401  registers its operator
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
from .head import LinearKDHead, LinearSparseKDHead
from .linear import linear_kd_loss
from .linear_sparse import linear_sparse_kd_loss
from .memory import release_memory
from .modules import KDLoss, LinearKDLoss, LinearSparseKDLoss, SparseKDLoss
from .options import Metrics
from .sparse import sparse_kd_loss

__all__ = [
    "JSD",
    "TVD",
    "AlphaBeta",
    "Divergence",
    "ForwardKL",
    "KDLoss",
    "LinearKDHead",
    "LinearKDLoss",
    "LinearSparseKDHead",
    "LinearSparseKDLoss",
    "Metrics",
    "ReverseKL",
    "SkewForwardKL",
    "SkewReverseKL",
    "SoftCrossEntropy",
    "SparseKDLoss",
    "SymmetricKL",
    "__version__",
    "kd_loss",
    "linear_kd_loss",
    "linear_sparse_kd_loss",
    "register_divergence",
    "release_memory",
    "sparse_kd_loss",
]
