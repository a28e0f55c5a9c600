"""The kernels of csrc/cuda in the emulator of csrc/tests, in the place of a GPU's.

``KDKERNELS_EMULATED`` names the extension that ``make emulated`` builds. With it, CUDA backends
take tensors on the CPU; what a GPU's streams, memory and arithmetic do differently is not seen.
"""

from __future__ import annotations

import importlib.util
import os
import sys

PATH = os.environ.get("KDKERNELS_EMULATED", "")


def _load() -> None:
    spec = importlib.util.spec_from_file_location("kdkernels._C", PATH)
    assert spec is not None, f"KDKERNELS_EMULATED={PATH} is no extension"
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules[spec.name] = module


def _take_tensors_of_the_cpu() -> None:
    from kdkernels.backends import cuda

    why_not = cuda.why_not
    cuda.device_reasons = lambda index=0: []
    cuda.why_not = lambda *call: [x for x in why_not(*call) if "not on a CUDA device" not in x]
    cuda._launch = lambda function, on, *arguments: function(*arguments, 0, 0)


if PATH:
    _load()
    _take_tensors_of_the_cpu()
