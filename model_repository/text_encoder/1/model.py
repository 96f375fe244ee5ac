"""Triton adapter of the text encoder: PROMPT -> TEXT_EMBEDDINGS, TEXT_LENGTH, TEXT_REPORT."""

from turbo_backend import triton_adapter as triton
from turbo_backend.errors import TurboError
from turbo_backend.stages.loading import load_text_encoder


class TritonPythonModel:
    @triton.tells_failure
    def initialize(self, args):
        self._stage = load_text_encoder(triton.read_settings(args))

    def execute(self, requests):
        prompts = [self._read(request) for request in requests]
        encoded = iter(self._stage.encode([prompt for prompt in prompts if isinstance(prompt, bytes)]))
        return [
            self._respond(request, next(encoded) if isinstance(prompt, bytes) else prompt)
            for request, prompt in zip(requests, prompts, strict=True)
        ]

    def _read(self, request):
        try:
            return triton.read_bytes(request, "PROMPT")
        except TurboError as error:
            return error

    def _respond(self, request, outcome):
        if isinstance(outcome, TurboError):
            return triton.error_response(outcome, request.request_id())
        return triton.response(
            triton.write_tensor("TEXT_EMBEDDINGS", outcome.embeddings),
            triton.write_integer("TEXT_LENGTH", outcome.length),
            triton.write_json("TEXT_REPORT", outcome.report()),
        )
