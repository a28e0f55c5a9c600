"""How a call is cut into programs: a pure function of its sizes and the device."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

#: Programs that scale a gradient; each walks many rows, since most calls leave at once.
SCALING_PROGRAMS = 1024

#: Entries of each model a thread holds at a time: more would spill, fewer make loads too small.
ENTRIES_PER_THREAD = 4


class Device(NamedTuple):
    """What the choice depends on."""

    multiprocessors: int
    cache_bytes: int  # of the last level before memory
    warp_size: int
    registers: int  # of a multiprocessor; 0 where a kernel's cannot be limited


class Schedule(NamedTuple):
    """One program of ``num_warps`` warps per row, which walks it in blocks of ``block`` entries."""

    block: int
    num_warps: int
    registers: int = 0  # at most, per thread; 0: as many as the compiler likes


INTERPRETER = Device(0, 0, 0, 0)


@functools.cache
def device_of(device: torch.device) -> Device:
    """The properties of a device; the interpreter's for the CPU."""
    if device.type == "cpu":
        return INTERPRETER
    properties = getattr(torch, device.type).get_device_properties(device)
    return Device(
        properties.multi_processor_count,
        getattr(properties, "L2_cache_size", 0),
        getattr(properties, "warp_size", 32),
        65536 if device.type == "cuda" and torch.version.hip is None else 0,
    )


def choose(vocab: int, pair_bytes: int, plain: bool, device: Device) -> Schedule:
    """The schedule for rows of ``vocab`` entries, student and teacher together ``pair_bytes``.

    ``plain`` calls need few registers: a built-in divergence of moderate cost, no rare option.
    """
    if device == INTERPRETER:  # NumPy is fast on few large blocks; two still test the loops
        return Schedule(max(512, _power_of_two(vocab // 2)), 1)
    if vocab <= 1024:
        threads = 128
    else:
        # The later sweeps find a row pair in the cache if those of all running programs fit there:
        # where two programs of 512 threads on each multiprocessor are too many, one of 1024.
        fits = 2 * device.multiprocessors * pair_bytes <= 0.8 * device.cache_bytes
        threads = 512 if fits or not plain else 1024
    # Without a limit the compiler spills a little to fit more programs than the cache serves.
    registers = device.registers // (1024 if plain else 512)
    return Schedule(threads * ENTRIES_PER_THREAD, threads // device.warp_size, registers)


def _power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(0, n - 1).bit_length()
