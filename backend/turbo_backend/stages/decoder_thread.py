"""The thread that decodes what is submitted, one video after another."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from typing import TypeAlias

from turbo_backend.errors import Cancelled, TurboError
from turbo_backend.memory import as_turbo_error
from turbo_backend.stages.vae_decoder import DecodedChunk, DecodedVideo, DecodeRequest, VAEDecoderStage

#: Gets every update of one request; the last one is a video or an error.
Receive: TypeAlias = Callable[[DecodedChunk | DecodedVideo | TurboError], None]

#: What is counted: by name, the description and what the label says.
COUNTERS: dict[str, tuple[str, str]] = {
    "turbo_vae_decoder_requests": ("Videos whose decoding ended, by outcome", "outcome"),
    "turbo_vae_decoder_chunks": ("Latent frames that were decoded, by their video's number of them", "chunks"),
}


class DecoderThread:
    """Runs a decoder.

    Args:
        stage: decodes; used by the thread alone.
        count: takes (counter, label) of what `COUNTERS` lists.
    """

    def __init__(self, stage: VAEDecoderStage, count: Callable[[str, str], None]) -> None:
        self._stage = stage
        self._count = count
        self._numbers = itertools.count()
        self._changed = threading.Condition()  # guards what follows
        self._receivers: dict[int, Receive] = {}
        self._waiting: dict[int, DecodeRequest] = {}
        self._is_closing = False
        self._thread = threading.Thread(target=self._run, name="vae-decoder")
        self._thread.start()

    def submit(self, request: DecodeRequest, receive: Receive) -> None:
        """Lets a video wait for its turn.

        Args:
            receive: called in the thread, for each update.
        """
        with self._changed:
            number = next(self._numbers)
            self._receivers[number] = receive
            self._waiting[number] = request
            self._changed.notify()

    def close(self) -> None:
        """Ends the thread, once what was submitted is decoded."""
        with self._changed:
            self._is_closing = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while self._wait():
            try:
                self._decode()
            except Exception as error:  # must not end the thread, nor leave a caller without answer
                with self._changed:
                    failed, self._receivers, self._waiting = self._receivers, {}, {}
                told = as_turbo_error(error, "vae_decoder")
                for receive in failed.values():
                    receive(told)

    def _wait(self) -> bool:
        """Returns when there is something to decode; False when nothing comes any more."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._is_closing)
            return bool(self._waiting)

    def _decode(self) -> None:
        """Decodes what waits and what comes meanwhile; a receiver is let go just before its last update."""
        for number, update in self._stage.decode(self._waiting):
            if isinstance(update, DecodedChunk):
                self._count("turbo_vae_decoder_chunks", str(update.step_count))
                self._receivers[number](update)
            else:
                self._count("turbo_vae_decoder_requests", _outcome(update))
                self._receivers.pop(number)(update)


def _outcome(update: DecodedVideo | TurboError) -> str:
    if isinstance(update, TurboError):
        return "cancelled" if isinstance(update, Cancelled) else "failed"
    return "done"
