"""The read-out and the gradients of a chunk, in CUDA C++ for Hopper."""
