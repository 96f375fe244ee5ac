"""Requests that the denoiser keeps open until their video is made, so that the decoder hears of callers who leave.

Triton tells that a caller has left to the models that it calls from then on, and to none that is running (issue 6739 of
its server). So the denoiser answers a request that waits, runs or is decoded now and then with nothing but its token:
each such word calls the decoder anew. A mark in the folder that the processes share says that a request is held. The
decoder removes it before the last chunk, and the denoiser then says its last word. A request whose decoding fails is
let go of first, and fails after the last word: Triton 2.51 never releases an ensemble that fails while one of its
models is at work.

    denoiser (`HeldOpen`)          decoder (`LettingGo`)
    word, step, word, ...   ->     has the caller left?
    latents                 ->     decodes
    word, word, ...         ->     has the caller left?
              (mark gone)   <-     the last chunk is due, or an error
    last word               ->     now it may fail
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from functools import partial

from turbo_backend.cancellation import Cancellations
from turbo_backend.stages.answers import Answers

_log = logging.getLogger(__name__)

#: How often a word is said to every request, and for each of many: at most 50 words a second.
_WORD_SECONDS = 0.05
_SECONDS_FOR_EACH = 0.02


class HeldOpen:
    """The denoiser's side: says a word to each held request now and then, from a thread of its own.

    Args:
        marks: of the server, which the decoder sees too.
    """

    def __init__(self, marks: Cancellations) -> None:
        self._marks = marks
        self._held: dict[str, Callable[[bool], bool]] = {}  # used by the thread alone
        self._said = time.monotonic()
        self._words = Answers(between=self._look, is_busy=lambda: bool(self._held))
        self._words.start()

    def hold(self, token: str, say: Callable[[bool], bool]) -> bool:
        """Holds a request; False where that cannot be marked and it is not held.

        Args:
            token: of the request.
            say: sends a word; called with whether it is the last one. Returns whether the request is still open.
        """
        try:
            self._marks.request(_mark(token))
        except OSError as error:
            _log.warning("a caller who leaves will not be noticed in time: %s", error)
            return False
        self._words.give(partial(self._held.__setitem__, token, say))
        return True

    def close(self) -> None:
        """Ends the thread; what is held then is given up."""
        self._words.close()
        self._marks.forget(*map(_mark, self._held))

    def _look(self) -> None:
        for token in [token for token in self._held if not self._marks.is_requested(_mark(token))]:
            self._held.pop(token)(True)
        if time.monotonic() - self._said >= max(_WORD_SECONDS, _SECONDS_FOR_EACH * len(self._held)):
            self._said = time.monotonic()
            for token, say in list(self._held.items()):
                del self._held[token]  # for good if nothing can be said any more
                if say(False):
                    self._held[token] = say
                    self._marks.keep(_mark(token))  # however long the request waits
                else:
                    self._marks.forget(_mark(token))


class LettingGo:
    """The decoder's side; any thread may use it.

    Args:
        marks: of the server, which the denoiser sees too.
    """

    def __init__(self, marks: Cancellations) -> None:
        self._marks = marks
        self._lock = threading.Lock()
        self._held: set[str] = set()
        self._afterwards: dict[str, Callable[[], None]] = {}

    def begin(self, token: str) -> None:
        """Takes note of a request whose latents have come, and of whether the denoiser holds it."""
        if self._marks.is_requested(_mark(token)):
            with self._lock:
                self._held.add(token)

    def let_go(self, token: str) -> None:
        """Asks for the last word to a request; nothing where it is not held."""
        self._marks.forget(_mark(token))

    def after(self, token: str, act: Callable[[], None]) -> None:
        """Lets go of a request and acts when the last word has come; at once where it is not held."""
        self.let_go(token)
        with self._lock:
            if token in self._held:
                self._afterwards[token] = act
                return
        act()

    def end(self, token: str) -> None:
        """Takes note of the last word."""
        with self._lock:
            self._held.discard(token)
            act = self._afterwards.pop(token, None)
        if act is not None:
            act()


def _mark(token: str) -> str:
    return f"{token} is held open"
