"""Kernels and models against their peers: `pytest benchmarks --benchmark`."""
