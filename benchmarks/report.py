"""Writes the tables of README.md and docs/ from the JSON files they name.

    python -m benchmarks.report           rewrite the tables
    python -m benchmarks.report --check   fail if one is stale

A table stands between `<!-- table NAME FILE -->` and `<!-- end -->`.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable

from .compiled_tables import cpu_flops, cpu_instructions, cuda_instructions, triton_resources
from .environment import ROOT
from .numerics_report import behaviour_table, numerics_table
from .sharded import sharded_table
from .tables import (
    FLOOR_NAMES,
    error,
    milliseconds,
    name_of,
    reason,
    reported,
    table,
    worst_gradient_error,
)
from .training import training_table

DOCUMENTS = ("README.md", *sorted(f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md")))
MARKED = re.compile(r"(<!-- table (\S+) (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def _milliseconds(result: dict | None) -> str:
    if result is None:
        return ""
    return reason(result) or f"{milliseconds(result['ms'])} ms"


def _memory(result: dict, case: dict) -> str:
    """Peak extra memory in tensors of the logits' size."""
    return f"{result['peak_mib'] / case['tensor_mib']:.1f}"


def _ratio(slow: dict, fast: dict, digits: int = 1) -> str:
    """How many times as long the first takes, where both were timed."""
    both = "ms" in slow and "ms" in fast
    return f"{slow['ms'] / fast['ms']:.{digits}f}x" if both else ""


def _source(report: dict, file: str) -> str:
    return f"\n\n{reported(report, file)}\n"


def beside_eager(report: dict, file: str) -> str:
    """Forward KL of logits: times, and peak memory in tensors of their size."""
    level = report["cases"][0]["level"]
    ours = {"logits": "kd_loss", "sparse": "sparse_kd_loss"}[level]
    rows = []
    for case in report["cases"]:
        if case["divergence"] != "forward_kl" or "eager" not in case["results"]:
            continue
        r = case["results"]
        row = [f"{case['rows']} x {case['vocab']} {case['dtype']}"]
        for name in ("eager", "torch.compile", "kdkernels", "kdkernels in place", "floor"):
            cell = _milliseconds(r.get(name))
            if name != "floor" and "peak_mib" in r.get(name, {}):
                cell += f", {_memory(r[name], case)}"
            row.append(cell)
        row += [_ratio(r[name], r["kdkernels"]) for name in ("eager", "torch.compile")]
        rows.append(row)
    header = [
        "logits",
        "eager",
        "torch.compile",
        ours,
        f"{ours} in place",
        FLOOR_NAMES[level]["floor"],
        f"eager / {ours}",
        f"torch.compile / {ours}",
    ]
    return table(header, rows) + _source(report, file)


def divergences(report: dict, file: str) -> str:
    cases = [case for case in report["cases"] if "eager" not in case["results"]]
    columns = list(dict.fromkeys((c["vocab"], c["dtype"]) for c in cases))
    rows = []
    for name in dict.fromkeys(c["divergence"] for c in cases):
        row = [f"`{name}`"]
        for column in columns:
            case = next(
                c for c in cases if (c["divergence"], c["vocab"], c["dtype"]) == (name, *column)
            )
            r = case["results"]["kdkernels in place"]
            row.append(reason(r) or f"{r['ms']:.1f} ({r['speed_of_floor']:.0%})")
        rows.append(row)
    header = ["in place, ms (speed of floor)", *(f"{v} {d}" for v, d in columns)]
    return table(header, rows) + _source(report, file)


def linear(report: dict, file: str) -> str:
    """Times, and peak memory beyond the returned gradients as a share of eager's."""
    rows = []
    for case in report["cases"]:
        r = case["results"]
        extra = r["kdkernels"]["peak_mib"] - case["gradients_mib"]
        dense = r["eager"]["peak_mib"]
        label = f"{case['rows']} x {case['vocab']}, {case['hidden']} / {case['teacher_hidden']}"
        names = ("eager", "torch.compile", "kdkernels", "floor")
        rows.append(
            [f"{label}, {case['dtype']}"]
            + [_milliseconds(r.get(name)) for name in names]
            + [
                _ratio(r["eager"], r["kdkernels"], 2),
                _ratio(r["kdkernels"], r["floor"], 2),
                f"{extra / dense:.0%}" if dense else "",
            ]
        )
    header = ["tokens x vocab, hidden sizes", "eager", "torch.compile", "linear_kd_loss"]
    header += ["four bare products", "eager / ours", "ours / products", "peak, of eager's"]
    return table(header, rows) + _source(report, file)


def shapes(report: dict, file: str) -> str:
    """A provider a row, a shape a column; a table for each dtype, divergence and question."""
    on_gpu = "gpu" in report["environment"]
    ceiling = "copy" if on_gpu else "floor"
    groups: dict[str, list[dict]] = {}
    for case in report["cases"]:
        title = f"{case['divergence']}, {case['dtype']}, {case['what']}"
        groups.setdefault(title, []).append(case)
    tables = []
    for title, cases in groups.items():
        names = dict.fromkeys(
            name
            for case in cases
            for name, result in case["results"].items()
            if "refused" not in result and (on_gpu or name != "copy")
        )
        header = [f"{title}: ms, speed of {name_of(cases[0], ceiling)}, peak, gradient error"]
        header += [f"{case['shape']}, {case['rows']} x {case['vocab']}" for case in cases]
        rows = [
            [name_of(cases[0], name), *(_shape_cell(case, name, ceiling) for case in cases)]
            for name in names
        ]
        tables.append(table(header, rows))
    return "\n\n".join(tables) + _never_timed(report) + _source(report, file)


def _shape_cell(case: dict, name: str, ceiling: str) -> str:
    result = case["results"].get(name, {})
    if "ms" not in result or reason(result):
        return reason(result)
    parts = [milliseconds(result["ms"]), f"{result.get(f'speed_of_{ceiling}', 1):.0%}"]
    if "peak_mib" in result:
        logits = case["level"] != "linear"
        parts.append(f"{_memory(result, case)} U" if logits else f"{result['peak_mib']:.0f} MiB")
    if (worst := worst_gradient_error(result)) is not None:
        parts.append(error(worst))
    return ", ".join(parts)


def _never_timed(report: dict) -> str:
    """Who refused every case, and why the first."""
    refused: dict[str, str] = {}
    served = set()
    for case in report["cases"]:
        for name, result in case["results"].items():
            if "refused" in result:
                refused.setdefault(name, result["refused"])
            else:
                served.add(name)
    names = [f"{name} ({why})" for name, why in refused.items() if name not in served]
    return f"\n\nNot timed: {'; '.join(names)}." if names else ""


def small_call(report: dict, file: str) -> str:
    """Microseconds of one (1, 8) call, forward and backward: median (least)."""
    r = report["small_call"]
    row = [f"{r[name]} ({r[name + '_min']})" for name in ("us", "eager_us")]
    return table(["`kd_loss`, us", "eager, us"], [row]) + _source(report, file)


TABLES: dict[str, Callable[[dict, str], str]] = {
    "forward_kl": beside_eager,
    "sparse": beside_eager,
    "divergences": divergences,
    "linear": linear,
    "shapes": shapes,
    "numerics": numerics_table,
    "behaviour": behaviour_table,
    "sharded": sharded_table,
    "training": training_table,
    "small_call": small_call,
    "cpu_instructions": cpu_instructions,
    "cpu_flops": cpu_flops,
    "cuda_instructions": cuda_instructions,
    "triton_resources": triton_resources,
}


def render(text: str, root: str) -> str:
    def replace(match: re.Match) -> str:
        begin, name, file, end = match.groups()
        report = json.loads((ROOT / file).read_text())
        return begin + TABLES[name](report, file).replace("{root}", root) + end

    return MARKED.sub(replace, text)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    stale = []
    for name in DOCUMENTS:
        path = ROOT / name
        rendered = render(path.read_text(), "../" * name.count("/"))
        if rendered != path.read_text():
            stale.append(name)
            if not check:
                path.write_text(rendered)
    print("stale:" if check else "rewritten:", ", ".join(stale) or "none")
    sys.exit(bool(check and stale))


if __name__ == "__main__":
    main()
