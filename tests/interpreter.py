"""Triton's interpreter, set up before any kernel is imported; on a GPU kernels are compiled."""

from __future__ import annotations

import importlib.util
import os

import torch

INSTALLED = importlib.util.find_spec("triton") is not None
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def _patch_once_a_module(interpreter) -> None:
    """The interpreter patches triton.language again for every call between jitted functions.

    That takes most of the time of a small kernel. Once for every module is enough: what a launch
    patches it takes back, what such a call patches stays.
    """
    original = interpreter.InterpretedFunction.__call__
    patched = set()

    def call(function, *args, **kwargs):
        module = function.fn.__module__
        if module in patched:
            return function.rewrite()(*args, **kwargs)
        patched.add(module)
        return original(function, *args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call


def _convert_bfloat16_as_hardware_does(interpreter) -> None:
    """The interpreter cuts off the bits that do not fit instead of rounding."""
    original = interpreter.InterpreterBuilder.cast_impl

    def cast(builder, source, to):
        kinds = source.dtype.scalar.name, to.scalar.name
        if kinds == ("fp32", "bf16"):
            rounded = torch.from_numpy(source.data).bfloat16().view(torch.uint16)
            return interpreter.TensorHandle(rounded.numpy(), to.scalar)
        if kinds == ("bf16", "fp32"):
            widened = torch.from_numpy(source.data).view(torch.bfloat16).float()
            return interpreter.TensorHandle(widened.numpy(), to.scalar)
        return original(builder, source, to)

    interpreter.InterpreterBuilder.cast_impl = cast


if INSTALLED and DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"
    from triton.runtime import interpreter

    _patch_once_a_module(interpreter)
    _convert_bfloat16_as_hardware_does(interpreter)
