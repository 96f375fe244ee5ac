"""Triton adapter of the VAE decoder: progress passes through at once, latents are decoded in a thread of their own."""

import json
from functools import partial

import numpy as np

from turbo_backend import triton_adapter as triton
from turbo_backend.cancellation import Cancellations
from turbo_backend.errors import TurboError, raise_reported
from turbo_backend.memory import as_turbo_error
from turbo_backend.parameters import make_delivery
from turbo_backend.stages.decoder_thread import COUNTERS, DecoderThread
from turbo_backend.stages.held_open import LettingGo
from turbo_backend.stages.loading import load_vae_decoder
from turbo_backend.stages.vae_decoder import DecodedChunk, DecodeRequest

NO_FRAMES = np.empty((0, 0, 0, 3), np.uint8)


class TritonPythonModel:
    @triton.tells_failure
    def initialize(self, args):
        self._cancellations = Cancellations.of_server()
        self._letting_go = LettingGo(self._cancellations)
        self._stage = load_vae_decoder(triton.read_settings(args), cancellations=self._cancellations)
        counters = {name: triton.Counter(name, *about) for name, about in COUNTERS.items()}
        self._decoder = DecoderThread(self._stage, lambda name, label: counters[name].increment(label))

    def execute(self, requests):
        for request in requests:
            caller = _Caller(request, self._letting_go)
            try:
                self._take(request, caller)
            except Exception as error:
                caller(as_turbo_error(error, "vae_decoder"))

    def finalize(self):
        self._decoder.close()
        self._cancellations.close()

    def _take(self, request, caller):
        caller.token = triton.read_scalar(request, "CANCEL_TOKEN")
        report = triton.read_json(request, "DENOISER_REPORT")
        raise_reported(report)
        # Triton tells that a caller has left to the models that it calls from then on, which is this one alone.
        has_left, is_last_word = request.is_cancelled(), report.get("is_last_word")
        latents = triton.read_tensor(request, "LATENTS")
        is_last = latents.shape[1] > 0
        if is_last:
            self._letting_go.begin(caller.token)
        caller.send(self._pass_progress_through(request) if is_last_word is None else None, final=not is_last)
        if is_last_word:
            self._letting_go.end(caller.token)
        elif has_left:  # filed last: Triton 2.51 never releases an ensemble that fails while a step runs
            self._cancellations.request(caller.token)
        if is_last:
            decoding = DecodeRequest(
                latents=latents.clone(),  # the request's memory ends with execute
                report={"request_id": request.request_id(), **report},
                delivery=make_delivery(triton.read_parameters(request)),
                cancel_keys=(caller.token, request.request_id()),
            )
            self._decoder.submit(decoding, caller)

    def _pass_progress_through(self, request):
        preview_latents = triton.read_tensor(request, "PREVIEW_LATENTS")
        preview = self._stage.preview(preview_latents) if preview_latents.shape[1] else b""
        step, count = (triton.read_scalar(request, name) for name in ("STEP", "STEP_COUNT"))
        return _respond("denoiser", step, count, preview=preview)


class _Caller:
    """Gives one call of this model its answers."""

    def __init__(self, request, letting_go):
        self.token = ""
        self._letting_go = letting_go
        self._sender = request.get_response_sender()
        self._fail = triton.make_failure(request, self._sender, partial(_respond, "error", 0, 0))

    def send(self, answer, *, final):
        triton.send(self._sender, answer, final=final)

    def __call__(self, update):
        if isinstance(update, TurboError):
            self._letting_go.after(self.token, partial(self._fail, update))
        elif isinstance(update, DecodedChunk):
            if update.step >= update.step_count - 1:
                self._letting_go.let_go(self.token)
            self.send(_respond("vae_decoder", update.step, update.step_count), final=False)
        else:
            count, report = update.step_count, json.dumps(update.report, ensure_ascii=False)
            self.send(_respond("done", count, count, video=update.mp4, frames=update.frames, report=report), final=True)


def _respond(stage, step, step_count, *, preview=b"", video=b"", frames=NO_FRAMES, report=""):
    return triton.response(
        triton.write_bytes("STAGE", stage),
        triton.write_integer("STEP", step),
        triton.write_integer("STEP_COUNT", step_count),
        triton.write_bytes("PREVIEW", preview),
        triton.write_bytes("VIDEO", video),
        triton.write_array("FRAMES", frames),
        triton.write_bytes("REPORT", report),
    )
