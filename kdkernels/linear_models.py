"""The two models of a fused-linear call, and the rows that take part in it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import collectives, gemm, payload
from .backends.row_plan import row_plan
from .linear_checks import check_positions
from .linear_plan import Plan, plan
from .memory import empty
from .options import LinearOptions, LogitsOptions


class SomeRows:
    """Some rows of a flattened leading shape, by an index, or all of them."""

    def __init__(self, lead: torch.Size, index: Tensor | None):
        self.lead, self.index = lead, index
        self.count = lead.numel() if index is None else index.numel()

    def everywhere(self, values: Tensor, dim: int = 0) -> Tensor:
        """Values of these rows, in the leading shape in place of ``dim``; zeros elsewhere."""
        before, after = values.shape[:dim], values.shape[dim + 1 :]
        if self.index is not None:
            zeros = values.new_zeros([*before, self.lead.numel(), *after])
            values = zeros.index_copy_(dim, self.index, values)
        return values.reshape([*before, *self.lead, *after])  # a list, which may be empty


class Rows(SomeRows):
    """The rows that take part, their labels and weights, and the normalizer of their sum.

    On a CPU, rows of weight 0 are dropped here, before any product. On a GPU finding them would
    wait for the device; there only ``row_index`` drops rows.
    """

    def __init__(
        self,
        lead: torch.Size,
        device: torch.device,
        labels: Tensor | None,
        token_weight: Tensor | None,
        normalizer: Tensor | None,
        row_index: Tensor | None,
        o: LogitsOptions,
    ):
        if row_index is not None:  # here, as a compiled call has no values before
            check_positions(row_index, lead.numel())
        super().__init__(lead, None if row_index is None else payload.to_device(row_index, device))
        self.host_index = row_index
        self.labels = self._pick(labels, self.index)
        self.token_weight = self._pick(token_weight, self.index)

        per_row = self.labels, self.token_weight
        weight, total, divisor = row_plan(*per_row, normalizer, o, self.count, torch.float64)
        if total is None and o.reduction == "mean":
            total = torch.full((), divisor, dtype=torch.float64, device=device)
        self.normalizer = None if total is None else total.to(torch.float32)
        if device.type == "cpu" and weight is not None:
            if self.labels is not None:
                self._check_labels(self.labels, weight, o)
            if not bool(weight.all()):
                self._drop(weight.nonzero().squeeze(1))

    @staticmethod
    def _pick(values: Tensor | None, index: Tensor | None) -> Tensor | None:
        if values is None:
            return None
        values = values.reshape(-1)  # a view with strides where there is one
        return values.contiguous() if index is None else values[index]

    def _check_labels(self, labels: Tensor, weight: Tensor, o: LogitsOptions) -> None:
        outside = (weight != 0) & ((labels < 0) | (labels >= o.vocab_size))
        if bool(outside.any()):
            row = int(outside.nonzero()[0])
            place = row if self.index is None else int(self.index[row])
            raise ValueError(
                f"labels: row {place} holds {int(labels[row])}, expected 0 to {o.vocab_size - 1} "
                f"or ignore_index ({o.ignore_index})"
            )

    def _drop(self, kept: Tensor) -> None:
        """Drops all rows but these."""
        self.index = self.host_index = kept if self.index is None else self.index[kept]
        self.count = kept.numel()
        self.labels = self._pick(self.labels, kept)
        self.token_weight = self._pick(self.token_weight, kept)

    def index_of(self, tensor: Tensor) -> Tensor | None:
        """The index on the tensor's device."""
        return self.host_index if tensor.device.type == "cpu" else self.index

    def per_token(self, begin: int, end: int) -> tuple[Tensor | None, Tensor | None]:
        """Labels and token weights of a block."""
        labels = None if self.labels is None else self.labels[begin:end]
        return labels, None if self.token_weight is None else self.token_weight[begin:end]


class TeacherLogits:
    """A teacher whose logits were given."""

    def __init__(self, logits: Tensor, rows: Rows, device: torch.device, options: LinearOptions):
        self.logits, self.index, self.device = logits, rows.index_of(logits), device
        self.dtype = options.teacher_dtype

    def row_bytes(self, width: int | None = None) -> int:
        """Memory that one row of a block takes, at its own width or the one given."""
        width = width or self.logits.shape[-1]
        size = width * self.logits.dtype.itemsize
        cast = 0 if self.logits.dtype == self.dtype else width * self.dtype.itemsize
        if self.logits.device != self.device:
            return 2 * size + cast  # one block in use, one on its way
        return cast if self.index is None else size + cast

    def blocks(self, spans: Sequence[payload.Span], memory: Tensor | None) -> Iterator[Tensor]:
        """(rows, vocab) logits of each span; ``memory`` is not needed."""
        for logits in payload.blocks(self.logits, self.index, spans, self.device):
            yield logits.to(self.dtype)


class TeacherHead:
    """A teacher of hidden states and a head."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        rows: Rows,
        options: LinearOptions,
    ):
        self.hidden, self.index, self.dtype = hidden, rows.index_of(hidden), options.teacher_dtype
        self.logits_dtype = torch.float32 if options.float32_logits else self.dtype
        self.weight = weight.to(self.dtype)  # (vocab, hidden)
        self.bias = None if bias is None else bias.to(self.dtype)

    def row_bytes(self, width: int | None = None) -> int:
        """Memory that one row of a block takes, at its own width or the one given."""
        return (width or self.weight.shape[0]) * self.logits_dtype.itemsize

    def blocks(self, spans: Sequence[payload.Span], memory: Tensor | None) -> Iterator[Tensor]:
        """(rows, vocab) logits of each span, written into ``memory`` (uint8) if given."""
        vocab, most = self.weight.shape[0], max((end - begin for begin, end in spans), default=0)
        if memory is None:
            buffer = empty((most, vocab), dtype=self.logits_dtype, device=self.weight.device)
        else:
            memory = memory[: most * self.row_bytes()]
            buffer = memory.view(self.logits_dtype).view(most, vocab)
        for hidden in payload.blocks(self.hidden, self.index, spans, self.weight.device):
            out = buffer[: hidden.shape[0]]
            gemm.write_logits(out, hidden.to(self.dtype), self.weight, self.bias, accumulate=False)
            yield out


def gradient_dtypes(
    product: torch.dtype, weight: Sequence[Tensor]
) -> tuple[torch.dtype, list[torch.dtype]]:
    """Dtypes of hidden and weight gradients: float32 for float16, scaled before rounded."""
    if product == torch.float16:
        return torch.float32, [torch.float32] * len(weight)
    return product, [w.dtype for w in weight]


@dataclass
class _Product:
    """A term hidden @ weight.T of the student's logits, and its gradients where they are needed."""

    hidden: Tensor  # (rows, hidden)
    weight: Tensor  # (vocab, hidden)
    weight_dtype: torch.dtype  # of its gradient
    needs_hidden: bool
    needs_weight: bool
    hidden_gradient: Tensor | None = None
    weight_gradient: Tensor | None = None


class StudentHead:
    """The student's logits, a chunk of rows at a time, and the gradients of what they are made of.

    The logits are a sum of products, one for a plain head; a low-rank adapter adds another.
    """

    def __init__(
        self,
        hidden: list[Tensor],
        weight: list[Tensor],
        bias: Tensor | None,
        rows: SomeRows,
        options: LinearOptions,
        needs_grad: list[bool] | None = None,  # of each hidden, each weight and the bias
    ):
        self.dtype = options.student_dtype
        self.logits_dtype = torch.float32 if options.float32_logits else self.dtype
        self.rows, self.vocab, self.device = rows, weight[0].shape[0], hidden[0].device
        self.half = self.dtype == torch.float16
        *needs, self.needs_bias = needs_grad or [False] * (2 * len(hidden) + 1)
        of_products = zip(needs[: len(hidden)], needs[len(hidden) :], strict=True)
        self.hidden_dtype, dtypes = gradient_dtypes(self.dtype, weight)
        self.products = [
            _Product(payload.take(h, rows.index).to(self.dtype), w.to(self.dtype), dtype, *needed)
            for h, w, dtype, needed in zip(hidden, weight, dtypes, of_products, strict=True)
        ]
        self.bias = None if bias is None else bias.to(self.dtype)

    def row_bytes(self, width: int | None = None) -> int:
        """Memory of a row of the logits, and of its copy for the products where dtypes differ."""
        copy = 0 if self.logits_dtype == self.dtype else self.dtype.itemsize
        return (width or self.vocab) * (self.logits_dtype.itemsize + copy)

    def weight_gradient_bytes(self) -> tuple[int, int]:
        """Bytes of the largest one, and of the float32 sums that several chunks need."""
        needed = [(p.weight.numel(), p.weight_dtype) for p in self.products if p.needs_weight]
        largest = max((n * dtype.itemsize for n, dtype in needed), default=0)
        return largest, sum(4 * n for n, dtype in needed if dtype != torch.float32)

    def plan(
        self,
        teacher: TeacherHead | TeacherLogits | None,
        chunk_bytes: int,
        o: LogitsOptions | None = None,
    ) -> Plan:
        """How the rows are split; the teacher's logits exist for one block at a time."""
        # A gradient that is copied to another dtype exists for a block, not for a longer chunk.
        apart = self.logits_dtype != self.dtype
        largest, sums = (0, 0) if apart else self.weight_gradient_bytes()
        width = None
        if o is not None and o.group:
            # The same in all processes, which communicate in every block.
            width = -(-o.vocab_size // o.processes)
            largest = sums = 0
        teacher_row = 0 if teacher is None else teacher.row_bytes(width)
        rows = self.rows.count, self.row_bytes(width), teacher_row
        return plan(*rows, largest, sums, chunk_bytes, self.device.type)

    def allocate(self, split: Plan) -> None:
        """Memory for the logits of a chunk and for the gradients."""
        device, self.chunk = self.device, split.chunk
        self.logits = empty((self.chunk, self.vocab), dtype=self.logits_dtype, device=device)
        self.row_scales: list[Tensor] = []
        once = self.chunk >= self.rows.count
        for p in self.products:
            if p.needs_hidden:
                p.hidden_gradient = empty(p.hidden.shape, dtype=self.hidden_dtype, device=device)
            if p.needs_weight:
                dtype = p.weight_dtype if once else torch.float32
                p.weight_gradient = empty(p.weight.shape, dtype=dtype, device=device)
                if self.rows.count == 0:
                    p.weight_gradient.zero_()
        self.bias_gradient = torch.zeros(
            self.vocab if self.needs_bias else 0, dtype=torch.float32, device=device
        )
        # float16: weight gradients are stored as multiples of this unit, which only grows.
        self.unit = torch.full(
            (), torch.finfo(torch.float32).tiny, dtype=torch.float32, device=device
        )

    def memory_of_a_weight_gradient(self) -> Tensor:
        """The bytes of the largest one, unused until the end of the chunk."""
        gradients = [p.weight_gradient for p in self.products if p.weight_gradient is not None]
        return max(gradients, key=lambda g: g.nbytes).view(-1).view(torch.uint8)

    def _place(self, begin: int, end: int) -> Tensor:
        """Memory of the logits of rows that lie in one chunk."""
        offset = begin % self.chunk
        return self.logits[offset : offset + end - begin]

    def logits_of(self, begin: int, end: int) -> Tensor:
        """Logits ``(end - begin, vocab)`` of a block of rows; what follows may overwrite them."""
        logits = self._place(begin, end)
        for i, p in enumerate(self.products):
            bias = self.bias if i == 0 else None
            gemm.write_logits(logits, p.hidden[begin:end], p.weight, bias, accumulate=i > 0)
        return logits

    def take(self, begin: int, end: int, row_scale: Tensor | None) -> None:
        """Adds up the gradients of a block of rows, whose logits were overwritten by theirs.

        Rows of a float16 gradient are yet to be multiplied by ``row_scale``.
        """
        gradient = self._place(begin, end).to(self.dtype)
        if not self.half:
            row_scale = None
        elif row_scale is not None:
            self.row_scales.append(row_scale)
        self._take_block(gradient, row_scale, begin, end)
        first = begin - begin % self.chunk
        if end < min(first + self.chunk, self.rows.count):
            return
        if first < begin:  # of several blocks, which only logits of the products' dtype have
            gradient = self._place(first, end)
        scale = torch.cat(self.row_scales) if self.half else None
        self._take_chunk(gradient, scale, first, end)
        self.row_scales = []

    def _take_block(self, gradient: Tensor, row_scale: Tensor | None, begin: int, end: int) -> None:
        """Hidden and bias gradients of a block of rows."""
        for p in self.products:
            if p.hidden_gradient is not None:
                out = p.hidden_gradient[begin:end]
                gemm.write_hidden_gradient(out, gradient, p.weight)
                if row_scale is not None:
                    out *= row_scale.unsqueeze(1)
        if self.needs_bias:
            gemm.add_bias_gradient(self.bias_gradient, gradient, row_scale)

    def _take_chunk(self, gradient: Tensor, row_scale: Tensor | None, begin: int, end: int) -> None:
        """Weight gradients of a chunk of rows.

        The product sums over rows, so the row scales of a float16 gradient go into the hidden
        states, relative to the largest scale so far.
        """
        before = self.unit
        if row_scale is not None:
            self.unit = torch.maximum(before, row_scale.abs().amax())
            row_scale = (row_scale / self.unit).unsqueeze(1)
        for p in self.products:
            if p.weight_gradient is None:
                continue
            hidden = p.hidden[begin:end]
            if row_scale is not None:
                hidden = (hidden * row_scale).to(self.dtype)
                if begin > 0:
                    p.weight_gradient *= before / self.unit
            gemm.add_weight_gradient(p.weight_gradient, gradient, hidden, accumulate=begin > 0)

    def gradients(self, group: str = "") -> list[Tensor]:
        """In the order of needs_grad, empty where not needed.

        Those of hidden states are summed over the group.
        """
        hidden = [
            self.logits.new_empty(0, dtype=self.hidden_dtype)
            if (g := p.hidden_gradient) is None
            else self.rows.everywhere(collectives.all_sum(g, group) if group else g)
            for p in self.products
        ]
        weight = [
            self.logits.new_empty(0, dtype=p.weight_dtype)
            if (g := p.weight_gradient) is None
            else (g.mul_(self.unit) if self.half else g).to(p.weight_dtype)
            for p in self.products
        ]
        return [*hidden, *weight, self.bias_gradient]
