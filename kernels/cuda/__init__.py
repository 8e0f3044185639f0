"""Triton kernels for NVIDIA GPUs, and the llmc operators that launch them. Knows tensors and grids; no graph,
no driver."""
