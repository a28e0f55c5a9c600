"""What a result depends on besides the code timed: versions, commit, command."""

from __future__ import annotations

import os
import platform
import shlex
from collections.abc import Iterable
from datetime import date
from importlib import metadata
from pathlib import Path

import torch

import kdkernels

from .device import stdout_of

ROOT = Path(__file__).parent.parent
CODE = ("kdkernels", "csrc", "benchmarks", ":!benchmarks/results")


def commit() -> str:
    """The checkout's commit, dirty where code differs from it; results and docs may."""
    if given := os.environ.get("KDKERNELS_COMMIT"):  # of a copy without its repository
        return given
    git = ("git", "-C", str(ROOT))
    changed = stdout_of(*git, "status", "--porcelain", "--untracked-files=no", "--", *CODE)
    return (stdout_of(*git, "rev-parse", "--short", "HEAD") or "unknown") + "-dirty" * bool(changed)


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def environment(command: list[str], packages: Iterable[str] = ()) -> dict[str, object]:
    """Versions of the packages are those installed; a missing one is null."""
    return {
        "kdkernels": kdkernels.__version__,
        "commit": commit(),
        "torch": torch.__version__,
        "packages": {name: version(name) for name in ("triton", *packages)},
        "python": platform.python_version(),
        "date": date.today().isoformat(),
        "command": shlex.join(["python", "-m", *command]),
    }
