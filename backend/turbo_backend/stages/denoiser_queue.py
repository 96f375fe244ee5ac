"""The requests that the denoiser holds: who is let in, who takes the next turn, and who is given up."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from turbo_backend.cancellation import Cancellations
from turbo_backend.errors import Cancelled, DeadlineExceeded, ResourceExhausted, TurboError
from turbo_backend.stages.denoiser_request import Run
from turbo_backend.stages.scheduler import StepScheduler, Task, Turn
from turbo_backend.stages.step_times import StepTimes


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningTurn:
    """A turn that was begun: whose step it is, and who will probably follow."""

    turn: Turn
    runs: Sequence[Run]
    upcoming: Sequence[Run]
    began: float


class DenoiserQueue:
    """Any thread may use it; one at a time takes turns.

    Args:
        scheduler: decides whose turn it is.
        max_size: most requests that are held, waiting and running.
        cancellations: where requests are given up; None where nobody can.
        clock: seconds.
    """

    def __init__(
        self,
        scheduler: StepScheduler,
        *,
        max_size: int,
        cancellations: Cancellations | None,
        clock: Callable[[], float],
    ) -> None:
        self._scheduler = scheduler
        self._max_size = max_size
        self._cancellations = cancellations
        self._clock = clock
        self._times = StepTimes()
        self._changed = threading.Condition()  # guards what follows
        self._runs: dict[Task, Run] = {}
        self._running: RunningTurn | None = None

    def __len__(self) -> int:
        return len(self._runs)

    def __contains__(self, run: Run) -> bool:
        return run.task in self._runs

    @property
    def is_running(self) -> bool:
        """Whether a turn has begun and not ended."""
        return self._running is not None

    def enter(self, run: Run) -> None:
        """Keeps a place for a run, which takes no turns yet.

        Raises:
            ResourceExhausted: too many are there.
            DeadlineExceeded: it could not be done in the time it has.
        """
        with self._changed:
            if len(self._runs) >= self._max_size:
                raise ResourceExhausted(f"{len(self._runs)} requests wait or run already, as many as are held at once")
            deadline_ms = run.request.scheduling.deadline_ms
            milliseconds = None if deadline_ms is None else self._predict(run)
            if deadline_ms is not None and milliseconds is not None and milliseconds > deadline_ms:
                raise DeadlineExceeded(f"deadline_ms = {deadline_ms}: its steps would be done after {milliseconds} ms")
            self._runs[run.task] = run

    def join(self, run: Run) -> None:
        """Lets a run take turns from its sample's step on, unless it has left."""
        with self._changed:
            if run.task in self._runs:
                self._scheduler.add(run.task, run.sample.step)
                self._changed.notify_all()

    def leave(self, run: Run) -> bool:
        """Takes a run out; False if it had left."""
        with self._changed:
            was_in = self._runs.pop(run.task, None) is not None
            self._scheduler.remove(run.task)
            self._changed.notify_all()
        return was_in

    def wait(self, otherwise: Callable[[], bool]) -> bool:
        """Waits until somebody waits for a turn, or `otherwise()` holds; False in the latter case."""
        with self._changed:
            self._changed.wait_for(lambda: otherwise() or len(self._scheduler) > 0)
            return not otherwise()

    def wake(self) -> None:
        """Has those who wait look again."""
        with self._changed:
            self._changed.notify_all()

    def begin_turn(self) -> RunningTurn | None:
        """Whose turn it is now, or None where nobody waits."""
        with self._changed:
            turn = self._scheduler.next_turn()
            if turn is None:
                return None
            self._running = RunningTurn(
                turn=turn,
                runs=[self._runs[task] for task in turn.tasks],
                upcoming=[self._runs[task] for task in turn.upcoming],
                began=self._clock(),
            )
            for run in self._running.runs:
                run.log.queue_milliseconds += (self._running.began - run.waiting_since) * 1000
            return self._running

    def end_turn(self, running: RunningTurn) -> float:
        """Counts a step of each as done; returns the milliseconds that it took."""
        with self._changed:
            now = self._clock()
            milliseconds = (now - running.began) * 1000
            self._times.record(running.turn.tasks, milliseconds / 1000)
            self._scheduler.advance(running.turn.tasks)
            for run in running.runs:
                run.waiting_since = now
                run.log.step_milliseconds.append(milliseconds)
                run.log.batch_sizes.append(len(running.runs))
            for task, run in self._runs.items():
                run.log.turns_waited += task not in running.turn.tasks
            self._running = None
        return milliseconds

    def fail_turn(self, running: RunningTurn) -> None:
        """Counts no step as done; those who took part take their turns alone from now on."""
        with self._changed:
            for run in running.runs:
                run.waiting_since = self._clock()
                self._scheduler.isolate(run.task)
            self._running = None

    def sweep(self) -> list[tuple[Run, TurboError]]:
        """Takes out who was cancelled or is late, but for those whose step is running; with the reason."""
        with self._changed:
            running = () if self._running is None else self._running.turn.tasks
            now = self._clock()
            reasons = [(run, self._reason_to_end(run, now)) for task, run in self._runs.items() if task not in running]
            ended = [(run, reason) for run, reason in reasons if reason is not None]
            for run, _ in ended:
                self.leave(run)
        return ended

    def _reason_to_end(self, run: Run, now: float) -> TurboError | None:
        if self._cancellations is not None and any(map(self._cancellations.is_requested, run.cancel_keys)):
            return Cancelled(f"the request was cancelled {run.progress}")
        deadline_ms = run.request.scheduling.deadline_ms
        if deadline_ms is not None and (now - run.arrived) * 1000 > deadline_ms:
            return DeadlineExceeded(f"deadline_ms = {deadline_ms}: passed {run.progress}")
        return None

    def _predict(self, run: Run) -> int | None:
        """Milliseconds from now until the run's steps are done, as far as is known; None where nothing is."""
        step = 0 if run.request.reached is None else run.request.reached[0]
        tasks: tuple[Task, ...] = ()
        left = 0.0
        if self._running is not None:
            tasks = self._running.turn.tasks
            left = max(0.0, (self._times.estimate(tasks) or 0.0) - (self._clock() - self._running.began))
        seconds = self._scheduler.predict(run.task, step, tasks, self._times.estimate)
        return None if seconds is None else round((left + seconds) * 1000)
