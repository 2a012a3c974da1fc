"""Operators of the CUDA backend that are made of matrix products; the others are C++."""
