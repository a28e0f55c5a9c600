"""Kernels in Triton: the logits level on any GPU that Triton reaches.

Imported by the backend when it first serves a call; kdkernels itself imports without Triton.
"""
