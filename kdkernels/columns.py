"""Which columns of the vocabulary take part, and which of them this process holds."""

from __future__ import annotations

from typing import NamedTuple

from . import scalars
from .scalars import Processes


class Columns(NamedTuple):
    """The columns of the vocabulary that a process holds; fields of LogitsOptions."""

    vocab: int
    group: str
    rank: int
    processes: int
    vocab_start: int
    vocab_size: int


def columns_of(
    processes: Processes | None,
    vocab_start: int | None,
    vocab_size: int | None,
    student: int,
    teacher: int,
) -> Columns:
    """The columns that take part, for a student and a teacher of these widths."""
    if vocab_start is not None:
        vocab_start = scalars.option("vocab_start", vocab_start)
        if processes is None:
            raise ValueError(f"vocab_start is {vocab_start}, which needs group, and group is None")
        if vocab_size is None:
            raise ValueError(
                f"vocab_start is {vocab_start}, which needs vocab_size, and vocab_size is None"
            )
    if processes is None or processes.size == 1:
        if vocab_start:
            raise ValueError(f"vocab_start is {vocab_start}, expected 0 in a group of one process")
        vocab = _vocab_size(vocab_size, student, teacher)
        return Columns(vocab, "", 0, 1, 0, vocab)
    name, rank, size = processes
    if vocab_start is None:
        if student != teacher:
            raise ValueError(
                f"the shards of the logits have {student} (student) and {teacher} (teacher) "
                "columns, expected as many, or vocab_start and vocab_size to say where they start"
            )
        vocab_start = rank * student
        vocab_size = _vocab_size(vocab_size, size * student, size * teacher)
    assert vocab_size is not None
    whole = scalars.integer("vocab_size", vocab_size, positive=True)
    start = min(vocab_start, whole)  # or there is only padding here
    return Columns(min(student, teacher, whole - start), name, rank, size, start, whole)


def _vocab_size(vocab_size: int | None, student: int, teacher: int) -> int:
    smaller = min(student, teacher)
    if smaller == 0:
        raise ValueError(
            f"student_logits and teacher_logits have {student} and {teacher} columns, expected a "
            "vocabulary of at least 1"
        )
    if vocab_size is None:
        return smaller
    vocab_size = scalars.integer("vocab_size", vocab_size)
    if not 1 <= vocab_size <= smaller:
        raise ValueError(
            f"vocab_size is {vocab_size}, expected 1 to {smaller}: the logits have {student} "
            f"(student) and {teacher} (teacher) columns"
        )
    return vocab_size
