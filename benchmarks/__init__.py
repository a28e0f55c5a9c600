"""Benchmarks of kdkernels: verify first, then time, interleaved with the rivals and with a copy."""
