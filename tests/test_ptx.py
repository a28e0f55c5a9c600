"""The translation of PTX to C++ in csrc/tests/ptx, an instruction at a time."""

from __future__ import annotations

import ctypes
import math
import platform
import shutil
import struct
import subprocess
import sys

import pytest

from .compiled_triton import library_of

pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++"),
    pytest.mark.skipif(platform.machine() != "x86_64", reason="the emulator runs on x86-64 only"),
]

NAN, INF = math.nan, math.inf

# An instruction whose operands are the letter of a type's registers, and what it makes of numbers.
CASES = [
    ("add.s32 r, r, r", (2**31 - 1, 1), -(2**31)),
    ("sub.u32 r, r, r", (1, 2), -1),
    ("mul.lo.s32 r, r, r", (65537, 65537), 131073),
    ("mul.hi.u32 r, r, r", (-1, -1), -2),
    ("mul.hi.s32 r, r, r", (-1, -1), 0),
    ("mul.wide.s32 d, r, r", (-3, 5), -15),
    ("mul.wide.u32 d, r, r", (-1, 2), 2**33 - 2),
    ("mad.lo.s32 r, r, r, r", (3, 5, -7), 8),
    ("mad.wide.s32 d, r, r, d", (-3, 5, 1), -14),
    ("shl.b32 r, r, r", (1, 31), -(2**31)),
    ("shl.b32 r, r, r", (1, 32), 0),
    ("shr.u32 r, r, r", (-1, 28), 15),
    ("shr.s32 r, r, r", (-8, 1), -4),
    ("shr.s32 r, r, r", (-8, 40), -1),
    ("shf.l.wrap.b32 r, r, r, r", (-(2**31), 1, 1), 3),
    ("shf.r.wrap.b32 r, r, r, r", (2, 1, 1), -(2**31) + 1),
    ("clz.b32 r, r", (1,), 31),
    ("clz.b32 r, r", (0,), 32),
    ("popc.b32 r, r", (-1,), 32),
    ("prmt.b32 r, r, r, r", (0x33221100, 0x77665544, 0x9604), 0x00660044),
    ("lop3.b32 r, r, r, r, 0xe8", (12, 10, 6), 14),  # what two of three have
    ("bfe.u32 r, r, r, r", (0xF0, 4, 4), 15),
    ("bfe.s32 r, r, r, r", (0xF0, 4, 4), -1),
    ("min.s32 r, r, r", (-1, 1), -1),
    ("min.u32 r, r, r", (-1, 1), 1),
    ("max.f32 f, f, f", (NAN, 1.0), 1.0),
    ("max.NaN.f32 f, f, f", (NAN, 1.0), NAN),
    ("min.f32 f, f, f", (0.0, -0.0), -0.0),
    ("neg.f32 f, f", (INF,), -INF),
    ("abs.f32 f, f", (-2.5,), 2.5),
    ("copysign.f32 f, f, f", (-1.0, 3.0), -3.0),
    ("fma.rn.f32 f, f, f, f", (1 + 2.0**-12, 1 + 2.0**-12, -1.0), 2.0**-11 + 2.0**-24),
    ("fma.rn.ftz.sat.f32 f, f, f, f", (2.0, 3.0, -5.5), 0.5),
    ("fma.rn.ftz.sat.f32 f, f, f, f", (2.0, 3.0, -4.0), 1.0),
    ("fma.rn.ftz.sat.f32 f, f, f, f", (2.0, 3.0, -7.0), 0.0),
    ("mul.ftz.f32 f, f, f", (2.0**-100, -(2.0**-40)), -0.0),
    ("mul.f32 f, f, f", (2.0**-100, 2.0**-40), 2.0**-140),
    ("add.ftz.f32 f, f, f", (2.0**-140, 0.0), 0.0),
    ("add.rz.f32 f, f, f", (1.0, 1.5 * 2.0**-23), 1 + 2.0**-23),
    ("add.rz.f32 f, f, f", (1.0, -(2.0**-30)), 1 - 2.0**-24),
    ("div.rn.f32 f, f, f", (1.0, 3.0), struct.unpack("f", struct.pack("f", 1 / 3))[0]),
    ("div.full.f32 f, f, f", (0.0, 2.0**-140), 0.0),
    ("div.full.ftz.f32 f, f, f", (0.0, 2.0**-140), NAN),
    ("div.full.f32 f, f, f", (2.0**100, INF), 0.0),
    ("ex2.approx.ftz.f32 f, f", (-INF,), 0.0),
    ("ex2.approx.ftz.f32 f, f", (0.0,), 1.0),
    ("lg2.approx.ftz.f32 f, f", (0.0,), -INF),
    ("rcp.approx.ftz.f32 f, f", (INF,), 0.0),
    ("cvt.rni.f32.f32 f, f", (2.5,), 2.0),
    ("cvt.rzi.s32.f32 r, f", (-2.9,), -2),
    ("cvt.rni.s32.f32 r, f", (3e9,), 2**31 - 1),
    ("cvt.rni.s32.f32 r, f", (NAN,), 0),
    ("cvt.rn.f32.s32 f, r", (-7,), -7.0),
    ("cvt.rn.f32.u32 f, r", (-1,), 2.0**32),
    ("cvt.s64.s32 d, r", (-1,), -1),
    ("cvt.u64.u32 d, r", (-1,), 2**32 - 1),
    ("cvt.u32.u64 r, d", (2**32 + 5,), 5),
    ("cvt.rn.bf16x2.f32 r, f, f", (1.0, -2.0), 0x3F80C000),
    ("cvt.rn.f16x2.f32 r, f, f", (1.0, 65520.0), 0x3C007C00),
    ("max.bf16x2 r, r, r", (0x3F807FC0, 0x40003F80), 0x40003F80),
    ("selp.b32 r, r, r, p", (1, 2, 0), 2),
    ("selp.b32 r, r, r, !p", (1, 2, 0), 1),
]
#: Comparisons of 1 with a NaN, and with 1.
COMPARISONS = {
    "eq": (0, 1),
    "ne": (0, 0),
    "equ": (1, 1),
    "neu": (1, 0),
    "lt": (0, 0),
    "leu": (1, 1),
}
COMPARISONS |= {"gt": (0, 0), "ge": (0, 1), "num": (0, 1), "nan": (1, 0)}
CASES += [
    (f"setp.{name}.f32 p, f, f", (1.0, other), result)
    for name, results in COMPARISONS.items()
    for other, result in zip((NAN, 1.0), results, strict=True)
]

FORMATS = {"r": "i", "d": "q", "f": "f", "p": "i"}
TYPES = {"r": "b32", "d": "b64", "f": "f32"}

SHUFFLES = """
mov.u32 %r1, %tid.x;
shfl.sync.bfly.b32 %r2|%p1, %r1, 1, 31, -1;
shfl.sync.down.b32 %r3|%p1, %r1, 16, 31, -1;
shfl.sync.up.b32 %r4, %r1, 1, 0, -1;
shfl.sync.idx.b32 %r5, %r1, 3, 6175, -1;
redux.sync.add.s32 %r6, %r1, -1;
setp.lt.u32 %p2, %r1, 4;
vote.sync.ballot.b32 %r7, %p2, -1;
"""


def kernel(body: str) -> str:
    """PTX of a kernel with addresses of what it reads and writes in %rd1 and %rd2."""
    return f"""
.version 8.0
.target sm_90
.address_size 64
.visible .entry tried(.param .u64 tried_param_0, .param .u64 tried_param_1)
{{
.reg .pred %p<9>;
.reg .b32 %r<9>;
.reg .b64 %rd<9>;
.reg .f32 %f<9>;
.reg .b64 %d<9>;
ld.param.u64 %rd1, [tried_param_0];
ld.param.u64 %rd2, [tried_param_1];
{body}
ret;
}}
"""


def launch(body: str, threads: int, read: bytes, written: int) -> bytes:
    """What a CTA writes."""
    function = library_of(kernel(body)).launch_tried
    source = ctypes.create_string_buffer(read, len(read) or 1)
    target = ctypes.create_string_buffer(written)
    values = [ctypes.c_uint64(ctypes.addressof(x)) for x in (source, target)]
    addresses = (ctypes.c_void_p * 2)(*[ctypes.addressof(x) for x in values])
    function(ctypes.c_uint(1), ctypes.c_uint(threads), ctypes.c_size_t(0), addresses)
    return target.raw


def test_instructions():
    body, read = [], b""
    for number, (text, inputs, _) in enumerate(CASES):
        name, *operands = text.replace(",", "").split()
        kinds = [x.lstrip("!") for x in operands if x.lstrip("!") in FORMATS]
        registers = [f"%{kind}{place}" for place, kind in enumerate(kinds)]
        for register, kind, value in zip(registers[1:], kinds[1:], inputs, strict=True):
            load = f"[%rd1+{len(read)}];"
            if kind == "p":
                body += [f"ld.global.b32 %r8, {load}", f"setp.ne.b32 {register}, %r8, 0;"]
            else:
                body.append(f"ld.global.{TYPES[kind]} {register}, {load}")
            value = value - 2**32 if kind == "r" and value >= 2**31 else value
            read += struct.pack(FORMATS[kind], value).ljust(8, b"\0")
        passed = iter(registers)
        operands = [
            x.replace(x.lstrip("!"), next(passed)) if x.lstrip("!") in FORMATS else x
            for x in operands
        ]
        body.append(f"{name} {', '.join(operands)};")
        if kinds[0] == "p":
            body += [
                f"selp.b32 %r8, 1, 0, {registers[0]};",
                f"st.global.b32 [%rd2+{8 * number}], %r8;",
            ]
        else:
            body.append(f"st.global.{TYPES[kinds[0]]} [%rd2+{8 * number}], {registers[0]};")
    written = launch("\n".join(body), 1, read, 8 * len(CASES))
    wrong = []
    for number, (text, inputs, expected) in enumerate(CASES):
        (actual,) = struct.unpack_from(FORMATS[text.split()[1][0]], written, 8 * number)
        # repr: of zeros the sign counts, and NaN is itself.
        if repr(actual) != repr(expected):
            wrong.append((text, inputs, actual, expected))
    assert not wrong


def test_threads_together():
    stores = "\n".join(f"st.global.b32 [%rd4+{4 * (i - 2)}], %r{i};" for i in range(2, 8))
    body = f"{SHUFFLES}\nmul.wide.u32 %rd3, %r1, 24;\nadd.s64 %rd4, %rd2, %rd3;\n{stores}"
    written = struct.unpack("192i", launch(body, 32, b"", 32 * 24))
    for lane in range(32):
        expected = lane ^ 1, min(lane + 16, 31) if lane < 16 else lane, max(0, lane - 1)
        # In segments of 8 lanes, the third of the caller's.
        expected += (lane & 24) + 3, 496, 15
        assert written[6 * lane : 6 * lane + 6] == expected


def test_a_barrier_that_is_missed_is_seen():
    body = "mov.u32 %r1, %tid.x;\nsetp.lt.u32 %p1, %r1, 32;\n@%p1 bar.sync 0;"
    program = f"from tests import test_ptx; test_ptx.launch({body!r}, 64, b'', 8)"
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert result.returncode != 0
    assert "nothing can run any more" in result.stderr
