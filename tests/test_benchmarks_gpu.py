"""What the benchmarks do on a GPU, without one: the order of calls around what is timed."""

from __future__ import annotations

import json
import os
from types import SimpleNamespace

import pytest
import torch

from benchmarks import device, gpu
from benchmarks.case import Step
from benchmarks.providers import textbook
from kdkernels import kd_loss, sharded

from .test_benchmarks import bench, small_device  # noqa: F401  a fixture


def test_events_enclose_the_step_alone(monkeypatch):
    """On a GPU: caches are emptied before the first event, and the second one is waited for."""
    order = []

    class Event:
        def __init__(self, enable_timing):
            self.name = len([entry for entry in order if entry.startswith("event")])
            order.append(f"event {self.name}")

        def record(self):
            order.append(f"record {self.name}")

        def synchronize(self):
            order.append(f"wait {self.name}")

        def elapsed_time(self, end):
            return 1000.0 * (end.name - self.name)

    a_gpu = object.__new__(device.Cuda)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(device.Cuda, "flush", lambda self: order.append("flush"))
    assert a_gpu.seconds(lambda: order.append("run")) == 1.0
    assert order[2:] == ["flush", "record 0", "run", "record 1", "wait 1"]


def test_peak_is_beyond_what_was_allocated(monkeypatch):
    calls = {"memory_allocated": 100, "max_memory_allocated": 350}
    for name, value in calls.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    for name in ("synchronize", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    assert object.__new__(device.Cuda).peak_bytes(Step(lambda: None)) == 250


def test_a_gpu_is_described(monkeypatch):
    asked = []

    def smi(*command):
        asked.append(command)
        return "1980" if "clocks" in command[2] else "580.1"

    def no_library(_):  # of the driver for Python, which a machine with a GPU may have
        raise ModuleNotFoundError

    properties = SimpleNamespace(
        name="GPU", major=9, minor=0, multi_processor_count=132, total_memory=2**36, uuid="0-1"
    )
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "clock_rate", no_library)
    monkeypatch.setattr(device, "stdout_of", smi)
    a_gpu = device.Cuda()
    assert a_gpu.clock_mhz() == 1980
    described = a_gpu.describe()
    assert (described["gpu"], described["driver"], described["capability"]) == (
        "GPU",
        "580.1",
        "9.0",
    )
    assert {command[1] for command in asked} == {"--id=GPU-0-1"}
    monkeypatch.setattr(device, "stdout_of", lambda *command: "")  # without nvidia-smi
    assert a_gpu.clock_mhz() is None


@pytest.fixture
def cpu_in_its_place(monkeypatch):
    monkeypatch.setattr(gpu, "BACKEND", "cpu")
    monkeypatch.setattr(gpu, "device_of", lambda name: device.Cpu())


@pytest.mark.usefixtures("cpu_in_its_place")
def test_check(monkeypatch, capsys):
    with pytest.raises(SystemExit) as error:
        gpu.main(["check"])
    assert error.value.code == 0
    assert "all right" in capsys.readouterr().out
    monkeypatch.setattr(gpu, "kdkernels", lambda case, backend: case.step(textbook(case)))
    with pytest.raises(SystemExit) as error:
        gpu.main(["check"])
    assert error.value.code == 1  # rounds every intermediate
    assert "bfloat16 forward_kl 1003 the loss is off by" in capsys.readouterr().out
    assert gpu.TILE not in os.environ


@pytest.mark.usefixtures("cpu_in_its_place")
def test_check_goes_on_where_a_tile_is_refused(monkeypatch, capsys):
    def without_clusters(*tensors, **options):
        if os.environ.get(gpu.TILE, "").startswith(("registers", "shared")):
            raise ValueError("the tile that was asked for cannot hold this row pair here")
        return kd_loss(*tensors, **options)

    monkeypatch.setattr(gpu, "kd_loss", without_clusters)
    with pytest.raises(SystemExit) as error:
        gpu.main(["check"])
    assert error.value.code == 0
    assert "all right" in capsys.readouterr().out


@pytest.mark.usefixtures("cpu_in_its_place")
def test_check_finds_a_wrong_shard(monkeypatch, capsys):
    settled = sharded._divergence
    monkeypatch.setattr(sharded, "_divergence", lambda *sums: settled(*sums) * 1.001)
    with pytest.raises(SystemExit) as error:
        gpu.main(["check"])
    assert error.value.code == 1
    lines = capsys.readouterr().out.splitlines()
    assert all(line.startswith("shard ") for line in lines[:-1])


@pytest.mark.usefixtures("cpu_in_its_place")
def test_tune(tmp_path):
    file = tmp_path / "tiles.json"
    gpu.main(["tune", "--rows", "4", "--vocab", "64", "--rounds", "1", "--output", str(file)])
    cases = json.loads(file.read_text())["cases"]
    assert [case["dtype"] for case in cases] == ["bfloat16", "bfloat16", "float32", "float32"]
    assert all("ms" in case["results"]["streaming:1x256"] for case in cases)
    assert all("ms" in case["results"]["shard"] for case in cases)


def test_table(tmp_path, capsys):
    file = tmp_path / "some.json"
    bench(f"--shapes 4x64 --dtype float32 --rounds 1 --providers kdkernels eager --output {file}")
    capsys.readouterr()
    gpu.main(["table", str(file)])
    ceilings, case = capsys.readouterr().out.splitlines()
    assert ceilings.startswith("some: copy_gb_per_s ")
    assert case.startswith("64 float32 forward_kl: ")
    assert all(part.endswith("U") and "%" in part for part in case.split(": ")[1].split("; "))


def test_without_a_gpu_the_option_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        bench("--device cuda")
    assert "PyTorch sees no CUDA device" in capsys.readouterr().err
