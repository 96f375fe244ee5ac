"""Networks, sampler, checkpoints and Triton stages of the TurboDiffusion server."""

import os

__version__ = "0.1.0"

# The model processes share the machine's processors. OpenMP threads that spin while they wait take them from each
# other: on two cores a decode beside another one took 12 times as long. libgomp reads this once, when torch loads it.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# What PyTorch holds of GPU memory shall grow and shrink with its tensors: in blocks of fixed sizes the processes of
# one server held up to 4 GiB in gaps. Releases before 2.9 know the second name.
for _name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
    os.environ.setdefault(_name, "expandable_segments:True")
