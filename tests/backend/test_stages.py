"""The stages of text-to-video with the tiny model: batches of unlike requests, and nobody harmed by a neighbour."""

from __future__ import annotations

import dataclasses
import io
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from turbo_backend.cancellation import Cancellations
from turbo_backend.checkpoints import (
    DenoiserLayout,
    ModelFiles,
    TextEncoderLayout,
    VAELayout,
    find_files,
    open_checkpoint,
    tiny_checkpoint_folder,
)
from turbo_backend.config import MODELS
from turbo_backend.errors import Cancelled, InvalidArgument, ResourceExhausted, TurboError
from turbo_backend.manifest import make_manifest
from turbo_backend.nets.dit import WanDiT
from turbo_backend.nets.umt5 import UMT5Encoder
from turbo_backend.parameters import MAX_PROMPT_BYTES, MAX_SEED, Delivery
from turbo_backend.stages.denoiser import DenoiserStage
from turbo_backend.stages.denoiser_request import DenoisedStep, DenoiseRequest
from turbo_backend.stages.experts import ResidentExperts
from turbo_backend.stages.text_encoder import EncodedPrompt, TextEncoderStage
from turbo_backend.stages.vae_decoder import DecodedChunk, DecodedVideo, DecodeRequest, VAEDecoderStage
from turbo_backend.tokenizer import Tokenizer

TINY = MODELS["tiny"]
CPU = torch.device("cpu")
MakeTextEncoder = Callable[..., TextEncoderStage]
MakeDenoiser = Callable[..., DenoiserStage]


@pytest.fixture(scope="module")
def files() -> ModelFiles:
    return find_files(TINY, tiny_checkpoint_folder(), quant_linear=False, dit=None)


@pytest.fixture(scope="module")
def make_text_encoder(files: ModelFiles) -> MakeTextEncoder:
    encoder: UMT5Encoder = TextEncoderLayout(TINY.text_encoder).load(
        open_checkpoint(files.text_encoder), device=CPU, dtype=torch.float32
    )
    tokenizer = Tokenizer.from_folder(files.tokenizer)

    def make(*, text_len: int = 512, cache_entries: int = 8) -> TextEncoderStage:
        return TextEncoderStage(
            encoder.eval(), tokenizer, text_len=text_len, cache_entries=cache_entries, fingerprint="text weights"
        )

    return make


@pytest.fixture(scope="module")
def make_denoiser(files: ModelFiles) -> MakeDenoiser:
    net: WanDiT = DenoiserLayout(TINY.dit, quant_linear=False).load(
        open_checkpoint(files.dit[0]), device=CPU, dtype=torch.float32
    )
    net.eval().requires_grad_(False)
    net.prepare_for_inference()

    def make(*, max_batch_size: int = 8, max_batch_tokens: int = 1 << 20) -> DenoiserStage:
        return DenoiserStage(
            ResidentExperts([net]),
            TINY,
            device=CPU,
            dtype=torch.float32,
            provider="reference",
            max_batch_size=max_batch_size,
            max_batch_tokens=max_batch_tokens,
            fingerprint="denoiser weights",
            identity={"ensemble": "text_to_video", "linear_kind": "plain"},
        )

    return make


@pytest.fixture(scope="module")
def vae_decoder(files: ModelFiles) -> VAEDecoderStage:
    vae = VAELayout(TINY.vae).load(open_checkpoint(files.vae), device=CPU, dtype=torch.float32)
    return VAEDecoderStage(vae.eval().requires_grad_(False), fingerprint="vae weights")


@pytest.fixture(scope="module")
def encoded(make_text_encoder: MakeTextEncoder) -> EncodedPrompt:
    return embed(make_text_encoder(), "a red fox runs")


def embed(stage: TextEncoderStage, prompt: bytes | str) -> EncodedPrompt:
    (outcome,) = stage.encode([prompt])
    assert isinstance(outcome, EncodedPrompt), outcome
    return outcome


def ask(encoded: EncodedPrompt, **values: object) -> DenoiseRequest:
    """A request of one step and five frames, unless `values` say otherwise."""
    return DenoiseRequest(
        text_embeddings=encoded.embeddings,
        text_length=encoded.length,
        values={"NUM_STEPS": 1, "NUM_FRAMES": 5, "SEED": 7, **values},
        report=encoded.report(),
    )


def finish(stage: DenoiserStage, requests: list[DenoiseRequest | TurboError]) -> list[DenoisedStep | TurboError]:
    """The one update that ends each request."""
    ends: dict[int, DenoisedStep | TurboError] = {}
    for index, update in stage.denoise(requests):
        assert index not in ends, "nothing comes after a request's end"
        if isinstance(update, TurboError) or update.latents is not None:
            ends[index] = update
    assert sorted(ends) == list(range(len(requests)))
    return [ends[index] for index in range(len(requests))]


def latents_of(end: DenoisedStep | TurboError) -> torch.Tensor:
    assert isinstance(end, DenoisedStep), end
    assert end.latents is not None
    return end.latents


def stage_report(end: DenoisedStep | TurboError) -> dict[str, object]:
    assert isinstance(end, DenoisedStep), end
    assert end.report is not None
    report: dict[str, object] = end.report["stages"]["denoiser"]  # type: ignore[index]
    return report


class TestTextEncoder:
    def test_the_cache_gives_the_very_same_embeddings(self, make_text_encoder: MakeTextEncoder) -> None:
        cached, uncached = make_text_encoder(), make_text_encoder(cache_entries=0)
        first, again = embed(cached, "a red fox"), embed(cached, b"a red fox")
        assert (first.cache_hit, again.cache_hit) == (False, True)
        assert again.milliseconds == 0.0
        assert torch.equal(first.embeddings, again.embeddings)
        for _ in range(2):
            fresh = embed(uncached, "a red fox")
            assert not fresh.cache_hit
            assert torch.equal(fresh.embeddings, first.embeddings)

    def test_a_batch_gives_what_each_prompt_gives_alone(self, make_text_encoder: MakeTextEncoder) -> None:
        prompts = ["a", "雪地里的红狐狸", "a much longer prompt than the others are", "a"]
        stage = make_text_encoder(cache_entries=0)
        for prompt, outcome in zip(prompts, stage.encode(prompts), strict=True):
            assert isinstance(outcome, EncodedPrompt)
            assert outcome.prompt == prompt
            assert torch.equal(outcome.embeddings, embed(stage, prompt).embeddings)

    def test_what_was_not_asked_for_longest_is_forgotten(self, make_text_encoder: MakeTextEncoder) -> None:
        stage = make_text_encoder(cache_entries=2)
        hits = [embed(stage, prompt).cache_hit for prompt in ("a", "b", "a", "c", "a", "b", "c")]
        assert hits == [False, False, True, False, True, False, False]

    def test_a_batch_larger_than_the_cache_is_answered_whole(self, make_text_encoder: MakeTextEncoder) -> None:
        stage = make_text_encoder(cache_entries=1)
        outcomes = stage.encode(["a", "b", "c", "b"])
        assert [isinstance(outcome, EncodedPrompt) for outcome in outcomes] == [True] * 4

    def test_prompts_that_clean_to_the_same_text_share_an_entry(self, make_text_encoder: MakeTextEncoder) -> None:
        stage = make_text_encoder()
        plain, spaced = embed(stage, "a red fox"), embed(stage, "  a  red\nfox ")
        assert spaced.cache_hit
        assert spaced.prompt == "  a  red\nfox ", "reported as it was given"
        assert torch.equal(plain.embeddings, spaced.embeddings)

    def test_a_prompt_may_fill_the_context_and_no_more(self, make_text_encoder: MakeTextEncoder) -> None:
        num_tokens = embed(make_text_encoder(), "a red fox").length
        assert embed(make_text_encoder(text_len=num_tokens), "a red fox").length == num_tokens
        (refused,) = make_text_encoder(text_len=num_tokens - 1).encode(["a red fox"])
        assert str(refused) == f"PROMPT = '{num_tokens} tokens': must be at most {num_tokens - 1} tokens long"

    def test_bad_prompts_harm_no_neighbour(self, make_text_encoder: MakeTextEncoder) -> None:
        stage = make_text_encoder()
        good = b"a good one"
        bad = {
            b"\xff\xfe": "valid UTF-8",
            b"": "not empty",
            b" \n\xe3\x80\x80": "not empty",
            b"x " * 2000: "at most 512 tokens long",
            b"x" * (MAX_PROMPT_BYTES + 1): f"at most {MAX_PROMPT_BYTES} bytes",
        }
        outcomes = stage.encode([prompt for wrong in bad for prompt in (wrong, good)])
        expected = embed(make_text_encoder(), good).embeddings
        for words, refused, kept in zip(bad.values(), outcomes[::2], outcomes[1::2], strict=True):
            assert isinstance(refused, InvalidArgument)
            assert str(refused).startswith("PROMPT = ")
            assert words in str(refused)
            assert isinstance(kept, EncodedPrompt)
            assert torch.equal(kept.embeddings, expected)

    def test_report(self, make_text_encoder: MakeTextEncoder) -> None:
        outcome = embed(make_text_encoder(), "a red fox")
        report = outcome.report()
        assert report["prompt"] == "a red fox"
        assert report["weights"] == {"text_encoder": "text weights"}
        assert report["stages"] == {
            "text_encoder": {
                "milliseconds": round(outcome.milliseconds, 2),
                "num_tokens": outcome.embeddings.shape[0],
                "cache_hit": False,
            }
        }


class TestDenoiser:
    def test_unlike_requests_in_one_call_run_in_groups(
        self, make_denoiser: MakeDenoiser, encoded: EncodedPrompt
    ) -> None:
        stage = make_denoiser()
        requests: list[DenoiseRequest | TurboError] = [
            ask(encoded, SEED=1),
            ask(encoded, SEED=2, NUM_STEPS=2),
            ask(encoded, SEED=3, SIGMA_MAX=120.0),
            ask(encoded, SEED=4, ATTENTION_TYPE="original"),
            ask(encoded, SEED=5, SLA_TOPK=0.4),
            ask(encoded, SEED=6, NUM_FRAMES=9),
            ask(encoded, SEED=7, ODE=True),
            ask(encoded, SEED=8, ASPECT_RATIO="9:16"),
            ask(encoded, SEED=9, NUM_STEPS=2),
        ]
        together = finish(stage, requests)
        assert [stage_report(end)["batch_size"] for end in together] == [5, 5, 5, 1, 1, 1, 5, 1, 5]
        for request, end in zip(requests, together, strict=True):
            (alone,) = finish(stage, [request])
            assert stage_report(alone)["batch_size"] == 1
            assert torch.equal(latents_of(alone), latents_of(end))

    def test_prompts_of_unlike_lengths_run_as_one_batch(
        self, make_denoiser: MakeDenoiser, make_text_encoder: MakeTextEncoder
    ) -> None:
        texts = make_text_encoder()
        requests: list[DenoiseRequest | TurboError] = [
            ask(embed(texts, prompt)) for prompt in ("a", "a fox in the snow", "雪")
        ]
        together = finish(make_denoiser(), requests)
        assert {stage_report(end)["batch_size"] for end in together} == {3}
        for request, end in zip(requests, together, strict=True):
            (alone,) = finish(make_denoiser(), [request])
            assert torch.equal(latents_of(alone), latents_of(end))

    def test_steps_come_in_order_with_previews_for_those_who_want_them(
        self, make_denoiser: MakeDenoiser, encoded: EncodedPrompt
    ) -> None:
        silent = ask(encoded, NUM_STEPS=3)
        seen: dict[int, list[DenoisedStep]] = {0: [], 1: []}
        for index, update in make_denoiser().denoise([dataclasses.replace(silent, preview=True), silent]):
            assert isinstance(update, DenoisedStep), update
            seen[index].append(update)
        for index, updates in seen.items():
            assert [(update.step, update.step_count) for update in updates] == [(1, 3), (2, 3), (3, 3)]
            assert [update.latents is not None for update in updates] == [False, False, True]
            assert [update.report is not None for update in updates] == [False, False, True]
            assert [update.preview_latents is not None for update in updates] == [index == 0] * 3
        for update in seen[0]:
            assert update.preview_latents is not None
            assert update.preview_latents.shape == (16, 1, 18, 32)
            assert update.preview_latents.isfinite().all()

    def test_errors_stay_with_their_requests(self, make_denoiser: MakeDenoiser, encoded: EncodedPrompt) -> None:
        good = ask(encoded)
        nan = encoded.embeddings.clone()
        nan[0, 3] = float("nan")
        huge = torch.full_like(encoded.embeddings, 3e38)
        wrong: list[tuple[DenoiseRequest | TurboError, type[TurboError], str]] = [
            (TurboError("an earlier error"), TurboError, "an earlier error"),
            (ask(encoded, NUM_STEPS=5), InvalidArgument, "NUM_STEPS = 5"),
            (ask(encoded, SIGMA_MAX=float("nan")), InvalidArgument, "SIGMA_MAX = nan"),
            (dataclasses.replace(good, text_embeddings=nan), InvalidArgument, "TEXT_EMBEDDINGS = 'NaN or infinity'"),
            (
                dataclasses.replace(good, text_embeddings=encoded.embeddings[:, :100]),
                InvalidArgument,
                "TEXT_EMBEDDINGS = [",
            ),
            (
                dataclasses.replace(good, text_embeddings=encoded.embeddings[0]),
                InvalidArgument,
                f"TEXT_EMBEDDINGS = [{TINY.dit.text_dim}]",
            ),
            (
                dataclasses.replace(good, text_embeddings=torch.zeros(513, TINY.dit.text_dim)),
                InvalidArgument,
                f"TEXT_EMBEDDINGS = [513, {TINY.dit.text_dim}]",
            ),
            (dataclasses.replace(good, text_length=0), InvalidArgument, "TEXT_LENGTH = 0"),
            (dataclasses.replace(good, text_length=encoded.length + 1), InvalidArgument, "TEXT_LENGTH"),
            (dataclasses.replace(good, text_embeddings=huge), TurboError, "not finite"),
            (dataclasses.replace(good, report=["no", "report"]), TurboError, "denoiser failed"),  # type: ignore[arg-type]
        ]
        requests = [request for bad, _, _ in wrong for request in (bad, good)]
        ends = finish(make_denoiser(), requests)
        (alone,) = finish(make_denoiser(), [good])
        for (_, kind, words), refused, kept in zip(wrong, ends[::2], ends[1::2], strict=True):
            assert type(refused) is kind, refused
            assert words in str(refused)
            assert torch.equal(latents_of(kept), latents_of(alone))

    def test_rows_past_the_text_length_are_ignored(self, make_denoiser: MakeDenoiser, encoded: EncodedPrompt) -> None:
        padded = torch.full((512, TINY.dit.text_dim), float("nan"))
        padded[: encoded.length] = encoded.embeddings
        request = ask(encoded)
        with_padding, without = finish(
            make_denoiser(), [dataclasses.replace(request, text_embeddings=padded.nan_to_num()), request]
        )
        assert torch.equal(latents_of(with_padding), latents_of(without))
        (nan_padding,) = finish(make_denoiser(), [dataclasses.replace(request, text_embeddings=padded)])
        assert torch.equal(latents_of(nan_padding), latents_of(without))

    @pytest.mark.parametrize(
        ("limits", "sizes"),
        [
            ({"max_batch_size": 2}, [2, 2, 1]),
            ({"max_batch_size": 1}, [1, 1, 1]),
            # Five frames are 288 tokens.
            ({"max_batch_tokens": 3 * 288 - 1}, [2, 2, 1]),
            ({"max_batch_tokens": 1}, [1, 1, 1]),
            ({}, [3, 3, 3]),
        ],
    )
    def test_batches_stay_within_their_limits(
        self, make_denoiser: MakeDenoiser, encoded: EncodedPrompt, limits: dict[str, int], sizes: list[int]
    ) -> None:
        ends = finish(make_denoiser(**limits), [ask(encoded, SEED=seed) for seed in (1, 2, 3)])
        assert [stage_report(end)["batch_size"] for end in ends] == sizes

    def test_what_cannot_fit_into_memory_is_refused(self, encoded: EncodedPrompt, files: ModelFiles) -> None:
        """The same request to a denoiser whose shapes need more than any machine has; no weights are touched."""
        vast = dataclasses.replace(TINY, dit=dataclasses.replace(TINY.dit, ffn_dim=1 << 36))
        stage = DenoiserStage(
            ResidentExperts([]),
            vast,
            device=CPU,
            dtype=torch.float32,
            provider="reference",
            max_batch_size=8,
            max_batch_tokens=1 << 20,
            fingerprint="",
            identity={},
        )
        (refused,) = finish(stage, [ask(encoded)])
        assert isinstance(refused, ResourceExhausted)
        assert str(refused).startswith("[RESOURCE_EXHAUSTED] denoising")

    def test_report(self, make_denoiser: MakeDenoiser, encoded: EncodedPrompt) -> None:
        (end,) = finish(make_denoiser(), [ask(encoded, NUM_STEPS=2, SEED=MAX_SEED)])
        assert isinstance(end, DenoisedStep)
        report = end.report
        assert report is not None
        json.dumps(report)
        steps = report["stages"]["denoiser"].pop("step_milliseconds")  # type: ignore[index]
        forwards = report["stages"]["denoiser"].pop("forward_milliseconds")  # type: ignore[index]
        assert len(forwards) == 2
        assert all(0 < forward <= step + 0.01 for forward, step in zip(forwards, steps, strict=True))
        assert len(steps) == 2  # and so three figures rounded to 0.01
        assert report["stages"]["denoiser"].pop("milliseconds") == pytest.approx(sum(steps), abs=0.016)  # type: ignore[index]
        assert report["stages"]["denoiser"].pop("queue_milliseconds") >= 0  # type: ignore[index]
        assert set(report.pop("versions")) >= {"torch", "numpy", "python", "turbodiffusion_server"}  # type: ignore[call-overload]
        assert report == {
            **encoded.report(),
            "ensemble": "text_to_video",
            "linear_kind": "plain",
            "model": "tiny",
            "seed": MAX_SEED,
            "parameters": {
                "num_steps": 2,
                "num_frames": 5,
                "resolution": "144p",
                "aspect_ratio": "16:9",
                "sigma_max": 80.0,
                "attention_type": "sagesla",
                "sla_topk": 0.1,
                "ode": False,
            },
            "attention": {"type": "sagesla", "provider": "reference", "block_q": 128, "block_k": 64},
            "num_tokens": 288,
            "device": "cpu",
            "dtype": "float32",
            "notes": [],
            "weights": {"text_encoder": "text weights", "denoiser": "denoiser weights"},
            "stages": {
                **encoded.report()["stages"],  # type: ignore[dict-item]
                "denoiser": {"turns_waited": 0, "batch_size": 1, "batch_sizes": [1, 1]},
            },
        }

    def test_a_seed_of_zero_is_drawn_and_reported(self, make_denoiser: MakeDenoiser, encoded: EncodedPrompt) -> None:
        stage = make_denoiser()
        ends = finish(stage, [ask(encoded, SEED=0), ask(encoded, SEED=0)])
        seeds = [end.report["seed"] for end in ends if isinstance(end, DenoisedStep) and end.report]
        assert len(set(seeds)) == 2
        (again,) = finish(stage, [ask(encoded, SEED=seeds[0])])
        assert torch.equal(latents_of(again), latents_of(ends[0]))


@pytest.fixture(scope="module")
def decode_request(make_denoiser: MakeDenoiser, encoded: EncodedPrompt) -> Callable[..., DecodeRequest]:
    """`decode_request(seed, num_frames, **delivery)`: what the denoiser hands on, made once for each."""
    made: dict[tuple[int, int], DenoisedStep] = {}

    def make(seed: int = 1, num_frames: int = 5, **delivery: object) -> DecodeRequest:
        key = (seed, num_frames)
        if key not in made:
            (end,) = finish(make_denoiser(), [ask(encoded, SEED=seed, NUM_FRAMES=num_frames)])
            assert isinstance(end, DenoisedStep)
            made[key] = end
        end = made[key]
        assert end.latents is not None
        assert end.report is not None
        return DecodeRequest(latents=end.latents, report=end.report, delivery=Delivery(**delivery))  # type: ignore[arg-type]

    return make


MakeDecodeRequest = Callable[..., DecodeRequest]


def decode(stage: VAEDecoderStage, requests: list[DecodeRequest]) -> list[DecodedVideo | TurboError]:
    ends: dict[int, DecodedVideo | TurboError] = {}
    for index, update in stage.decode(dict(enumerate(requests))):
        assert index not in ends, "nothing comes after a request's end"
        if not isinstance(update, DecodedChunk):
            ends[index] = update
    return [ends[index] for index in range(len(requests))]


def video_of(end: DecodedVideo | TurboError) -> DecodedVideo:
    assert isinstance(end, DecodedVideo), end
    return end


class TestVAEDecoder:
    def test_videos_of_several_requests_are_what_each_is_alone(
        self, vae_decoder: VAEDecoderStage, decode_request: MakeDecodeRequest
    ) -> None:
        requests = [
            decode_request(1, container="raw"),
            decode_request(2, container="mp4"),
            decode_request(3, num_frames=9, container="raw"),
            decode_request(1, container="mp4", fps=24),
        ]
        together = [video_of(end) for end in decode(vae_decoder, requests)]
        for request, video in zip(requests, together, strict=True):
            alone = video_of(*decode(vae_decoder, [request]))
            assert alone.mp4 == video.mp4
            np.testing.assert_array_equal(alone.frames, video.frames)
        assert [video.frames.shape[0] for video in together] == [5, 0, 9, 0]
        assert [bool(video.mp4) for video in together] == [False, True, False, True]

    def test_the_mp4_plays_what_the_raw_frames_show(
        self, vae_decoder: VAEDecoderStage, decode_request: MakeDecodeRequest
    ) -> None:
        raw, mp4 = (
            video_of(end)
            for end in decode(vae_decoder, [decode_request(container="raw"), decode_request(container="mp4", fps=24)])
        )
        with av.open(io.BytesIO(mp4.mp4)) as container:
            assert container.streams.video[0].average_rate == 24
            frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
        assert raw.frames.dtype == np.uint8
        assert frames.shape == raw.frames.shape == (5, 144, 256, 3)
        luma = np.array([0.2126, 0.7152, 0.0722])  # colour has a quarter of the resolution
        correlation = np.corrcoef((frames @ luma).ravel(), (raw.frames @ luma).ravel())[0, 1]
        assert correlation > 0.95, "the weights are random, so the frames are noise, which H.264 cannot keep exactly"

    def test_what_is_cancelled_leaves_the_others_as_they_are(
        self, files: ModelFiles, vae_decoder: VAEDecoderStage, decode_request: MakeDecodeRequest, tmp_path: Path
    ) -> None:
        cancellations = Cancellations(tmp_path)
        vae = VAELayout(TINY.vae).load(open_checkpoint(files.vae), device=CPU, dtype=torch.float32)
        stage = VAEDecoderStage(
            vae.eval().requires_grad_(False), fingerprint="vae weights", cancellations=cancellations
        )
        requests = [
            dataclasses.replace(decode_request(seed, num_frames=9, container="mp4"), cancel_keys=(f"token {seed}", ""))
            for seed in (1, 2, 3)
        ]
        cancellations.request("token 3")
        before = set(threading.enumerate())
        seen: dict[int, list[DecodedChunk | DecodedVideo | TurboError]] = {0: [], 1: [], 2: []}
        for index, update in stage.decode(dict(enumerate(requests))):
            seen[index].append(update)
            if index == 0 and isinstance(update, DecodedChunk) and update.step == 1:
                cancellations.request("token 1")
        assert [type(update) for update in seen[0]] == [DecodedChunk, Cancelled]
        assert [type(update) for update in seen[1]] == [DecodedChunk] * 3 + [DecodedVideo]
        assert [type(update) for update in seen[2]] == [Cancelled]
        assert video_of(seen[1][-1]).mp4 == video_of(*decode(vae_decoder, [requests[1]])).mp4
        assert not list(tmp_path.iterdir()), "cancellations that were carried out are forgotten"
        assert not set(threading.enumerate()) - before, "the encoders of the cancelled were abandoned"

        cancellations.request("token 2")
        (only,) = stage.decode({0: requests[1]})
        assert isinstance(only[1], Cancelled)
        assert not set(threading.enumerate()) - before, "no encoder is left"

    def test_decoding_stops_when_all_are_cancelled(
        self, vae_decoder: VAEDecoderStage, decode_request: MakeDecodeRequest, tmp_path: Path
    ) -> None:
        cancellations = Cancellations(tmp_path)

        class Counting:
            """The network, with a count of the chunks that were decoded."""

            num_chunks = 0

            def __getattr__(self, name: str) -> object:
                return getattr(vae_decoder._vae, name)

            def decode_chunks(self, *arguments: object, **options: object) -> Iterator[torch.Tensor]:
                for chunk in vae_decoder._vae.decode_chunks(*arguments, **options):  # type: ignore[arg-type]
                    self.num_chunks += 1
                    yield chunk

        vae = Counting()
        stage = VAEDecoderStage(vae, fingerprint="", cancellations=cancellations)  # type: ignore[arg-type]
        before = set(threading.enumerate())
        request = dataclasses.replace(decode_request(num_frames=9, container="mp4"), cancel_keys=("mine",))
        updates = []
        for _, update in stage.decode({0: request}):
            updates.append(update)
            cancellations.request("mine")
        assert [type(update) for update in updates] == [DecodedChunk, Cancelled]
        assert vae.num_chunks < 3, "of three"
        assert not set(threading.enumerate()) - before, "the encoder was abandoned"

    def test_progress_counts_the_latent_frames(
        self, vae_decoder: VAEDecoderStage, decode_request: MakeDecodeRequest
    ) -> None:
        updates = [update for _, update in vae_decoder.decode({0: decode_request(num_frames=9)})]
        assert [(u.step, u.step_count) for u in updates if isinstance(u, DecodedChunk)] == [(1, 3), (2, 3), (3, 3)]
        assert isinstance(updates[-1], DecodedVideo)

    @pytest.mark.parametrize(
        ("spoil", "words"),
        [
            # Refused by the encoder in its own thread.
            (lambda r: dataclasses.replace(r, delivery=Delivery(fps=-5)), "MP4 encoding failed"),
            # Fails while the encoder is opened, in the middle of the batch.
            (lambda r: dataclasses.replace(r, delivery=Delivery(fps=0)), "vae_decoder failed: ZeroDivisionError"),
            (lambda r: dataclasses.replace(r, report={}), "vae_decoder failed: KeyError"),
            (lambda r: dataclasses.replace(r, latents=r.latents[0]), "LATENTS = [2, 18, 32]"),
            (lambda r: dataclasses.replace(r, latents=r.latents[:3]), "must be [B, 16, T, h, w]"),
        ],
        ids=["encoder", "open", "report", "shape", "channels"],
    )
    def test_a_failure_harms_no_neighbour(
        self,
        vae_decoder: VAEDecoderStage,
        decode_request: MakeDecodeRequest,
        spoil: Callable[[DecodeRequest], DecodeRequest],
        words: str,
    ) -> None:
        good = [decode_request(1, container="mp4"), decode_request(2, container="raw")]
        first, failed, second = decode(vae_decoder, [good[0], spoil(decode_request(3)), good[1]])
        assert isinstance(failed, TurboError)
        assert words in str(failed)
        assert video_of(first).mp4 == video_of(*decode(vae_decoder, [good[0]])).mp4
        np.testing.assert_array_equal(video_of(second).frames, video_of(*decode(vae_decoder, [good[1]])).frames)

    def test_the_first_is_done_before_the_next_begins_and_what_comes_meanwhile_is_taken_in(
        self, vae_decoder: VAEDecoderStage, decode_request: MakeDecodeRequest
    ) -> None:
        waiting = {5: decode_request(1, num_frames=9), 6: decode_request(2)}
        numbers = []
        for number, _ in vae_decoder.decode(waiting):
            if not numbers:
                waiting[7] = decode_request(3)
            numbers.append(number)
        assert numbers == [5] * 4 + [6] * 3 + [7] * 3
        assert not waiting

    def test_report(self, vae_decoder: VAEDecoderStage, decode_request: MakeDecodeRequest) -> None:
        request = decode_request(container="mp4", fps=8)
        video = video_of(*decode(vae_decoder, [request]))
        report = video.report
        json.dumps(report)
        assert report["video"] == {
            "container": "mp4",
            "width": 256,
            "height": 144,
            "num_frames": 5,
            "fps": 8,
            "bytes": len(video.mp4),
        }
        assert report["parameters"] == {**request.report["parameters"], "fps": 8}  # type: ignore[dict-item]
        assert set(report["stages"]) == {"text_encoder", "denoiser", "vae_decoder", "video_encoder"}  # type: ignore[call-overload]
        assert report["weights"] == {
            "text_encoder": "text weights",
            "denoiser": "denoiser weights",
            "vae": "vae weights",
        }

    def test_preview_is_a_small_jpeg(self, vae_decoder: VAEDecoderStage, decode_request: MakeDecodeRequest) -> None:
        image = Image.open(io.BytesIO(vae_decoder.preview(decode_request().latents[:, :1])))
        assert (image.format, image.size) == ("JPEG", (256, 144))


class TestManifest:
    def test_equal_requests_have_equal_manifests_and_files(
        self, make_denoiser: MakeDenoiser, vae_decoder: VAEDecoderStage, encoded: EncodedPrompt
    ) -> None:
        videos = []
        for _ in range(2):
            (end,) = finish(make_denoiser(), [ask(encoded)])
            assert isinstance(end, DenoisedStep)
            assert end.latents is not None
            assert end.report is not None
            request = DecodeRequest(latents=end.latents, report=end.report, delivery=Delivery())
            videos.append(video_of(*decode(vae_decoder, [request])))
        first, second = videos
        assert first.report["stages"] != second.report["stages"], "times differ"
        assert make_manifest(first.report) == make_manifest(second.report)
        assert first.mp4 == second.mp4

    def test_it_holds_what_makes_the_video_and_no_times(
        self, vae_decoder: VAEDecoderStage, decode_request: MakeDecodeRequest
    ) -> None:
        video = video_of(*decode(vae_decoder, [decode_request(fps=24)]))
        with av.open(io.BytesIO(video.mp4)) as container:
            text = container.metadata["comment"]
        assert text == make_manifest(video.report)
        assert "milliseconds" not in text
        manifest = json.loads(text)
        assert set(manifest) == {
            "turbodiffusion_manifest", "model", "ensemble", "prompt", "seed", "parameters", "weights", "attention",
            "linear_kind", "dtype", "device", "versions",
        }  # fmt: skip
        assert manifest["prompt"] == "a red fox runs"
        assert manifest["parameters"]["fps"] == 24
        assert set(manifest["weights"]) == {"text_encoder", "denoiser", "vae"}

    def test_another_request_has_another_manifest(
        self, vae_decoder: VAEDecoderStage, decode_request: MakeDecodeRequest
    ) -> None:
        requests = [decode_request(1), decode_request(2), decode_request(1, fps=24)]
        manifests = [make_manifest(video_of(end).report) for end in decode(vae_decoder, requests)]
        assert len(set(manifests)) == 3
