"""Triton adapter of the image encoder: IMAGE and parameters -> IMAGE_LATENTS, IMAGE_REPORT."""

from turbo_backend import triton_adapter as triton
from turbo_backend.errors import TurboError
from turbo_backend.stages.image_encoder import ImageRequest
from turbo_backend.stages.loading import load_image_encoder


class TritonPythonModel:
    @triton.tells_failure
    def initialize(self, args):
        self._stage = load_image_encoder(triton.read_settings(args))
        self._lookups = triton.Counter(
            "turbo_image_cache_lookups", "Images looked up in the cache of image latents, by outcome", "outcome"
        )

    def execute(self, requests):
        read = [self._read(request) for request in requests]
        encoded = iter(self._stage.encode([image for image in read if isinstance(image, ImageRequest)]))
        return [
            self._respond(request, next(encoded) if isinstance(image, ImageRequest) else image)
            for request, image in zip(requests, read, strict=True)
        ]

    def _read(self, request):
        try:
            return ImageRequest(
                content=triton.read_bytes(request, "IMAGE"),
                values=triton.read_values(request),
            )
        except TurboError as error:
            return error

    def _respond(self, request, outcome):
        if isinstance(outcome, TurboError):
            return triton.error_response(outcome, request.request_id())
        self._lookups.increment("hit" if outcome.cache_hit else "miss")
        return triton.response(
            triton.write_tensor("IMAGE_LATENTS", outcome.latents),
            triton.write_json("IMAGE_REPORT", outcome.report()),
        )
