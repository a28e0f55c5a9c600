"""benchmarks.training: its methods agree, and its search finds the largest batch that fits."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from benchmarks import training
from benchmarks.peers import PEERS, why_not

OURS = ("eager", "kd_loss", "kd_loss in place", "linear_kd_loss")


class Model(torch.nn.Module):
    """As a causal language model of transformers: a trunk, a head, hidden states and logits."""

    class Trunk(torch.nn.Embedding):
        def forward(self, ids):
            return SimpleNamespace(last_hidden_state=super().forward(ids))

    def __init__(self, vocab: int, hidden: int) -> None:
        super().__init__()
        self.model = self.Trunk(vocab, hidden)
        self.lm_head = torch.nn.Linear(hidden, vocab, bias=False)

    def forward(self, ids):
        return SimpleNamespace(logits=self.lm_head(self.model(ids).last_hidden_state))


@pytest.fixture
def run():
    torch.manual_seed(0)
    models = Model(50, 8), Model(50, 12)
    return training.Training(*models, temperature=2.0), torch.randint(50, (3, 7))


@pytest.mark.filterwarnings("ignore")  # of foreign packages, about each other's versions
@pytest.mark.parametrize("name", training.METHODS)
def test_a_method_agrees_with_eager(name, run):
    if name in PEERS and (reason := why_not(PEERS[name], torch.device("cpu"))):
        pytest.skip(f"{name}: {reason}")
    steps, ids = run
    found = steps.verify({name: training.METHODS[name]}, ids)[name]
    assert found["loss"] > 0
    assert found["gradient_difference"] < 1e-5


def test_a_method_that_disagrees_is_not_timed(run):
    steps, ids = run
    with pytest.raises(ArithmeticError, match="planted disagrees"):
        steps.verify({"planted": lambda *x: 1.01 * training.eager(*x)}, ids)


def test_a_step_trains(run):
    steps, ids = run
    before = steps.student.lm_head.weight.detach().clone()
    for name in OURS:
        steps.step(training.METHODS[name], ids)
    assert not torch.equal(before, steps.student.lm_head.weight)
    assert steps.student.lm_head.weight.grad is None
    assert steps.teacher.lm_head.weight.grad is None


@pytest.mark.parametrize("cost", [lambda b: 100 + 30 * b, lambda b: 100 + b * b, lambda b: 7])
def test_the_largest_batch_has_been_tried_and_so_has_the_next(cost):
    tried = []

    def peak(batch: int) -> int:
        tried.append(batch)
        return cost(batch)

    peaks = training.largest_batch(peak, 1000, most=64)
    assert len(tried) == len(set(tried)) < 12
    best = max(batch for batch, bytes_ in peaks.items() if bytes_ <= 1000)
    assert best == max(batch for batch in range(1, 65) if cost(batch) <= 1000)
    assert best == 64 or peaks[best + 1] > 1000
    assert training.largest_batch(lambda batch: 2000, 1000) == {1: 2000}


def test_times_peaks_and_table(run):
    steps, ids = run
    methods = {name: training.METHODS[name] for name in OURS}
    device = training.device_of("cpu")
    results = training.measure(steps, methods, ids, 2, 1, 2**40, device)
    assert all(r["largest_batch"] == 3 and r["ms"] > 0 for r in results.values())
    environment = {
        "cpu": "c",
        "threads": 2,
        "instruction_set": "avx2",
        "torch": "2",
        "date": "today",
        "commit": "abc",
        "command": "python",
    }
    settings = {"batch": 2, "seq_len": 7, "memory_gib": 1024.0, "most": 3}
    report = {"environment": environment, "settings": settings, "results": results}
    table = training.training_table(report | {"refused": {"TRL dense": "no trl"}}, "f.json")
    assert "| `linear_kd_loss` |" in table
    assert "3 or more" in table
    assert "Not run: TRL dense, no trl." in table
