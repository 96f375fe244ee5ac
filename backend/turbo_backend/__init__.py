"""Networks, sampler, checkpoints and Triton stages of the TurboDiffusion server."""

import os

__version__ = "0.1.0"

# The model processes share the machine's processors. OpenMP threads that spin while they wait take them from each
# other: on two cores a decode beside another one took 12 times as long. libgomp reads this once, when torch loads it.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# Each of them keeps a cache of GPU memory to itself. In segments that grow and shrink little of it lies idle; with
# fixed ones it was a fifth of 25 GiB. PyTorch, too, reads this once.
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
