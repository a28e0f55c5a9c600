"""Whether anything watches or transforms the operators that a call would dispatch."""

from __future__ import annotations

import operator
from functools import reduce

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.compiler import is_compiling
from torch.overrides import has_torch_function

try:  # private names: with a PyTorch that has others, every call is dispatched
    from torch._C import (
        DispatchKey,
        DispatchKeySet,
        _dispatch_keys,
        _dispatch_tls_local_include_set,
    )
    from torch._C._autograd import _profiler_enabled

    def _keys(*names: str) -> int:
        return reduce(
            operator.or_, (DispatchKeySet(getattr(DispatchKey, name)) for name in names)
        ).raw_repr()

    _THREAD_KEYS = _keys("BackendSelect", "ADInplaceOrView")
    _TENSOR_KEYS = _keys("CPU", "ADInplaceOrView", "AutogradCPU", "AutocastCPU")
except (AttributeError, ImportError, TypeError):
    _THREAD_KEYS = 0


try:  # private names too: without them, torch's own errors have to do
    from torch._C import _are_functorch_transforms_active as transforms_active
    from torch._C._functorch import get_unwrapped, is_functorch_wrapped_tensor
except ImportError:

    def transforms_active() -> bool:
        """Whether torch.func transforms what runs."""
        return False


def hides_gradient(tensor: Tensor) -> bool:
    """Whether it requires grad beneath the wrappers of torch.func's vmap, which say it does not."""
    if is_compiling() or not transforms_active():
        return False
    while is_functorch_wrapped_tensor(tensor):
        tensor = get_unwrapped(tensor)
    return tensor.requires_grad


def has_autocast(device: torch.device) -> bool:
    """Where torch.autocast works: torch.compile of torch 2.8 cannot trace PyTorch's own answer."""
    return device.type != "meta"


def may_look(tensor: Tensor) -> bool:
    """Whether a look at values can be, costs no waiting for a device, and is no part of a graph."""
    return tensor.device.type == "cpu" and not is_compiling() and not isinstance(tensor, FakeTensor)


def goes_straight(*tensors: Tensor | None) -> bool:
    """Whether calling an operator would only run its implementation on plain CPU tensors.

    The implementation is called itself then: dispatching costs a small call more than its kernel.
    Whoever looks at operators shows in the keys by which torch dispatches. In those of the thread:
    modes, fake tensors, transforms, tracing. In those of a tensor: subclasses, wrappers of
    transforms, lazy negation and zeros. Any other set of keys than the usual one is theirs.
    """
    if (
        is_compiling()
        or not _THREAD_KEYS
        or _profiler_enabled()
        or has_torch_function(tensors)
        or _dispatch_tls_local_include_set().raw_repr() != _THREAD_KEYS
    ):
        return False
    for tensor in tensors:
        if tensor is not None and _dispatch_keys(tensor).raw_repr() != _TENSOR_KEYS:
            return False
    return True
