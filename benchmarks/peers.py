"""The other libraries' losses, each called as its users would, with one meaning of the loss.

That meaning is kdkernels': p = softmax(teacher / T), q = softmax(student / T), a divergence summed
over the vocabulary, averaged over rows and multiplied by T². A peer that takes no temperature gets
logits (or hidden states) divided by it, one that averages otherwise is asked for sums over the
vocabulary, and the T² that a peer leaves to its user is put in. Nothing is imported before a peer
is asked for; `benchmarks/requirements-peers.txt` installs them all.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

#: mean over rows, times T²: of (student, teacher, temperature), logits (rows, vocab), or of
#: (student_hidden, student_weight, teacher_hidden, teacher_weight, temperature).
Loss = Callable[..., Tensor]

#: The generalised JSD of GKD by its beta: everywhere here beta is the teacher's share of the
#: mixture, 0 stands for forward KL (teacher || student) and 1 for reverse KL.
BETA = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": 0.5}


@dataclass(frozen=True)
class Peer:
    """A loss of another package."""

    name: str
    package: str  # the distribution whose version is recorded
    level: str  # "logits" | "linear"
    divergences: tuple[str, ...]  # that it computes with kdkernels' default parameters
    load: Callable[[str], Loss]  # imports the package and returns its loss for a divergence
    triton: bool = False  # runs on a GPU only


def why_not(peer: Peer, device: torch.device) -> str | None:
    """Why a peer can't be timed on ``device``; None where it can. May import the peer."""
    try:
        metadata.version(peer.package)
    except metadata.PackageNotFoundError:
        return f"{peer.package} is not installed"
    if peer.triton and device.type == "cpu":
        return "needs a GPU: its kernels are Triton"
    try:
        peer.load(peer.divergences[0])
    except Exception as error:  # whatever a foreign package raises when it is imported
        return f"{peer.package} does not import: {type(error).__name__}: {error}"
    return None


def _over(x: Tensor, temperature: float) -> Tensor:
    return x if temperature == 1 else x / temperature


def _of_log_probabilities(divergence: Callable[[Tensor, Tensor], Tensor]) -> Loss:
    def loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        log_q = F.log_softmax(_over(student, temperature), dim=-1)
        log_p = F.log_softmax(_over(teacher, temperature), dim=-1)
        return divergence(log_q, log_p) * temperature**2

    return loss


def _liger_jsd(divergence: str) -> Loss:
    from liger_kernel.transformers.jsd import LigerJSD

    return _of_log_probabilities(LigerJSD(beta=BETA[divergence]))


def _liger_kl(divergence: str) -> Loss:
    from liger_kernel.transformers.kl_div import LigerKLDIVLoss

    return _of_log_probabilities(LigerKLDIVLoss(reduction="batchmean", log_target=True))


def _liger_tvd(divergence: str) -> Loss:
    from liger_kernel.transformers.tvd import LigerTVDLoss

    tvd = LigerTVDLoss(reduction="batchmean")

    def loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        q = F.softmax(_over(student, temperature), dim=-1)
        p = F.softmax(_over(teacher, temperature), dim=-1)
        return tvd(q, p) * temperature**2  # only the first argument gets a gradient

    return loss


def _liger_linear_jsd(divergence: str) -> Loss:
    from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD

    def loss(
        student_hidden: Tensor,
        student_weight: Tensor,
        teacher_hidden: Tensor,
        teacher_weight: Tensor,
        temperature: float,
    ) -> Tensor:
        jsd = LigerFusedLinearJSD(jsd_beta=BETA[divergence], temperature=temperature)
        value = jsd(student_hidden, student_weight, teacher_hidden, teacher_weight, None)
        return value * temperature**2

    return loss


def _liger_chunked_jsd(divergence: str) -> Loss:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    def loss(
        student_hidden: Tensor,
        student_weight: Tensor,
        teacher_hidden: Tensor,
        teacher_weight: Tensor,
        temperature: float,
    ) -> Tensor:
        jsd = LigerFusedLinearJSDLoss(
            weight_hard_loss=0.0,
            weight_soft_loss=1.0,
            beta=BETA[divergence],
            temperature=temperature,
        )
        labels = student_hidden.new_zeros(len(student_hidden), dtype=torch.long)  # none ignored
        value = jsd(student_hidden, student_weight, teacher_hidden, teacher_weight, labels)
        return value * temperature**2

    return loss


def _trl_dense(divergence: str) -> Loss:
    from trl.experimental.gkd import GKDTrainer

    def loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        value = GKDTrainer.generalized_jsd_loss(
            student, teacher, beta=BETA[divergence], temperature=temperature
        )
        return value * temperature**2

    return loss


def _trl_chunked(divergence: str) -> Loss:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    def loss(
        student_hidden: Tensor,
        student_weight: Tensor,
        teacher_hidden: Tensor,
        teacher_weight: Tensor,
        temperature: float,
    ) -> Tensor:
        per_token, _ = ChunkedDivergenceFunction.apply(
            student_hidden,
            student_weight,
            None,
            teacher_hidden,
            teacher_weight,
            None,
            BETA[divergence],
            temperature,
        )
        return per_token.mean() * temperature**2

    return loss


def torchtune_losses() -> ModuleType:
    """Its file of losses alone: the package needs torchao and torchvision to be imported."""
    path = metadata.distribution("torchtune").locate_file("torchtune/modules/loss/kd_losses.py")
    spec = importlib.util.spec_from_file_location("torchtune_kd_losses", str(path))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _torchtune(divergence: str) -> Loss:
    losses = torchtune_losses()
    kinds = {
        "soft_cross_entropy": losses.ForwardKLWithChunkedOutputLoss,
        "reverse_kl": losses.ReverseKLWithChunkedOutputLoss,
    }
    chunked = kinds[divergence]()

    def loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        labels = student.new_zeros(1, len(student), dtype=torch.long)  # none ignored
        chunks = [
            _over(logits, temperature)[None].chunk(chunked.num_output_chunks, dim=1)
            for logits in (student, teacher)
        ]
        return chunked(*chunks, labels) * temperature**2

    return loss


def _fla(divergence: str) -> Loss:
    from fla.modules.fused_kl_div import FusedKLDivLoss

    kl = FusedKLDivLoss()

    def loss(
        student_hidden: Tensor,
        student_weight: Tensor,
        teacher_hidden: Tensor,
        teacher_weight: Tensor,
        temperature: float,
    ) -> Tensor:
        student, teacher = _over(student_hidden, temperature), _over(teacher_hidden, temperature)
        return kl(student, teacher, student_weight, teacher_weight) * temperature**2

    return loss


def _speculators(divergence: str) -> Loss:
    from speculators.losses import fused

    name = {
        "forward_kl": "fused_kl_div_loss",
        "reverse_kl": "fused_reverse_kl_div_loss",
        "jsd": "fused_js_div_loss",
        "tvd": "fused_tv_loss",
    }[divergence]
    per_token = getattr(fused, name)

    def loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        value = per_token(_over(student, temperature)[None], _over(teacher, temperature)[None])
        return value.mean() * temperature**2

    return loss


def _modelopt(divergence: str) -> Loss:
    from modelopt.torch.distill.losses import LogitsDistillationLoss

    def loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        # Its default, reduction="mean", divides by the vocabulary as well.
        return LogitsDistillationLoss(temperature, reduction="batchmean")(student, teacher)

    return loss


GKD = ("forward_kl", "reverse_kl", "jsd")

PEERS: dict[str, Peer] = {
    peer.name: peer
    for peer in (
        # Liger's take log-probabilities or probabilities: softmax, its backward and T² are the
        # user's. The fused one sums the weight's gradient over chunks in the weight's dtype.
        Peer("Liger JSD", "liger-kernel", "logits", GKD, _liger_jsd, triton=True),
        Peer("Liger KL", "liger-kernel", "logits", ("forward_kl",), _liger_kl, triton=True),
        Peer("Liger TVD", "liger-kernel", "logits", ("tvd",), _liger_tvd, triton=True),
        Peer(
            "Liger fused linear JSD", "liger-kernel", "linear", GKD, _liger_linear_jsd, triton=True
        ),
        # torch.compile of plain PyTorch in the inputs' dtype, no Triton; T² is the user's.
        Peer("Liger chunked JSD", "liger-kernel", "linear", GKD, _liger_chunked_jsd),
        # Plain PyTorch in the logits' dtype; T² is the user's.
        Peer("TRL dense", "trl", "logits", GKD, _trl_dense),
        # Triton on a GPU, plain PyTorch elsewhere; T² is the user's.
        Peer("TRL chunked", "trl", "linear", GKD, _trl_chunked),
        # ForwardKLLoss is the cross-entropy with the teacher: the gradient of forward KL, but not
        # its value; SymmetricKLLoss likewise. No temperature.
        Peer("torchtune", "torchtune", "logits", ("soft_cross_entropy", "reverse_kl"), _torchtune),
        # No temperature: hidden states are divided by it.
        Peer("fla", "fla-core", "linear", ("forward_kl",), _fla, triton=True),
        # No temperature: copies of both logits are divided by it.
        Peer("speculators", "speculators", "logits", (*GKD, "tvd"), _speculators, triton=True),
        # Plain PyTorch in the logits' dtype.
        Peer("ModelOpt", "nvidia-modelopt", "logits", ("forward_kl",), _modelopt),
    )
}
