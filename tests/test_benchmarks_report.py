"""The tables of documents, written from the results of runs."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from benchmarks import report

from .test_benchmarks import SHAPE, bench, small_device  # noqa: F401  a fixture


@pytest.fixture
def documents(tmp_path, monkeypatch, compiled_is_eager):
    """A repository of one document, whose tables come from a run."""
    for level, name in (("logits", "run"), ("linear", "linear")):
        shape = SHAPE[level].name
        bench(f"--level {level} --shapes {shape} --rounds 1 --output {tmp_path}/{name}.json")
    markers = [("forward_kl", "run"), ("shapes", "run"), ("linear", "linear"), ("shapes", "linear")]
    tables = [f"<!-- table {table} {name}.json -->\n<!-- end -->\n" for table, name in markers]
    (tmp_path / "README.md").write_text("\n".join(tables))
    monkeypatch.setattr(report, "ROOT", tmp_path)
    monkeypatch.setattr(report, "DOCUMENTS", ("README.md",))
    return tmp_path


@pytest.fixture
def compiled_is_eager(monkeypatch):
    """Compiling takes seconds, and is not what is tested."""
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: function)


def test_stale_tables_are_found(documents, monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["report", *arguments])
        with pytest.raises(SystemExit) as error:
            report.main()
        return error.value.code

    assert run("--check") == 1  # the tables are still empty
    assert run() == 0
    text = (documents / "README.md").read_text()
    assert "| 8 x 96 float32 | " in text
    assert "| kdkernels in place | " in text
    assert run("--check") == 0
    results = json.loads((documents / "run.json").read_text())
    results["cases"][0]["results"]["eager"] = {"wrong": "the gradient is off by 3.0e-01"}
    (documents / "run.json").write_text(json.dumps(results))
    assert run("--check") == 1
    assert "stale: README.md" in capsys.readouterr().out
    assert run() == 0
    assert "wrong: the gradient is off by 3.0e-01" in (documents / "README.md").read_text()
