"""Text embeddings and a seed in, latents out: requests wait, take turns step by step, and are answered as they go.

    submit -> checks -> queue -> [turn: choose who, one step, answers] ... -> latents

A turn is the unit of everything: between two turns requests join, leave, are cancelled, or pass one another
(`scheduler`); within a turn, `sampling` runs one step of those that were chosen. In a server, which calls `start`, one
thread takes the turns and another gives the answers; in one process, whoever iterates over `denoise` takes them.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TypeAlias

import torch

from turbo_backend.cancellation import Cancellations
from turbo_backend.config import ModelConfig
from turbo_backend.errors import Cancelled, DeadlineExceeded, InvalidArgument, ResourceExhausted, TurboError
from turbo_backend.memory import FreeMemory, as_turbo_error
from turbo_backend.stages.admission import Admission
from turbo_backend.stages.answers import Answers
from turbo_backend.stages.denoiser_queue import DenoiserQueue
from turbo_backend.stages.denoiser_report import DenoiserReport
from turbo_backend.stages.denoiser_request import DenoisedStep, DenoiseRequest, Receive, Run
from turbo_backend.stages.experts import Experts
from turbo_backend.stages.sampling import HostStep, Sample, Sampling, use_device
from turbo_backend.stages.scheduler import StepScheduler, Task
from turbo_backend.stages.step_store import Reached, StepStore, StepWriter

_log = logging.getLogger(__name__)

#: Requests whose first noise is drawn on arrival; more of it would only fill memory.
_MAX_DRAWN_AHEAD = 8

#: What a stage counts: by name, the description and what the label says.
COUNTERS: dict[str, tuple[str, str]] = {
    "turbo_denoiser_requests": ("Requests that ended, by outcome", "outcome"),
    "turbo_denoiser_queue_milliseconds": ("Time that requests waited before their first step", "priority_level"),
    "turbo_denoiser_steps": ("Denoising steps that ran, by how many requests shared each", "batch_size"),
    "turbo_denoiser_step_milliseconds": ("Time that these steps took", "batch_size"),
    "turbo_denoiser_resumes": ("Requests that went on from a stored step, by its number", "step"),
}

#: Outcomes of requests that end in an error; in any other than these, the request has failed.
_OUTCOMES: dict[type[TurboError], str] = {
    Cancelled: "cancelled",
    DeadlineExceeded: "deadline",
    InvalidArgument: "invalid",
    ResourceExhausted: "exhausted",
}

#: (counter, label, amount).
Count: TypeAlias = Callable[[str, str, float], None]


class DenoiserStage:
    """Runs the rCM sampler for unlike requests, one step of a few of them at a time.

    With two experts, the high-noise one runs until a step begins below the request's boundary, and the low-noise one
    from there on.

    Args:
        experts: the denoiser networks.
        model: the served model.
        device: where they run.
        dtype: of their activations.
        provider: attention provider (`reference`, `triton`, `spargeattn`).
        max_batch_size: most requests that share a forward.
        max_batch_tokens: most tokens that one forward may hold together; a longer request runs alone.
        fingerprint: of the weights, for the report.
        identity: other facts about this server that go into every report.
        room: bytes of GPU memory that shall be free for others when no request is held.
        records: whether forwards of one request are recorded as CUDA graphs where they can be.
        max_queue_size: most requests that are held, waiting and running; more are refused.
        cancellations: where requests are given up; None where nobody can.
        store: where the steps of durable requests are kept; None keeps none.
        clock: seconds, for deadlines and times.
    """

    def __init__(
        self,
        experts: Experts,
        model: ModelConfig,
        *,
        device: torch.device,
        dtype: torch.dtype,
        provider: str,
        max_batch_size: int,
        max_batch_tokens: int,
        fingerprint: str,
        identity: Mapping[str, object],
        room: int = 0,
        records: bool = False,
        max_queue_size: int = 64,
        cancellations: Cancellations | None = None,
        store: StepStore | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._device = device
        self._cancellations = cancellations
        self._writer = None if store is None else StepWriter(store)
        self._count: Count | None = None
        self._clock = clock
        self._admission = Admission(model, device=device, dtype=dtype, provider=provider)
        self._sampling = Sampling(
            experts,
            model.dit.out_channels,
            device=device,
            dtype=dtype,
            provider=provider,
            room=room,
            records=records,
        )
        scheduler = StepScheduler(
            max_batch_size=max_batch_size,
            max_batch_tokens=max_batch_tokens,
            switch_is_free=experts.switch_is_free,
        )
        self._queue = DenoiserQueue(scheduler, max_size=max_queue_size, cancellations=cancellations, clock=clock)
        self._report = DenoiserReport(
            model,
            device=device,
            dtype=dtype,
            provider=provider,
            placement=experts.placement,
            fingerprint=fingerprint,
            identity=identity,
        )
        self._answers = Answers(between=self._sweep, is_busy=lambda: len(self._queue) > 0)
        self._free = FreeMemory(device)
        self._turn_lock = threading.Lock()
        self._turns: threading.Thread | None = None
        self._is_closing = False

    def start(self, count: Count | None = None) -> None:
        """Lets threads take the turns and give the answers; `denoise` is of no use from then on.

        Args:
            count: takes what `COUNTERS` lists, in the thread that gives answers.
        """
        self._count = count
        self._free.begin()
        self._answers.start()
        self._turns = threading.Thread(target=self._take_turns, name="denoiser-turns")
        self._turns.start()

    def close(self) -> None:
        """Ends the threads, once what was submitted is done."""
        self._is_closing = True
        self._queue.wake()
        if self._turns is not None:
            self._turns.join()
        self._answers.close()
        self._sampling.close()
        if self._writer is not None:
            self._writer.close()

    def submit(self, request: DenoiseRequest, receive: Receive) -> Run | None:
        """Lets a request wait for its turns, or refuses it.

        Args:
            receive: called for each update; after `start` in another thread.

        Returns:
            What `withdraw` takes; None where it was refused.
        """
        try:
            run = self._admit(request, receive)
            self._queue.enter(run)
        except Exception as error:
            refused = as_turbo_error(error, "denoiser")
            self._add("turbo_denoiser_requests", _OUTCOMES.get(type(refused), "failed"))
            self._answers.give(partial(receive, refused))
            return None
        self._answers.wake()  # it may have been given up already
        if self._writer is not None and request.scheduling.durable:
            self._writer.load(request.request_id, partial(self._join, run))
        else:
            self._join(run, request.reached)
        return run

    def withdraw(self, run: Run) -> None:
        """Lets a run take no more turns, and get no more answers; one that has ended stays as it is."""
        if self._queue.leave(run):
            run.has_ended = True
            self._sampling.forget(run.sample)

    def denoise(
        self, requests: Sequence[DenoiseRequest | TurboError]
    ) -> Iterator[tuple[int, DenoisedStep | TurboError]]:
        """Runs requests in this process; yields (index, update), for each request ending in latents or an error.

        An entry that is already an error is yielded as it is; one that fails never harms its neighbours. Several
        threads may do this at once: whoever wants an update takes the next turn, for all.
        """
        updates: deque[tuple[int, DenoisedStep | TurboError]] = deque()
        runs: list[Run | None] = []

        def receiver(index: int) -> Receive:
            return lambda update: updates.append((index, update))

        for index, request in enumerate(requests):
            if isinstance(request, TurboError):
                receiver(index)(request)
            else:
                runs.append(self.submit(request, receiver(index)))
        unanswered = len(requests)
        try:
            while unanswered:
                while not updates:
                    if self._queue.wait(lambda: bool(updates)):
                        self.turn()
                index, update = updates.popleft()
                unanswered -= _ends(update)
                yield index, update
        finally:  # the caller may want no more
            for run in runs:
                if run is not None:
                    self.withdraw(run)

    def turn(self) -> None:
        """Ends what is to be ended, then runs one step of those whose turn it is, if anybody waits."""
        with self._turn_lock:
            self._sweep()
            self._free.look()
            running = self._queue.begin_turn()
            if running is None:
                return
            for run in running.runs:
                if not run.log.step_milliseconds:
                    label = str(run.task.priority_level)
                    self._add("turbo_denoiser_queue_milliseconds", label, run.log.queue_milliseconds)
            turn = running.turn
            try:
                steps, forward_milliseconds = self._sampling.run(
                    [run.sample for run in running.runs],
                    turn.expert,
                    upcoming=[run.sample for run in running.upcoming],
                    next_expert=turn.next_expert,
                )
            except Exception as error:
                self._queue.fail_turn(running)
                self._tell_failure(running.runs, error)
                return
            milliseconds = self._queue.end_turn(running)
            for run in running.runs:
                run.log.forward_milliseconds.append(forward_milliseconds)
            self._add("turbo_denoiser_steps", str(len(steps)))
            self._add("turbo_denoiser_step_milliseconds", str(len(steps)), milliseconds)
            self._sweep()  # who was cancelled meanwhile is told so, and of no further step
            done = [run for run, step in zip(running.runs, steps, strict=True) if step.latents is not None]
            for run in done:
                self._sampling.forget(run.sample)
            if sum(run in self._queue for run in done) == len(self._queue):  # before the next stage may need it
                self._sampling.release_workspace()
            for run, step in zip(running.runs, steps, strict=True):
                self._tell_step(run, step)

    def _admit(self, request: DenoiseRequest, receive: Receive) -> Run:
        """Checks a request.

        Raises:
            TurboError: it is refused.
        """
        free = self._free.bytes if self._queue.is_running else self._free.look()
        parameters = self._admission.check(request, free=free)
        return Run(
            request=request,
            receive=receive,
            task=Task(
                group=(parameters.latent_shape, parameters.attention_type, parameters.sla_topk),
                num_tokens=parameters.num_tokens,
                experts=self._admission.experts(parameters),
                priority_level=request.scheduling.priority_level,
            ),
            sample=Sample(
                parameters=parameters,
                text_embeddings=request.text_embeddings[: request.text_length],
                image_latents=request.image_latents,
                preview=request.preview,
                keep=self._writer is not None and request.scheduling.durable,
            ),
            arrived=self._clock(),
        )

    def _join(self, run: Run, reached: Reached | None) -> None:
        """Lets a run take its turns, from where another run of the request had come."""
        sample = run.sample
        if reached is not None:
            try:
                self._admission.check_reached(reached, sample.parameters)
            except InvalidArgument as error:
                _log.warning("request %s begins anew: %s", run.request.request_id, error)
            else:
                sample.step, sample.state = reached
                run.log.resumed_after = sample.step
                self._add("turbo_denoiser_resumes", str(sample.step))
        if sample.state is not None and sample.step == sample.parameters.num_steps:
            self._tell_step(run, HostStep(latents=sample.state.float()))
            return
        if len(self._queue) <= _MAX_DRAWN_AHEAD:
            self._sampling.draw_ahead(sample, sample.step)
        self._queue.join(run)

    def _sweep(self) -> None:
        for run, reason in self._queue.sweep():
            self._end(run, reason)

    def _tell_step(self, run: Run, step: HostStep) -> None:
        if run not in self._queue:
            return
        if step.state is not None and self._writer is not None:
            self._writer.save(run.request.request_id, run.sample.step, step.state)
        if step.latents is not None and not self._queue.leave(run):
            return
        self._answers.give(partial(self._give_step, run, run.sample.step, step))

    def _give_step(self, run: Run, number: int, step: HostStep) -> None:
        report = None
        if step.latents is not None:
            if not torch.isfinite(step.latents).all():
                self._end(run, TurboError("denoiser gave latents that are not finite"))
                return
            self._add("turbo_denoiser_requests", "done")
            report = self._report.write(run.request.report, run.sample.parameters, run.task.experts, run.log)
        self._give(
            run,
            DenoisedStep(
                step=number,
                step_count=len(run.task.experts),
                cancel_token=run.cancel_token,
                preview_latents=step.preview_latents,
                latents=step.latents,
                report=report,
            ),
        )

    def _give(self, run: Run, update: DenoisedStep | TurboError) -> None:
        """One update; nothing comes after a run's end, which may have been found while its step was being told."""
        if not run.has_ended:
            run.has_ended = _ends(update)
            run.receive(update)
            self._queue.wake()

    def _tell_failure(self, runs: Sequence[Run], error: Exception) -> None:
        """What fails together may do alone; one that fails alone is over."""
        if len(runs) > 1:
            _log.warning("%d requests failed as one batch, each now runs alone: %s", len(runs), error)
            return
        (run,) = runs
        if self._queue.leave(run):
            self._end(run, as_turbo_error(error, "denoiser"))

    def _end(self, run: Run, error: TurboError) -> None:
        """Answers a run that ends without latents and has left the queue."""
        self._sampling.forget(run.sample)
        if self._writer is not None:
            self._writer.forget(run.request.request_id)
        if self._cancellations is not None:
            self._cancellations.forget(*run.cancel_keys)
        self._add("turbo_denoiser_requests", _OUTCOMES.get(type(error), "failed"))
        self._answers.give(partial(self._give, run, error))

    def _add(self, counter: str, label: str, amount: float = 1.0) -> None:
        if self._count is not None:
            self._answers.give(partial(self._count, counter, label, amount))

    def _take_turns(self) -> None:
        use_device(self._device)
        while self._queue.wait(lambda: self._is_closing and not len(self._queue)):
            self.turn()


def _ends(update: DenoisedStep | TurboError) -> bool:
    return isinstance(update, TurboError) or update.latents is not None
