"""Rows as the programs of the Triton backend share them: schedules and launches."""

from __future__ import annotations

import inspect
from types import SimpleNamespace

import pytest
import torch

from . import interpreter
from .cases import correlated_pair
from .harness import TRITON, assert_same_bits, run

pytestmark = pytest.mark.skipif(not interpreter.INSTALLED, reason="Triton is not installed")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("per_row", [False, True])
def test_a_program_scales_several_rows_of_a_gradient(monkeypatch, dtype, per_row):
    from kdkernels.triton import schedule

    student, teacher = (x.to(dtype) for x in correlated_pair(5, 37))
    options = {"grad_output": torch.tensor(3.0)}
    if per_row:
        options = {"grad_output": torch.tensor([1.0, 0.0, -2.0, 0.5, 3.0]), "reduction": "none"}
    expected = run(TRITON, student, teacher, **options)
    monkeypatch.setattr(schedule, "SCALING_PROGRAMS", 2)
    assert_same_bits(run(TRITON, student, teacher, **options), expected)


def test_a_schedule_for_a_gpu_whose_properties_have_other_names(monkeypatch):
    from kdkernels.triton import schedule

    properties = SimpleNamespace(gpu_subslice_count=64, last_level_cache_size=200 * 2**20)
    monkeypatch.setattr(torch.xpu, "get_device_properties", lambda _: properties)
    device = schedule.device_of.__wrapped__(torch.device("xpu", 0))
    assert device == schedule.Device(64, 200 * 2**20, 32, 0)
    assert schedule.choose(32000, 128000, True, False, device) == schedule.Schedule(2048, 16)


@pytest.mark.parametrize(
    ("hip", "warp_size", "registers"), [(None, 32, 65536), ("7.0", 64, 0)], ids=["NVIDIA", "AMD"]
)
def test_what_a_schedule_goes_by_on_a_gpu(monkeypatch, hip, warp_size, registers):
    # AMD's compiler refuses a limit on registers.
    from kdkernels.triton import launch, schedule

    properties = SimpleNamespace(
        multi_processor_count=132, L2_cache_size=50 * 2**20, warp_size=warp_size
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(torch.version, "hip", hip)
    device = inspect.unwrap(schedule.device_of)(torch.device("cuda", 0))
    assert device == schedule.Device(132, 50 * 2**20, warp_size, registers)
    options = launch.options_of(schedule.choose(32000, 128000, True, True, device))
    assert options["num_warps"] * warp_size == 512
    assert options.get("maxnreg") == (64 if registers else None)


@pytest.mark.parametrize("vocab", [1, 19, 300, 1000, 32000, 128256, 151936, 256000])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_schedules(vocab, itemsize):
    from kdkernels.triton import schedule

    hopper = schedule.Device(132, 50 * 2**20, 32, 65536)
    pair = 2 * itemsize * vocab
    for plain, many in ((False, False), (True, False), (True, True)):
        chosen = schedule.choose(vocab, pair, plain, many, hopper)
        assert chosen.num_warps == 1 or vocab >= 256
        assert chosen.entries == (schedule.MANY if many and vocab > 1024 else schedule.FEW)
        assert chosen.block == 32 * chosen.num_warps * chosen.entries
        assert 32 * chosen.num_warps * chosen.registers <= hopper.registers
        if plain and vocab > 1024 and chosen.num_warps < 32:
            assert 2 * hopper.multiprocessors * pair <= hopper.cache_bytes
    amd = schedule.Device(304, 4 * 2**20, 64, 0)
    chosen = schedule.choose(vocab, pair, True, True, amd)
    assert 64 <= 64 * chosen.num_warps <= 1024
    assert chosen.registers == 0


def test_launches_go_to_the_device_of_a_tensor():
    from kdkernels.triton import launch

    device = launch._on(SimpleNamespace(device=torch.device("cuda", 1)))
    assert isinstance(device, torch.cuda.device)
    assert device.idx == 1


def rows_in(memory, begin, *strides, width=37):
    """Rows of float16 that begin and lie apart by these entries."""
    shape = *(2 for _ in strides), width
    return memory.as_strided(shape, (*strides, 1), begin)


@pytest.mark.parametrize(
    ("begin", "strides", "expected"),
    [
        (0, (48,), True),
        (8, (48,), True),  # 16 bytes
        (4, (48,), False),
        (0, (37,), False),
        (0, (40,), False),
        (0, (160, 48), True),
        (0, (168, 48), False),
        (0, (160, 40), False),
    ],
)
def test_rows_that_begin_at_multiples_of_16(begin, strides, expected):
    from kdkernels.triton import launch

    memory = torch.zeros(512, dtype=torch.float16)
    assert memory.data_ptr() % 16 == 0
    assert launch.aligned(launch._rows(rows_in(memory, begin, *strides))) == expected
