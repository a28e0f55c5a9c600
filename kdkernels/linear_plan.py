"""How the rows of a fused-linear call are split: a pure function of sizes."""

from __future__ import annotations

from typing import NamedTuple

#: With fewer rows matrix products are slow, as each reads the whole weight.
_ROWS_WORTH_A_PRODUCT = 128

#: The default of ``chunk_bytes`` on a GPU, and its limit on a CPU.
_CHUNK_BYTES = 2**30


class Plan(NamedTuple):
    """How rows are split. Weight gradients are taken once a chunk, all else once a block."""

    chunk: int  # rows of the student's logits held at a time
    block: int  # rows of the teacher's
    lend: bool  # the teacher's logits lie in the weight gradient, which is not there yet

    def spans(self, rows: int) -> list[tuple[int, int]]:
        """(first row, last row + 1) of each block."""
        step = max(1, self.block)
        return [(begin, min(begin + step, rows)) for begin in range(0, rows, step)]


def plan(
    rows: int,
    student_row: int,
    teacher_row: int,
    weight_gradient: int,
    accumulator: int,
    chunk_bytes: int,
    device_type: str,
) -> Plan:
    """Splits rows, from sizes alone.

    Args:
        rows: in all.
        student_row: bytes of a row of the student's logits.
        teacher_row: the same for the teacher's, 0 where they take no memory here.
        weight_gradient: bytes of the largest one, 0 where none is needed.
        accumulator: bytes of float32 memory that more than one chunk takes for them.
        chunk_bytes: what both models' logits may take, 0 for the default: on a GPU 1 GiB, on a CPU
            a quarter of all their logits, but at least 128 rows and at most 1 GiB.
        device_type: such as "cpu".
    """
    row = max(1, student_row + teacher_row)
    if not chunk_bytes:
        chunk_bytes = _CHUNK_BYTES
        if device_type == "cpu":
            chunk_bytes = min(chunk_bytes, max(rows // 4, _ROWS_WORTH_A_PRODUCT) * row)
    most = max(1, chunk_bytes // row)
    if most >= rows:
        return Plan(rows, rows, False)
    # One chunk needs no accumulator, which makes it the better use of the same memory.
    lent = weight_gradient // teacher_row if teacher_row else rows
    one_chunk = weight_gradient and rows * student_row <= chunk_bytes + accumulator
    if one_chunk and lent >= min(rows, _ROWS_WORTH_A_PRODUCT):
        return Plan(rows, _even(rows, lent), teacher_row > 0)
    block = _even(rows, most)
    return Plan(block, block, False)


def _even(rows: int, most: int) -> int:
    """The size of parts of about equal size, as few as possible, of at most ``most`` rows."""
    size = -(-rows // -(-rows // most))
    rounded = -(-size // 64) * 64
    return min(rows, rounded if rounded <= most else size)
