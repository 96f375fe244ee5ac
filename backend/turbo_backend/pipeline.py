"""The whole request in one process: what the ensemble does, without a server. For tests, benches and notebooks."""

from __future__ import annotations

from collections.abc import Iterator

from turbo_backend.errors import TurboError
from turbo_backend.manifest import merge_reports
from turbo_backend.parameters import Delivery
from turbo_backend.settings import Settings
from turbo_backend.stages.denoiser import DenoiserStage
from turbo_backend.stages.denoiser_request import DenoisedStep, DenoiseRequest
from turbo_backend.stages.image_encoder import ImageEncoderStage, ImageRequest
from turbo_backend.stages.loading import load_denoiser, load_image_encoder, load_text_encoder, load_vae_decoder
from turbo_backend.stages.text_encoder import TextEncoderStage
from turbo_backend.stages.vae_decoder import DecodedChunk, DecodedVideo, DecodeRequest, VAEDecoderStage


class Pipeline:
    """Text encoder, image encoder, denoiser and VAE decoder in one process."""

    def __init__(
        self,
        text_encoder: TextEncoderStage,
        image_encoder: ImageEncoderStage,
        denoiser: DenoiserStage,
        vae_decoder: VAEDecoderStage,
    ) -> None:
        self._text_encoder = text_encoder
        self._image_encoder = image_encoder
        self._denoiser = denoiser
        self._vae_decoder = vae_decoder

    @classmethod
    def from_settings(cls, settings: Settings) -> Pipeline:
        """Loads every stage of the model that `settings` choose."""
        return cls(
            load_text_encoder(settings),
            load_image_encoder(settings),
            load_denoiser(settings),
            load_vae_decoder(settings),
        )

    def stream(
        self, prompt: str, *, image: bytes | None = None, delivery: Delivery | None = None, **values: object
    ) -> Iterator[DenoisedStep | DecodedChunk | DecodedVideo]:
        """Runs one request, yielding each step, each decoded chunk, and the video.

        Args:
            prompt: what the video shows.
            image: JPEG, PNG or WebP that the video starts from, for a model that takes one.
            delivery: container, frame rate and previews.
            values: parameters by lower-case wire name (`num_steps=2`); absent ones take the model's defaults.

        Raises:
            TurboError: whatever the failing stage says.
        """
        delivery = delivery or Delivery(preview=False)
        (encoded,) = self._text_encoder.encode([prompt])
        if isinstance(encoded, TurboError):
            raise encoded
        wire_values = {name.upper(): value for name, value in values.items()}
        report, image_latents = encoded.report(), None
        if image is not None:
            (encoded_image,) = self._image_encoder.encode([ImageRequest(content=image, values=wire_values)])
            if isinstance(encoded_image, TurboError):
                raise encoded_image
            report, image_latents = merge_reports(report, encoded_image.report()), encoded_image.latents
        request = DenoiseRequest(
            text_embeddings=encoded.embeddings,
            text_length=encoded.length,
            values=wire_values,
            report=report,
            image_latents=image_latents,
            preview=delivery.preview,
        )
        for _, step in self._denoiser.denoise([request]):
            if isinstance(step, TurboError):
                raise step
            yield step
            if step.latents is not None and step.report is not None:
                finished = DecodeRequest(latents=step.latents, report=step.report, delivery=delivery)
        for _, update in self._vae_decoder.decode({0: finished}):
            if isinstance(update, TurboError):
                raise update
            yield update

    def generate(
        self, prompt: str, *, image: bytes | None = None, delivery: Delivery | None = None, **values: object
    ) -> DecodedVideo:
        """Runs one request to its end; arguments and errors as in `stream`."""
        *_, video = self.stream(prompt, image=image, delivery=delivery, **values)
        assert isinstance(video, DecodedVideo)
        return video
