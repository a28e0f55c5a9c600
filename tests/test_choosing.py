"""What docs/choosing.md says, its code and that of README.md, docs/linear.md, docs/sparse.md."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdkernels import (
    JSD,
    AlphaBeta,
    ReverseKL,
    SkewForwardKL,
    SkewReverseKL,
    SymmetricKL,
    kd_loss,
    sparse_kd_loss,
)

from .cases import normal

ROOT = Path(__file__).parent.parent
ROWS, VOCAB = (2, 7), 97
STUDENT, TEACHER = normal(*ROWS, VOCAB, seed=0), normal(*ROWS, VOCAB, seed=1)
LABELS = torch.arange(14).view(ROWS).index_fill(1, torch.tensor([0, 1]), -100)


def blocks(page: str, heading: str = "") -> list[str]:
    """The Python code of a page, or of one section."""
    text = (ROOT / page).read_text(encoding="utf-8")
    if heading:
        text = text.split(f"## {heading}\n")[1].split("\n## ")[0]
    return re.findall(r"```python\n(.*?)```", text, re.S)


def run(code: str, page: str, names: dict[str, Any]) -> Any:
    exec(compile(code, page, "exec"), names)
    return names.get("loss")


def kl(p: Tensor, log_q: Tensor) -> Tensor:
    return (p * (p.log() - log_q)).sum(-1).mean()


class Model(nn.Module):
    def __init__(self, hidden: int):
        super().__init__()
        self.embeddings = nn.Embedding(VOCAB, hidden)
        self.lm_head = nn.Linear(hidden, VOCAB, bias=False)

    def model(self, ids):
        return SimpleNamespace(last_hidden_state=self.embeddings(ids))


def test_readme_before_and_after():
    before, after = blocks("README.md")[0].split("# after")
    names = {"F": F, "T": 2.0, "labels": LABELS, "mask": LABELS[:, 1:] != -100}
    names |= {"student_logits": STUDENT, "teacher_logits": TEACHER}
    expected = run(before, "README.md", names)
    torch.testing.assert_close(run("#" + after, "README.md", names), expected)


def test_readme_and_linear_page():
    torch.manual_seed(0)
    student, teacher, ids = Model(16), Model(24), LABELS.clamp_min(0)
    names = {"student": student, "teacher": teacher, "ids": ids, "labels": LABELS, "T": 2.0}
    names |= {"num_items_in_batch": torch.tensor(10), "teacher_logits": TEACHER}
    names |= {"student_logits": STUDENT, "student_hidden": student.embeddings(ids)}
    names["teacher_hidden"] = teacher.embeddings(ids).detach()
    code, shards = blocks("README.md")[1].split("loss = kd_loss(student_shard")
    assert "group=" in shards  # docs/parallel.md has it in full, and tests
    assert run(code, "README.md", names) > 0
    assert names["metrics"]["agreement"].shape == ROWS
    assert run(blocks("docs/linear.md")[0], "docs/linear.md", names) > 0
    assert student.lm_head.weight.grad is not None


@pytest.mark.parametrize(
    ("divergence", "share"),
    [
        (ReverseKL(), 1),
        (SymmetricKL(0.3), 1),
        (JSD(), 1 / 4),
        (JSD(0.1), 0.1 * 0.9),
        (SkewForwardKL(0.1), 0.9**2),
        (SkewReverseKL(0.2), 0.8**2),
        (AlphaBeta(0.3, 0.7), 1),
    ],
)
def test_divergences_near_the_teacher(divergence, share):
    teacher = TEACHER.double()
    student = teacher + 1e-4 * STUDENT
    ratio = kd_loss(student, teacher, divergence=divergence) / kd_loss(student, teacher)
    assert ratio == pytest.approx(share, rel=1e-3)


def test_recipes():
    names: dict[str, Any] = {}
    for block in blocks("docs/choosing.md"):
        run(block, "docs/choosing.md", names)
    of_student, of_teacher = 2.0, 0.7
    log_q, p = (STUDENT / of_student).log_softmax(-1), (TEACHER / of_teacher).softmax(-1)
    actual = names["two_temperatures"](STUDENT, TEACHER, of_student, of_teacher)
    torch.testing.assert_close(actual, kl(p, log_q) * of_student**2)
    teachers = TEACHER, TEACHER.flip(-1), STUDENT.flip(-1)
    p = torch.stack([(logits / of_student).softmax(-1) for logits in teachers]).mean(0)
    actual = names["several_teachers"](STUDENT, teachers, of_student)
    torch.testing.assert_close(actual, kl(p, log_q) * of_student**2)
    for step, divergence in ((0, "forward_kl"), (1, "jsd"), (2, "reverse_kl")):
        expected = kd_loss(STUDENT, TEACHER, divergence=divergence)
        assert names["scheduled"](STUDENT, TEACHER, step, 2) == expected


@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides")
def test_names_elsewhere():
    log_q, log_p = STUDENT.log_softmax(-1), TEACHER.log_softmax(-1)
    for reduction, options in (
        ("batchmean", {"normalizer": ROWS[0]}),
        ("mean", {"kd_weight": 1 / VOCAB}),
        ("sum", {"reduction": "sum"}),
    ):
        expected = F.kl_div(log_q, log_p, log_target=True, reduction=reduction)
        torch.testing.assert_close(kd_loss(STUDENT, TEACHER, **options), expected)
    mask = (LABELS != -100).long()
    masked = kd_loss(STUDENT[:, :-1], TEACHER[:, :-1], token_weight=mask[:, 1:].bool())
    assert masked == kd_loss(STUDENT[:, :-1], TEACHER[:, :-1], labels=LABELS[:, 1:])


def test_what_looks_wrong():
    torch.testing.assert_close(
        kd_loss(STUDENT, TEACHER.softmax(-1).log()), kd_loss(STUDENT, TEACHER)
    )
    for backend in ("cpu", "reference"):
        options = {"labels": LABELS, "return_metrics": True, "backend": backend}
        for name, metric in kd_loss(STUDENT, TEACHER, **options)[1].items():
            assert (metric[LABELS == -100] == 0).all(), name
    nothing = torch.full_like(LABELS, -100)
    assert kd_loss(STUDENT, TEACHER, labels=nothing, normalizer=torch.tensor(0)).isnan()


def test_from_a_server():
    """What a server returns of a prompt: the top k of every position, and the token itself."""
    names: dict[str, Any] = {}
    for block in blocks("docs/sparse.md", "From a server"):
        run(block, "docs/sparse.md", names)
    student, teacher, labels, k = STUDENT[1], TEACHER[1], LABELS[1], 5
    log_p = teacher.log_softmax(-1)
    returned: list[dict[int, SimpleNamespace] | None] = [None]
    for row, label in zip(log_p[:-1], labels[1:], strict=True):
        listed = [label.clamp_min(0), *row.topk(k).indices]
        returned.append({int(i): SimpleNamespace(logprob=float(row[i])) for i in listed})
    indices, logprobs = names["from_prompt_logprobs"](returned, k)
    top = log_p[:-1].topk(k)
    assert torch.equal(indices, top.indices)
    assert torch.equal(logprobs, top.values)
    indices, logprobs = names["from_prompt_logprobs"](returned, k + 3)  # fewer are listed
    assert (indices == -1).any(-1).all()
    assert sparse_kd_loss(student[:-1], indices, logprobs) > 0

    temperature = 2.0
    actual = names["at_another_temperature"](student[:-1], *top[::-1], temperature)
    log_p = (teacher / temperature).log_softmax(-1)[:-1].gather(-1, top.indices)
    options = {"temperature": temperature, "tail": "renormalize"}
    expected = sparse_kd_loss(student[:-1], top.indices, log_p, **options)
    torch.testing.assert_close(actual, expected)
