"""Triton adapter of the denoiser: text embeddings and parameters -> one response a step, latents with the last."""

from functools import partial

import torch

from turbo_backend import triton_adapter as triton
from turbo_backend.cancellation import Cancellations
from turbo_backend.errors import Cancelled
from turbo_backend.jobs.steps import open_step_files
from turbo_backend.manifest import merge_reports
from turbo_backend.memory import as_turbo_error
from turbo_backend.parameters import make_delivery, make_scheduling
from turbo_backend.stages.caller import Caller
from turbo_backend.stages.denoiser import COUNTERS
from turbo_backend.stages.denoiser_request import DenoiseRequest
from turbo_backend.stages.held_open import HeldOpen
from turbo_backend.stages.loading import load_denoiser

EMPTY_LATENTS = torch.empty(16, 0, 0, 0)


class TritonPythonModel:
    @triton.tells_failure
    def initialize(self, args):
        self._cancellations = Cancellations.of_server()
        settings = triton.read_settings(args)
        self._stage = load_denoiser(
            settings, cancellations=self._cancellations, open_store=partial(open_step_files, settings)
        )
        counters = {name: triton.Counter(name, *about) for name, about in COUNTERS.items()}
        self._held_open = HeldOpen(self._cancellations)  # threads begin where nothing can fail any more
        self._stage.start(count=lambda name, label, amount: counters[name].increment(label, amount))

    def execute(self, requests):
        """Hands the requests over; they are answered as their steps are done."""
        for request in requests:
            caller = self._caller(request)
            try:
                if (run := self._stage.submit(self._read(request), caller)) is not None:
                    caller.hold(run.cancel_token)
            except Exception as error:
                caller(as_turbo_error(error, "denoiser"))

    def finalize(self):
        self._stage.close()
        self._held_open.close()
        self._cancellations.close()

    def _caller(self, request):
        sender = request.get_response_sender()
        send, fail = partial(_send, sender), partial(_fail, sender, request.request_id())
        return Caller(send, fail, held_open=self._held_open, is_job=triton.is_durable(request))

    def _read(self, request):
        if request.is_cancelled():
            raise Cancelled("the request was cancelled before its first step")
        reports = [triton.read_json(request, name) for name in ("TEXT_REPORT", "IMAGE_REPORT")]
        image_latents = triton.read_optional_tensor(request, "IMAGE_LATENTS")
        parameters = triton.read_parameters(request)
        return DenoiseRequest(  # the request's memory ends with execute
            text_embeddings=triton.read_tensor(request, "TEXT_EMBEDDINGS").clone(),
            text_length=triton.read_scalar(request, "TEXT_LENGTH"),
            values=triton.read_values(request),
            report=merge_reports(*[report for report in reports if report is not None]),
            image_latents=None if image_latents is None else image_latents.clone(),
            preview=make_delivery(parameters).preview,
            request_id=request.request_id(),
            scheduling=make_scheduling(parameters),
        )


def _send(sender, update, is_last):
    triton.send(sender, _respond(update), final=is_last)


def _fail(sender, request_id, error):
    triton.send(sender, triton.error_response(error, request_id), final=True)


def _respond(update):
    def or_empty(latents):
        return EMPTY_LATENTS if latents is None else latents

    return triton.response(
        triton.write_integer("STEP", update.step),
        triton.write_integer("STEP_COUNT", update.step_count),
        triton.write_bytes("CANCEL_TOKEN", update.cancel_token),
        triton.write_tensor("PREVIEW_LATENTS", or_empty(update.preview_latents)),
        triton.write_tensor("LATENTS", or_empty(update.latents)),
        triton.write_json("DENOISER_REPORT", update.report or {}),
    )
