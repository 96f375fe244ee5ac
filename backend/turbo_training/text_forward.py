"""The UMT5 encoder for training: padded batches with gradients, the same numbers as prompt by prompt."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from turbo_backend.config import TextEncoderConfig
from turbo_backend.nets.umt5 import Block, UMT5Encoder, relative_buckets
from turbo_backend.tokenizer import Tokenizer, clean_prompt
from turbo_training.dit_forward import TextBatch

#: Lengths are padded to a multiple, so that few distinct shapes occur.
_STEP = 8
#: Captions embedded together.
_AT_ONCE = 2048


class TextSource:
    """A trained encoder, frozen, and its tokenizer."""

    def __init__(self, encoder: UMT5Encoder, tokenizer: Tokenizer, device: torch.device) -> None:
        self.encoder, self.tokenizer, self.device = encoder, tokenizer, device

    @torch.no_grad()
    def embed(self, captions: Sequence[str], *, num_rows: int = 0) -> TextBatch:
        """Float32 embeddings of captions, `num_rows` or more; the empty caption stands for no condition."""
        text = encode_text(self.encoder, *tokenize(self.tokenizer, captions, self.device, num_rows=num_rows))
        return TextBatch(text.embeddings.float(), text.lengths)

    @torch.no_grad()
    def embed_tokens(self, token_ids: Tensor, lengths: Tensor) -> TextBatch:
        """Bfloat16 embeddings of any number of token rows."""
        parts = [
            encode_text(self.encoder, ids, some).embeddings.to(torch.bfloat16)
            for ids, some in zip(token_ids.split(_AT_ONCE), lengths.split(_AT_ONCE), strict=True)
        ]
        return TextBatch(torch.cat(parts), lengths)


def pad_tokens(sequences: Sequence[Sequence[int]], device: torch.device, *, num_rows: int = 0) -> tuple[Tensor, Tensor]:
    """Token ids [B, S] padded with 0 to a multiple of eight, at least `num_rows`, and lengths [B]."""
    longest = max(num_rows, max(map(len, sequences)))
    size = -(-longest // _STEP) * _STEP
    rows = [[*sequence, *[0] * (size - len(sequence))] for sequence in sequences]
    lengths = torch.tensor([len(sequence) for sequence in sequences], device=device)
    return torch.tensor(rows, device=device), lengths


def tokenize(
    tokenizer: Tokenizer, captions: Sequence[str], device: torch.device, *, num_rows: int = 0
) -> tuple[Tensor, Tensor]:
    """Captions, cleaned as serving cleans them, to padded ids and lengths; the empty caption is </s> alone."""
    return pad_tokens([tokenizer.encode(clean_prompt(caption)) for caption in captions], device, num_rows=num_rows)


def encode_text(encoder: UMT5Encoder, token_ids: Tensor, lengths: Tensor) -> TextBatch:
    """Embeds a padded batch; rows past a length are zeros.

    Args:
        token_ids: int64 [B, S].
        lengths: int64 [B].
    """
    config = encoder.config
    num_rows = token_ids.shape[1]
    buckets = _buckets(num_rows, config, token_ids.device)
    is_text = torch.arange(num_rows, device=token_ids.device) < lengths[:, None]
    mask = torch.where(is_text, 0.0, -torch.inf)[:, None, None]
    x = encoder.token_embedding(token_ids)
    for block in encoder.blocks:
        assert isinstance(block, Block)
        h = block.norm1(x)
        bias = block.pos_embedding(buckets) + mask
        x = x + block.attn(h, bias.to(_attention_dtype(h)))
        x = x + block.ffn(block.norm2(x))
    return TextBatch(encoder.norm(x) * is_text[..., None], lengths)


@lru_cache(maxsize=8)
def _buckets(num_rows: int, config: TextEncoderConfig, device: torch.device) -> Tensor:
    """Kept on the device: a recorded step copies nothing from the host."""
    buckets = relative_buckets(num_rows, num_buckets=config.num_buckets, max_distance=config.max_distance)
    return buckets.to(device)


def _attention_dtype(x: Tensor) -> torch.dtype:
    """What linears give: the mask of fused attention must have the dtype of its queries."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
