"""Backends under test, one way to run a loss on any of them, and comparison with the oracle."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import kdkernels
from kdkernels import extension
from kdkernels.backends import cuda
from kdkernels.divergences import as_divergence

from . import emulated, interpreter, tolerances


@dataclass(frozen=True)
class Backend:
    """One configuration that the shared tests run on; a new backend is a new entry of BACKENDS."""

    name: str
    backend: str
    device: str = "cpu"
    environment: dict[str, str] = field(default_factory=dict)
    skip: str = ""  # why it cannot run here
    kernel: bool = True  # has a gradient of its own: in place, consumed by one backward
    checks_labels: bool = True  # before anything is written; on a GPU that would wait for it
    # CUDA threads share out a row by 16-byte addresses: rounding depends on where it lies.
    same_bits_anywhere: bool = True
    interpreted: bool = False  # milliseconds per row: fewer rows where a test takes many

    def __str__(self) -> str:
        return self.name


def _cpu_backends() -> list[Backend]:
    if extension.missing:
        return [Backend("cpu", "cpu", skip=extension.missing)]
    here = extension._C.instruction_sets()
    return [
        Backend(
            f"cpu-{isa}",
            "cpu",
            environment={"KDKERNELS_CPU_ISA": isa},
            skip="" if isa in here else f"this machine or build has no {isa}, only {here}",
        )
        for isa in dict.fromkeys(("avx512", "avx2", "baseline", *here))
    ]


def _cuda_backends() -> list[Backend]:
    """The kernels that hold a row pair on chip, where they can, and those that stream it."""
    skip = "; ".join(cuda.device_reasons())
    streaming = {"KDKERNELS_CUDA_TILE": "streaming:1x256"}
    return [
        Backend(
            name,
            "cuda",
            device="cpu" if emulated.PATH else "cuda",
            environment=environment,
            skip=skip,
            checks_labels=False,
            same_bits_anywhere=False,
            interpreted=bool(emulated.PATH),
        )
        for name, environment in (("cuda", {}), ("cuda-streaming", streaming))
    ]


TRITON = Backend(
    "triton",
    "triton",
    device=interpreter.DEVICE,
    checks_labels=False,
    interpreted=interpreter.DEVICE == "cpu",
    skip="" if interpreter.INSTALLED else "Triton is not installed",
)
BACKENDS = [
    *_cpu_backends(),
    *_cuda_backends(),
    TRITON,
    Backend("reference", "reference", kernel=False),
]
DEVICES = {config.backend: config.device for config in BACKENDS}


class Result(NamedTuple):
    """What a call gave, on the CPU."""

    loss: Tensor
    gradient: Tensor
    metrics: dict[str, Tensor | None] | None


def move(value: Any, device: str) -> Any:
    """To the device, keeping strides on the CPU."""
    return value.to(device) if isinstance(value, Tensor) else value


def loss_of(backend: Backend, student: Tensor, teacher: Tensor, **options: Any) -> Any:
    options = {name: move(value, backend.device) for name, value in options.items()}
    return kdkernels.kd_loss(
        move(student, backend.device),
        move(teacher, backend.device),
        backend=backend.backend,
        **options,
    )


def run(backend: Backend, student: Tensor, teacher: Tensor, **options: Any) -> Result:
    """Loss, gradient and metrics; ``reduction="none"`` sums before the backward."""

    def loss(logits: Tensor, **options: Any) -> Any:
        return loss_of(backend, logits, teacher, **options)

    return run_backward(backend, student, loss, **options)


def run_backward(
    backend: Backend,
    student: Tensor,
    loss_of_logits: Callable[..., Any],
    *,
    grad_output: Tensor | None = None,
    **options: Any,
) -> Result:
    """What a loss of logits and options gives."""
    leaf = move(student, backend.device).detach().requires_grad_()
    # An in-place gradient needs a student that is no leaf, of the same strides.
    logits = Relay.apply(leaf) if options.get("inplace_grad") else leaf
    result = loss_of_logits(logits, **options)
    loss, metrics = result if options.get("return_metrics") else (result, None)
    loss.backward(torch.ones_like(loss) if grad_output is None else move(grad_output, loss.device))
    if metrics is not None:
        metrics = {name: None if m is None else m.cpu() for name, m in metrics.items()}
    return Result(loss.detach().cpu(), leaf.grad.cpu(), metrics)


class Relay(torch.autograd.Function):
    """A copy with the strides of its input, which ``clone`` does not promise."""

    @staticmethod
    def forward(ctx, x):
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device).copy_(x)

    @staticmethod
    def backward(ctx, gradient):
        return gradient.clone()


class InPlace(torch.autograd.Function):
    """Makes a tensor the output of a computation without copying it."""

    @staticmethod
    def forward(ctx, seed, tensor):
        return tensor.detach()

    @staticmethod
    def backward(ctx, gradient):
        return gradient.new_zeros(()), None


class Operators(TorchDispatchMode):
    """Those that are dispatched: on a GPU most are a launch each."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append(function)
        return function(*args, **(kwargs or {}))


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """As ``torch.set_default_dtype``, for a while."""
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


REFERENCE = Backend("oracle", "reference", kernel=False)


def oracle(student: Tensor, teacher: Tensor, **options: Any) -> Result:
    """Plain PyTorch in float64, differentiated by autograd."""
    options.pop("inplace_grad", None)
    for name in ("token_weight", "normalizer"):
        if isinstance(options.get(name), Tensor):
            options[name] = options[name].double()
    if isinstance(options.get("grad_output"), Tensor):
        options["grad_output"] = options["grad_output"].double()
    return run(REFERENCE, student.double(), teacher.double(), **options)


def assert_close(
    actual: Tensor, expected: Tensor, tolerance: tuple[float, float], what: str = "loss"
) -> None:
    """Elementwise within (relative, absolute); NaN and infinities at the same places."""
    assert actual.shape == expected.shape, f"{what}: shape {actual.shape} != {expected.shape}"
    actual, expected = actual.cpu().double(), expected.cpu().double()
    assert_same_specials(actual, expected, what)
    finite = expected.isfinite()
    relative, absolute = tolerance
    error = (actual - expected)[finite].abs()
    excess = error - torch.clamp(relative * expected[finite].abs(), min=absolute)
    if excess.numel() and not bool((excess <= 0).all()):
        worst = int(excess.argmax())
        raise AssertionError(
            f"{what}: got {actual[finite][worst]:.9g}, expected {expected[finite][worst]:.9g}, "
            f"off by {error[worst]:.3g} with tolerance {relative:g} relative, {absolute:g} absolute"
        )


def assert_same_specials(actual: Tensor, expected: Tensor, what: str = "loss") -> None:
    for kind in (torch.isnan, torch.isposinf, torch.isneginf):
        different = kind(actual) != kind(expected)
        assert not bool(different.any()), (
            f"{what}: {kind.__name__} differs at {different.nonzero()[:5].tolist()}: "
            f"got {actual[different][:5].tolist()}, expected {expected[different][:5].tolist()}"
        )


def assert_gradient(
    actual: Tensor, expected: Tensor, relative: float, per_element: float = 0.0
) -> None:
    """Within a relative L2 error; NaN and infinities at the same places, rows of 0 exactly 0."""
    assert actual.shape == expected.shape
    actual, expected = actual.cpu().double(), expected.cpu().double()
    assert_same_specials(actual, expected, "gradient")
    empty = (expected == 0).all(-1)
    assert not actual[empty].any(), "gradient: a row without any is not 0"
    finite = expected.isfinite()
    error = float((actual - expected)[finite].norm())
    size = float(expected[finite].norm())
    bound = relative * size + per_element * expected.numel() ** 0.5
    assert error <= bound, (
        f"gradient: off by {error:.3g} in L2, its norm is {size:.3g}: relative error "
        f"{error / (size or 1):.3g} with tolerance {relative:g}"
    )


def assert_matches(
    actual: Result, expected: Result, divergence: str, dtype: torch.dtype, *, close: bool = False
) -> None:
    """Loss and gradient (of the student's ``dtype``) within the suite's tolerances."""
    assert actual.loss.dtype == torch.float32
    assert_close(actual.loss, expected.loss, tolerances.loss_tolerance(divergence))
    assert actual.gradient.dtype == dtype
    assert_gradient_of(divergence, dtype, actual.gradient, expected.gradient, close=close)


def assert_gradient_of(
    divergence: str,
    dtype: torch.dtype,
    actual: Tensor,
    expected: Tensor,
    *,
    close: bool = False,
) -> None:
    """A gradient of the student's ``dtype``, or some rows or columns of it."""
    subnormal = tolerances.FLOAT16_SUBNORMAL if dtype == torch.float16 else 0.0
    relative = tolerances.gradient_tolerance(divergence, dtype, close=close)
    assert_gradient(actual, expected, relative, subnormal)


def assert_as_oracle(
    actual: Result, student: Tensor, teacher: Tensor, *, close: bool = False, **options: Any
) -> None:
    """What a call with these options gave, its metrics included."""
    expected = oracle(student, teacher, **options)
    divergence = as_divergence(options.get("divergence", "forward_kl")).name
    assert_matches(actual, expected, divergence, student.dtype, close=close)
    if expected.metrics is not None:
        assert_metrics(actual.metrics, expected.metrics, divergence)


def assert_same(actual: Result, expected: Result, divergence: str, backend: Backend) -> None:
    """The same call on the same values elsewhere in memory: the same bits, where those hold."""
    if not backend.same_bits_anywhere:
        assert_matches(actual, expected, divergence, expected.gradient.dtype)
        if expected.metrics is not None:
            assert_metrics(actual.metrics, expected.metrics, divergence)
        return
    assert_same_bits(actual, expected)


def assert_same_bits(actual: Result, expected: Result) -> None:
    torch.testing.assert_close(actual[:2], expected[:2], rtol=0, atol=0)
    for name, metric in (expected.metrics or {}).items():
        assert metric is None or torch.equal(actual.metrics[name], metric), name


def assert_metrics(actual: dict, expected: dict, divergence: str) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        if value is None:
            assert actual[name] is None
            continue
        assert actual[name].dtype == torch.float32
        assert not actual[name].requires_grad
        tolerance = tolerances.METRIC
        if name == "divergence":
            tolerance = tolerances.loss_tolerance(divergence)
        assert_close(actual[name], value, tolerance, name)
