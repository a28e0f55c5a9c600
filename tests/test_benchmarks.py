"""The benchmarks: what they verify, leave out and write. Speed is not tested."""

from __future__ import annotations

import csv
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import bench_losses, dense, device, measure, peers, providers, shapes
from benchmarks.__main__ import main
from benchmarks.case import DTYPES, LOSS, Step
from benchmarks.cases import CASES
from benchmarks.measure import Budget, Progress, run_case, verify
from benchmarks.providers import Provider, of_peer, textbook
from kdkernels.divergences import DIVERGENCES

SHAPE = {
    "logits": shapes.Shape("8x96", 8, 96),
    "sparse": shapes.Shape("8x96", 8, 96),
    "linear": shapes.Shape("8x96x16x32", 8, 96, 16, 32),
}
LEVELS = pytest.mark.parametrize("level", CASES)


@pytest.fixture(autouse=True)
def small_device(monkeypatch):
    """What is not under test takes no time here."""
    monkeypatch.setattr(device.Cpu, "copy_bytes", 2**12)
    monkeypatch.setattr(device.Cpu, "gemm_size", 16)
    monkeypatch.setattr(device, "cache_bytes", lambda: 2**12)
    monkeypatch.setattr(measure.small_call, "__defaults__", (3,))


@pytest.fixture
def cpu():
    return device.Cpu()


def bench(options):
    """``python -m benchmarks`` with these options, on one thread."""
    main(f"{options} --threads 1".split())


def case_of(level="logits", dtype=torch.float32, **options):
    return CASES[level].make(SHAPE[level], dtype, torch.device("cpu"), **options)


def timed(case, chosen, cpu, rounds=2, budget=None):
    return run_case(case, chosen, cpu, rounds, budget or Budget(), Progress(1))["results"]


def eager(name="eager"):
    return Provider(name, lambda case: case.step(textbook(case)))


def changed(change):
    """The textbook loss with its value or gradient changed."""

    def make(case):
        loss = textbook(case)
        return case.step(lambda *inputs: change(loss(*inputs)))

    return Provider("changed", make)


def test_a_student_next_to_its_teacher(capsys):
    case = case_of(close=True)
    losses, _ = case.expected
    assert 5e-4 < losses.mean() / case.temperature**2 < 2e-3
    bench("--close --shapes 2x64 --dtype float32 --providers kdkernels --rounds 1")
    assert "next to the teacher" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        bench("--close --level linear")
    assert "--close is of logits" in capsys.readouterr().err


@LEVELS
@pytest.mark.parametrize("what", ["loss", "loss+gradient"])
def test_a_run_writes_everything(level, what, tmp_path, capsys):
    stem = tmp_path / "folder" / "run"
    bench(
        f"--level {level} --shapes {SHAPE[level].name} --rounds 2 --providers kdkernels eager "
        f"--what {what} --output {stem}"
    )
    written = json.loads((tmp_path / "folder/run.json").read_text())
    assert written["environment"]["command"].startswith(f"python -m benchmarks --level {level}")
    assert written["left_out"] == []
    assert [case["dtype"] for case in written["cases"]] == ["float32", "bfloat16"]
    for case in written["cases"]:
        assert case["rounds"] == 2
        for name, result in case["results"].items():
            assert result["ms_min"] <= result["ms_q1"] <= result["ms"] <= result["ms_q3"]
            assert result["speed_of_floor"] > 0
            if name not in ("floor", "copy"):
                assert "peak_mib" in result
                gradients = {key for key in result if key.endswith("gradient_error")}
                expected = "hidden_gradient_error" if level == "linear" else "gradient_error"
                assert expected in gradients if what != LOSS else not gradients
    lines = list(csv.DictReader((tmp_path / "folder/run.csv").open()))
    assert {line["provider"] for line in lines} >= {"floor", "kdkernels", "eager"}
    assert all(line["status"] == "ok" and float(line["ms"]) > 0 for line in lines)
    text = (tmp_path / "folder/run.md").read_text()
    assert text in capsys.readouterr().out
    assert "| kdkernels | " in text


def test_a_run_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    bench(f"--shapes 8x96 --rounds 1 --providers eager trl-dense --output {tmp_path}/run.png")
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_the_rest_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    bench(f"--shapes 8x96 --rounds 1 --providers eager --output {tmp_path}/run")
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".csv", ".md"}
    assert "run.png is not drawn" in capsys.readouterr().err


def test_the_model_of_work():
    logits, linear = case_of("logits"), case_of("linear")
    tensor = 8 * 96 * 4
    assert (logits.work, logits.variant("jsd", LOSS).work) == (3 * tensor, 2 * tensor)
    assert case_of("sparse").work == 2 * tensor
    assert linear.work == 2 * 8 * 96 * (16 + 32) + 4 * 8 * 96 * 16
    assert linear.variant("jsd", LOSS).work == 2 * 8 * 96 * (16 + 32)
    assert measure.speed([2.0, 4.0, 4.0], 2, [1.0, 1.0, 1.0], 3) == round(2 / 3 / 4, 4)


@LEVELS
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_the_textbook_formulas_are_right(level, divergence):
    case = case_of(level, divergence=divergence)
    errors = verify(case, case.step(textbook(case)))
    assert max(errors.values()) < 1e-5
    assert set(dense.TERMS) == set(DIVERGENCES)


@LEVELS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "change",
    [
        lambda loss: loss / 4,  # without T squared
        lambda loss: 0.8 * loss + 0.2 * loss.detach(),  # the right value, another gradient
        lambda loss: loss + 0.1 * loss.detach(),  # the right gradient, another value
        lambda loss: loss * math.nan,
    ],
    ids=["scaled", "gradient", "value", "nan"],
)
def test_what_is_wrong_is_shown_and_not_timed(level, dtype, change, cpu):
    case = case_of(level, DTYPES[dtype])
    results = timed(case, [eager(), changed(change)], cpu)
    assert "ms" in results["eager"]
    wrong = results["changed"]
    assert "ms" not in wrong
    assert "is off by" in wrong["wrong"]
    assert json.dumps(wrong, allow_nan=False)


@LEVELS
def test_a_gradient_wrong_outside_the_sample_is_caught(level, monkeypatch):
    """Not every row is compared; what was never written there is NaN in these tests."""
    monkeypatch.setattr("benchmarks.cases.CHECKED_ROWS", {"cpu": 2})
    monkeypatch.setattr("benchmarks.cases.CHECKED_TOKENS", 2)
    case = case_of(level)
    step = case.step(textbook(case))

    def run():
        loss, gradients = step.run()
        gradients[-1][1] = math.nan  # neither the first nor the last
        return loss, gradients

    case.checked = torch.tensor([0, len(step.run()[1][-1]) - 1])
    step.prepare()
    with pytest.raises(measure.Wrong, match="gradient is off by nan"):
        verify(case, Step(run, step.prepare))


def test_failures_do_not_stop_the_others(cpu):
    def out_of_memory(case):
        raise torch.OutOfMemoryError("CUDA out of memory.\nmore lines")

    def fails_when_timed(case):
        step, runs = case.step(textbook(case)), []

        def run():
            runs.append(1)
            if len(runs) > 3:  # verified, peak, warm-up
                raise RuntimeError("an illegal memory access")
            return step.run()

        return Step(run)

    broken = [Provider("large", out_of_memory), Provider("later", fails_when_timed)]
    results = timed(case_of(), [*broken, eager()], cpu)
    assert results["large"] == {"failed": "OutOfMemoryError: CUDA out of memory."}
    assert "illegal memory access" in results["later"]["failed"]
    assert "ms" not in results["later"]
    assert "ms" in results["eager"]


def test_a_missing_package_is_named(cpu):
    peer = peers.Peer("Peer", "no-such-package", "logits", ("forward_kl",), lambda divergence: None)
    results = timed(case_of(), [of_peer(peer), eager()], cpu)
    assert results["Peer"] == {"refused": "no-such-package is not installed"}
    results = timed(case_of(divergence="tvd"), [of_peer(peer)], cpu)
    assert results["Peer"] == {"refused": "it does not compute tvd"}


def test_a_backend_that_cannot_serve_says_why(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    bench(
        "--shapes 4x32 --dtype float32 --rounds 1 --what loss --providers kdkernels-cpu "
        f"kdkernels-cuda kdkernels-cpu-in-place --output {tmp_path}/run.json"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]
    (case,) = json.loads((tmp_path / "run.json").read_text())["cases"]
    assert "ms" in case["results"]["kdkernels cpu"]
    assert "the tensors are on cpu" in case["results"]["kdkernels cuda"]["refused"]
    assert "no gradient" in case["results"]["kdkernels cpu in place"]["refused"]
    assert "Refused: kdkernels cuda: " in capsys.readouterr().out


def test_kdkernels_wrong_is_an_error(monkeypatch):
    monkeypatch.setitem(providers.OURS, "logits", lambda student, *_, **__: student.sum())
    with pytest.raises(SystemExit, match="wrong or failed: kdkernels"):
        bench("--shapes 4x32 --dtype float32 --rounds 1 --providers kdkernels")


def test_a_spent_budget_leaves_out_and_says_so(tmp_path):
    bench(f"--shapes 4x32 8x32 --dtype float32 --budget 0 --output {tmp_path}/run")
    written = json.loads((tmp_path / "run.json").read_text())
    assert written["cases"] == []
    assert len(written["left_out"]) == 2
    assert "8x32 float32 forward_kl loss+gradient: the budget was spent" in written["left_out"]
    assert "the budget was spent" in (tmp_path / "run.md").read_text()


def test_rounds_end_with_the_budget(cpu, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(measure.time, "monotonic", lambda: now[0])

    def run():
        now[0] += 10.0

    steps = {"slow": Step(run)}
    times, failed = measure.interleaved(steps, cpu, rounds=9, budget=Budget(45.0))
    # A round more would end at 50: one of warming up, three timed ones.
    assert (len(times["slow"]), failed, now[0]) == (3, {}, 40.0)


def test_in_place_gets_fresh_inputs_in_every_round(cpu):
    case = case_of()
    step = providers.in_place(case, "cpu")
    step.prepare()
    expected = step.run()[1][0].clone()
    losses = []

    def run():
        loss, (gradient,) = step.run()
        losses.append(float(loss))
        assert torch.equal(gradient, expected)
        return loss, (gradient,)

    _, failed = measure.interleaved({"fresh": Step(run, step.prepare)}, cpu, 3, Budget())
    assert failed == {}
    assert len(set(losses)) == 1
    _, failed = measure.interleaved({"stale": Step(run)}, cpu, 3, Budget())
    assert "stale" in failed


def test_every_provider_has_its_turn_in_every_round(cpu, monkeypatch):
    order = []
    monkeypatch.setattr(device.Cpu, "flush", lambda self: order.append("flush"))
    steps = {
        name: Step(lambda name=name: order.append(name), lambda: order.append("prepare"))
        for name in "ab"
    }
    measure.interleaved(steps, cpu, 2, Budget())
    assert order == ["prepare", "flush", "a", "prepare", "flush", "b"] * 3


def test_peak_is_beyond_what_was_there(cpu):
    kept = []
    step = Step(lambda: kept.append(torch.ones(2**24)))  # 64 MiB
    peak = cpu.peak_bytes(step)
    assert peak is None or 2**26 <= peak < 2**27


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--providers nobody", "provider 'nobody' is unknown at the logits level"),
        ("--rounds 0", "argument --rounds: 0 is less than 1"),
        ("--shapes wide", "shape 'wide' is unknown"),
        ("--level linear --shapes 512x32000", "has no hidden sizes"),
        ("--level linear --shapes 32000x64x32", "a student wider than its teacher"),
    ],
)
def test_bad_options_are_refused(options, message, capsys):
    with pytest.raises(SystemExit) as error:
        bench(options)
    assert error.value.code == 2
    assert message in capsys.readouterr().err


def test_shapes():
    assert shapes.parse(["7x32000"], "logits", 512) == [shapes.Shape("7x32000", 7, 32000)]
    assert shapes.parse(["50x8x16"], "linear", 3) == [shapes.Shape("50x8x16", 3, 50, 8, 16)]
    real = shapes.parse(["real"], "linear", 4)
    assert [shape.name for shape in real] == ["gpt2", "llama3", "qwen3", "gemma3"]
    assert {shape.rows for shape in real} == {4}


def test_no_peer_is_imported_unless_asked_for():
    script = """
import sys
asked = []
class Recorder:
    def find_spec(self, name, path=None, target=None):
        asked.append(name.split(".")[0])
sys.meta_path.insert(0, Recorder())
from benchmarks import peers
from benchmarks.__main__ import main
main("--shapes 4x32 --rounds 1 --dtype float32 --providers kdkernels eager".split())
names = {"trl", "liger_kernel", "fla", "speculators", "modelopt", "torchtune", "transformers"}
assert not names & set(asked), names & set(asked)
assert "matplotlib" not in asked
try:
    peers.PEERS["TRL dense"].load("jsd")
except Exception:
    pass
assert "trl" in asked
"""
    result = subprocess.run(
        [sys.executable, "-c", script],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-2000:]


class FakeBenchmark:
    """In the place of pytest-benchmark's fixture."""

    def __init__(self):
        self.extra_info, self.group, self.runs = {}, "", 0

    def pedantic(self, run, setup, rounds, warmup_rounds):
        for _ in range(rounds + warmup_rounds):
            setup()
            run()
            self.runs += 1


@pytest.mark.parametrize("provider", bench_losses.PROVIDERS[:-1])  # compiling takes too long
def test_entry_points_of_pytest_benchmark(provider, cpu):
    benchmark = FakeBenchmark()
    bench_losses.time(benchmark, case_of(), provider, cpu)
    assert benchmark.runs == 6
    assert ("gradient_error" in benchmark.extra_info) == (provider != "floor")
