"""Triton's interpreter, set up before any kernel is imported; on a GPU kernels are compiled."""

from __future__ import annotations

import importlib.util
import os

import numpy as np
import torch

from . import compiled_triton

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


def _remember_types(interpreter) -> None:
    """The interpreter makes the type of a block, and a table of NumPy's, anew in every operation.

    They are a quarter of its time; what a tensor takes from its type is another tenth.
    """
    from triton.language.core import block_type, tensor

    make, look_up, make_tensor = block_type.__init__, interpreter._get_np_dtype, tensor.__init__
    made, known, taken = {}, {}, {}

    def remembered(block, element_type, shape):
        key = element_type.name, *(getattr(size, "value", size) for size in shape)
        if key not in made:
            make(block, element_type, shape)
            made[key] = vars(block) | {"key": key}
        vars(block).update(made[key])

    def numpy_type(dtype):
        if dtype.name not in known:
            known[dtype.name] = look_up(dtype)
        return known[dtype.name]

    def tensor_of(t, handle, type):
        key = vars(type).get("key", type.name)
        if key not in taken:
            make_tensor(t, handle, type)
            taken[key] = {name: value for name, value in vars(t).items() if name != "handle"}
        vars(t).update(taken[key], handle=handle)

    block_type.__init__ = remembered
    interpreter._get_np_dtype = numpy_type
    tensor.__init__ = tensor_of


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


def _reduce_nan_as_hardware_does(interpreter) -> None:
    """A block's maximum leaves NaN out, and Triton 3.4's interpreter doesn't."""
    original = interpreter.ReduceOps.min_max
    without_nan = {np.max: np.nanmax, np.min: np.nanmin}

    def min_max(reduction, block, val_reduce_op, idx_reduce_op=None):
        of_values = without_nan.get(val_reduce_op, val_reduce_op)
        return original(reduction, block, of_values, idx_reduce_op)

    interpreter.ReduceOps.min_max = min_max


if INSTALLED and compiled_triton.FOLDER:
    compiled_triton.install()
elif INSTALLED and DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"
    from triton.runtime import interpreter

    from . import interpreter_operations

    _patch_once_a_module(interpreter)
    _remember_types(interpreter)
    interpreter_operations.install()
    _convert_bfloat16_as_hardware_does(interpreter)
    _reduce_nan_as_hardware_does(interpreter)
