"""Cells and tables in Markdown, of results as ``python -m benchmarks`` writes them."""

from __future__ import annotations

#: Why a provider has no time, in the words of its result.
REASONS = ("refused", "wrong", "failed", "left_out")
FLOORS = ("floor", "copy")
FLOOR_NAMES = {
    "logits": {"floor": "add(s, t, out=g)", "copy": "copy"},
    "sparse": {"floor": "neg(s, out=g)"},
    "linear": {"floor": "bare products"},
}


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def source(file: str, command: str) -> str:
    """A link to the results, and what writes them; benchmarks.report fills in the root."""
    return f"[`{file}`]({{root}}{file}), `{command}`"


def reported(report: dict, file: str) -> str:
    """Where, when and how the results came about."""
    e = report["environment"]
    return f"{machine(e)}: {source(file, e['command'])}."


def reason(result: dict) -> str:
    """Why there is no time, or nothing."""
    return next((f"{key.replace('_', ' ')}: {result[key]}" for key in REASONS if key in result), "")


def milliseconds(value: float) -> str:
    """Three digits."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def worst_gradient_error(result: dict) -> float | None:
    errors = [value for key, value in result.items() if key.endswith("gradient_error")]
    return max(errors) if errors else None


def error(value: float | None) -> str:
    return "" if value is None else f"{value:.0e}"


def name_of(case: dict, provider: str) -> str:
    return FLOOR_NAMES[case["level"]].get(provider, provider)


def case_title(case: dict) -> str:
    name = "" if case["shape"][:1].isdigit() else f"{case['shape']}: "
    sizes = f"{case['rows']} x {case['vocab']}"
    if "hidden" in case:
        sizes += f", hidden sizes {case['hidden']} / {case['teacher_hidden']}"
    close = ", next to the teacher" if "close" in case else ""
    return f"{name}{sizes}, {case['dtype']}, {case['divergence']}, {case['what']}{close}"


def case_table(case: dict) -> str:
    """Everything measured of one case, a provider a row; below it who refused."""
    linear = case["level"] == "linear"
    unit, rate = ("GFLOP/s", "gflop_per_s") if linear else ("GB/s", "gb_per_s")
    others = [name for name in FLOORS if "ms" in case["results"].get(name, {})]
    header = ["", "ms", "quartiles", unit, *(f"of {name_of(case, name)}" for name in others)]
    header += ["peak MiB", "loss error", "gradient error"]
    rows, refused = [], []
    for provider, result in case["results"].items():
        if "refused" in result:
            refused.append(f"{provider}: {result['refused']}")
            continue
        row = [name_of(case, provider)]
        if why := reason(result):
            row += [why, *[""] * (2 + len(others))]
        else:
            quartiles = f"{milliseconds(result['ms_q1'])} to {milliseconds(result['ms_q3'])}"
            row += [milliseconds(result["ms"]), quartiles, f"{result[rate]:.1f}"]
            row += [f"{result[f'speed_of_{name}']:.0%}" for name in others]
        row.append(f"{result['peak_mib']:.0f}" if "peak_mib" in result else "")
        row += [error(result.get("loss_error")), error(worst_gradient_error(result))]
        rows.append(row)
    return table(header, rows) + ("\n\nRefused: " + "; ".join(refused) + "." if refused else "")


def machine(environment: dict) -> str:
    """A line that names the machine and the versions."""
    e = environment
    if "gpu" in e:
        device = f"{e['gpu']}, driver {e['driver']}"
    else:
        device = f"{e['cpu']}, {e['threads']} threads, {e['instruction_set']}"
    return f"{device}, torch {e['torch']}, {e['date']}, commit {e['commit']}"


def markdown(report: dict) -> str:
    """A whole run."""
    parts = [f"{machine(report['environment'])}: `{report['environment']['command']}`"]
    if ceilings := report.get("ceilings"):
        parts.append(
            f"Copy {ceilings['copy_gb_per_s']:.0f} GB/s, bfloat16 product "
            f"{ceilings['bfloat16_gemm_gflop_per_s']:.0f} GFLOP/s."
        )
    if small := report.get("small_call"):
        parts.append(f"A (1, 8) call takes {small['us']} us, eager PyTorch {small['eager_us']} us.")
    for case in report["cases"]:
        rounds = f"Rounds: {case['rounds']}. Allowed errors: {case['allowed_loss_error']:.0e} of "
        rounds += f"the loss, {case['allowed_gradient_error']:.0e} of gradients"
        if ours := case.get("allowed_of_ours"):  # earlier results had none
            rounds += f"; of kdkernels' kernels {ours[0]:.0e} and {ours[1]:.0e}"
        parts.append(f"## {case_title(case)}\n\n{case_table(case)}\n\n{rounds}.")
    if report["left_out"]:
        parts.append("## Left out\n\n" + "\n".join(f"- {line}" for line in report["left_out"]))
    return "\n\n".join(parts) + "\n"
