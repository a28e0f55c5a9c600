"""The tiles of CUDA's kernels that ``KDKERNELS_CUDA_TILE`` asks for."""

from __future__ import annotations

import re

import pytest
import torch

import kdkernels

from .cases import correlated_pair
from .harness import BACKENDS, assert_as_oracle, loss_of, run

VOCAB = 517


@pytest.fixture
def cuda():
    """The CUDA backend where it has all of its tiles."""
    (config,) = (config for config in BACKENDS if config.name == "cuda")
    if config.skip:
        pytest.skip(config.skip)
    if config.device == "cuda" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("only devices from 9.0 on have clusters")
    return config


@pytest.mark.parametrize(
    "tile",
    [
        *("registers", "registers:8", "registers:8x", "warps:1x64", "registers:1x64+behind"),
        *("registers:3x256", "registers:32x256", "streaming:2x256", "streaming:1x256+ahead"),
        *("registers:1x0", "registers:1x48", "registers:1x544", "shared:1x288", "streaming:1x544"),
    ],
)
def test_what_is_no_tile_of_cuda(cuda, monkeypatch, tile):
    monkeypatch.setenv("KDKERNELS_CUDA_TILE", tile)
    with pytest.raises(ValueError, match=f"KDKERNELS_CUDA_TILE is {re.escape(tile)}, expected"):
        loss_of(cuda, *correlated_pair(1, VOCAB))


@pytest.mark.parametrize(
    ("tile", "divergence"),
    [
        ("", "forward_kl"),
        ("registers:1x32", "forward_kl"),
        ("registers:2x512+ahead", "forward_kl"),
        ("shared:1x32", "jsd"),
        ("shared:2x256+ahead", "jsd"),
        ("streaming:1x32", "forward_kl"),
        ("streaming:1x512", "forward_kl"),
        ("streaming:1x256", kdkernels.AlphaBeta(1, 1)),
    ],
)
def test_tiles_that_cuda_has(cuda, monkeypatch, tile, divergence):
    monkeypatch.setenv("KDKERNELS_CUDA_TILE", tile)
    student, teacher = correlated_pair(2, VOCAB)
    actual = run(cuda, student, teacher, divergence=divergence)
    assert_as_oracle(actual, student, teacher, divergence=divergence)


@pytest.mark.parametrize(
    ("tile", "options"),
    [
        ("registers:1x32", {"divergence": "forward_kl"}),  # 11 vectors of 16 bytes for each
        ("registers:1x64", {"divergence": "jsd"}),  # whose slopes are kept
        ("registers:1x64", {"divergence": "forward_kl", "return_metrics": True}),
        ("streaming:1x512", {"divergence": kdkernels.AlphaBeta(1, 1)}),  # too many registers
    ],
)
def test_tiles_that_cuda_cannot_take(cuda, monkeypatch, tile, options):
    monkeypatch.setenv("KDKERNELS_CUDA_TILE", tile)
    student, teacher = correlated_pair(1, 1280)
    with pytest.raises(ValueError, match="cannot hold this row pair"):
        loss_of(cuda, student, teacher, **options)
