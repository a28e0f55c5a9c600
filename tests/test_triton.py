"""What only the Triton backend has: compiled kernels, agreement with the CPU."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import types
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import kdkernels
from kdkernels import ForwardKL, extension, kd_loss
from kdkernels.backends import triton as triton_backend
from kdkernels.options import LogitsOptions

from . import compiled_triton, interpreter, tolerances, upstream
from .cases import (
    ALL,
    ONE_OF_EACH,
    close_pair,
    correlated_pair,
    labels_for,
    normal,
    without_ties,
)
from .documents import ROOT
from .harness import (
    TRITON,
    assert_as_oracle,
    assert_close,
    assert_gradient_of,
    assert_matches,
    assert_metrics,
    loss_of,
    move,
    oracle,
    run,
)
from .test_compile import operands
from .test_compile import options as operator_options

pytestmark = pytest.mark.skipif(not interpreter.INSTALLED, reason="Triton is not installed")


@pytest.mark.skipif(bool(extension.missing), reason=extension.missing)
@pytest.mark.parametrize("divergence", ONE_OF_EACH, ids=str)
def test_agrees_with_the_cpu(divergence):
    student, teacher = correlated_pair(3, 2503)
    labels = labels_for(3, vocab=2503)
    options = {"divergence": divergence, "labels": labels, "ce_weight": 0.5, "temperature": 2.0}
    actual = run(TRITON, student, teacher, **options)
    leaf = student.clone().requires_grad_()
    loss = kd_loss(leaf, teacher, backend="cpu", **options)
    loss.backward()
    assert abs(actual.loss - loss.detach()) <= 1e-6 * loss.detach().abs()
    assert (actual.gradient - leaf.grad).norm() <= 1e-6 * leaf.grad.norm()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", ["logits_loss", "logits_loss_and_grad", "logits_loss_and_grad_"])
def test_opcheck(name):
    operator = getattr(torch.ops.kdkernels, name).default
    *tensors, _ = (move(x, TRITON.device) for x in operands(torch.float16))
    torch.library.opcheck(operator, (*tensors, "triton", *operator_options()))


def test_imports_and_refuses_without_triton():
    script = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Missing())
import importlib.util, torch
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "triton" else find(name, *rest)
import kdkernels
x = torch.zeros(2, 3)
print(float(kdkernels.kd_loss(x, x)))
try:
    kdkernels.kd_loss(x, x, backend="triton")
except ValueError as error:
    print(error)
"""
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.startswith("0.0\n")
    assert "triton: Triton is not installed" in result.stdout


def test_what_stands_in_for_triton_is_not_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", types.ModuleType("triton"))
    assert not triton_backend._installed()


@pytest.mark.skipif(bool(compiled_triton.FOLDER), reason="kernels are compiled for the CPU")
@pytest.mark.parametrize("value", ["1", "true", "ON", "yes", "Y", "0", "off", ""])
def test_an_interpreter_where_triton_has_one(monkeypatch, value):
    from triton import knobs

    monkeypatch.setenv("TRITON_INTERPRET", value)
    assert triton_backend._interpreted() == knobs.runtime.interpret


@pytest.mark.parametrize(("device", "refusals"), [("cuda", 0), ("xpu", 0), ("mps", 1)])
def test_devices_that_kernels_are_compiled_for(device, refusals):
    logits = SimpleNamespace(device=torch.device(device), dtype=torch.float32)
    assert len(triton_backend.why_not(logits, logits, ForwardKL())) == refusals


def test_float64_by_few_operations():
    from .triton_functions import log_and_inverse

    # Sums of exponentials, among them those that float32 rounds across an octave's border.
    near = 2.0 ** torch.arange(-8.0, 8.0, 0.5, dtype=torch.float64)
    by = 1 + 2.0 ** torch.arange(-52.0, 0.0, dtype=torch.float64)
    numbers = torch.cat([(near[:, None] * by).flatten(), (near[:, None] / by).flatten()])
    numbers = torch.cat([numbers, (normal(768) * 20).exp().double()]).to(interpreter.DEVICE)
    logs, inverses = torch.empty_like(numbers), torch.empty_like(numbers)
    log_and_inverse[(1,)](numbers, logs, inverses, len(numbers))
    assert (logs - numbers.log()).abs().max() < 4e-12
    assert (inverses * numbers - 1).abs().max() < 2e-14


@pytest.mark.parametrize("divergence", ONE_OF_EACH, ids=str)
def test_what_a_kernel_compares_with_none_holds_no_none(divergence):
    # Triton up to 3.6 has no type for it then; the interpreter does not mind.
    from kdkernels.triton import launch

    options = LogitsOptions(*divergence.kernel(), *operator_options()[3:])
    far = launch._divergence(options).far
    assert far is None or None not in far


@pytest.mark.parametrize("number", [Fraction(1, 2), np.float32(0.5), 2], ids=repr)
def test_parameters_are_floats(number):
    # A launch refuses other numbers, and an int of 1 would compile another kernel.
    parameters = kdkernels.AlphaBeta(number, number).kernel()[1:]
    assert [type(parameter) for parameter in parameters] == [float, float]


def test_kdkernels_does_not_import_triton():
    script = "import sys, kdkernels; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


@pytest.mark.skipif(bool(compiled_triton.FOLDER), reason="the emulator takes tensors on the CPU")
def test_refuses_cpu_tensors_where_kernels_are_compiled(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    student, teacher = correlated_pair(3, 37)
    with pytest.raises(ValueError, match="triton: the tensors are on cpu"):
        kd_loss(student, teacher, backend="triton")
    assert math.isfinite(kdkernels.kd_loss(student, teacher))


def compiling(*arguments: str) -> str:
    """What Python prints where kernels are compiled, for GPUs that need not be here."""
    result = subprocess.run(
        [sys.executable, "-W", "ignore", *arguments],
        env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr[-2000:]
    return result.stdout


@upstream.before("triton", 3, 9, reason="spills a number of a row or block in some kernels")
def test_no_kernel_spills():
    """A sample, as all of them take three minutes."""
    printed = compiling("-m", "benchmarks.triton_resources", "--check", "--every", "7")
    assert "57 kernels compiled, 0 spill" in printed


def test_no_kernel_spilled_when_all_were_compiled():
    """Every schedule, divergence and dtype, of the sources as they are."""
    recorded = json.loads((ROOT / "benchmarks/results/triton_resources.json").read_text())
    script = "from benchmarks.triton_resources import sources; print(sources())"
    assert recorded["sources"] == compiling("-c", script).strip(), (
        "the kernels have changed: python -m benchmarks.triton_resources --output "
        "benchmarks/results/triton_resources.json, then python -m benchmarks.report"
    )
    assert len(recorded["kernels"]) == 399
    assert not any(kernel["stack"] or kernel["local"] for kernel in recorded["kernels"])


def test_batches_of_any_size_take_the_same_kernels():
    """A trainer's rows change from step to step, and compiling takes a second."""
    script = """
from benchmarks.triton_resources import SCALE, TAILS, TARGETS, Kernel, compile_kernel
from kdkernels.triton import launch
for rows in (1, 7, 16):
    for what in ("forward_kl", SCALE, TAILS):
        compile_kernel(Kernel(TARGETS[0], what, "bfloat16", 1000, rows=rows))
    compile_kernel(Kernel(TARGETS[0], TAILS, "bfloat16", 1000, gradient=False, rows=rows))
    compile_kernel(Kernel(TARGETS[0], "jsd", "bfloat16", 1000, phase="sums", rows=rows))
for name in ("loss", "scale", "tails", "tails_gradient", "shard"):
    (cache,) = getattr(launch, f"{name}_kernel").device_caches.values()
    print(name, len(cache[0]))
"""
    printed = compiling("-c", script)
    assert printed.split()[1::2] == ["1"] * 5, printed


@pytest.fixture
def many_blocks(monkeypatch):
    """Rows of 517 columns are five blocks."""
    from kdkernels.triton import schedule

    monkeypatch.setattr(schedule, "choose", lambda *_: schedule.Schedule(128, 1))


@pytest.mark.usefixtures("many_blocks")
@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
def test_hostile_rows_of_many_blocks(divergence):
    student, teacher = correlated_pair(7, 517)
    student[0, :300] = teacher[0, :300] = -math.inf  # whole blocks
    student[1, 5] = math.nan
    teacher[2] = -math.inf
    student[3, 400] = teacher[3, 400] = 1e4
    labels = torch.tensor([400, 1, 2, 400, -100, 0, 516])
    options = {
        "divergence": divergence,
        "labels": labels,
        "ce_weight": 0.5,
        "temperature": 2.0,
        "reduction": "none",
        "return_metrics": True,
    }
    for inplace in (False, True):
        expected = oracle(student, teacher, **options)
        actual = run(TRITON, student, teacher, inplace_grad=inplace, **options)
        assert_metrics(actual.metrics, expected.metrics, divergence)
        assert_close(actual.loss, expected.loss, tolerances.loss_tolerance(divergence))
        # Row 3 is certain of the same token in both: its gradient is rounding.
        others = [0, 1, 2, 4, 5, 6]
        gradients = actual.gradient[others], expected.gradient[others]
        assert_gradient_of(divergence, torch.float32, *gradients)


@pytest.fixture
def no_near_rows(monkeypatch):
    """Fails where a row takes the formulas that keep digits near the teacher."""
    if compiled_triton.FOLDER or not TRITON.interpreted:
        pytest.skip("a compiled kernel has its functions inside: runs in the interpreter")
    from kdkernels.triton import rows

    def refuse(*_):
        raise AssertionError("a near row")

    monkeypatch.setattr(rows, "write_near", refuse)


@pytest.mark.usefixtures("no_near_rows")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("divergence", ONE_OF_EACH, ids=str)
def test_far_rows_take_the_textbook_formulas(divergence, dtype):
    student, teacher = correlated_pair(3, 517)
    student[1] *= 3
    student, teacher = student.to(dtype), teacher.to(dtype)
    options = {"divergence": divergence, "labels": labels_for(3, vocab=517), "ce_weight": 0.5}
    options |= {"student_softcap": 30.0, "reduction": "none"}
    expected = oracle(student, teacher, **options)
    assert_matches(run(TRITON, student, teacher, **options), expected, divergence.name, dtype)
    with torch.no_grad():
        loss = loss_of(TRITON, student, teacher, **options)
    assert_close(loss.cpu(), expected.loss, tolerances.loss_tolerance(divergence.name))


@pytest.mark.usefixtures("no_near_rows", "many_blocks")
@pytest.mark.parametrize("divergence", ONE_OF_EACH, ids=str)
def test_far_rows_whose_largest_logits_come_late(divergence):
    student, teacher = correlated_pair(3, 517)
    # What exponentials are relative to moves with these.
    steps = 30.0 * (torch.arange(517) // 128).clamp(max=3)
    student += steps
    teacher += steps
    student[1] -= 1000
    student[2] *= torch.linspace(1, 1.2, 517)
    options = {"divergence": divergence, "temperature": 0.75, "reduction": "none"}
    actual = run(TRITON, student, teacher, **options)
    assert_as_oracle(actual, student, teacher, **options)


def pair_at(level, divergence, temperature):
    """A row whose divergence is about ``level``; of soft cross-entropy, without the entropy."""
    teacher, noise = 2 * normal(1, 1030, seed=1), temperature * normal(1, 1030, seed=2)
    value = (ForwardKL() if divergence.name == "soft_cross_entropy" else divergence).value
    log_p = torch.log_softmax(teacher.double() / temperature, -1)
    below, above = 0.0, 20.0
    for _ in range(40):
        distance = (below + above) / 2
        student = teacher + distance * noise
        log_q = torch.log_softmax(student.double() / temperature, -1)
        if value(log_p, log_q).sum() < level:
            below = distance
        else:
            above = distance
    return student, teacher


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("divergence", ALL, ids=str)
def test_rows_at_the_border_of_far(divergence, temperature):
    from kdkernels.triton.divergences import FUNCTIONS

    name, *parameters = divergence.kernel()
    far_from = FUNCTIONS[name].far_from(*parameters)
    if math.isinf(far_from):
        pytest.skip("none of its rows is far")
    pairs = [pair_at(level * far_from, divergence, temperature) for level in (0.999, 1.001, 1.1)]
    student, teacher = (torch.cat(logits) for logits in zip(*pairs, strict=True))
    if divergence.name == "tvd":
        student = without_ties(student, teacher, temperature, tolerances.TVD_TIE)
    options = {"divergence": divergence, "temperature": temperature, "reduction": "none"}
    actual = run(TRITON, student, teacher, **options)
    assert_as_oracle(actual, student, teacher, **options)


@pytest.mark.parametrize("divergence", ONE_OF_EACH, ids=str)
def test_a_rare_token_makes_kl_large_and_nothing_else(divergence):
    teacher = normal(3, 517)
    student = teacher + 0.05 * normal(3, 517, seed=1)
    rest = teacher[:, 1:].logsumexp(-1)
    teacher[:, 0] = rest + torch.tensor([1e-3, 3e-3, 0.1]).log()
    student[:, 0] = rest + math.log(1e-12)
    options = {"divergence": divergence, "reduction": "none"}
    actual = run(TRITON, student, teacher, **options)
    assert_as_oracle(actual, student, teacher, **options, close=True)


@pytest.mark.usefixtures("no_near_rows", "many_blocks")
@pytest.mark.parametrize(
    "lower", [None, (2.7, 4.6), (4.0, 2.7)], ids=["close", "drowned", "drowned the other way"]
)
def test_near_rows_do_not_take_them(lower):
    student, teacher = close_pair(2, 512)
    if lower:
        # Two terms of its divergence, of 1/28, are 36 times as large or more: the sums are relative
        # to tokens of the first block that both choose with probabilities of 1 % to 6 %.
        teacher = 0.3 * correlated_pair(2, 512)[1]
        rest = teacher[:, 128:].logsumexp(-1, keepdim=True) - math.log(128)
        student = teacher.clone()
        student[:, :128], teacher[:, :128] = rest - lower[0], rest - lower[1]
    with pytest.raises(Exception, match="a near row"):
        run(TRITON, student, teacher)


@pytest.mark.parametrize("divergence", ONE_OF_EACH, ids=str)
def test_far_rows_with_infinite_logits(divergence):
    student, teacher = correlated_pair(4, 517)
    student[0, 5:300] = teacher[0, 5:300] = -math.inf
    student[1, 7] = -math.inf
    teacher[2, 9] = -math.inf
    options = {"divergence": divergence, "reduction": "none"}
    expected = oracle(student, teacher, **options)
    actual = run(TRITON, student, teacher, **options)
    assert_close(actual.loss, expected.loss, tolerances.loss_tolerance(divergence.name))
    rows = [0, 1, 2, 3]
    if divergence.name in ("reverse_kl", "symmetric_kl"):  # infinite: there is no gradient
        assert actual.gradient[2].isnan().all()
        rows.remove(2)
    gradients = actual.gradient[rows], expected.gradient[rows]
    assert_gradient_of(divergence.name, torch.float32, *gradients)


def test_tables_of_divergences_agree():
    from kdkernels.triton.divergences import FUNCTIONS

    assert list(FUNCTIONS) == list(kdkernels.divergences.DIVERGENCES)
