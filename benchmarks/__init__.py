"""Benchmarks of kernels and models against other libraries: `pytest benchmarks --benchmark`."""
