"""Where the state of a durable request is kept after each step, so that another process can go on from there."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, TypeAlias

import torch

_log = logging.getLogger(__name__)

#: (finished steps, float64 state `[16, T, h, w]`).
Reached: TypeAlias = "tuple[int, torch.Tensor]"


class StepStore(Protocol):
    """Keeps the newest finished step of each durable request.

    The denoiser calls it from one thread of its own, while steps go on. An exception that it raises is logged and costs
    the request nothing: the run goes on, or begins anew, and gives the same bytes.
    """

    def load(self, request_id: str) -> Reached | None:
        """What a run of that request reached before: (finished steps, state), or None when nothing usable is kept.

        The state is float64 `[16, T, h, w]` on the CPU, as `save` got it.
        """

    def save(self, request_id: str, step: int, state: torch.Tensor) -> None:
        """Keeps `state` as that after `step` finished steps (1 to num_steps), in place of what an earlier step left.

        Where saving takes longer than a step, a later one may come without those before it. It may still be called when
        the request has been answered just before.
        """


class StepWriter:
    """The thread that uses a store; what waits for it is the newest state of each request, no more.

    Args:
        store: where states are kept.
    """

    def __init__(self, store: StepStore) -> None:
        self._store = store
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="step-store")
        self._lock = threading.Lock()
        self._newest: dict[str, Reached] = {}

    def load(self, request_id: str, then: Callable[[Reached | None], None]) -> None:
        """Calls `then`, in the thread, with what is kept of that request."""
        self._thread.submit(self._load, request_id, then)

    def save(self, request_id: str, step: int, state: torch.Tensor) -> None:
        """Has `state` kept as that after `step` finished steps."""
        with self._lock:
            is_waiting = request_id in self._newest
            self._newest[request_id] = step, state
        if not is_waiting:
            self._thread.submit(self._save, request_id)

    def forget(self, request_id: str) -> None:
        """Keeps nothing more of a request, but for what is being written."""
        with self._lock:
            self._newest.pop(request_id, None)

    def close(self) -> None:
        """Returns when all has been written."""
        self._thread.shutdown()

    def _load(self, request_id: str, then: Callable[[Reached | None], None]) -> None:
        try:
            reached = self._store.load(request_id)
        except Exception:
            _log.exception("request %s: its steps cannot be read, it begins anew", request_id)
            reached = None
        then(reached)

    def _save(self, request_id: str) -> None:
        with self._lock:
            newest = self._newest.pop(request_id, None)
        if newest is not None:
            try:
                self._store.save(request_id, *newest)
            except Exception:
                _log.exception("request %s: its step %d cannot be kept", request_id, newest[0])
