"""What older PyTorch and Triton do not do: tests of it are expected to fail there."""

from __future__ import annotations

import importlib
import importlib.util

import pytest


def before(package: str, *version: int, reason: str) -> pytest.MarkDecorator:
    """Of tests that fail with an older version of the package, for this reason."""
    older = False
    if importlib.util.find_spec(package):
        here = importlib.import_module(package).__version__.split(".")
        older = tuple(int(x) for x in here[: len(version)]) < version
    return pytest.mark.xfail(older, reason=f"{package} {reason}")
