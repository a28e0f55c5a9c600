"""Benchmarks' peers compute what kdkernels computes.

Peers are no requirement of the tests: `benchmarks/requirements-peers.txt` says how to install them.
"""

from __future__ import annotations

import pytest
import torch

from benchmarks.numerics import NOT_INTERPRETED
from benchmarks.peers import PEERS, Peer, why_not
from kdkernels import kd_loss
from kdkernels.divergences import DIVERGENCES

from . import interpreter

CASES = [(peer, name) for peer in PEERS.values() for name in peer.divergences]

#: float32 throughout, in the textbook form.
RTOL = 1e-5


def load(peer: Peer, divergence: str):
    """The peer's loss, its Triton kernels interpreted where there is no GPU."""
    if peer.triton and interpreter.DEVICE == "cpu":
        if not interpreter.INSTALLED:
            pytest.skip(f"{peer.name}: Triton is not installed")
        if peer.name in NOT_INTERPRETED:
            pytest.skip(f"{peer.name}: Triton's interpreter cannot run its kernels")
    device = torch.device("cuda" if peer.triton else "cpu")
    if reason := why_not(peer, device):
        pytest.skip(f"{peer.name}: {reason}")
    return peer.load(divergence)


@pytest.mark.filterwarnings("ignore")  # of foreign packages, about each other's versions
@pytest.mark.parametrize(("peer", "divergence"), CASES, ids=lambda x: getattr(x, "name", x))
def test_a_peer_agrees_with_the_oracle(peer, divergence):
    loss = load(peer, divergence)
    device = interpreter.DEVICE if peer.triton else "cpu"
    generator = torch.Generator().manual_seed(0)
    rows, vocab, temperature = 5, 301, 2.0

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    if peer.level == "logits":
        inputs, leaves = [normal(rows, vocab), 2 * normal(rows, vocab)], 1
    else:  # different hidden sizes
        inputs = [normal(rows, 16), normal(vocab, 16), normal(rows, 24), normal(vocab, 24) / 3]
        leaves = 2

    def run(function, tensors):
        for leaf in tensors[:leaves]:
            leaf.requires_grad_()
        result = function(*tensors)
        result.backward()
        return result.detach(), *(leaf.grad for leaf in tensors[:leaves])

    def exact(*tensors):
        if peer.level == "linear":
            tensors = tensors[0] @ tensors[1].t(), tensors[2] @ tensors[3].t()
        return kd_loss(
            *tensors, divergence=divergence, temperature=temperature, backend="reference"
        )

    with torch.compiler.set_stance("force_eager"):  # the adapter is tested, not the compiler
        got = run(lambda *x: loss(*x, temperature), [x.clone().to(device) for x in inputs])
    assert got[0].ndim == 0
    for actual, expected in zip(got, run(exact, [x.double() for x in inputs]), strict=True):
        error = (actual.cpu().double() - expected).norm() / expected.norm()
        assert error < RTOL, f"{peer.name} {divergence} is off by {float(error):.1e}"


def test_the_table_names_what_exists():
    assert all(set(peer.divergences) <= set(DIVERGENCES) for peer in PEERS.values())
    assert {peer.level for peer in PEERS.values()} == {"logits", "linear"}


def test_why_not_says_what_is_missing():
    def load(divergence):
        raise ImportError("No module named 'something_it_needs'")

    def peer(package: str, triton: bool = False) -> Peer:
        return Peer("x", package, "logits", ("forward_kl",), load, triton)

    cpu = torch.device("cpu")
    assert why_not(peer("kd-no-such-package"), cpu) == "kd-no-such-package is not installed"
    assert "something_it_needs" in why_not(peer("torch"), cpu)
    assert "GPU" in why_not(peer("torch", triton=True), cpu)
    present = Peer("x", "torch", "logits", ("forward_kl",), lambda divergence: torch.add)
    assert why_not(present, cpu) is None
