"""Networks, sampler, checkpoints and Triton stages of the TurboDiffusion server."""

__version__ = "0.1.0"
