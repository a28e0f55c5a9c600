"""Matrix products of the fused-linear level, those of a GPU by stand-ins for its functions."""

from __future__ import annotations

import pytest
import torch

from kdkernels import gemm

from .cases import normal

ROWS, VOCAB, HIDDEN = 9, 300, 40


@pytest.fixture(params=["cpu", "gpu", "gpu that cannot accumulate"])
def products(request, monkeypatch):
    """How many products each call takes, as a list."""
    sizes = []
    mm, addmm = torch.mm, torch.addmm

    def wide_mm(a, b, *, out_dtype=None, out=None):
        sizes.append(b.shape[1])
        if out_dtype is None:
            return mm(a, b) if out is None else mm(a, b, out=out)
        product = mm(a.to(out_dtype), b.to(out_dtype))
        return product if out is None else out.copy_(product)

    def wide_addmm(total, a, b, *, out_dtype=None, out=None):
        sizes.append(b.shape[1])
        if out_dtype is None:
            return addmm(total, a, b, out=out)
        return out.copy_(total + mm(a.to(out_dtype), b.to(out_dtype)))

    monkeypatch.setattr(torch, "mm", wide_mm)
    monkeypatch.setattr(torch, "addmm", wide_addmm)
    monkeypatch.setattr(gemm, "_on_gpu", lambda _: request.param != "cpu")
    monkeypatch.setattr(gemm, "_accumulates_in_float32", lambda *_: request.param == "gpu")
    monkeypatch.setattr(gemm, "_SLICE_BYTES", {"cpu": 4 * 64 * HIDDEN})
    sizes.append(request.param)
    return sizes


def random(*shape, seed):
    return normal(*shape, seed=seed).bfloat16()


def close(actual, expected):
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bias", [None, random(VOCAB, seed=3)], ids=["plain", "bias"])
def test_float32_logits_of_16_bits(products, bias):
    hidden, weight = random(ROWS, HIDDEN, seed=1), random(VOCAB, HIDDEN, seed=2)
    out = torch.full((ROWS, VOCAB), torch.nan)
    gemm.write_logits(out, hidden, weight, bias, accumulate=False)
    exact = hidden.double() @ weight.double().t() + (0 if bias is None else bias.double())
    close(out, exact)
    gemm.write_logits(out, hidden, weight, None, accumulate=True)
    close(out, exact + hidden.double() @ weight.double().t())
    kind, *sizes = products
    slices = [64] * 4 + [VOCAB - 4 * 64]
    once = {"cpu": slices + slices, "gpu": [VOCAB, VOCAB]}
    assert sizes == once.get(kind, [VOCAB, *slices])


def test_gradients_in_float32(products, monkeypatch):
    monkeypatch.setattr(gemm, "_multiplies_bfloat16", lambda: False)
    hidden, weight = random(ROWS, HIDDEN, seed=1), random(VOCAB, HIDDEN, seed=2)
    gradient, scale = random(ROWS, VOCAB, seed=4), normal(ROWS, seed=5)
    out = torch.full((ROWS, HIDDEN), torch.nan)
    gemm.write_hidden_gradient(out, gradient, weight)
    close(out, gradient.double() @ weight.double())
    out = torch.full((VOCAB, HIDDEN), torch.nan)
    exact = gradient.double().t() @ hidden.double()
    for count in (1, 2):
        gemm.add_weight_gradient(out, gradient, hidden, accumulate=count > 1)
        close(out, count * exact)
    out = torch.ones(VOCAB)
    gemm.add_bias_gradient(out, gradient, None)
    close(out, 1 + gradient.double().sum(0))
    gemm.add_bias_gradient(out, gradient, scale)
    close(out, 1 + gradient.double().sum(0) + scale.double() @ gradient.double())


def test_weight_gradients_by_products_in_bfloat16(monkeypatch):
    """Each rounded once, to half a unit in the last of its 8 bits, and added in float32."""
    monkeypatch.setattr(gemm, "_multiplies_bfloat16", lambda: True)
    monkeypatch.setattr(gemm, "_SLICE_BYTES", {"cpu": 4 * 64 * HIDDEN})
    out = torch.full((VOCAB, HIDDEN), torch.nan)
    exact, rounding = torch.zeros(VOCAB, HIDDEN, dtype=torch.float64), 0.0
    for chunk in range(3):
        hidden = random(ROWS, HIDDEN, seed=chunk)
        gradient = random(ROWS, VOCAB, seed=chunk + 10)
        product = gradient.double().t() @ hidden.double()
        exact, rounding = exact + product, rounding + product.abs() * 2.0**-8
        gemm.add_weight_gradient(out, gradient, hidden, accumulate=chunk > 0)
        assert ((out.double() - exact).abs() <= rounding + 1e-5).all()
