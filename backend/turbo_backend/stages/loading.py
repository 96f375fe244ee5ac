"""Settings to stages: finds the weight files, builds each network on `meta`, loads it, and warms the stage up."""

from __future__ import annotations

import logging
from typing import TypeVar

from torch import nn

from turbo_backend.errors import TurboError
from turbo_backend.nets.umt5 import UMT5Encoder
from turbo_backend.settings import Settings
from turbo_backend.stages.text_encoder import TextEncoderStage
from turbo_backend.tokenizer import Tokenizer

_log = logging.getLogger(__name__)
_Net = TypeVar("_Net", bound=nn.Module)

#: Seed of `TURBO_WEIGHTS=random`.
_RANDOM_SEED = 0
#: A request longer than this runs alone on a GPU: one such sample already fills it.
_GPU_BATCH_TOKENS = 8192
_CPU_BATCH_TOKENS = 65536
#: Pixels decoded together: a 720p video of 81 frames, or more of smaller ones.
_BATCH_PIXELS = 81 * 1280 * 720


def load_text_encoder(settings: Settings) -> TextEncoderStage:
    """The text encoder stage, loaded and warm."""
    model, files = settings.served_model, _find_files(settings)
    encoder, _ = _load(lambda: UMT5Encoder(model.text_encoder), files.text_encoder, settings, dtype=settings.dtype)
    stage = TextEncoderStage(
        encoder,
        Tokenizer.from_folder(files.tokenizer),
        text_len=model.dit.text_len,
        cache_entries=settings.text_cache_entries,
    )
    (warm,) = stage.encode(["warm-up"])
    if isinstance(warm, TurboError):
        raise warm
    return stage
