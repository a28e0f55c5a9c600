"""The picture and the tables of what ``python -m benchmarks.numerics`` found."""

from __future__ import annotations

from itertools import cycle
from pathlib import Path

from .tables import source, table

FINEST = 1e-8  # where the axis of errors ends: half a unit in the last place of float32 is 6e-8
COARSEST = 1e3
STYLES = {
    "kd_loss": {"color": "black", "linewidth": 2.2, "zorder": 5},
    "eager": {"color": "tab:red", "linewidth": 1.6},
    "eager, .float()": {"color": "tab:orange", "linewidth": 1.6},
}
COLOURS = ("blue", "green", "purple", "brown", "hotpink", "olive", "teal", "navy", "lime")
MARKERS = "ov^sDPX*<"
#: Drawn over kd_loss it could not be told apart.
NOT_DRAWN = ("linear_kd_loss",)
TABLE_AT = (1e-6, 1e-1)  # nats
TABLE_OF = ("forward_kl", "reverse_kl", "jsd")


def _clip(values: list[float | None]) -> list[float]:
    return [float("nan") if v is None else min(max(v, FINEST), COARSEST) for v in values]


def draw(report: dict, path: Path) -> None:
    """Errors by KL at temperature 1, a row for each divergence; below them forward KL by T."""
    from matplotlib.figure import Figure  # only a picture needs it

    grid, accuracy = report["grid"], report["accuracy"]
    names = [name for name in accuracy if name not in NOT_DRAWN]
    styles = {
        name: {"color": colour, "marker": marker, "markersize": 3.5, "linewidth": 0.8}
        for name, colour, marker in zip(
            [name for name in names if name not in STYLES], cycle(COLOURS), cycle(MARKERS)
        )
    } | STYLES
    divergences = list(dict.fromkeys(d for a in accuracy.values() for x in a.values() for d in x))
    columns = [(what, dtype) for what in ("loss", "gradient") for dtype in report["rounding"]]
    at_one = grid["temperatures"].index(1.0)
    at_kl = grid["targets"].index(1e-4)

    figure = Figure(figsize=(15, 11.5), layout="constrained")
    panels = figure.subplots(len(divergences) + 1, len(columns), sharey=True)
    lines = {}
    for row, divergence in enumerate([*divergences, None]):
        for panel, (what, dtype) in zip(panels[row], columns, strict=True):
            kind = divergence or "forward_kl"
            x = grid["temperatures"] if divergence is None else grid["kl"][dtype][at_one]

            def pick(errors: list[list], by_temperature: bool = divergence is None) -> list:
                return [r[at_kl] for r in errors] if by_temperature else errors[at_one]

            if what == "gradient":
                floor = _clip(pick(report["rounding"][dtype][kind]))
                (lines["rounding to the dtype"],) = panel.plot(x, floor, color="0.6", linestyle=":")
            for name in names:
                if errors := accuracy[name].get(dtype, {}).get(kind):
                    y = _clip(pick(errors[what]))
                    (lines[name],) = panel.plot(x, y, **styles[name])
            panel.set(xscale="log", yscale="log", ylim=(FINEST, COARSEST))
            panel.grid(alpha=0.3)
            panel.tick_params(labelsize=7)
            if divergence is None:
                panel.set_xticks(x, [f"{t:g}" for t in x])
                panel.minorticks_off()
            if row == 0:
                panel.set_title(f"{what}, {dtype}", fontsize=10)
        label = "forward_kl = 1e-4\nby temperature" if divergence is None else divergence
        panels[row][0].set_ylabel(label, fontsize=10)
    for panel in panels[-2]:
        panel.set_xlabel("KL(teacher || student) in nats, T = 1", fontsize=8)
    for panel in panels[-1]:
        panel.set_xlabel("temperature", fontsize=8)
    marks = report.get("interpreted", [])
    labels = [f"{name} (interpreted)" if name in marks else name for name in lines]
    figure.suptitle("Relative error against float64 on the same inputs", fontsize=12)
    figure.legend(lines.values(), labels, loc="outside lower center", ncols=6, fontsize=9)
    figure.savefig(path, dpi=110)


def _worst(report: dict, name: str, dtype: str, what: str, target: float) -> str:
    """Over temperatures and divergences."""
    column = report["grid"]["targets"].index(target)
    values = [
        row[column]
        for divergence, errors in report["accuracy"][name].get(dtype, {}).items()
        if divergence in TABLE_OF
        for row in errors[what]
    ]
    if not values:
        return ""
    return "NaN" if None in values else f"{max(values):.0e}"


def _source(report: dict, file: str) -> str:
    e = report["environment"]
    packages = ", ".join(f"{name} {v}" for name, v in e["packages"].items() if v)
    missing = "".join(f" Not run: {name}, {why}." for name, why in report["refused"].items())
    marked = report.get("interpreted", [])
    note = f" Under Triton's interpreter: {', '.join(marked)}." if marked else ""
    return (
        f"\n\ntorch {e['torch']}, {packages}, {e['date']}, commit {e['commit']}: "
        f"{source(file, e['command'])}.{note}{missing}\n"
    )


def numerics_table(report: dict, file: str) -> str:
    """The worst errors at a small and at a larger KL."""
    rows = [
        [f"`{name}`" if name.endswith("kd_loss") else name]
        + [
            ", ".join(filter(None, (_worst(report, name, dtype, what, at) for at in TABLE_AT)))
            for dtype in report["rounding"]
            for what in ("loss", "gradient")
        ]
        for name in report["accuracy"]
    ]
    header = ["relative error"]
    header += [f"{dtype} {what}" for dtype in report["rounding"] for what in ("loss", "gradient")]
    return table(header, rows) + _source(report, file)


def _cell(verdicts: dict[str, str] | None) -> str:
    """Divergences of one verdict together."""
    if verdicts is None:
        return ""
    if len(set(verdicts.values())) == 1:
        return next(iter(verdicts.values()))
    by_verdict: dict[str, list[str]] = {}
    for divergence, verdict in verdicts.items():
        by_verdict.setdefault(verdict, []).append(f"`{divergence}`")
    return "; ".join(f"{', '.join(names)} {verdict}" for verdict, names in by_verdict.items())


def behaviour_table(report: dict, file: str) -> str:
    """The verdict on every provider in every case."""
    cases = list(dict.fromkeys(case for b in report["behaviour"].values() for case in b))
    rows = [
        [f"`{name}`" if name.endswith("kd_loss") else name, *(_cell(b.get(case)) for case in cases)]
        for name, b in report["behaviour"].items()
    ]
    return table(["", *cases], rows) + _source(report, file)
