"""Kernels in CUDA C++, compiled where they run: a folder for each."""
