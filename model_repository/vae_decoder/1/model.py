"""Triton adapter of the VAE decoder: progress passes through at once, latents are decoded in a worker thread."""

import itertools
import json
import threading
from functools import partial

import numpy as np

from turbo_backend import triton_adapter as triton
from turbo_backend.cancellation import Cancellations
from turbo_backend.errors import TurboError, raise_reported
from turbo_backend.memory import as_turbo_error
from turbo_backend.parameters import make_delivery
from turbo_backend.stages.loading import load_vae_decoder
from turbo_backend.stages.vae_decoder import DecodedChunk, DecodeRequest

NO_FRAMES = np.empty((0, 0, 0, 3), np.uint8)


class TritonPythonModel:
    @triton.tells_failure
    def initialize(self, args):
        self._cancellations = Cancellations.of_server()
        self._stage = load_vae_decoder(triton.read_settings(args), cancellations=self._cancellations)
        self._numbers = itertools.count()
        self._answers, self._waiting = {}, {}  # by number: how a request is answered, what is to be decoded
        self._changed = threading.Condition()
        self._is_closing = False
        self._worker = threading.Thread(target=self._decode_forever, name="vae-decoder")
        self._worker.start()

    def execute(self, requests):
        for request in requests:
            sender = request.get_response_sender()
            fail = triton.make_failure(request, sender, partial(_respond, "error", 0, 0))
            try:
                raise_reported(triton.read_json(request, "DENOISER_REPORT"))
                latents = triton.read_tensor(request, "LATENTS")
                is_last = latents.shape[1] > 0
                # Triton tells that a caller is gone to the models that it calls from then on, which is this one alone.
                is_cancelled = request.is_cancelled()
                triton.send(sender, self._pass_progress_through(request), final=not is_last)
                if is_cancelled:  # filed last: Triton 2.51 never releases an ensemble that fails while a step runs
                    self._cancellations.request(triton.read_scalar(request, "CANCEL_TOKEN"))
                if is_last:
                    decoding = self._read(request, latents)
                    with self._changed:
                        number = next(self._numbers)
                        self._answers[number] = sender, fail
                        self._waiting[number] = decoding
                        self._changed.notify()
            except Exception as error:
                fail(as_turbo_error(error, "vae_decoder"))

    def finalize(self):
        with self._changed:
            self._is_closing = True
            self._changed.notify()
        self._worker.join()
        self._cancellations.close()

    def _pass_progress_through(self, request):
        preview_latents = triton.read_tensor(request, "PREVIEW_LATENTS")
        preview = self._stage.preview(preview_latents) if preview_latents.shape[1] else b""
        step, count = (triton.read_scalar(request, name) for name in ("STEP", "STEP_COUNT"))
        return _respond("denoiser", step, count, preview=preview)

    def _read(self, request, latents):
        report = triton.read_json(request, "DENOISER_REPORT")
        return DecodeRequest(
            latents=latents.clone(),  # the request's memory ends with execute
            report={"request_id": request.request_id(), **report},
            delivery=make_delivery(triton.read_parameters(request)),
            cancel_keys=(triton.read_scalar(request, "CANCEL_TOKEN"), request.request_id()),
        )

    def _decode_forever(self):
        while self._wait():
            try:
                self._decode()
            except Exception as error:  # must not end the worker, nor leave a caller without answer
                with self._changed:
                    failed, self._answers, self._waiting = self._answers, {}, {}
                told = as_turbo_error(error, "vae_decoder")
                for _, fail in failed.values():
                    fail(told)

    def _wait(self):
        """Returns when there is something to decode; nothing comes any more if there is not."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._is_closing)
            return bool(self._waiting)

    def _decode(self):
        """Decodes what waits and what comes meanwhile; a request leaves `_answers` just before its final response."""
        for number, update in self._stage.decode(self._waiting):
            sender, fail = self._answers[number]
            if isinstance(update, DecodedChunk):
                triton.send(sender, _respond("vae_decoder", update.step, update.step_count), final=False)
                continue
            del self._answers[number]
            if isinstance(update, TurboError):
                fail(update)
                continue
            count, report = update.step_count, json.dumps(update.report, ensure_ascii=False)
            answer = _respond("done", count, count, video=update.mp4, frames=update.frames, report=report)
            triton.send(sender, answer, final=True)


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
