"""The files of the embedded `tiny` models, shipped with the package."""

from __future__ import annotations

from pathlib import Path

import turbo_backend


def tiny_checkpoint_folder() -> Path:
    """Folder of the denoisers of `tiny` and `tiny-I2V` and of what they share: text encoder, VAE and tokenizer."""
    return Path(turbo_backend.__file__).parent / "tiny"
