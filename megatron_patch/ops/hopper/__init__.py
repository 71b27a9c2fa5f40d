"""Hopper's own kernels for chunked gated linear attention, in CUDA C++: output and gradients."""
