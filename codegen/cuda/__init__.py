"""Code for NVIDIA GPUs: kernels compiled ahead of time, without a GPU."""
