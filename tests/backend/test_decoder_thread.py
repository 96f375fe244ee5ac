"""The decoder's thread: each request gets its own updates, failures too, and what ended is counted."""

from __future__ import annotations

import queue
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from turbo_backend.cancellation import Cancellations
from turbo_backend.config import VAEConfig
from turbo_backend.errors import Cancelled, TurboError
from turbo_backend.nets.random_weights import initialize_random
from turbo_backend.nets.vae import WanVAE
from turbo_backend.parameters import Delivery
from turbo_backend.stages.decoder_thread import DecoderThread
from turbo_backend.stages.vae_decoder import DecodedChunk, DecodedVideo, DecodeRequest, VAEDecoderStage

Updates = queue.SimpleQueue[DecodedChunk | DecodedVideo | TurboError]


@pytest.fixture
def counts() -> Counter[tuple[str, str]]:
    return Counter()


@pytest.fixture
def cancellations(tmp_path: Path) -> Cancellations:
    return Cancellations(tmp_path)


@pytest.fixture
def decoder(counts: Counter[tuple[str, str]], cancellations: Cancellations) -> Iterator[DecoderThread]:
    vae = WanVAE(VAEConfig(base_dim=8))
    initialize_random(vae, 0, device=torch.device("cpu"), dtype=torch.float32)
    stage = VAEDecoderStage(vae.eval().requires_grad_(False), fingerprint="", cancellations=cancellations)
    decoder = DecoderThread(stage, lambda name, label: counts.update([(name, label)]))
    yield decoder
    decoder.close()


def request(seed: int, *, num_latent_frames: int = 2, cancel_key: str = "") -> DecodeRequest:
    latents = torch.randn(16, num_latent_frames, 4, 4, generator=torch.Generator().manual_seed(seed))
    report = {"parameters": {"seed": seed}, "stages": {}}
    return DecodeRequest(latents=latents, report=report, delivery=Delivery(container="raw"), cancel_keys=(cancel_key,))


def end_of(updates: Updates) -> tuple[int, DecodedVideo | TurboError]:
    """How many chunks were told, and the last update."""
    num_chunks = 0
    while isinstance(update := updates.get(timeout=60), DecodedChunk):
        num_chunks += 1
    return num_chunks, update


def test_each_caller_gets_its_own_video(decoder: DecoderThread, counts: Counter[tuple[str, str]]) -> None:
    received: dict[int, Updates] = {seed: Updates() for seed in (1, 2, 3)}
    for seed, updates in received.items():
        decoder.submit(request(seed), updates.put)
    for seed, updates in received.items():
        num_chunks, video = end_of(updates)
        assert num_chunks == 2
        assert isinstance(video, DecodedVideo)
        assert video.report["parameters"]["seed"] == seed  # type: ignore[index]
    decoder.close()
    assert counts == {("turbo_vae_decoder_requests", "done"): 3, ("turbo_vae_decoder_chunks", "2"): 6}


def test_what_is_cancelled_or_fails_is_told_and_counted_as_such(
    decoder: DecoderThread, cancellations: Cancellations, counts: Counter[tuple[str, str]]
) -> None:
    cancelled, failed = Updates(), Updates()
    cancellations.request("mine")
    decoder.submit(request(1, cancel_key="mine"), cancelled.put)
    decoder.submit(request(2, num_latent_frames=0), failed.put)
    assert isinstance(end_of(cancelled)[1], Cancelled)
    assert isinstance(end_of(failed)[1], TurboError)
    assert counts == {("turbo_vae_decoder_requests", "cancelled"): 1, ("turbo_vae_decoder_requests", "failed"): 1}


def test_a_fault_outside_a_request_is_told_to_all_and_does_not_end_the_thread(decoder: DecoderThread) -> None:
    def break_down(update: object) -> None:
        if isinstance(update, DecodedChunk):
            raise RuntimeError("the stream is gone")
        broken.put(update)  # type: ignore[arg-type]

    broken, other, later = Updates(), Updates(), Updates()
    decoder.submit(request(1), break_down)
    decoder.submit(request(2), other.put)
    assert "the stream is gone" in str(end_of(broken)[1])
    assert isinstance(end_of(other)[1], TurboError | DecodedVideo)
    decoder.submit(request(3), later.put)
    assert isinstance(end_of(later)[1], DecodedVideo)
