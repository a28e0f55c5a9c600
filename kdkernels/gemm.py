"""The matrix products of the fused-linear level, written into existing memory.

Where operands are 16-bit and the result is float32, or the dtype is float16 on a CPU, which has no
fast product for it, products run by slices of the vocabulary: in float32 on a CPU, with float32
results on a GPU. The size of a slice, and so the memory it takes, is bounded.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

#: What a slice takes: on a CPU it stays in the cache, on a GPU it is to occupy all multiprocessors.
_SLICE_BYTES = {"cpu": 2**22, "cuda": 2**25}


def _fits(out: Tensor, operand: Tensor) -> bool:
    """Whether one product of PyTorch does it, without converting."""
    return out.dtype == operand.dtype and not (
        out.device.type == "cpu" and out.dtype == torch.float16
    )


def _slices(vocab: int, width: int, like: Tensor) -> Iterator[slice]:
    """Slices of the vocabulary whose float32 (slice, width) tensor takes about _SLICE_BYTES."""
    step = max(16, _SLICE_BYTES.get(like.device.type, 2**22) // (4 * max(1, width)))
    for begin in range(0, vocab, step):
        yield slice(begin, min(vocab, begin + step))


@functools.cache
def _accumulates_in_float32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this torch adds a 16-bit product to a float32 matrix."""
    matrix = torch.zeros(16, 16, device=device, dtype=dtype)
    total = torch.zeros(16, 16, device=device, dtype=torch.float32)
    try:
        torch.addmm(total, matrix, matrix, out_dtype=torch.float32, out=total)
    except RuntimeError:
        return False
    return True


def _on_gpu(tensor: Tensor) -> bool:
    """Whether products of 16-bit operands can have a float32 result there."""
    return tensor.device.type == "cuda"


def _wide_product(out: Tensor, a: Tensor, b: Tensor, accumulate: bool) -> bool:
    """out = a @ b, or out += a @ b, in float32 of 16-bit operands, if a GPU does it at once."""
    if not _on_gpu(out):
        return False
    if not accumulate:
        torch.mm(a, b, out_dtype=torch.float32, out=out)
    elif _accumulates_in_float32(out.device, a.dtype):
        torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
    else:
        return False
    return True


@functools.cache
def _multiplies_bfloat16() -> bool:
    """Whether this CPU has instructions for it: products are twice as fast then, or more."""
    return torch.cpu._is_avx512_bf16_supported()


def _operand(tensor: Tensor) -> Tensor:
    """The tensor as :func:`_float32_product` takes it."""
    return tensor if _on_gpu(tensor) else tensor.float()


def _float32_product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in float32."""
    return torch.mm(a, b) if a.dtype == torch.float32 else torch.mm(a, b, out_dtype=torch.float32)


def write_logits(
    out: Tensor,  # (rows, vocab)
    hidden: Tensor,  # (rows, hidden)
    weight: Tensor,  # (vocab, hidden)
    bias: Tensor | None,  # (vocab,)
    accumulate: bool,
) -> None:
    """out = hidden @ weight.T + bias; with ``accumulate`` out += hidden @ weight.T."""
    if _fits(out, hidden):
        if accumulate:
            out.addmm_(hidden, weight.t())
        elif bias is None:
            torch.mm(hidden, weight.t(), out=out)
        else:
            torch.addmm(bias, hidden, weight.t(), out=out)
        return
    if _wide_product(out, hidden, weight.t(), accumulate):
        if bias is not None and not accumulate:
            out += bias
        return
    hidden = _operand(hidden)
    for part in _slices(weight.shape[0], max(hidden.shape), out):
        product = _float32_product(hidden, _operand(weight[part]).t())
        if accumulate:
            product += out[:, part]
        elif bias is not None:
            product += bias[part]
        out[:, part] = product


def write_hidden_gradient(
    out: Tensor,  # (rows, hidden)
    gradient: Tensor,  # (rows, vocab)
    weight: Tensor,  # (vocab, hidden)
) -> None:
    """out = gradient @ weight."""
    if _fits(out, gradient):
        torch.mm(gradient, weight, out=out)
    elif not _wide_product(out, gradient, weight, accumulate=False):
        total = torch.zeros_like(out, dtype=torch.float32)
        for part in _slices(weight.shape[0], max(out.shape), out):
            total.addmm_(gradient[:, part].float(), weight[part].float())
        out.copy_(total)


def add_weight_gradient(
    out: Tensor,  # (vocab, hidden)
    gradient: Tensor,  # (rows, vocab)
    hidden: Tensor,  # (rows, hidden)
    accumulate: bool,
) -> None:
    """out = gradient.T @ hidden, or out += with ``accumulate``; sums over rows are float32.

    On a CPU that multiplies bfloat16 a product is rounded to it once before it is added.
    """
    if _fits(out, gradient):
        if accumulate:
            out.addmm_(gradient.t(), hidden)
        else:
            torch.mm(gradient.t(), hidden, out=out)
        return
    if _wide_product(out, gradient.t(), hidden, accumulate):
        return
    narrow = not _on_gpu(out) and gradient.dtype == torch.bfloat16 and _multiplies_bfloat16()
    if not narrow:
        hidden = _operand(hidden)
    for part in _slices(out.shape[0], max(hidden.shape), out):
        operand = gradient[:, part]
        if narrow:
            product = torch.mm(operand.t(), hidden)
        else:
            product = _float32_product(_operand(operand).t(), hidden)
        if accumulate:
            out[part] += product
        else:
            out[part] = product


def add_bias_gradient(
    out: Tensor,  # (vocab,) float32
    gradient: Tensor,  # (rows, vocab)
    row_scale: Tensor | None,  # (rows,) float32
) -> None:
    """out += row_scale @ gradient, in float32."""
    if row_scale is None and _on_gpu(out):
        out += gradient.sum(0, dtype=torch.float32)
        return
    if row_scale is None:
        row_scale = torch.ones(gradient.shape[0], dtype=torch.float32, device=gradient.device)
    for part in _slices(out.shape[0], gradient.shape[0], out):
        out[part] += row_scale @ gradient[:, part].float()
