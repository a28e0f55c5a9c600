"""What losses return on inputs that occur in practice and break textbook formulas.

Padded columns are -inf in one model or in both, vocabularies are padded to different widths, a
student starts as a copy of its teacher. Each answer is judged against the float64 definition:
columns that only one model has take no part.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from .pairs import Outcome, Pair, compare
from .peers import Loss

ROWS, VOCAB, PADDED = 16, 1000, 24
VOCABULARIES = 151936, 152064  # of small and large Qwen2.5 models, one tokenizer
#: Relative to what is exact, or to the norm of the teacher's probabilities where that is 0.
TOLERANCE = 1e-4
ZERO = 1e-12  # what float64 makes of it
TEMPERATURE = 1.0


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _logits() -> tuple[torch.Tensor, torch.Tensor]:
    generator = _generator()
    teacher = 2 * torch.randn(ROWS, VOCAB, generator=generator)
    return 0.6 * teacher + 1.2 * torch.randn(ROWS, VOCAB, generator=generator), teacher


def masked(*, student: bool, teacher: bool) -> Pair:
    """Logits whose last columns are -inf."""
    logits = _logits()
    for tensor, mask in zip(logits, (student, teacher), strict=True):
        if mask:
            tensor[:, -PADDED:] = -torch.inf
    return Pair(*logits)


def unequal(student_vocab: int, teacher_vocab: int) -> Pair:
    """Heads of different widths on one hidden state: the first columns are of the same tokens."""
    generator = _generator()
    hidden, widest = 8, max(student_vocab, teacher_vocab)
    states = torch.randn(ROWS, hidden, generator=generator)
    teacher = torch.randn(widest, hidden, generator=generator)
    student = 0.8 * teacher + 0.4 * torch.randn(widest, hidden, generator=generator)
    student, teacher = student[:student_vocab].contiguous(), teacher[:teacher_vocab].contiguous()
    heads = states, student, states, teacher
    return Pair(states @ student.t(), states @ teacher.t(), heads)


def identical() -> Pair:
    logits = _logits()[1].bfloat16()
    return Pair(logits, logits.clone())


CASES: dict[str, Callable[[], Pair]] = {
    "-inf in both": lambda: masked(student=True, teacher=True),
    "-inf in the teacher": lambda: masked(student=False, teacher=True),
    "-inf in the student": lambda: masked(student=True, teacher=False),
    "student 151936, teacher 152064": lambda: unequal(*VOCABULARIES),
    "student 152064, teacher 151936": lambda: unequal(*reversed(VOCABULARIES)),
    "identical, bfloat16": identical,
}


def verdict(got: Outcome, exact: Outcome, unit: float) -> str:
    """``right``, ``NaN`` or what is wrong; ``unit`` is the size of a gradient where it is 0."""
    if math.isnan(got.loss):
        return "NaN"
    if not math.isfinite(exact.loss):
        return "right" if got.loss == exact.loss else f"wrong: {got.loss:.4g}, not {exact.loss}"
    off = abs(got.loss - exact.loss)
    if abs(exact.loss) < ZERO:
        if off > TOLERANCE:
            return f"wrong: {got.loss:.2g}, not 0"
    elif off > TOLERANCE * abs(exact.loss):
        share = off / abs(exact.loss)
        there = f"{100 * share:.2g} % off" if share < 0.1 else f"not {exact.loss:.3g}"
        return f"wrong: {got.loss:.3g}, {there}"
    if not got.gradient.isfinite().all():
        return "NaN gradient"
    norm = float(exact.gradient.norm())
    off = float((got.gradient - exact.gradient).norm()) / (norm if norm > ZERO else unit)
    if off > TOLERANCE:
        return f"wrong: gradient {100 * off:.2g} % {'off' if norm > ZERO else 'instead of 0'}"
    return "right"


def judge(load: Callable[[str], Loss], level: str, pair: Pair, divergence: str) -> str:
    """The verdict on one loss, or what it raises."""
    try:
        got, exact = compare(load(divergence), level, pair, divergence, TEMPERATURE)
    except Exception as refusal:  # whatever foreign code raises
        return f"raises {type(refusal).__name__}"
    probabilities = pair.teacher.double().softmax(-1)
    return verdict(got, exact, float(probabilities.norm()) / len(probabilities))
