"""Operations of Triton's interpreter on numbers of one type, by NumPy and nothing else.

To find out that they are of one type takes the interpreter some five times as long, and to look for
overflow of integers by further operations twenty times. All else is left to it; overflow too, which
it reports.
"""

from __future__ import annotations

import numpy as np
import triton.language as tl
from triton.language.core import block_type, constexpr, dtype, int1, int64, tensor
from triton.runtime import interpreter

FLOATS, INTEGERS = ("fp32", "fp64"), ("int32", "int64")
NUMBERS = FLOATS + INTEGERS
_types = {}


def _sizes(type):
    return vars(type).get("key", ("",))[1:]  # () of a number


def _result(data, element, like, *others):
    shape = next(filter(None, map(_sizes, (like, *others))), ())
    key = element.name, shape
    if key not in _types:
        _types[key] = block_type(element, list(shape)) if shape else element
    return tensor(interpreter.TensorHandle(data, element), _types[key])


def _pair(x, y, kinds):
    """Two values, the element type and type of what they make; None if they do not match."""
    y = y.value if type(y) is constexpr else y
    element, whole = x.dtype, x.type
    if element.name not in kinds:
        return None
    if type(y) is not tensor:
        fits = type(y) is int and abs(y) < 2**31
        fits = fits or (type(y) is float and element.name in FLOATS)
        return (x.handle.data, y, element, whole) if fits else None
    if y.dtype.name != element.name:
        if _sizes(whole) or _sizes(y.type) or not {element.name, y.dtype.name} <= {*INTEGERS}:
            return None
        element = whole = int64
    elif y.type is not whole:
        if _sizes(whole) and _sizes(y.type):
            return None
        whole = whole if _sizes(whole) else y.type
    return x.handle.data, y.handle.data, element, whole


def _arithmetic(operate):
    def call(slow, x, y):
        known = _pair(x, y, NUMBERS)
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


def _truth(operate, kinds):
    def call(slow, x, y):
        known = _pair(x, y, kinds)
        if known is None:
            return slow(x, y)
        left, right, _, whole = known
        return _result(operate(left, right), int1, whole)

    return call


def _where(slow, condition, x, y):
    of_bool = type(condition) is tensor and condition.dtype.name == "int1"
    known = _pair(x, y, NUMBERS) if of_bool and type(x) is tensor else None
    if known is None or (_sizes(known[3]) and _sizes(condition.type) not in ((), _sizes(known[3]))):
        return slow(condition, x, y)
    left, right, element, whole = known
    data = np.where(condition.handle.data, left, right)
    return _result(data, element, whole, condition.type)


def _to(slow, x, type, *args):
    type = type.value if isinstance(type, constexpr) else type
    name = type.name if isinstance(type, dtype) else ""
    exact = not args and x.dtype.name in NUMBERS and name in NUMBERS
    if not exact or (x.dtype.name in FLOATS and name in INTEGERS):
        return slow(x, type, *args)
    data = x.handle.data.astype(interpreter._get_np_dtype(type), copy=False)
    return _result(data, type, x.type)


def _exp2(slow, x):
    return _result(np.exp2(x.handle.data), x.dtype, x.type) if x.dtype.name in FLOATS else slow(x)


def _faster_operations():
    """By the object that has them and their names."""
    faster = {(tensor, "to"): _to, (tl, "where"): _where, (tl, "exp2"): _exp2}
    for name, operate in {"add": np.add, "sub": np.subtract, "mul": np.multiply}.items():
        faster[tensor, f"__{name}__"] = _arithmetic(operate)
        faster[tensor, f"__r{name}__"] = _arithmetic(lambda x, y, operate=operate: operate(y, x))
    orders = {"lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal}
    for name, operate in {**orders, "eq": np.equal}.items():
        faster[tensor, f"__{name}__"] = _truth(operate, NUMBERS)
    faster[tensor, "__and__"] = _truth(np.bitwise_and, ("int1",))
    faster[tensor, "__or__"] = _truth(np.bitwise_or, ("int1",))
    return faster


def install() -> None:
    """Has the interpreter use them."""
    faster, original = _faster_operations(), interpreter._patch_attr

    def patch(obj, name, *args):
        original(obj, name, *args)
        slow, call = getattr(obj, name), faster.get((obj, name))
        if call:
            setattr(obj, name, lambda *args, **options: (
                slow(*args, **options) if options else call(slow, *args)
            ))  # fmt: skip

    interpreter._patch_attr = patch
