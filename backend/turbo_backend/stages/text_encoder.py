"""Prompt in, text embeddings out: cleaning, tokens, the UMT5 encoder, and an exact cache of what was encoded."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from turbo_backend.errors import InvalidArgument, TurboError
from turbo_backend.memory import as_turbo_error, gpu_peak
from turbo_backend.nets.umt5 import UMT5Encoder
from turbo_backend.parameters import MAX_PROMPT_BYTES
from turbo_backend.tokenizer import Tokenizer, clean_prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedPrompt:
    """What one prompt became.

    Attributes:
        prompt: as it was given.
        embeddings: float32 `[length, text_dim]` on the CPU, one row a token.
        milliseconds: time of the batch that encoded it; 0 from the cache.
        cache_hit: the embeddings are those of an earlier request.
        fingerprint: of the encoder's weights.
    """

    prompt: str
    embeddings: torch.Tensor
    milliseconds: float
    cache_hit: bool
    fingerprint: str

    @property
    def length(self) -> int:
        return self.embeddings.shape[0]

    def report(self) -> dict[str, object]:
        """What later stages pass on to the caller."""
        stage = {
            "milliseconds": round(self.milliseconds, 2),
            "num_tokens": self.length,
            "cache_hit": self.cache_hit,
            **gpu_peak(),
        }
        weights = {"text_encoder": self.fingerprint}
        return {"prompt": self.prompt, "stages": {"text_encoder": stage}, "weights": weights}


class TextEncoderStage:
    """Encodes prompts at their true length; embeddings of recent prompts are kept and given out again.

    Args:
        encoder: network on its device, in its dtype.
        tokenizer: the one the encoder was trained with.
        text_len: most tokens the denoiser attends to; a longer prompt is refused.
        cache_entries: prompts kept (0 turns the cache off).
        fingerprint: of the weights, for the report.
    """

    def __init__(
        self, encoder: UMT5Encoder, tokenizer: Tokenizer, *, text_len: int, cache_entries: int, fingerprint: str
    ) -> None:
        self._encoder = encoder
        self._tokenizer = tokenizer
        self._text_len = text_len
        self._cache_entries = cache_entries
        self._fingerprint = fingerprint
        self._cache: OrderedDict[tuple[int, ...], torch.Tensor] = OrderedDict()

    def encode(self, prompts: Sequence[bytes | str]) -> list[EncodedPrompt | TurboError]:
        """Encodes a batch; a prompt that cannot be encoded yields its error and harms no neighbour."""
        started = time.perf_counter()
        read: list[tuple[str, tuple[int, ...]] | TurboError] = []
        for prompt in prompts:
            try:
                text = _to_text(prompt)
                read.append((text, tuple(self._tokenize(text))))
            except Exception as error:
                read.append(as_turbo_error(error, "text_encoder"))
        wanted = {item[1] for item in read if isinstance(item, tuple)}
        known = {tokens: self._cache[tokens] for tokens in wanted if tokens in self._cache}
        fresh: dict[tuple[int, ...], torch.Tensor | TurboError] = {}
        sequences = sorted(wanted - known.keys(), key=len)
        try:
            fresh.update(self._run(sequences))
        except Exception as error:
            fresh.update(dict.fromkeys(sequences, as_turbo_error(error, "text_encoder")))
        elapsed = (time.perf_counter() - started) * 1000
        self._remember(known, fresh)
        outcomes: list[EncodedPrompt | TurboError] = []
        for item in read:
            if isinstance(item, TurboError):
                outcomes.append(item)
                continue
            text, tokens = item
            found = known[tokens] if tokens in known else fresh[tokens]
            if isinstance(found, TurboError):
                outcomes.append(found)
            else:
                hit = tokens in known
                outcomes.append(
                    EncodedPrompt(
                        prompt=text,
                        embeddings=found,
                        milliseconds=0.0 if hit else elapsed,
                        cache_hit=hit,
                        fingerprint=self._fingerprint,
                    )
                )
        return outcomes

    def _tokenize(self, text: str) -> list[int]:
        cleaned = clean_prompt(text)
        if not cleaned:
            raise InvalidArgument("PROMPT", text, "a description of the video, not empty")
        tokens = self._tokenizer.encode(cleaned)
        if len(tokens) > self._text_len:
            raise InvalidArgument("PROMPT", f"{len(tokens)} tokens", f"at most {self._text_len} tokens long")
        return tokens

    @torch.inference_mode()
    def _run(self, sequences: Sequence[tuple[int, ...]]) -> dict[tuple[int, ...], torch.Tensor]:
        if not sequences:
            return {}
        longest = max(map(len, sequences))
        ids = torch.tensor([[*tokens, *[0] * (longest - len(tokens))] for tokens in sequences])
        embeddings = self._encoder(ids, [len(tokens) for tokens in sequences]).cpu().float()
        return {tokens: row[: len(tokens)].clone() for tokens, row in zip(sequences, embeddings, strict=True)}

    def _remember(self, *groups: Mapping[tuple[int, ...], torch.Tensor | TurboError]) -> None:
        for group in groups:
            for tokens, embeddings in group.items():
                if isinstance(embeddings, torch.Tensor):
                    self._cache[tokens] = embeddings
                    self._cache.move_to_end(tokens)
        while len(self._cache) > self._cache_entries:
            self._cache.popitem(last=False)


def _to_text(prompt: bytes | str) -> str:
    if len(prompt) > MAX_PROMPT_BYTES:
        raise InvalidArgument("PROMPT", f"{len(prompt)} bytes", f"at most {MAX_PROMPT_BYTES} bytes")
    if isinstance(prompt, str):
        return prompt
    try:
        return prompt.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidArgument("PROMPT", f"bytes that break at {error.start}", "valid UTF-8") from None
