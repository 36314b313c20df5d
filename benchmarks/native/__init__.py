"""The CUDA kernels of csrc/cuda straight through the C ABI: built by nvcc alone, without an installation."""
