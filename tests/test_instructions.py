"""The comparison of instruction counts with those on record can fail."""

from __future__ import annotations

import copy
import json
import re

import pytest

from benchmarks import instructions

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
