"""Gradients of a chunk, in CUDA C++ for Hopper."""
