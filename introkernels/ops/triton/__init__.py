"""Triton kernels behind the operators, for NVIDIA and AMD GPUs from one source."""
