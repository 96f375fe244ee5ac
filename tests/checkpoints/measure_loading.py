"""Loads a file into a stack of linears and prints this process's anonymous memory as JSON (run by test_memory.py)."""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path

import torch
from torch import nn

from turbo_backend.checkpoints import load_into, open_checkpoint


def anonymous_bytes() -> int:
    """RssAnon: pages of a mapped file do not count."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no RssAnon")


def main() -> None:
    path, how, dtype = (
        Path(sys.argv[1]),
        sys.argv[2],
        {"float32": torch.float32, "bfloat16": torch.bfloat16}[sys.argv[3]],
    )
    checkpoint = open_checkpoint(path)
    with torch.device("meta"):
        network = nn.ModuleList(nn.Linear(*reversed(checkpoint.shape(key)), bias=False) for key in checkpoint)
    peak = 0
    stop = threading.Event()

    def sample() -> None:
        nonlocal peak
        while not stop.is_set():
            peak = max(peak, anonymous_bytes())
            stop.wait(0.0005)

    sampler = threading.Thread(target=sample)
    sampler.start()
    if how == "load_into":
        load_into(network, checkpoint, device="cpu", dtype=dtype)
    else:  # what everybody writes first, as a control of the measurement
        state = torch.load(path, weights_only=True)
        network.load_state_dict({key: tensor.to(dtype) for key, tensor in state.items()}, assign=True)
        del state
    stop.set()
    sampler.join()
    after = anonymous_bytes()
    tensors = list(network.state_dict().values())
    assert all(tensor.dtype == dtype for tensor in tensors)
    print(json.dumps({"peak": max(peak, after), "after": after, "network": sum(t.nbytes for t in tensors)}))


main()
