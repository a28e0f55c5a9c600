"""How programs walk the rows of a call: a pure function of its sizes and the device."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

#: Programs that scale a gradient; each walks many rows, since most calls leave at once.
SCALING_PROGRAMS = 1024

#: Entries of each model a thread holds at a time: more would spill, fewer make loads too small.
FEW, MANY = 4, 8

#: The part of the cache that the row pairs in flight may take; the gradient passes through it too.
CACHE_SHARE = 0.8


class Device(NamedTuple):
    """What the choice depends on."""

    multiprocessors: int
    cache_bytes: int  # of the last level before memory
    warp_size: int
    registers: int  # of a multiprocessor; 0 where a kernel's cannot be limited


class Schedule(NamedTuple):
    """Programs of ``num_warps`` warps that walk a row each, in blocks of ``block``."""

    block: int
    num_warps: int
    registers: int = 0  # at most, per thread; 0: as many as the compiler likes
    entries: int = FEW  # of a block, a thread's


INTERPRETER = Device(0, 0, 0, 0)


@functools.cache
def device_of(device: torch.device) -> Device:
    """The properties of a device; the interpreter's for the CPU."""
    if device.type == "cpu":
        return INTERPRETER
    properties = getattr(torch, device.type).get_device_properties(device)

    def named(cuda: str, xpu: str) -> int:
        return getattr(properties, cuda, getattr(properties, xpu, 0))

    return Device(
        named("multi_processor_count", "gpu_subslice_count"),
        named("L2_cache_size", "last_level_cache_size"),
        getattr(properties, "warp_size", 32),
        65536 if device.type == "cuda" and torch.version.hip is None else 0,
    )


def choose(vocab: int, pair_bytes: int, plain: bool, many: bool, device: Device) -> Schedule:
    """The schedule for rows of ``vocab`` entries, student and teacher together ``pair_bytes``.

    ``plain`` calls need few registers: a built-in divergence of moderate cost, no rare option.
    Those of them that need so few that a thread can hold ``MANY`` entries are ``many``.
    """
    if device == INTERPRETER:  # NumPy is fast on few large blocks; two still test the loops
        return Schedule(max(512, _power_of_two(vocab // 2)), 1)
    short = vocab <= 1024
    if short:  # a row's fixed cost is each warp's
        threads = min(128, max(device.warp_size, _power_of_two(vocab // 8)))
    else:
        # The later sweeps find a row pair in the cache if those of all running programs fit there:
        # where two programs of 512 threads on each multiprocessor are too many, one of 1024.
        in_flight = 2 * device.multiprocessors * pair_bytes
        fits = in_flight <= CACHE_SHARE * device.cache_bytes
        threads = 512 if fits or not plain else 1024
    # Without a limit the compiler spills a little to fit more programs than the cache serves. To
    # short rows, which fit it anyway, 64 registers matter less than that none is spilled.
    registers = device.registers // (1024 if plain and not short else 512)
    entries = MANY if many and threads * MANY <= vocab else FEW
    return Schedule(threads * entries, threads // device.warp_size, registers, entries)


def _power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(0, n - 1).bit_length()
