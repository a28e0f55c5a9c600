"""The benchmark of a sharded vocabulary, in two processes of its own."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch.distributed as dist

from benchmarks import sharded

from .documents import ROOT


@pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="torch has no gloo"
)
def test_verifies_times_and_writes(tmp_path):
    output = tmp_path / "sharded.json"
    small = "--rows 8 --vocab 96 --rounds 2 --dtype float32 --divergence forward_kl"
    command = [sys.executable, "-m", "benchmarks.sharded", *small.split(), "--output", output]
    subprocess.run(command, check=True, cwd=ROOT, capture_output=True, timeout=120)
    report = json.loads(output.read_text())
    (case,) = report["cases"]
    assert case["results"].keys() == {"floor", *sharded.PROVIDERS}
    for name in sharded.PROVIDERS:
        assert case["results"][name]["gradient_error"] < 1e-4
        assert case["results"][name]["ms"] > 0
    assert "2 processes" in sharded.sharded_table(report, "results.json")
