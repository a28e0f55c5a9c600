"""Whether anything watches or transforms the operators that a call dispatches."""

from __future__ import annotations

import operator
from functools import reduce

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.compiler import is_compiling
from torch.overrides import has_torch_function

try:  # private names: where a PyTorch lacks them, every call is dispatched
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
    _TENSOR_KEYS = {
        _keys(device, "ADInplaceOrView", f"Autograd{device}", f"Autocast{device}")
        for device in ("CPU", "CUDA")
    }
except (AttributeError, ImportError, TypeError):
    _THREAD_KEYS = 0


try:  # private names too: without them, PyTorch's own errors are raised
    from torch._C import _are_functorch_transforms_active as transforms_active
    from torch._C._functorch import (
        get_unwrapped,
        is_functorch_wrapped_tensor,
        is_legacy_batchedtensor,
    )
except ImportError:

    def transforms_active() -> bool:
        """Whether a torch.func transform is active."""
        return False

    def is_legacy_batchedtensor(tensor: Tensor) -> bool:
        """Whether a tensor is a batch of them, by is_grads_batched of torch.autograd.grad."""
        return False


def hides_gradient(tensor: Tensor) -> bool:
    """Whether a tensor requires grad although its torch.func.vmap wrapper says it does not."""
    if is_compiling() or not transforms_active():
        return False
    while is_functorch_wrapped_tensor(tensor):
        tensor = get_unwrapped(tensor)
    return tensor.requires_grad


def has_autocast(device: torch.device) -> bool:
    """Whether torch.autocast works; torch.compile of torch 2.8 cannot trace PyTorch's check."""
    return device.type != "meta"


def may_look(tensor: Tensor) -> bool:
    """Whether values can be looked at: no tracing, no transform, no device to wait for."""
    return (
        tensor.device.type == "cpu"
        and not is_compiling()
        and not isinstance(tensor, FakeTensor)
        and not transforms_active()
    )


def goes_straight(*tensors: Tensor | None) -> bool:
    """Whether dispatching an operator would only run its implementation on plain tensors.

    Then the implementation is called directly, as dispatching takes longer than the kernel of a
    small call. Whoever intercepts operators shows in the keys by which torch dispatches: in the
    thread's keys modes, fake tensors, transforms and tracing, in a tensor's keys subclasses,
    wrappers of transforms, lazy negation and zeros. So any unusual set of keys is dispatched.
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
        if tensor is not None and _dispatch_keys(tensor).raw_repr() not in _TENSOR_KEYS:
            return False
    return True
