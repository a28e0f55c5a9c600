"""The compiled extension ``kdkernels._C``, or why there is none."""

from __future__ import annotations

try:
    from . import _C
except ImportError as error:  # a source tree that was not built
    _C = None  # type: ignore[assignment]
    missing = f"the extension kdkernels._C is not built ({error})"
else:
    missing = ""
