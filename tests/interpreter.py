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


def _operate_at_once(interpreter) -> None:
    """What NumPy does with numbers of one type is done by it, and by nothing else.

    To find out that they are of one type takes the interpreter some five times as long, and to look
    for overflow of integers by further operations twenty times. All else is left to it; overflow
    too, which it reports.
    """
    from triton.language.core import block_type, constexpr, dtype, int1, int64, tensor

    floats, integers = ("fp32", "fp64"), ("int32", "int64")
    numbers = floats + integers
    types = {}

    def sizes(type):
        return vars(type).get("key", ("",))[1:]  # () of a number

    def result(data, element, like, *others):
        shape = next(filter(None, map(sizes, (like, *others))), ())
        key = element.name, shape
        if key not in types:
            types[key] = block_type(element, list(shape)) if shape else element
        return tensor(interpreter.TensorHandle(data, element), types[key])

    def pair(x, y, kinds):
        """Two values, the element type and type of what they make; None if they do not match."""
        y = y.value if type(y) is constexpr else y
        element, whole = x.dtype, x.type
        if element.name not in kinds:
            return None
        if type(y) is not tensor:
            fits = type(y) is int and abs(y) < 2**31
            fits = fits or (type(y) is float and element.name in floats)
            return (x.handle.data, y, element, whole) if fits else None
        if y.dtype.name != element.name:
            if sizes(whole) or sizes(y.type) or not {element.name, y.dtype.name} <= {*integers}:
                return None
            element = whole = int64
        elif y.type is not whole:
            if sizes(whole) and sizes(y.type):
                return None
            whole = whole if sizes(whole) else y.type
        return x.handle.data, y.handle.data, element, whole

    def arithmetic(operate):
        def call(slow, x, y):
            known = pair(x, y, numbers)
            if known is None:
                return slow(x, y)
            left, right, element, whole = known
            if element.name != "int32":
                data = operate(left, right)
            else:
                exact = operate(np.int64(left), np.int64(right))
                data = exact.astype(np.int32)
                if (data != exact).any():
                    return slow(x, y)
            return tensor(interpreter.TensorHandle(data, element), whole)

        return call

    def truth(operate, kinds):
        def call(slow, x, y):
            known = pair(x, y, kinds)
            if known is None:
                return slow(x, y)
            left, right, _, whole = known
            return result(operate(left, right), int1, whole)

        return call

    def where(slow, condition, x, y):
        of_bool = type(condition) is tensor and condition.dtype.name == "int1"
        known = pair(x, y, numbers) if of_bool and type(x) is tensor else None
        if known is None or (
            sizes(known[3]) and sizes(condition.type) not in ((), sizes(known[3]))
        ):
            return slow(condition, x, y)
        left, right, element, whole = known
        data = np.where(condition.handle.data, left, right)
        return result(data, element, whole, condition.type)

    def to(slow, x, type, *args):
        type = type.value if isinstance(type, constexpr) else type
        name = type.name if isinstance(type, dtype) else ""
        exact = not args and x.dtype.name in numbers and name in numbers
        if not exact or (x.dtype.name in floats and name in integers):
            return slow(x, type, *args)
        data = x.handle.data.astype(interpreter._get_np_dtype(type), copy=False)
        return result(data, type, x.type)

    def exp2(slow, x):
        return (
            result(np.exp2(x.handle.data), x.dtype, x.type) if x.dtype.name in floats else slow(x)
        )

    tl = interpreter.tl
    faster = {(tensor, "to"): to, (tl, "where"): where, (tl, "exp2"): exp2}
    for name, operate in {"add": np.add, "sub": np.subtract, "mul": np.multiply}.items():
        faster[tensor, f"__{name}__"] = arithmetic(operate)
        faster[tensor, f"__r{name}__"] = arithmetic(lambda x, y, operate=operate: operate(y, x))
    orders = {"lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal}
    for name, operate in {**orders, "eq": np.equal}.items():
        faster[tensor, f"__{name}__"] = truth(operate, numbers)
    faster[tensor, "__and__"] = truth(np.bitwise_and, ("int1",))
    faster[tensor, "__or__"] = truth(np.bitwise_or, ("int1",))
    original = interpreter._patch_attr

    def patch(obj, name, *args):
        original(obj, name, *args)
        slow, call = getattr(obj, name), faster.get((obj, name))
        if call:
            setattr(obj, name, lambda *args, **options: (
                slow(*args, **options) if options else call(slow, *args)
            ))  # fmt: skip

    interpreter._patch_attr = patch


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

    _patch_once_a_module(interpreter)
    _remember_types(interpreter)
    _operate_at_once(interpreter)
    _convert_bfloat16_as_hardware_does(interpreter)
    _reduce_nan_as_hardware_does(interpreter)
