"""GPU kernels for sparse-linear 8-bit video attention, each beside its PyTorch reference."""
