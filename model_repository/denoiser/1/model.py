"""Triton adapter of the denoiser: text embeddings and parameters -> one response a step, latents with the last."""

import torch

from turbo_backend import triton_adapter as triton
from turbo_backend.errors import TurboError
from turbo_backend.manifest import merge_reports
from turbo_backend.parameters import make_delivery
from turbo_backend.stages.denoiser import DenoiseRequest
from turbo_backend.stages.loading import load_denoiser

#: Optional inputs, checked by the stage.
FIELDS = (
    "SEED",
    "NUM_STEPS",
    "NUM_FRAMES",
    "RESOLUTION",
    "ASPECT_RATIO",
    "SIGMA_MAX",
    "ATTENTION_TYPE",
    "SLA_TOPK",
    "ODE",
    "BOUNDARY",
    "ADAPTIVE_RESOLUTION",
    "FIT",
)
EMPTY_LATENTS = torch.empty(16, 0, 0, 0)


class TritonPythonModel:
    def initialize(self, args):
        self._stage = load_denoiser(triton.read_settings(args))

    def execute(self, requests):
        senders = [request.get_response_sender() for request in requests]
        ids = [request.request_id() for request in requests]
        for index, update in self._stage.denoise([self._read(request) for request in requests]):
            if isinstance(update, TurboError):
                triton.send(senders[index], triton.error_response(update, ids[index]), final=True)
            else:
                triton.send(senders[index], self._respond(update), final=update.report is not None)

    def _read(self, request):
        try:
            values = {name: triton.read_scalar(request, name) for name in FIELDS}
            reports = [triton.read_json(request, name) for name in ("TEXT_REPORT", "IMAGE_REPORT")]
            return DenoiseRequest(
                text_embeddings=triton.read_tensor(request, "TEXT_EMBEDDINGS"),
                text_length=triton.read_scalar(request, "TEXT_LENGTH"),
                values={name: value for name, value in values.items() if value is not None},
                report=merge_reports(*[report for report in reports if report is not None]),
                image_latents=triton.read_optional_tensor(request, "IMAGE_LATENTS"),
                preview=make_delivery(triton.read_parameters(request)).preview,
            )
        except TurboError as error:
            return error

    def _respond(self, update):
        def or_empty(latents):
            return EMPTY_LATENTS if latents is None else latents

        return triton.response(
            triton.write_integer("STEP", update.step),
            triton.write_integer("STEP_COUNT", update.step_count),
            triton.write_tensor("PREVIEW_LATENTS", or_empty(update.preview_latents)),
            triton.write_tensor("LATENTS", or_empty(update.latents)),
            triton.write_json("DENOISER_REPORT", update.report or {}),
        )
