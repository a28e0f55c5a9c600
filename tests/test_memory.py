"""Peak memory of a call, measured in a process of its own, and tensors of over 2^31 elements."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

import kdkernels

from . import tolerances
from .cases import DTYPES, correlated_pair
from .harness import InPlace, assert_close, assert_gradient, oracle
from .test_compile import COMPILER

MIB = 2**20
ROWS, VOCAB = 512, 32768
TENSOR = ROWS * VOCAB * 4 / MIB  # 64 MiB in float32

PROLOGUE = """
import sys, torch, kdkernels
from kdkernels import kd_loss

def status(field):
    for line in open("/proc/self/status"):
        if line.startswith(field):
            return int(line.split()[1]) / 1024

class InPlace(torch.autograd.Function):  # makes a tensor no leaf without copying it
    @staticmethod
    def forward(ctx, seed, tensor):
        return tensor.detach()
    @staticmethod
    def backward(ctx, gradient):
        return gradient.new_zeros(()), None

def peak(call):
    "Mebibytes that `call` takes at most beyond what was there before."
    before = status("VmRSS")
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak starts again from here
    call()
    return status("VmHWM") - before

torch.set_num_threads(2)
seed = torch.zeros((), requires_grad=True)
rows, vocab = {rows}, {vocab}
def make(dtype=torch.float32):
    return torch.full((rows, vocab), 0.5).to(dtype), torch.full((rows, vocab), 0.25).to(dtype)
"""


def measure(body: str) -> list[float]:
    """The numbers that a script prints; it starts with small calls of its own."""
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("peak memory is read from Linux's /proc/self/clear_refs and VmHWM")
    script = PROLOGUE.replace("{rows}", str(ROWS)).replace("{vocab}", str(VOCAB))
    paths = [str(Path(kdkernels.__file__).parents[1]), *filter(None, sys.path)]
    result = subprocess.run(
        [sys.executable, "-c", script + textwrap.dedent(body)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return [float(x) for x in result.stdout.split()[-1].split(",")]


SCRATCH = 2 * tolerances.SCRATCH_PER_THREAD + tolerances.MEMORY_NOISE


@pytest.mark.parametrize("options", ["", "divergence='jsd', temperature=2.0, return_metrics=True"])
@pytest.mark.parametrize(("dtype", "size"), [("float32", TENSOR), ("bfloat16", TENSOR / 2)])
def test_eager(dtype, size, options):
    fresh, inplace, loss_only = measure(f"""
        s, t = make(torch.{dtype})
        def loss(student, **more):
            result = kd_loss(student, t, {options or "temperature=2.0"}, **more)
            return result[0] if isinstance(result, tuple) else result
        for inplace in (False, True):  # libraries load, thread pools start
            small, t0, t = InPlace.apply(seed, s[:2].clone()), t, t[:2]
            loss(small, inplace_grad=inplace).backward()
            t = t0
        def step(inplace):
            loss(InPlace.apply(seed, s), inplace_grad=inplace).backward()
        def only():
            with torch.no_grad():
                loss(s)
        print(",".join(str(peak(f)) for f in (lambda: step(False), lambda: step(True), only)))
    """)
    assert fresh < size + SCRATCH
    assert inplace < SCRATCH
    assert loss_only < SCRATCH


def test_scaling_the_gradient_takes_no_memory():
    fresh, inplace = measure("""
        s, t = make()
        def step(inplace):
            (3 * kd_loss(InPlace.apply(seed, s), t, inplace_grad=inplace)).backward()
        s, big, t, big_t = s[:2], s, t[:2], t
        step(False), step(True)
        s, t = big, big_t
        print(",".join(str(peak(f)) for f in (lambda: step(False), lambda: step(True))))
    """)
    assert fresh < TENSOR + SCRATCH
    assert inplace < SCRATCH


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_on_a_gpu(gpu, dtype, divergence):
    """What PyTorch's allocator hands out beyond both logits: the gradient, or next to nothing."""
    student, teacher = (torch.full((ROWS, VOCAB), x, dtype=dtype, device="cuda") for x in (0.5, 0))
    seed = torch.zeros((), device="cuda", requires_grad=True)
    options = {"divergence": divergence, "temperature": 2.0, "backend": gpu.backend}

    def step(rows, inplace):
        logits = InPlace.apply(seed, student[:rows])
        (3 * kdkernels.kd_loss(logits, teacher[:rows], inplace_grad=inplace, **options)).backward()

    def only(rows):
        with torch.no_grad():
            kdkernels.kd_loss(student[:rows], teacher[:rows], **options)

    def peak(call):
        call(2)  # kernels load, streams and buffers of their own come into being
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call(ROWS)
        return (torch.cuda.max_memory_allocated() - before) / MIB

    size = student.numel() * student.element_size() / MIB
    fresh, inplace = peak(lambda rows: step(rows, False)), peak(lambda rows: step(rows, True))
    loss_only = peak(only)
    print(f"MiB: fresh {fresh}, in place {inplace}, loss only {loss_only}, of {size}")
    assert size <= fresh < size + 1
    assert inplace < 1
    assert loss_only < 1


@COMPILER
def test_compiled():
    """Compiled, from hidden states: logits are an intermediate, as in a training step."""
    eager_fresh, eager_inplace, fresh, inplace = measure("""
        hidden = torch.full((rows, 8), 0.5, requires_grad=True)
        head = torch.full((vocab, 8), 0.25)
        t = torch.full((rows, vocab), 0.25)
        def step(hidden, t, inplace):
            return kd_loss(hidden @ head.T, t, inplace_grad=inplace)
        compiled = torch.compile(step, fullgraph=True)
        def run(function, inplace):
            def call():
                function(hidden, t, inplace).backward()
            call()
            return call
        calls = [run(f, i) for f in (step, compiled) for i in (False, True)]
        print(",".join(str(peak(call)) for call in calls))
    """)
    print(f"MiB: eager {eager_fresh} {eager_inplace}, compiled {fresh} {inplace}, of {TENSOR}")
    noise = SCRATCH + 8  # Inductor's buffers and the product's packed operands
    assert eager_fresh < 2 * TENSOR + noise  # logits and gradient
    assert eager_inplace < TENSOR + noise
    assert fresh < 2 * TENSOR + noise
    assert inplace < TENSOR + noise


def available_gib() -> float:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 0.0
    return next(int(x.split()[1]) for x in lines if x.startswith("MemAvailable")) / 2**20


def test_more_than_2_to_the_31_elements(threads):
    divergence = "jsd"  # writes in a sweep of its own
    needed = 12
    if available_gib() < needed:
        pytest.skip(f"needs {needed} GiB of free memory, {available_gib():.1f} GiB are available")
    threads(2)
    vocab, rows = 2**17 + 3, 2**14 + 2
    assert rows * vocab > 2**31
    student, teacher = (x.bfloat16() for x in correlated_pair(2, vocab))
    logits = torch.empty(rows // 2, 2, vocab, dtype=torch.bfloat16)
    logits.copy_(student.expand(rows // 2, 2, vocab))
    logits = logits.view(rows, vocab)
    seed = torch.zeros((), requires_grad=True)
    loss = kdkernels.kd_loss(
        InPlace.apply(seed, logits),
        teacher[:1].expand(rows, vocab),
        divergence=divergence,
        inplace_grad=True,
        normalizer=2,
    )
    loss.backward()
    expected = oracle(student, teacher[:1].expand(2, vocab), divergence=divergence)
    # Their two rows, rows / 2 times.
    assert_close(loss.detach() / (rows // 2), expected.loss, tolerances.OTHER_LOSS)
    for i in (0, rows // 4 * 2, rows - 2):
        assert_gradient(logits[i : i + 2], expected.gradient, tolerances.BFLOAT16_GRADIENT)
