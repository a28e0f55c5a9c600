"""The comparison of instruction counts with those on record can fail."""

from __future__ import annotations

import copy
import json
import re

import pytest

from benchmarks import flops, instructions

RECORDED = json.loads(instructions.RECORD.read_text())


def changed(change):
    report = copy.deepcopy(RECORDED)
    change(report["instruction_sets"]["avx2"]["per_entry"])
    return report


def multiplied(factor):
    def change(counts):
        counts["jsd bfloat16 loss+gradient"] *= factor

    return change


def test_the_record_agrees_with_itself(capsys):
    assert instructions.check(RECORDED, RECORDED) == 0
    assert "108 counts of instructions compared, 0 differences" in capsys.readouterr().out


@pytest.mark.parametrize("factor", [1.029, 0.971])
def test_changes_within_the_tolerance(factor):
    assert instructions.check(RECORDED, changed(multiplied(factor))) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (multiplied(1.031), "avx2 jsd bfloat16 loss.gradient: .* for .*, \\+3.1%"),
        (multiplied(0.969), "avx2 jsd bfloat16 loss.gradient: .* for .*, -3.1%"),
        (multiplied(float("nan")), "avx2 jsd bfloat16 loss.gradient: nan for"),
        (lambda counts: counts.pop("tvd float32 loss"), "avx2 tvd float32 loss: on record, not"),
        (lambda counts: counts.update(new=1.0), "avx2 new: not on record"),
    ],
)
def test_differences_are_reported(capsys, change, message):
    assert instructions.check(RECORDED, changed(change)) == 1
    assert re.match(message, capsys.readouterr().out)


def test_another_compiler_is_not_compared(capsys):
    report = changed(multiplied(2)) | {"compiler": "Clang 99"}
    assert instructions.check(RECORDED, report) == 0
    assert "NOT COMPARED" in capsys.readouterr().out


def test_a_machine_without_valgrind_is_told(capsys, monkeypatch):
    monkeypatch.setattr(instructions.shutil, "which", lambda _: None)
    monkeypatch.setattr("sys.argv", ["instructions", "--check"])
    instructions.main()
    assert "NOT COMPARED: there is no valgrind" in capsys.readouterr().out


def test_flops_of_instructions():
    disassembly = """
0000000000043d00 <f>:
   43d37:\tvfmadd132ps %ymm1,%ymm0,%ymm5
   43d3c:\tvaddss %xmm1,%xmm0,%xmm5
   43d40:\tmulps  (%rax),%xmm2
   43d43:\tvaddpd %zmm1,%zmm0,%zmm5
   43d49:\tvmovaps %ymm1,%ymm2
   43d4e:\tvfnmadd213ps 0x40(%rax),%ymm0,%ymm5
   43d54:\tsqrtsd %xmm0,%xmm0
   43d58:\tvaddsubps %xmm0,%xmm0,%xmm0
   43d5c:\tpaddd  %xmm0,%xmm0
   43d60:\tvcmpltps %ymm1,%ymm0,%ymm2
"""
    assert flops.of_instructions(disassembly) == {
        0x43D37: 16,
        0x43D3C: 1,
        0x43D40: 4,
        0x43D43: 8,
        0x43D4E: 16,
        0x43D54: 1,
    }


def test_executions_of_the_program_alone():
    dump = """
ob=/lib/libm.so
0x43d37 0 1000
ob=/bin/program
fn=f
0x43d37 0 5
calls=2 0x10 0
0x43d37 0 4000
0x43d3c 0 7
"""
    program = instructions.Path("/bin/program")
    assert list(flops.executions(dump, program)) == [(0x43D37, 5), (0x43D3C, 7)]
    assert flops.executed(dump, program, {0x43D37: 16}) == 80
