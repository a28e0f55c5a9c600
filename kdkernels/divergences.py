"""The divergences between a teacher p and a student q: the one list everything iterates over.

Each is a small frozen dataclass. ``value`` is its definition, a plain PyTorch function of log p and
log q whose sum over the vocabulary is the divergence; the reference backend differentiates it.
``kernel`` names what the compiled backends run, with parameters at a limit mapped to the divergence
they become there.
"""

from __future__ import annotations

import inspect
import math
import numbers
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor


def _times(x: Tensor, y: Tensor) -> Tensor:
    """``x * y``, and 0 with gradient 0 where ``x`` is 0, even if ``y`` is infinite."""
    zero = x == 0
    return torch.where(zero, 0.0, x * torch.where(zero, 0.0, y))


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """The terms of KL(p || q)."""
    p = log_p.exp()
    return _times(p, torch.where(p == 0, 0.0, log_p) - torch.where(p == 0, 0.0, log_q))


def _log_mixture(log_p: Tensor, log_q: Tensor, share: float) -> Tensor:
    """log(share p + (1 - share) q), -inf where both are 0."""
    empty = (log_p == -math.inf) & (log_q == -math.inf)
    log_p, log_q = torch.where(empty, 0.0, log_p), torch.where(empty, 0.0, log_q)
    mixed = torch.logaddexp(log_p + math.log(share), log_q + math.log1p(-share))
    return torch.where(empty, -math.inf, mixed)


def check_number(name: str, value: float) -> None:
    """Raises for what is no real number."""
    if isinstance(value, bool) or not isinstance(value, (int, numbers.Real)):
        raise TypeError(f"{name} is a {type(value).__name__}, expected a number")


def _in_range(
    name: str, value: float, low: float, high: float, *, open_above: bool = False
) -> None:
    check_number(name, value)
    if not (low <= value < high if open_above else low <= value <= high):
        bracket = ")" if open_above else "]"
        raise ValueError(f"{name} is {value}, expected a number in [{low:g}, {high:g}{bracket}")


@dataclass(frozen=True)
class Divergence:
    """Base of the divergences.

    A custom one defines ``value``, and ``name`` for messages; it runs on the reference backend.
    """

    name: ClassVar[str] = ""

    def value(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """Terms of the divergence, elementwise, for log-probabilities of any equal shape."""
        raise TypeError(f"{type(self).__name__} does not define value(log_p, log_q)")

    def kernel(self) -> tuple[str, float, float]:
        """The compiled divergence's name and its two parameters (0 where it has none)."""
        return self.name, 0.0, 0.0


def _weighted(divergence: Divergence, weight: float) -> tuple[str, float, float]:
    """Both weights as parameters: 1 - weight in float32 would have few digits near 1."""
    return divergence.name, float(weight), 1 - float(weight)  # Triton takes no other numbers


@dataclass(frozen=True)
class ForwardKL(Divergence):
    """KL(p || q) = sum p (log p - log q). Hinton et al. 2015, arXiv:1503.02531."""

    name: ClassVar[str] = "forward_kl"

    def value(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return _kl(log_p, log_q)


@dataclass(frozen=True)
class ReverseKL(Divergence):
    """KL(q || p) = sum q (log q - log p). MiniLLM, Gu et al. 2023, arXiv:2306.08543."""

    name: ClassVar[str] = "reverse_kl"

    def value(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return _kl(log_q, log_p)


@dataclass(frozen=True)
class JSD(Divergence):
    """Generalised Jensen-Shannon: beta KL(p || m) + (1 - beta) KL(q || m).

    m = beta p + (1 - beta) q. ``beta=0`` means forward KL and ``beta=1`` reverse KL, the limits of
    the divergence divided by beta (1 - beta). GKD, Agarwal et al. 2023, arXiv:2306.13649.
    """

    name: ClassVar[str] = "jsd"
    beta: float = 0.5

    def __post_init__(self) -> None:
        _in_range("beta", self.beta, 0, 1)

    def value(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        if self.beta in (0, 1):
            return _kl(log_p, log_q) if self.beta == 0 else _kl(log_q, log_p)
        log_m = _log_mixture(log_p, log_q, self.beta)
        return self.beta * _kl(log_p, log_m) + (1 - self.beta) * _kl(log_q, log_m)

    def kernel(self) -> tuple[str, float, float]:
        limits: dict[float, Divergence] = {0: ForwardKL(), 1: ReverseKL()}
        return limits[self.beta].kernel() if self.beta in limits else _weighted(self, self.beta)


@dataclass(frozen=True)
class SkewForwardKL(Divergence):
    """KL(p || alpha p + (1 - alpha) q). DistiLLM, Ko et al. 2024, arXiv:2402.03898."""

    name: ClassVar[str] = "skew_forward_kl"
    alpha: float = 0.1

    def __post_init__(self) -> None:
        _in_range("alpha", self.alpha, 0, 1, open_above=True)

    def value(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return _kl(log_p, _log_mixture(log_p, log_q, self.alpha) if self.alpha else log_q)

    def kernel(self) -> tuple[str, float, float]:
        return _weighted(self, self.alpha) if self.alpha else ForwardKL().kernel()


@dataclass(frozen=True)
class SkewReverseKL(Divergence):
    """KL(q || alpha q + (1 - alpha) p). DistiLLM, Ko et al. 2024, arXiv:2402.03898."""

    name: ClassVar[str] = "skew_reverse_kl"
    alpha: float = 0.1

    def __post_init__(self) -> None:
        _in_range("alpha", self.alpha, 0, 1, open_above=True)

    def value(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return _kl(log_q, _log_mixture(log_q, log_p, self.alpha) if self.alpha else log_p)

    def kernel(self) -> tuple[str, float, float]:
        return _weighted(self, self.alpha) if self.alpha else ReverseKL().kernel()


@dataclass(frozen=True)
class SymmetricKL(Divergence):
    """weight KL(p || q) + (1 - weight) KL(q || p). Jeffreys 1946."""

    name: ClassVar[str] = "symmetric_kl"
    weight: float = 0.5

    def __post_init__(self) -> None:
        _in_range("weight", self.weight, 0, 1)

    def value(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        if self.weight in (0, 1):
            return _kl(log_p, log_q) if self.weight == 1 else _kl(log_q, log_p)
        return self.weight * _kl(log_p, log_q) + (1 - self.weight) * _kl(log_q, log_p)

    def kernel(self) -> tuple[str, float, float]:
        limits: dict[float, Divergence] = {0: ReverseKL(), 1: ForwardKL()}
        if self.weight in limits:
            return limits[self.weight].kernel()
        return _weighted(self, self.weight)


@dataclass(frozen=True)
class TVD(Divergence):
    """Total variation: 1/2 sum |p - q|, slope 0 where p = q. Wen et al. 2023, arXiv:2307.15190."""

    name: ClassVar[str] = "tvd"

    def value(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return (log_p.exp() - log_q.exp()).abs() / 2


@dataclass(frozen=True)
class AlphaBeta(Divergence):
    """-1/(ab) sum [p^a q^b - a/(a+b) p^(a+b) - b/(a+b) q^(a+b)], a = alpha, b = beta.

    Its limits are taken at a = 0, b = 0 and a + b = 0; (1, 0) is forward KL and (0, 1) reverse KL.
    A parameter within 2^-15 of 0 counts as 0: it would divide powers that cancel. Finite on -inf
    logits for positive parameters. With a negative one, those of one model alone make it infinite
    or NaN, and kernels multiply max(p, q)^(a+b) by a power of the ratio: where these leave
    float32's range (p^2 / q with p below 1e-38) a term counts as 0 or infinite, which
    ``backend="reference"`` has in float64. ABKD, Wang et al. 2025, arXiv:2505.04560; Cichocki et
    al. 2011.
    """

    name: ClassVar[str] = "alpha_beta"
    alpha: float
    beta: float

    def __post_init__(self) -> None:
        for name in ("alpha", "beta"):
            check_number(name, getattr(self, name))
            if not abs(getattr(self, name)) <= torch.finfo(torch.float32).max:
                raise ValueError(
                    f"{name} is {getattr(self, name)}, expected a finite number that float32 holds"
                )

    def value(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        a, b = self._powers()
        empty = (log_p == -math.inf) & (log_q == -math.inf)
        log_p, log_q = torch.where(empty, 0.0, log_p), torch.where(empty, 0.0, log_q)

        def power(x: float, y: float) -> Tensor:
            """p^x q^y; a power of 0 is left out, so that 0 * inf cannot arise."""
            terms = [c * log for c, log in ((x, log_p), (y, log_q)) if c != 0]
            return torch.exp(sum(terms, torch.zeros_like(log_p)))

        d = log_p - log_q
        if a == 0 and b == 0:
            value = d.square() / 2
        elif a == 0:
            value = (power(b, 0) - power(0, b) - b * _times(power(0, b), d)) / b**2
        elif b == 0:
            value = (power(0, a) - power(a, 0) + a * _times(power(a, 0), d)) / a**2
        elif a + b == 0:
            value = (power(a, b) - 1 - a * d) / a**2
        else:
            value = (power(a + b, 0) / b + power(0, a + b) / a) / (a + b) - power(a, b) / (a * b)
        return torch.where(empty, 0.0, value)

    def kernel(self) -> tuple[str, float, float]:
        limits: dict[tuple[float, float], Divergence] = {(1, 0): ForwardKL(), (0, 1): ReverseKL()}
        powers = self._powers()
        return limits[powers].kernel() if powers in limits else (self.name, *powers)

    def _powers(self) -> tuple[float, float]:
        a, b = (0.0 if abs(x) <= 2.0**-15 else float(x) for x in (self.alpha, self.beta))
        return a, b


@dataclass(frozen=True)
class SoftCrossEntropy(Divergence):
    """-sum p log q: forward KL plus the teacher's entropy, with the same gradient."""

    name: ClassVar[str] = "soft_cross_entropy"

    def value(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return -_times(log_p.exp(), log_q)


#: Every built-in divergence by name, in kernel order. All but ``alpha_beta`` have defaults.
DIVERGENCES: dict[str, type[Divergence]] = {
    cls.name: cls
    for cls in (
        ForwardKL,
        ReverseKL,
        JSD,
        SkewForwardKL,
        SkewReverseKL,
        SymmetricKL,
        TVD,
        AlphaBeta,
        SoftCrossEntropy,
    )
}


def is_built_in(divergence: Divergence) -> bool:
    """Whether kernels know it. By type: a subclass of a built-in one may define another value."""
    return DIVERGENCES.get(divergence.name) is type(divergence)


def kl_weights(kernel: str, parameter: float) -> tuple[float, float] | None:
    """Weights of KL(p || q) and KL(q || p) in a divergence made of them; None for any other."""
    weights = {
        "forward_kl": (1.0, 0.0),
        "reverse_kl": (0.0, 1.0),
        "symmetric_kl": (parameter, 1 - parameter),
        "soft_cross_entropy": (1.0, 0.0),  # and the teacher's entropy
    }
    return weights.get(kernel)


_DEFAULTS: dict[str, Divergence] = {
    name: cls() for name, cls in DIVERGENCES.items() if cls is not AlphaBeta
}


class Registered(NamedTuple):
    """What :func:`register_divergence` was given."""

    divergence: Divergence
    value: Any  # triton.JITFunction
    slope: Any


REGISTERED: dict[str, Registered] = {}


def register_divergence(
    name: str, *, value: Any, slope: Any, reference: Callable[[Tensor, Tensor], Tensor]
) -> Divergence:
    """Adds a divergence of your own, without a compiler: two Triton functions and their definition.

    D = sum over the vocabulary of a pointwise function of log p (teacher) and log q (student). It
    runs on the Triton backend on GPUs and on the reference backend elsewhere, with every option of
    :func:`kdkernels.kd_loss`. Registering a name again replaces what it meant.

    Args:
        name: what to pass as ``divergence=``; not the name of a built-in one.
        value: a ``@triton.jit`` function ``(p, q, log_p, log_q, r)`` of float32 blocks that returns
            the terms of the divergence. r = log q - log p is accurate where p and q are close, as
            differences of p and q are not. Where one of them is 0, r and a logarithm are infinite;
            where both are, r is 0 and the term must be 0: ``kdkernels.triton.math`` has
            ``times_or_zero``, ``expm1``, ``log1p`` and more.
        slope: likewise d value / d log q, up to a multiple of q, which cancels in the gradient.
        reference: the definition in PyTorch: terms for ``log_p`` and ``log_q`` of any equal shape,
            differentiable; the oracle of the other two.

    Returns:
        The divergence, which ``divergence=`` takes as well as the name.

    Raises:
        TypeError: ``value`` or ``slope`` is no ``@triton.jit`` function, or ``reference`` no
            function.
        ValueError: ``name`` is taken by a built-in divergence or no identifier, or a function takes
            other arguments.

    Example:
        The squared Hellinger distance; ``docs/triton.md`` derives it.

        >>> import torch, triton, triton.language as tl  # doctest: +SKIP
        >>> from kdkernels.triton.math import expm1  # doctest: +SKIP
        >>> @triton.jit  # doctest: +SKIP
        ... def value(p, q, log_p, log_q, r):
        ...     gap = expm1(-0.5 * tl.abs(r))
        ...     return 0.5 * tl.maximum(p, q) * gap * gap
        >>> @triton.jit  # doctest: +SKIP
        ... def slope(p, q, log_p, log_q, r):
        ...     gap = expm1(-0.5 * tl.abs(r))
        ...     return 0.5 * tl.where(r > 0, -q * gap, p * gap * (1.0 + gap))
        >>> def reference(log_p, log_q):  # doctest: +SKIP
        ...     return ((log_p / 2).exp() - (log_q / 2).exp()).square() / 2
        >>> register_divergence(  # doctest: +SKIP
        ...     "squared_hellinger", value=value, slope=slope, reference=reference
        ... )
        squared_hellinger()
    """
    if not isinstance(name, str):
        raise TypeError(f"name is a {type(name).__name__}, expected a str")
    if not name.isidentifier() or name in DIVERGENCES:
        raise ValueError(f"name is {name!r}, expected an identifier other than a built-in name")
    for role, function in (("value", value), ("slope", slope)):
        if not callable(getattr(function, "fn", None)):
            raise TypeError(
                f"{role} is a {type(function).__name__}, expected a function under @triton.jit"
            )
        arguments = list(inspect.signature(function.fn).parameters)
        if len(arguments) != 5:
            raise ValueError(f"{role} takes {arguments}, expected (p, q, log_p, log_q, r)")
    if not callable(reference):
        raise TypeError(f"reference is a {type(reference).__name__}, expected a function")

    def terms(self: Divergence, log_p: Tensor, log_q: Tensor) -> Tensor:
        return reference(log_p, log_q)

    kind: type[Divergence] = type(name, (Divergence,), {"name": name, "value": terms})
    REGISTERED[name] = Registered(dataclass(frozen=True)(kind)(), value, slope)
    return REGISTERED[name].divergence


def as_divergence(divergence: str | Divergence) -> Divergence:
    """The instance behind a name; an instance is returned as it is."""
    if isinstance(divergence, Divergence):
        return divergence
    if not isinstance(divergence, str):
        kind = f"a {type(divergence).__name__}"
        expected = "a name or a Divergence instance"
        if isinstance(divergence, type) and issubclass(divergence, Divergence):
            kind = f"the class {divergence.__name__}"
            expected += f", such as {divergence.__name__}(...)"
        raise TypeError(f"divergence is {kind}, expected {expected}")
    if divergence in REGISTERED:
        return REGISTERED[divergence].divergence
    if divergence not in DIVERGENCES:
        names = ", ".join([*DIVERGENCES, *REGISTERED])
        raise ValueError(f"divergence is {divergence!r}, expected one of {names}")
    if divergence == AlphaBeta.name:
        raise ValueError(
            "divergence is 'alpha_beta', which has no defaults, expected AlphaBeta(alpha, beta)"
        )
    return _DEFAULTS[divergence]
