"""Kernels in CUDA C++, compiled for a model when it is first used."""
