"""What docs/choosing.md says, its code and that of README.md, docs/linear.md, docs/sparse.md."""

from __future__ import annotations

import re
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
    linear_kd_loss,
    sparse_kd_loss,
)

from .cases import normal
from .documents import blocks, defined, run, text_of

ROWS, VOCAB = (2, 7), 97
STUDENT, TEACHER = normal(*ROWS, VOCAB, seed=0), normal(*ROWS, VOCAB, seed=1)
LABELS = torch.arange(14).view(ROWS).index_fill(1, torch.tensor([0, 1]), -100)


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
    (block,) = (block for block in blocks("README.md") if "# after" in block)
    before, after = block.split("# after")
    names = {"F": F, "T": 2.0, "labels": LABELS, "mask": LABELS[:, 1:] != -100}
    names |= {"student_logits": STUDENT, "teacher_logits": TEACHER, "kd_loss": kd_loss}
    expected = run(before, "README.md", names)
    torch.testing.assert_close(run("#" + after, "README.md", names), expected)


def test_readme_and_linear_page():
    torch.manual_seed(0)
    student, teacher, ids = Model(16), Model(24), LABELS.clamp_min(0)
    names = {"student": student, "teacher": teacher, "ids": ids, "labels": LABELS, "T": 2.0}
    names |= {"num_items_in_batch": torch.tensor(10), "teacher_logits": TEACHER}
    names |= {"student_logits": STUDENT, "student_hidden": student.embeddings(ids)}
    names["teacher_hidden"] = teacher.embeddings(ids).detach()
    first, *_, block = blocks("README.md")
    assert run(first, "README.md", {}) > 0
    code, shards = block.split("loss = kd_loss(student_shard")
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
    names = defined("docs/choosing.md")
    of_student, of_teacher = 2.0, 0.7
    log_q, p = (STUDENT / of_student).log_softmax(-1), (TEACHER / of_teacher).softmax(-1)
    actual = names["two_temperatures"](STUDENT, TEACHER, of_student, of_teacher)
    torch.testing.assert_close(actual, kl(p, log_q) * of_student**2)
    teachers = TEACHER, TEACHER.flip(-1), STUDENT.flip(-1)
    p = torch.stack([(logits / of_student).softmax(-1) for logits in teachers]).mean(0)
    actual = names["several_teachers"](STUDENT, teachers, of_student)
    torch.testing.assert_close(actual, kl(p, log_q) * of_student**2)
    for step, divergence in ((0, "forward_kl"), (1, "symmetric_kl"), (2, "reverse_kl")):
        expected = kd_loss(STUDENT, TEACHER, divergence=divergence)
        assert names["scheduled"](STUDENT, TEACHER, step, 2) == expected


def test_teachers_in_bfloat16():
    """Their log-probabilities are taken in float32."""
    teacher, temperature = TEACHER.bfloat16(), 2.0
    exact = (teacher.double() / temperature).log_softmax(-1)
    for page in ("README.md", "docs/sparse.md"):
        (line,) = re.findall("^logprobs, indices = .*$", text_of(page), re.MULTILINE)
        names = {"teacher_logits": teacher, "T": temperature}
        run(line.replace("64", "8"), page, names)
        torch.testing.assert_close(names["logprobs"].double(), exact.topk(8).values)
    several_teachers = recipes("Several teachers, several divergences")["several_teachers"]
    assert several_teachers(teacher, [teacher, teacher], temperature) < 1e-6


def recipes(heading: str) -> dict[str, Any]:
    return defined("docs/choosing.md", heading, kd_loss=kd_loss)


def same_gradients(actual: Tensor, expected: Tensor, *inputs: Tensor, **tolerance: float) -> None:
    """Of two losses of the same inputs, the second in float64."""
    torch.testing.assert_close(
        actual.double(), expected, **(tolerance or {"rtol": 1e-6, "atol": 1e-7})
    )
    gradients = torch.autograd.grad(expected, inputs, retain_graph=True)
    for a, b in zip(torch.autograd.grad(actual, inputs), gradients, strict=True):
        torch.testing.assert_close(a, b, **(tolerance or {"rtol": 1e-5, "atol": 1e-7}))


def test_dino():
    student, center = STUDENT.clone().requires_grad_(), TEACHER.mean((0, 1))
    log_q = (student.double() / 0.1).log_softmax(-1)
    p = ((TEACHER - center).double() / 0.04).softmax(-1)
    expected = -(p * log_q).sum(-1).mean()
    dino = recipes("Temperature")["dino"]
    same_gradients(dino(student, TEACHER, center), expected, student)
    options = {"divergence": "soft_cross_entropy", "temperature_squared": False, "temperature": 0.1}
    sinkhorn = kd_loss(student, 0.1 * p.log().float(), **options)
    same_gradients(sinkhorn, expected, student, rtol=1e-5, atol=1e-6)
    tensors = student, torch.eye(VOCAB), TEACHER, torch.eye(VOCAB)
    bias = {"teacher_bias": -center, "teacher_scale": 0.1 / 0.04}
    same_gradients(linear_kd_loss(*tensors, **options, **bias), expected, student)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_images(layout):
    student = normal(2, 19, 4, 5, seed=0).to(memory_format=layout).requires_grad_()
    teacher = normal(2, 19, 4, 5, seed=1).to(memory_format=layout)
    labels = torch.arange(40).view(2, 4, 5) % 19
    labels[:, 1] = 255
    log_q, log_p = student.double().log_softmax(1), teacher.double().log_softmax(1)
    pixels = F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(1)
    of_pixels = recipes("Images and speech")["of_pixels"]
    expected = pixels[labels != 255].mean()
    same_gradients(of_pixels(student, teacher, labels), expected, student)
    copied = student.movedim(1, -1).contiguous().data_ptr() != student.data_ptr()
    assert copied == (layout == torch.contiguous_format)


def test_frames():
    lengths = torch.tensor([7, 3])
    padding = torch.arange(7) >= lengths.unsqueeze(-1)
    student, teacher = STUDENT.clone(), TEACHER.clone()
    student[padding] = teacher[padding] = float("nan")
    student.requires_grad_()
    p, log_q = (x.double()[~padding].log_softmax(-1) for x in (teacher, student))
    expected = kl(p.exp(), log_q)
    actual = recipes("Images and speech")["of_frames"](student, teacher, lengths)
    same_gradients(actual, expected, student)
    student, teacher = (x.transpose(0, 1).log_softmax(-1) for x in (student, teacher))
    time_first = kd_loss(student, teacher, token_weight=~padding.T)
    torch.testing.assert_close(time_first, actual)


def test_decoupled():
    labels, temperature = LABELS.clamp(min=0), 4.0
    student = STUDENT.clone().requires_grad_()
    is_label = F.one_hot(labels, VOCAB).bool()
    p, q = ((x.double() / temperature).softmax(-1) for x in (TEACHER, student))
    two_p, two_q = (torch.stack([x[is_label], 1 - x[is_label]], -1) for x in (p, q))
    others_p, others_q = (
        x[~is_label].view(-1, VOCAB - 1) / (1 - x[is_label]).unsqueeze(-1) for x in (p, q)
    )
    expected = kl(two_p, two_q.log()) + 8 * kl(others_p, others_q.log())
    actual = recipes("Images and speech")["decoupled"](student, TEACHER, labels)
    same_gradients(actual, temperature**2 * expected, student)


def test_standardized():
    standardized = recipes("Images and speech")["standardized"]
    torch.testing.assert_close(standardized(STUDENT * 3 + 5), standardized(STUDENT))
    assert kd_loss(standardized(STUDENT * 3 + 5), standardized(STUDENT)) < 1e-10


def test_draft_heads():
    names, hidden, teacher_hidden = recipes("Draft heads"), normal(*ROWS, 8), normal(*ROWS, 12)
    teacher_head, distances = normal(VOCAB, 12, seed=2), torch.arange(20) * 3 + 5
    ids = torch.arange(20) + distances
    draft_head = normal(20, 8, seed=3).requires_grad_()
    hidden.requires_grad_()
    teacher_logits = teacher_hidden @ teacher_head.T
    log_q = (hidden.double() @ draft_head.double().T).log_softmax(-1)
    log_p = (teacher_hidden.double() @ teacher_head[ids].double().T).log_softmax(-1)
    known = torch.isin(teacher_logits.argmax(-1), ids)
    assert 0 < known.sum() < known.numel()
    rows = (log_p.exp() * (log_p - log_q)).sum(-1)
    expected = rows[known].mean()
    tensors = hidden, draft_head, teacher_hidden, teacher_head[ids]
    actual = names["draft_loss"](*tensors, token_weight=known)
    same_gradients(actual, expected, hidden, draft_head, rtol=1e-4, atol=1e-5)
    draft_logits = (hidden @ draft_head.T).detach()
    gathered = kd_loss(draft_logits, teacher_logits[..., ids], token_weight=known)
    torch.testing.assert_close(gathered, actual.detach())

    logprobs, indices = teacher_logits.log_softmax(-1).topk(VOCAB)
    indices[0, 0] = -1  # nothing is left of this row, which counts as 0
    for listed in (indices, indices.int()):
        actual = names["draft_loss_of_lists"](draft_logits, listed, logprobs, ids, VOCAB)
        expected = (rows.sum() - rows[0, 0]) / rows.numel()
        torch.testing.assert_close(actual.double(), expected.detach(), rtol=1e-5, atol=1e-6)


def test_medusa():
    hiddens = [normal(*ROWS, 8, seed=i).requires_grad_() for i in (0, 1)]
    heads = [normal(VOCAB, 8, seed=i).requires_grad_() for i in (2, 3)]
    teacher_hidden, teacher_head = normal(*ROWS, 12, seed=4), normal(VOCAB, 12, seed=5)
    p = (teacher_hidden.double() @ teacher_head.double().T).softmax(-1)
    log_q = [
        (h.double() @ w.double().T).log_softmax(-1) for h, w in zip(hiddens, heads, strict=True)
    ]
    expected = 0.8 * kl(p[:, 1:], log_q[0][:, :-1]) + 0.64 * kl(p[:, 2:], log_q[1][:, :-2])
    actual = recipes("Draft heads")["medusa_loss"](hiddens, heads, teacher_hidden, teacher_head)
    same_gradients(actual, expected, *hiddens, *heads, rtol=1e-4, atol=1e-5)


def test_on_policy():
    names, student = recipes("On text that the student samples"), STUDENT.clone().requires_grad_()
    completion, ids = torch.arange(14).view(ROWS) % 7 > 2, LABELS.clamp_min(0)
    log_q, log_p = (
        student.double()[:, :-1].log_softmax(-1),
        TEACHER.double()[:, :-1].log_softmax(-1),
    )
    tokens = (log_q.exp() * (log_q - log_p)).sum(-1) * completion[:, 1:]
    expected = tokens.sum() / completion[:, 1:].sum()
    actual = names["on_policy_loss"](student, TEACHER, completion)
    same_gradients(actual, expected, student)
    actual = names["reward"](student, TEACHER, completion)
    torch.testing.assert_close(actual.double(), F.pad(-tokens.detach(), (0, 1)))
    assert not actual.requires_grad
    expected = F.pad(log_q.gather(-1, ids[:, 1:, None]).squeeze(-1), (0, 1))
    actual = names["log_q"](student, ids)
    torch.testing.assert_close(actual.double(), expected)
    weight = torch.rand(actual.shape, dtype=torch.float64)
    same_gradients((actual * weight.float()).sum(), (expected * weight).sum(), student)


def test_drop_does_not_see_what_the_student_says_elsewhere():
    teacher = TEACHER.log_softmax(-1)
    logprobs, indices = teacher.topk(5)
    student = TEACHER.scatter(-1, indices, -10.0)  # all but what the teacher lists
    options = {"divergence": "reverse_kl"}
    assert sparse_kd_loss(student, indices, logprobs, tail="drop", **options).abs() < 1e-3
    assert sparse_kd_loss(student, indices, logprobs, **options) > 0.1


def test_next_to_the_teacher():
    hidden, weight = normal(64, 64, seed=0).bfloat16(), normal(2000, 64, seed=1).bfloat16() / 5
    quantised = ((weight * 64).round() / 64).bfloat16()
    log_p, log_q = (
        (hidden.double() @ head.double().T).log_softmax(-1) for head in (weight, quantised)
    )
    exact = kl(log_p.exp(), log_q)
    assert 1e-4 < exact < 1e-2
    of_quantised_head = recipes("Next to the teacher")["of_quantised_head"]
    calls = hidden, weight, hidden, weight, lambda _: quantised
    assert of_quantised_head(*calls) == pytest.approx(exact.item(), rel=1e-4)
    student, teacher = hidden @ quantised.T, hidden @ weight.T
    of_logits = kl(teacher.double().softmax(-1), student.double().log_softmax(-1))
    assert kd_loss(student, teacher) == pytest.approx(of_logits.item(), rel=1e-6)
    assert 2e-5 < of_logits - exact < 5e-4
    log_q, log_p = student.log_softmax(-1), teacher.log_softmax(-1)
    eager = F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")
    assert 0.05 < (eager.double() / of_logits - 1).abs() < 0.8


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
    names = defined("docs/sparse.md", "From a server")
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
