"""Bad input: the right exception, which names the argument, what was got and what is expected."""

from __future__ import annotations

import inspect
import math
import re
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import kdkernels
from kdkernels import (
    JSD,
    AlphaBeta,
    KDLoss,
    LinearKDHead,
    LinearKDLoss,
    LinearSparseKDLoss,
    SkewForwardKL,
    SkewReverseKL,
    SparseKDLoss,
    SymmetricKL,
    kd_loss,
    scalars,
)

from . import emulated

S, T = torch.zeros(2, 3, 8), torch.zeros(2, 3, 8)
LABELS = torch.zeros(2, 3, dtype=torch.int64)
STRIDED = torch.zeros(2, 3, 16)[..., ::2]
META = torch.zeros(2, 3, 8, device="meta")
with warnings.catch_warnings():  # that it is a prototype
    warnings.simplefilter("ignore")
    NESTED = torch.nested.nested_tensor([torch.zeros(3, 8), torch.zeros(2, 8)])
LEARNT = torch.tensor(2.0, requires_grad=True)

LOGITS = [
    # student, teacher, exception, the message
    (None, T, TypeError, "student_logits is a NoneType, expected a torch.Tensor"),
    (S, [[0.0]], TypeError, "teacher_logits is a list, expected a torch.Tensor$"),
    (SimpleNamespace(logits=S), T, TypeError, r"student_logits is a .*: pass its \.logits$"),
    (S.numpy(), T, TypeError, "student_logits is a ndarray, expected a torch.Tensor"),
    (S.long(), T, TypeError, "student_logits is torch.int64, expected float32, bfloat16"),
    (S, T.bool(), TypeError, "teacher_logits is torch.bool, expected float32, bfloat16"),
    (S, T.to(torch.complex64), TypeError, "teacher_logits is torch.complex64, expected float32"),
    (S.to(torch.float8_e4m3fn), T, TypeError, "student_logits is torch.float8_e4m3fn, expected"),
    (S[0, 0, 0], T[0], ValueError, r"student_logits has shape \(\), expected \(\.\.\., vocab\)"),
    (S, T[:1], ValueError, r"teacher_logits has shape \(1, 3, 8\), expected .* \(2, 3\)"),
    (S, T[0], ValueError, r"teacher_logits has shape \(3, 8\), expected .* \(2, 3\)"),
    (S.view(6, 8), T, ValueError, r"teacher_logits has shape \(2, 3, 8\), expected .* \(6,\)"),
    (S[..., :0], T, ValueError, "student_logits.*vocabulary of at least 1"),
    (S, T[..., :0], ValueError, "teacher_logits.*vocabulary of at least 1"),
    (
        STRIDED,
        T,
        ValueError,
        r"student_logits has stride 2 in its last dimension, expected 1: pass .*contiguous",
    ),
    (
        S,
        STRIDED,
        ValueError,
        r"teacher_logits has stride 2 in its last dimension, expected 1: pass .*contiguous",
    ),
    (S, T[..., :1].expand(2, 3, 8), ValueError, "teacher_logits has stride 0 in its last dim"),
    (S.to_sparse(), T, TypeError, "student_logits is torch.sparse_coo, .*layout torch.strided"),
    (NESTED, T, TypeError, "student_logits is a nested tensor, expected a plain tensor"),
    (S, META, ValueError, "teacher_logits is on meta, expected the device of student_logits, cpu"),
    (META, T, ValueError, "teacher_logits is on cpu, expected the device of student_logits, meta"),
    (S, T.clone().requires_grad_(), ValueError, r"teacher_logits requires grad, .*detach\(\)"),
]


@pytest.mark.parametrize(("student", "teacher", "error", "match"), LOGITS)
@pytest.mark.parametrize("backend", ["auto", "cpu", "reference"])
def test_logits(student, teacher, error, match, backend):
    with pytest.raises(error, match=match):
        kd_loss(student, teacher, backend=backend)


OPTIONS = [
    # option, value, exception, the message
    ("temperature", 0, ValueError, "temperature is 0, expected positive and finite"),
    ("temperature", -1.0, ValueError, "temperature is -1.0, expected positive and finite"),
    ("temperature", math.nan, ValueError, "temperature is nan, expected positive and finite"),
    ("temperature", math.inf, ValueError, "temperature is inf, expected positive and finite"),
    ("temperature", "2", TypeError, "temperature is a str, expected a number"),
    ("temperature", None, TypeError, "temperature is a NoneType, expected a number"),
    ("temperature", True, TypeError, "temperature is a bool, expected a number"),
    ("temperature", torch.tensor(2.0), TypeError, "temperature is a Tensor, expected a number"),
    ("temperature", 1e39, ValueError, r"temperature is 1e\+39, expected what float32 can hold"),
    ("temperature", 10**400, ValueError, "temperature is 10+, expected what float32 can hold"),
    ("kd_weight", -1e39, ValueError, r"kd_weight is -1e\+39, expected what float32 can hold"),
    ("student_softcap", 1e-39, ValueError, "student_softcap is 1e-39, expected what float32"),
    ("kd_weight", math.nan, ValueError, "kd_weight is nan, expected finite"),
    ("kd_weight", "1", TypeError, "kd_weight is a str, expected a number"),
    ("ce_weight", math.inf, ValueError, "ce_weight is inf, expected finite"),
    ("ce_weight", 0.5, ValueError, "ce_weight is 0.5, which needs labels"),
    ("ce_weight", -0.5, ValueError, "ce_weight is -0.5, which needs labels"),
    ("divergence", "kl", ValueError, "divergence is 'kl', expected one of forward_kl, reverse_kl"),
    ("divergence", "alpha_beta", ValueError, r"which has no defaults, expected AlphaBeta\(a"),
    ("divergence", None, TypeError, "divergence is a NoneType, expected a name or a Divergence"),
    (
        "divergence",
        JSD,
        TypeError,
        r"divergence is the class JSD, expected a name or a Div.*, such as JSD\(\.\.\.\)",
    ),
    ("divergence", 3, TypeError, "divergence is a int, expected a name or a Divergence"),
    (
        "labels",
        LABELS.int(),
        TypeError,
        r"labels is torch.int32, expected int64: .*labels.long\(\)",
    ),
    ("labels", LABELS.float(), TypeError, "labels is torch.float32, expected int64$"),
    ("labels", LABELS[:1], ValueError, r"labels has shape \(1, 3\), expected \(2, 3\)"),
    ("labels", LABELS.view(6), ValueError, r"labels has shape \(6,\), expected \(2, 3\)$"),
    ("labels", LABELS.new_zeros(2, 4), ValueError, r"expected \(2, 3\): .*labels\[\.\.\., 1:\]"),
    ("labels", LABELS.to("meta"), ValueError, "labels is on meta, expected cpu"),
    ("labels", LABELS.to_sparse(), TypeError, "labels is torch.sparse_coo, .*layout torch.strided"),
    ("token_weight", S[..., 0].to_sparse(), TypeError, "token_weight is torch.sparse_coo, exp"),
    ("token_weight", NESTED, TypeError, "token_weight is a nested tensor, expected a plain"),
    ("normalizer", NESTED, TypeError, "normalizer is a nested tensor, expected a plain tensor"),
    ("labels", [[0]], TypeError, "labels is a list, expected a torch.Tensor"),
    ("ignore_index", "x", TypeError, "ignore_index is a str, expected an int"),
    ("ignore_index", 1.5, TypeError, "ignore_index is a float, expected an int"),
    ("ignore_index", None, TypeError, "ignore_index is a NoneType, expected an int"),
    (
        "ignore_index",
        2**63,
        ValueError,
        "ignore_index is 9223372036854775808, expected an int of 64",
    ),
    ("token_weight", LABELS, TypeError, r"token_weight is torch.int64, .*float32.*weight.bool\(\)"),
    ("token_weight", torch.ones(2, 4), ValueError, r"\(2, 3\): .*token_weight\[\.\.\., 1:\]"),
    ("token_weight", S, ValueError, r"token_weight has shape \(2, 3, 8\), expected \(2, 3\)"),
    ("token_weight", META[..., 0], ValueError, "token_weight is on meta, expected cpu"),
    ("token_weight", LEARNT.expand(2, 3), ValueError, r"token_weight requires grad, .*detach\(\)"),
    ("normalizer", LEARNT, ValueError, r"normalizer requires grad, .*detach\(\)"),
    ("token_weight", 1.0, TypeError, "token_weight is a float, expected a torch.Tensor"),
    ("reduction", "average", ValueError, "reduction is 'average', expected one of none, sum, mean"),
    ("reduction", None, ValueError, "reduction is None, expected one of none, sum, mean"),
    ("reduction", np.zeros(2), ValueError, "reduction is array.*, expected one of none, sum, mean"),
    ("normalizer", 0, ValueError, "normalizer is 0, expected positive and finite"),
    ("normalizer", -2.0, ValueError, "normalizer is -2.0, expected positive and finite"),
    ("normalizer", math.nan, ValueError, "normalizer is nan, expected positive and finite"),
    ("normalizer", "3", TypeError, "normalizer is a str, expected a number"),
    ("normalizer", torch.tensor(True), TypeError, "normalizer is torch.bool, expected a real"),
    ("normalizer", torch.tensor(1j), TypeError, "normalizer is torch.complex64, expected a real"),
    ("normalizer", torch.ones(2), ValueError, r"normalizer has shape \(2,\), expected a 0-d"),
    ("normalizer", torch.ones(1), ValueError, r"normalizer has shape \(1,\), expected a 0-d"),
    ("vocab_size", 9, ValueError, "vocab_size is 9, expected 1 to 8.*8 .student. and 8 .teacher."),
    ("vocab_size", 0, ValueError, "vocab_size is 0, expected 1 to 8"),
    ("vocab_size", -1, ValueError, "vocab_size is -1, expected 1 to 8"),
    ("vocab_size", 4.0, TypeError, "vocab_size is a float, expected an int"),
    ("vocab_size", True, TypeError, "vocab_size is a bool, expected an int"),
    ("student_scale", 0, ValueError, "student_scale is 0, expected positive and finite"),
    ("teacher_scale", math.inf, ValueError, "teacher_scale is inf, expected positive and finite"),
    ("student_scale", "1", TypeError, "student_scale is a str, expected a number"),
    ("student_softcap", 0, ValueError, "student_softcap is 0, expected positive and finite"),
    ("student_softcap", -30.0, ValueError, "student_softcap is -30.0, expected positive"),
    ("teacher_softcap", 0.0, ValueError, "teacher_softcap is 0.0, expected positive"),
    ("teacher_softcap", math.nan, ValueError, "teacher_softcap is nan, expected positive"),
    ("teacher_softcap", "30", TypeError, "teacher_softcap is a str, expected a number"),
    (
        "backend",
        "metal",
        ValueError,
        "backend is 'metal', expected 'auto', 'cpu', 'cuda', .*'reference'",
    ),
    ("backend", None, ValueError, "backend is None, expected 'auto', 'cpu', 'cuda', .*'reference'"),
    ("backend", np.zeros(2), ValueError, "backend is array.*, expected 'auto', 'cpu', 'cuda'"),
    ("temperature_squared", 2.0, TypeError, "temperature_squared is a float, expected a bool"),
    ("return_metrics", "no", TypeError, "return_metrics is a str, expected a bool"),
    ("inplace_grad", None, TypeError, "inplace_grad is a NoneType, expected a bool"),
]


@pytest.mark.parametrize(("name", "value", "error", "match"), OPTIONS)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_option(name, value, error, match, backend):
    options = {"backend": backend, name: value}
    with pytest.raises(error, match=match):
        kd_loss(S, T, **options)


def linear_head(**options):
    return LinearKDHead(torch.nn.Linear(4, 8), **options)


@pytest.mark.parametrize("make", [KDLoss, LinearKDLoss, linear_head])
def test_modules_check_their_options_when_made(make):
    known = make().known
    for name, value, error, match in OPTIONS:
        if name not in known or "needs labels" in match or name == "vocab_size":
            continue
        with pytest.raises(error, match=match):
            make(**{name: value})
    assert make(ce_weight=0.5, vocab_size=9, student_softcap=None)
    for size, error, match in (
        (0, ValueError, "vocab_size is 0, expected at least 1"),
        (4.0, TypeError, "vocab_size is a float, expected an int"),
    ):
        with pytest.raises(error, match=match):
            make(vocab_size=size)
    if make is not KDLoss:
        with pytest.raises(ValueError, match="chunk_bytes is 0, expected at least 1"):
            make(chunk_bytes=0)
        with pytest.raises(ValueError, match=r"logits_dtype is torch\.float16, expected None or"):
            make(logits_dtype=torch.float16)


LOSSES = {
    kdkernels.kd_loss: KDLoss,
    kdkernels.linear_kd_loss: LinearKDLoss,
    kdkernels.sparse_kd_loss: SparseKDLoss,
    kdkernels.linear_sparse_kd_loss: LinearSparseKDLoss,
}


@pytest.mark.parametrize("loss", LOSSES)
def test_every_keyword_is_known(loss):
    """To those who check options, and to type checkers."""
    module = LOSSES[loss]
    signature = inspect.signature(loss).parameters.values()
    named = {p.name for p in signature if p.kind is inspect.Parameter.KEYWORD_ONLY}
    typed = getattr(kdkernels.keywords, module.__name__.replace("Loss", "Keywords"))
    assert named == {*typed.__annotations__, "return_metrics"}
    assert {*module.known} <= named & scalars._OPTIONS.keys()
    tensors = inspect.signature(module.forward).parameters.keys()
    assert named == {*module.known, *tensors} & named
    assert not tensors & {*module.known}


def test_numbers_of_numpy():
    options = {"vocab_size": 4, "ignore_index": -1, "temperature": 2.0, "normalizer": 3.0}
    of_numpy = {name: np.array(value)[()] for name, value in options.items()}
    of_numpy["temperature_squared"] = np.array(True)[()]
    student = torch.arange(48.0).view(2, 3, 8).sin()
    expected = kd_loss(student, T, labels=LABELS, **options)
    assert torch.equal(kd_loss(student, T, labels=LABELS, **of_numpy), expected)


def test_products_that_float32_cannot_hold():
    for options, name in (
        ({"temperature": 1e25}, r"kd_weight \* temperature \*\* 2"),
        ({"kd_weight": 1e30, "normalizer": 1e-20}, "kd_weight / normalizer"),
        ({"labels": LABELS, "ce_weight": 1e30, "normalizer": 1e-20}, "ce_weight / normalizer"),
    ):
        with pytest.raises(ValueError, match=rf"{name} is .*e\+50, expected what float32 can hold"):
            kd_loss(S, T, **options)


def test_teacher_narrower_than_vocab_size():
    with pytest.raises(ValueError, match=r"vocab_size is 7, expected 1 to 6.*8 .*6"):
        kd_loss(S, T[..., :6], vocab_size=7)


@pytest.mark.parametrize("label", [-1, -99, 8, 9, 2**40])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("ce_weight", [0.0, 1.0])
def test_labels_outside_the_vocabulary(label, backend, ce_weight):
    labels = LABELS.clone()
    labels[1, 2] = label
    with pytest.raises(ValueError, match=f"labels.*{label}, expected 0 to 7 or ignore_index"):
        kd_loss(S, T, labels=labels, ce_weight=ce_weight, backend=backend)
    # A row that takes no part may hold anything.
    weight = torch.ones(2, 3)
    weight[1, 2] = 0
    kd_loss(S, T, labels=labels, ce_weight=ce_weight, backend=backend, token_weight=weight)
    kd_loss(S, T, labels=labels, ce_weight=ce_weight, backend=backend, ignore_index=label)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_labels_beyond_vocab_size(backend):
    with pytest.raises(ValueError, match=r"labels.*6, expected 0 to 5"):
        kd_loss(S, T, labels=LABELS + 6, ce_weight=1.0, vocab_size=6, backend=backend)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: JSD(-0.1), r"beta is -0.1, expected a number in \[0, 1\]"),
        (lambda: JSD(beta=1.1), r"beta is 1.1, expected a number in \[0, 1\]"),
        (lambda: JSD(math.nan), r"beta is nan, expected a number in \[0, 1\]"),
        (lambda: SkewForwardKL(1), r"alpha is 1, expected a number in \[0, 1\)"),
        (lambda: SkewForwardKL(-0.1), r"alpha is -0.1, expected a number in \[0, 1\)"),
        (lambda: SkewReverseKL(1.0), r"alpha is 1.0, expected a number in \[0, 1\)"),
        (lambda: SymmetricKL(2), r"weight is 2, expected a number in \[0, 1\]"),
        (lambda: AlphaBeta(math.inf, 1), "alpha is inf, expected a finite number"),
        (lambda: AlphaBeta(1, math.nan), "beta is nan, expected a finite number"),
        (lambda: AlphaBeta(1, -(10**400)), "beta is -10+, expected a finite number that float32"),
    ],
)
def test_parameters_of_divergences(make, match):
    with pytest.raises(ValueError, match=match):
        make()


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: JSD("0.5"), "beta"),
        (lambda: SkewForwardKL(None), "alpha"),
        (lambda: SymmetricKL([1]), "weight"),
        (lambda: AlphaBeta("a", 1), "alpha"),
        (lambda: AlphaBeta(1, None), "beta"),
    ],
)
def test_parameters_of_divergences_are_numbers(make, name):
    with pytest.raises(TypeError, match=f"{name} is a .*, expected a number"):
        make()


def test_unknown_keywords():
    with pytest.raises(TypeError, match="temprature"):
        kd_loss(S, T, temprature=2.0)
    with pytest.raises(TypeError, match="temprature"):
        KDLoss(temprature=2.0)
    with pytest.raises(TypeError, match="labels"):
        KDLoss(labels=LABELS)
    with pytest.raises(TypeError, match="positional"):
        kd_loss(S, T, "jsd")
    with pytest.raises(
        TypeError, match=r"KDLoss got 2\.0 by position, expected options by name: div"
    ):
        KDLoss(2.0)


def test_a_divergence_that_is_summed_already():
    class Summed(kdkernels.Divergence):
        def value(self, log_p, log_q):
            return (log_p - log_q).square().sum(-1)

    with pytest.raises(ValueError, match=r"value of Summed has shape \(2, 3\), .* \(2, 3, 8\)"):
        kd_loss(S, T, divergence=Summed())


def test_backends_say_why_not():
    with pytest.raises(ValueError, match=r"cpu: student_logits is torch.float64.*takes float32"):
        kd_loss(S.double(), T, backend="cpu")
    with pytest.raises(ValueError, match=r"cpu: teacher_logits is torch.float64"):
        kd_loss(S, T.double(), backend="cpu")
    leaf = S.double().requires_grad_()
    with pytest.raises(ValueError, match=r"cpu: .*float64.*reference: .*cannot overwrite"):
        kd_loss(leaf * 1, T, inplace_grad=True)


@pytest.mark.skipif(bool(emulated.PATH), reason="the emulator takes tensors on the CPU")
def test_cuda_says_why_not_on_the_cpu():
    with pytest.raises(ValueError, match=r"cuda: the tensors are on cpu, not on a CUDA device"):
        kd_loss(S, T, backend="cuda")
    if torch.cuda.is_available():
        return
    for reason in kdkernels.backends.cuda.device_reasons():
        with pytest.raises(ValueError, match=f"cuda: .*{re.escape(reason)}"):
            kd_loss(S, T, backend="cuda")


def test_a_call_on_the_cpu_leaves_devices_alone(monkeypatch):
    def ask(index=0):
        raise AssertionError("this would make a context on a device that the call does not use")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(kdkernels.backends.cuda, "device_reasons", ask)
    assert kd_loss(S.double(), T).dtype == torch.float64  # after the refusals of all kernels


def test_unknown_instruction_set(monkeypatch):
    monkeypatch.setenv("KDKERNELS_CPU_ISA", "bogus")
    with pytest.raises(ValueError, match=r"KDKERNELS_CPU_ISA=bogus is not.*baseline"):
        kd_loss(S, T, backend="cpu")


def test_nothing_is_written_before_a_check():
    leaf = S.clone().requires_grad_()
    labels = LABELS.clone()
    labels[1, 2] = 99
    bad = [
        {"labels": labels, "ce_weight": 1.0},
        {"temperature": 0},
        {"vocab_size": 9},
        {"student_softcap": -1},
        {"backend": "reference"},
        {"normalizer": 0},
    ]
    for options in bad:
        logits = leaf + 1
        with pytest.raises(ValueError, match=r"."):
            kd_loss(logits, T, inplace_grad=True, **options)
        assert torch.equal(logits, torch.ones_like(logits))
        assert logits._version == 0


def test_tables_of_divergences_agree():
    assert kdkernels._C.divergences() == list(kdkernels.divergences.DIVERGENCES)
