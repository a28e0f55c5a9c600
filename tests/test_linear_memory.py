"""Peak memory of the fused-linear level, and teachers that are fetched while they are used."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch

from kdkernels import payload
from kdkernels.linear_plan import plan

from .cases import normal
from .test_memory import MIB, ROWS, SCRATCH, VOCAB, measure

HIDDEN, TEACHER_HIDDEN = 64, 128

SETUP = f"""
        from kdkernels import linear_kd_loss
        def make(*shape, dtype=torch.float32):
            return torch.full(shape, 0.5).to(dtype)
        def heads(dtype, rows={ROWS}):
            student = make(rows, {HIDDEN}, dtype=dtype), make({VOCAB}, {HIDDEN}, dtype=dtype)
            teacher = (
                make(rows, {TEACHER_HIDDEN}, dtype=dtype),
                make({VOCAB}, {TEACHER_HIDDEN}, dtype=dtype),
            )
            return *(x.requires_grad_() for x in student), *teacher
        def step(tensors, **options):
            for x in tensors[:2]:
                x.grad = None
            linear_kd_loss(*tensors, **options).backward()
"""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_step(dtype):
    """Logits as planned, the returned gradients, and no more, whatever needs a gradient."""
    name = str(dtype)
    row = VOCAB * dtype.itemsize
    gradient = VOCAB * HIDDEN * dtype.itemsize
    accumulator = 0 if dtype == torch.float32 else VOCAB * HIDDEN * 4
    small = 2**24  # less than a quarter of the logits: several chunks
    default, several, frozen, loss_only = measure(
        SETUP
        + f"""
        tensors, few = heads({name}), heads({name}, 128)
        frozen = [x.detach() for x in tensors]
        frozen[0].requires_grad_()
        def only():
            with torch.no_grad():
                linear_kd_loss(*tensors)
        calls = [
            lambda: step(tensors),
            lambda: step(tensors, chunk_bytes={small}),
            lambda: step(frozen),
            only,
        ]
        step(few), step(few, chunk_bytes={small})
        result = []
        for call in calls:
            for x in (*tensors, *frozen):
                x.grad = None
            result.append(peak(call))
        print(",".join(map(str, result)))
        """
    )
    split = plan(ROWS, row, row, gradient, accumulator, 0, "cpu")
    logits = split.chunk * row + (0 if split.lend else split.block * row)
    assert logits <= ROWS * row  # a seventh of what dense PyTorch takes
    sums = accumulator if split.chunk < ROWS else 0
    assert default < (logits + gradient + sums) / MIB + SCRATCH
    assert several < (small + gradient + accumulator) / MIB + SCRATCH
    assert frozen < ROWS * row / 2 / MIB + SCRATCH
    assert loss_only < ROWS * row / 2 / MIB + SCRATCH


class FakeCuda:
    """Streams as queues that run when something waits for them.

    Work is put off as long as it may be, so that what is handed out too early or overwritten too
    soon holds the wrong rows.
    """

    active: ClassVar[list] = []

    class Event:
        def __init__(self):
            self.work = []

        def record(self, stream):
            self.work = list(stream.work)

        def synchronize(self):
            for run in self.work:
                run()

    class Stream:
        def __init__(self, device=None):
            self.work = []

        def queue(self, function):
            done = []

            def run():
                if not done:
                    done.append(True)
                    function()

            self.work.append(run)

        def wait_event(self, event):
            work = list(event.work)
            self.queue(lambda: [run() for run in work])

        def wait_stream(self, other):
            self.wait_event(type("Now", (), {"work": list(other.work)}))

        def __enter__(self):
            FakeCuda.active.append(self)

        def __exit__(self, *_):
            FakeCuda.active.pop()

    def __init__(self):
        self.default = self.Stream()

    def current_stream(self, device):
        return self.default

    def stream(self, stream):
        return stream


class Queued(torch.Tensor):
    """A tensor whose ``copy_(..., non_blocking=True)`` waits in the active stream."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.Tensor.copy_ and kwargs.get("non_blocking"):
            target, source = (x.as_subclass(torch.Tensor) for x in args)
            FakeCuda.active[-1].queue(lambda: target.copy_(source))
            return args[0]
        return super().__torch_function__(function, types, args, kwargs)


@pytest.mark.parametrize(
    "index", [None, torch.tensor([0, 2, 3, 7, 8, 11, 16])], ids=["all", "index"]
)
@pytest.mark.parametrize("block", [1, 3, 7, 17])
def test_blocks_arrive_whole_and_stay_until_used(monkeypatch, block, index):
    """The order of copies, waits and uses; a GPU is not there."""
    cuda = FakeCuda()

    def pinned(rows, like):
        return torch.full((rows, like.shape[-1]), torch.nan).as_subclass(Queued)

    monkeypatch.setattr(payload, "_pinned", pinned)
    tensor = normal(17, 5)
    expected = tensor if index is None else tensor[index]
    spans = [(i, min(i + block, len(expected))) for i in range(0, len(expected), block)]
    rows = payload._Rows(tensor, index)
    used = []
    for part in payload._copied_ahead(rows, spans, torch.device("cpu"), cuda):
        # The kernel that reads the block is queued, and runs only when something waits for it.
        cuda.default.queue(lambda part=part: used.append(part.as_subclass(torch.Tensor).clone()))
    for run in cuda.default.work:
        run()
    assert torch.equal(torch.cat(used), expected)


def test_a_block_on_its_way_arrives_before_its_memory_serves_again(monkeypatch):
    """Where the user of the block before it fails."""
    cuda, copied = FakeCuda(), []
    monkeypatch.setattr(payload, "_pinned", lambda rows, like: torch.empty(rows, like.shape[-1]))
    rows = payload._Rows(torch.randn(4, 3), None)
    spans = [(0, 1), (1, 2), (2, 3), (3, 4)]
    monkeypatch.setattr(FakeCuda, "stream", lambda self, side: copied.append(side) or side)
    blocks = payload._copied_ahead(rows, spans, torch.device("cpu"), cuda)
    next(blocks)
    arrivals = []
    copied[0].queue(lambda: arrivals.append("the second block"))
    blocks.close()
    for run in cuda.default.work:
        run()
    assert arrivals


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("rows", "vocab", "hidden"), [(1024, 32000, 256), (256, 128256, 512)])
def test_default_plan_against_dense(rows, vocab, hidden, dtype):
    """Dense PyTorch's peak is 7 tensors of logits on a CPU (benchmarks); the plan takes one."""
    row = vocab * dtype.itemsize
    accumulator = 0 if dtype == torch.float32 else vocab * hidden * 4
    split = plan(rows, row, row, vocab * hidden * dtype.itemsize, accumulator, 0, "cpu")
    taken = split.chunk * row + (0 if split.lend else split.block * row)
    taken += accumulator if split.chunk < rows else 0
    assert taken < 0.15 * 7 * rows * row
    assert split.block >= 128


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("rows", [1, 63, 256, 1000, 8192])
@pytest.mark.parametrize("accumulator", [0, 2**20, 2**30])
@pytest.mark.parametrize("chunk_bytes", [0, 1, 2**20, 2**30])
def test_plan(device, rows, accumulator, chunk_bytes):
    for student, teacher in ((4000, 4000), (256512, 512), (256512, 0), (64000, 256512)):
        for gradient in (0, 2**24):
            split = plan(rows, student, teacher, gradient, accumulator, chunk_bytes, device)
            assert 1 <= split.block <= split.chunk <= rows
            assert split.chunk % split.block == 0 or split.chunk == rows
            limit = chunk_bytes or 2**30
            taken = split.chunk * student + (0 if split.lend else split.block * teacher)
            if split.chunk > 1:
                assert taken <= limit + (accumulator if split.chunk == rows else 0)
            if split.lend:
                assert split.block * teacher <= gradient
                assert split.chunk == rows
