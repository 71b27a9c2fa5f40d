"""A whole decoder's step for one token of one sequence, in CUDA C++ for Hopper and later."""
