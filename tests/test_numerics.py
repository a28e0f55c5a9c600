"""The judgement of benchmarks.numerics: errors against float64, and verdicts on hostile inputs."""

from __future__ import annotations

import json
import math

import pytest
import torch

from benchmarks import behaviour, dense, numerics
from benchmarks.case import relative
from benchmarks.numerics_report import behaviour_table, draw, numerics_table
from benchmarks.pairs import Pair, compare, head


def halved(divergence: str):
    """A loss that is wrong by a factor of 2, and its gradient with it."""
    loss = dense.logits_loss(divergence)
    return lambda *arguments: loss(*arguments) / 2


def padded_with_zeros(divergence: str):
    """A loss that gives the columns that only one model has a logit of 0 in the other."""
    loss = dense.logits_loss(divergence)

    def padded(student, teacher, temperature):
        width = max(student.shape[1], teacher.shape[1])
        both = (torch.nn.functional.pad(x, (0, width - x.shape[1])) for x in (student, teacher))
        return loss(*both, temperature)

    return padded


PLANTED = {
    "halved": numerics.Provider("logits", ("forward_kl",), halved),
    "padded": numerics.Provider("logits", ("forward_kl",), padded_with_zeros),
}


@pytest.fixture(scope="module")
def report():
    grid = numerics.Grid(
        vocab=64, rows=2, dtypes=("float32",), temperatures=(1.0,), targets=(1e-6, 1e-4, 1e-1)
    )
    return numerics.results(numerics.OURS | PLANTED, grid, lambda name: None)


def test_the_grid_reaches_its_targets(report):
    assert report["grid"]["kl"]["float32"] == [pytest.approx([1e-6, 1e-4, 1e-1], rel=0.05)]


def test_errors_tell_right_from_wrong(report):
    for name in ("kd_loss", "linear_kd_loss"):
        errors = report["accuracy"][name]["float32"]["forward_kl"]
        assert max(errors["loss"][0]) < 1e-6
        assert errors["gradient"][0][-1] < 1e-6
    halved = report["accuracy"]["halved"]["float32"]["forward_kl"]
    assert halved["loss"][0][-1] == halved["gradient"][0][-1] == 0.5


def test_verdicts_tell_right_from_wrong(report):
    verdicts = report["behaviour"]
    for name in ("kd_loss", "linear_kd_loss"):
        assert {v for case in verdicts[name].values() for v in case.values()} == {"right"}
    shared, one_sided = "-inf in both", "-inf in the student"
    assert verdicts["eager"][shared]["forward_kl"] == "NaN"
    assert verdicts["eager"][one_sided]["forward_kl"] == "right"  # infinite, as it is
    wider = "student 151936, teacher 152064"
    assert verdicts["eager"][wider]["forward_kl"] == "raises RuntimeError"
    assert verdicts["padded"][wider]["forward_kl"].startswith("wrong")


def test_a_verdict_on_what_is_zero_or_infinite():
    inputs = behaviour.masked(student=True, teacher=False)
    got, exact = compare(dense.logits_loss("forward_kl"), "logits", inputs, "forward_kl", 1.0)
    assert behaviour.verdict(got, exact, 1.0) == "right"
    assert "not inf" in behaviour.verdict(got._replace(loss=5.0), exact, 1.0)
    zero = behaviour.identical().exact("forward_kl", 1.0)
    assert behaviour.verdict(zero, zero, 1.0) == "right"
    assert behaviour.verdict(zero._replace(loss=0.025), zero, 1.0) == "wrong: 0.025, not 0"
    off = zero._replace(gradient=zero.gradient + 1)
    assert "instead of 0" in behaviour.verdict(off, zero, 1.0)
    nothing = zero._replace(gradient=zero.gradient * torch.nan)
    assert behaviour.verdict(nothing, zero, 1.0) == "NaN gradient"


def test_a_head_gives_the_logits_exactly():
    for pair in (behaviour.masked(student=True, teacher=True), behaviour.identical()):
        hidden, weight = head(pair.student)
        assert torch.equal(hidden @ weight.t(), pair.student)


def test_what_is_nan_is_never_right():
    nan = Pair(torch.full((1, 4), torch.nan), torch.zeros(1, 4))
    got, _ = compare(dense.logits_loss("forward_kl"), "logits", nan, "forward_kl", 1.0)
    exact = behaviour.identical().exact("forward_kl", 1.0)
    assert behaviour.verdict(got, exact, 1.0) == "NaN"
    assert math.isnan(relative(torch.tensor([1.0, torch.nan]), torch.ones(2)))


def test_report_picture_and_tables(report, tmp_path):
    report = json.loads(numerics.text_of(report))  # what a file holds
    report["refused"] = {"fla": "fla-core is not installed"}
    report["environment"] = {
        "torch": "0",
        "packages": {"trl": "1", "fla-core": None},
        "date": "today",
        "commit": "abc",
        "command": "python",
    }
    table = numerics_table(report, "f.json")
    assert "| halved | 5e-01, 5e-01 | 5e-01, 5e-01 |" in table
    assert "trl 1" in table
    assert "Not run: fla, fla-core is not installed" in table
    lines = [line for line in behaviour_table(report, "f.json").splitlines() if "| padded" in line]
    assert len(lines) == 1
    assert "wrong" in lines[0]
    pytest.importorskip("matplotlib", reason="matplotlib draws the picture")
    draw(report, tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 10000
