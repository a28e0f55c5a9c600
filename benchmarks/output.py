"""Writes a run as JSON, CSV, Markdown and a picture."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

from .tables import FLOORS, case_title, markdown, milliseconds, name_of, reason

SUFFIXES = (".json", ".csv", ".md", ".png")
_RESULT = (
    *("ms", "ms_q1", "ms_q3", "ms_min", "ms_max", "gb_per_s", "gflop_per_s"),
    *("speed_of_floor", "speed_of_copy", "peak_mib"),
    *("loss_error", "gradient_error", "hidden_gradient_error", "weight_gradient_error"),
)
_CASE = (
    "level",
    "shape",
    "rows",
    "vocab",
    "hidden",
    "teacher_hidden",
    "dtype",
    "divergence",
    "what",
)


def files_of(output: Path) -> dict[str, Path]:
    """The file itself where its suffix is known, else one of each kind beside that stem."""
    if output.suffix in SUFFIXES:
        return {output.suffix: output}
    return {suffix: output.with_name(output.name + suffix) for suffix in SUFFIXES}


def json_text(report: dict) -> str:
    return json.dumps(report, indent=1) + "\n"


def csv_text(report: dict) -> str:
    """A line for each provider of each case."""
    stream = io.StringIO()
    writer = csv.DictWriter(
        stream, (*_CASE, "provider", "status", *_RESULT), restval="", lineterminator="\n"
    )
    writer.writeheader()
    for case in report["cases"]:
        for provider, result in case["results"].items():
            line = {key: case[key] for key in _CASE if key in case}
            line |= {key: result[key] for key in _RESULT if key in result}
            writer.writerow(line | {"provider": provider, "status": reason(result) or "ok"})
    return stream.getvalue()


def draw(report: dict, path: Path) -> None:
    """Median times with quartiles, a panel for each case; what has no time says why."""
    from matplotlib.figure import Figure  # only a picture needs it

    cases = [case for case in report["cases"] if case["rounds"]]
    sizes = [3 + len(case["results"]) for case in cases]
    figure = Figure(figsize=(9, 0.2 * sum(sizes)), layout="constrained")
    panels = figure.subplots(len(sizes), 1, squeeze=False, height_ratios=sizes)[:, 0]
    for case, panel in zip(cases, panels, strict=True):
        fastest = min(r["ms"] for r in case["results"].values() if not reason(r))
        for row, (provider, result) in enumerate(case["results"].items()):
            if why := reason(result):
                panel.text(fastest, row, why[:80], fontsize=6, va="center")
                continue
            ms = result["ms"]
            spread = [[ms - result["ms_q1"]], [result["ms_q3"] - ms]]
            colour = "0.5" if provider in FLOORS else "C0" if "kdkernels" in provider else "C1"
            panel.errorbar(ms, row, xerr=spread, fmt="o", color=colour, markersize=4)
            text = f"{milliseconds(ms)} ms"
            if "speed_of_floor" in result:
                text += f", {result['speed_of_floor']:.0%}"
            panel.annotate(
                text, (ms, row), (0, 3), textcoords="offset points", ha="center", fontsize=6
            )
        panel.set_yticks(range(len(case["results"])))
        panel.set_yticklabels([name_of(case, name) for name in case["results"]])
        panel.set_xscale("log")
        panel.set_ylim(len(case["results"]) - 0.5, -0.8)
        panel.tick_params(which="both", labelsize=7)
        panel.grid(axis="x", alpha=0.3)
        panel.set_title(f"{case_title(case)}: ms, speed of the floor", fontsize=8, loc="left")
    figure.savefig(path, dpi=120)


def write(report: dict, output: Path, only: str = "") -> list[str]:
    """Writes the files, or those with one suffix, and says what could not be written."""
    missing = []
    timed = any(case["rounds"] for case in report["cases"])
    for suffix, path in files_of(output).items():
        if only not in ("", suffix):
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        if suffix == ".png":
            try:
                if timed:
                    draw(report, path)
            except ModuleNotFoundError as error:
                missing.append(f"{path} is not drawn: {error}")
        else:
            texts = {".json": json_text, ".csv": csv_text, ".md": markdown}
            path.write_text(texts[suffix](report))
    return missing
