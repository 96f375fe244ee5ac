"""Weight files: reading, checking, loading, converting and fetching them.

from turbo_backend.checkpoints import DenoiserLayout, find_files, open_checkpoint

files = find_files(model, folder, quant_linear=False)
network = DenoiserLayout(model.dit, quant_linear=False).load(open_checkpoint(files.dit[0]), device=..., dtype=...)
"""

from turbo_backend.checkpoints.convert import convert_checkpoint
from turbo_backend.checkpoints.files import ModelFiles, find_files
from turbo_backend.checkpoints.inspection import inspect_file
from turbo_backend.checkpoints.layouts import DenoiserLayout, TextEncoderLayout, VAELayout
from turbo_backend.checkpoints.loader import load_into
from turbo_backend.checkpoints.published import published_files
from turbo_backend.checkpoints.reader import Checkpoint, open_checkpoint
from turbo_backend.checkpoints.tiny import tiny_checkpoint_folder

__all__ = [
    "Checkpoint",
    "DenoiserLayout",
    "ModelFiles",
    "TextEncoderLayout",
    "VAELayout",
    "convert_checkpoint",
    "find_files",
    "inspect_file",
    "load_into",
    "open_checkpoint",
    "published_files",
    "tiny_checkpoint_folder",
]
