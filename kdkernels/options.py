"""The checked options of one call, in the form operators and backends take them."""

from __future__ import annotations

from typing import Annotated, Any, NamedTuple, TypedDict, TypeVar, get_type_hints

import torch
from torch import Tensor

Options = TypeVar("Options", bound=tuple)

#: An int that depends on shapes, which torch.compile may leave symbolic.
Size = Annotated[int, "SymInt"]


class Metrics(TypedDict):
    """Per-token tensors ``(...)`` that ``return_metrics=True`` adds, 0 where a token takes no part.

    ``divergence``, before its weight and T²; ``cross_entropy``, None without labels; entropies of
    both models at the loss's temperature, in nats; ``agreement``, 1.0 where their top tokens agree.
    """

    # In the order kernels write.

    divergence: Tensor
    cross_entropy: Tensor | None  # None without labels
    teacher_entropy: Tensor
    student_entropy: Tensor
    agreement: Tensor


METRICS = tuple(Metrics.__annotations__)


def with_metrics(
    loss: Tensor, stacked: Tensor | None, labels: Tensor | None
) -> tuple[Tensor, Metrics]:
    """What ``return_metrics=True`` returns, from stacked metrics ``(5, ...)``."""
    assert stacked is not None
    metrics: Any = dict(zip(METRICS, stacked.unbind(0), strict=True))
    if labels is None:
        metrics["cross_entropy"] = None
    return loss, metrics


REDUCTIONS = ("none", "sum", "mean")

#: How tokens that a sparse teacher does not list are treated.
TAILS = ("bucket", "renormalize", "drop", "sampled")

#: Phases of a shard of the vocabulary, and numbers of a row, as in csrc/core/params.h.
SHARD_PHASES = ("states", "sums", "gradient")
SHARD_STATES = (
    *("student_base", "teacher_base", "student_sum", "teacher_sum"),
    *("reverse", "forward", "entropy", "student_sum_at_1"),
)
SHARD_SUMS = ("value", "slope", "shift", "largest_slope", "student_entropy", "teacher_entropy")


def replaced(options: Options, **changes: Any) -> Options:
    """``options._replace(**changes)``, which torch.compile of torch 2.8 cannot trace."""
    kind: Any = type(options)
    return kind(*[changes.get(n, x) for n, x in zip(kind._fields, options, strict=True)])


_SCHEMA_TYPES: dict[Any, str] = {
    str: "str",
    bool: "bool",
    int: "int",
    float: "float",
    Size: "SymInt",
    torch.dtype: "ScalarType",
}


def schema_of(kind: type[tuple]) -> str:
    """The fields of options as the parameters of an operator."""
    fields = get_type_hints(kind, include_extras=True).items()
    return ", ".join(f"{_SCHEMA_TYPES[annotation]} {name}" for name, annotation in fields)


class LogitsOptions(NamedTuple):
    """Scalars of the logits level."""

    divergence: str  # the compiled divergence, "" for one only the reference can evaluate
    parameter_0: float
    parameter_1: float
    temperature: float
    kd_weight: float  # includes temperature squared and a host-known normalizer
    ce_weight: float
    ignore_index: int
    reduction: str
    vocab: Size  # columns that take part here
    student_scale: float
    student_softcap: float  # 0: none
    teacher_scale: float
    teacher_softcap: float
    metrics: bool
    group: str  # of processes that share the vocabulary, "" for none
    rank: int  # of this one
    processes: int
    vocab_start: Size  # of this process's columns
    vocab_size: Size  # of all of them


class LinearOptions(NamedTuple):
    """What the fused-linear level adds."""

    student_dtype: torch.dtype  # of the products
    teacher_dtype: torch.dtype
    float32_logits: bool  # wider than the products' operands
    chunk_bytes: Size  # 0: the default
    backend: str


class TailOptions(NamedTuple):
    """Scalars of the operators behind a sparse teacher."""

    temperature: float
    at_1: bool  # log-sum-exps also at temperature 1
    scale: float
    softcap: float  # 0: none
    vocab: Size

    def temperatures(self) -> tuple[float, ...]:
        return (self.temperature, 1.0) if self.at_1 else (self.temperature,)

    @property
    def results(self) -> int:
        """Numbers per row: a reference, and a log-sum-exp for each temperature."""
        return 1 + len(self.temperatures())
