"""Tables of what compilers made of the kernels, which needs no quiet machine to know."""

from __future__ import annotations

import re

from .tables import source, table


def cpu_instructions(report: dict, file: str) -> str:
    """Instructions per vocabulary entry, loss and loss + gradient."""
    sets = report["instruction_sets"]
    columns = [(name, dtype) for name in sets for dtype in ("float32", "bfloat16", "float16")]
    divergences = dict.fromkeys(key.split()[0] for key in sets["avx2"]["per_entry"])

    def cell(divergence: str, name: str, dtype: str) -> str:
        counts = sets[name]["per_entry"]
        both = (counts[f"{divergence} {dtype} {what}"] for what in ("loss", "loss+gradient"))
        return ", ".join(f"{count:.1f}" for count in both)

    header = ["instructions an entry: loss, loss + gradient"]
    header += [f"{name} {dtype}" for name, dtype in columns]
    rows = [[f"`{d}`", *(cell(d, *column) for column in columns)] for d in divergences]
    note = f"\n\n{report['compiler']}: {source(file, 'python -m benchmarks.instructions')}.\n"
    return table(header, rows) + note


def cpu_flops(report: dict, file: str) -> str:
    """Floating-point operations per vocabulary entry, as an AVX2 kernel executes them."""
    counts = report["instruction_sets"]["avx2"]["flops_per_entry"]
    dtypes = {"float32": 4, "bfloat16": 2, "float16": 2}

    def cell(divergence: str, dtype: str) -> str:
        loss, both = (counts[f"{divergence} {dtype} {what}"] for what in ("loss", "loss+gradient"))
        return f"{loss:.0f}, {both:.0f} ({both / (3 * dtypes[dtype]):.1f})"

    header = ["FLOPs an entry: loss, loss + gradient (a byte of 3U)", *dtypes]
    divergences = dict.fromkeys(key.split()[0] for key in counts)
    rows = [[f"`{d}`", *(cell(d, dtype) for dtype in dtypes)] for d in divergences]
    note = f"\n\n{report['compiler']}, AVX2: {source(file, 'python -m benchmarks.instructions')}.\n"
    return table(header, rows) + note


def snake_case(name: str) -> str:
    """A divergence's name from that of its struct."""
    return re.sub("(?<=[a-z])(?=[A-Z])", "_", name).lower()


def cuda_instructions(report: dict, file: str) -> str:
    """Of the kernel that serves a plain call, per pair of logits; their time over the 3U floor."""
    names = dict.fromkeys(case["divergence"] for case in report["cases"])

    def cells(divergence: str, item_size: int, rows: str) -> list[str]:
        of_both = [
            case
            for case in report["cases"]
            if (case["divergence"], case["item_size"], case["rows"])
            == (divergence, item_size, rows)
        ]
        # Registers where a divergence has such a kernel: as csrc/cuda/tiles.h chooses.
        case = min(of_both, key=lambda case: case["kernel"] != "registers")
        return [
            f"{case['instructions_per_pair']:.0f}, {case['flops_per_pair']:.0f}",
            f"{case['issue_of_floor']:.2f}, {case['special_of_floor']:.2f}",
        ]

    header = [""]
    for kind in ("far rows, bfloat16", "near rows, bfloat16", "far rows, float32"):
        header += [f"{kind}: instructions, FLOPs a pair", "issue, special functions / floor"]
    rows = [
        [
            f"`{snake_case(name)}`",
            *cells(name, 2, "far"),
            *cells(name, 2, "near"),
            *cells(name, 4, "far"),
        ]
        for name in names
    ]
    e = report["environment"]
    note = f"\n\n{e['note']}, nvcc {e['nvcc']}: {source(file, e['command'])}.\n"
    return table(header, rows) + note


def triton_resources(report: dict, file: str) -> str:
    """Registers and instructions per divergence, at a vocabulary of 128256."""
    large = [k for k in report["kernels"] if k["vocab"] == 128256 and not k["phase"]]
    kernels = [k for k in large if k["divergence"] not in ("scale", "tails")]

    def cell(target: str, divergence: str, **want: bool) -> str:
        want = {"labels": False, "options": False, "gradient": True, **want}
        kernel = next(
            k
            for k in kernels
            if (k["target"], k["divergence"]) == (target, divergence)
            and k["dtype"] == ("float16" if want["options"] else "bfloat16")
            and all(k[name] == value for name, value in want.items())
        )
        return f"{kernel['registers']}, {kernel['instructions']}, {kernel['float64']}"

    variants: dict[str, dict[str, bool]] = {
        "loss + gradient": {},
        "loss only": {"gradient": False},
        "with labels": {"labels": True},
        "all options": {"options": True},
    }
    everywhere = dict.fromkeys(k["target"] for k in report["kernels"])
    targets = [target for target in everywhere if target.startswith("sm_")]
    header = ["registers, instructions, of them float64"]
    header += [f"{variant}, {target}" for variant in variants for target in targets]
    rows = [
        [f"`{name}`"]
        + [cell(target, name, **want) for want in variants.values() for target in targets]
        for name in dict.fromkeys(k["divergence"] for k in kernels)
    ]
    spilled = sum(k["stack"] > 0 or k["local"] > 0 for k in report["kernels"])
    note = (
        f"\n\n{len(report['kernels'])} kernels for {', '.join(everywhere)}, {spilled} with spills "
        f"or local memory, Triton {report['triton']}: "
        f"{source(file, 'python -m benchmarks.triton_resources')}.\n"
    )
    return table(header, rows) + note
