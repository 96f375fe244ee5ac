"""Which requests take the next denoising step. Knows counts and sizes alone: no tensor, no thread, no clock.

A turn is one forward of one expert for a few requests. Between turns requests join and leave, so nobody waits for
another's last step. In a turn goes first

1. the request of the most urgent priority level;
2. among equals, that with the least left to do (steps left x tokens), so that a short draft passes a long final;
3. among equals, that which arrived first;

but every fourth turn belongs to the request that arrived first of all, whatever its level, so that each one advances
however many more urgent ones keep coming. Among finals, a draft of two or three steps thus waits for at most two of
their steps: the one that runs when it arrives, and one fourth turn.

Beside the first, a turn takes those that can share its forward: the same shape, attention and expert, and a level no
less urgent; at which of their steps they are does not matter.

Where changing experts costs something, requests of one level stay with the expert that is loaded while it has work,
for at most eight turns while another waits; a more urgent level changes it at once, but for a change that is under way.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

#: Of so many turns, one belongs to whoever arrived first.
_OLDEST_EVERY = 4
#: So many turns may one expert take while another is waited for.
_MAX_TURNS_HELD = 8


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Task:
    """What must be known of a request to give it turns; equal to itself alone.

    Attributes:
        group: what must match, beside the expert, for two requests to share a forward.
        num_tokens: length of its sequence.
        experts: which one each of its steps takes.
        priority_level: 0, the most urgent, to 9.
    """

    group: Hashable
    num_tokens: int
    experts: tuple[int, ...]
    priority_level: int


@dataclass(frozen=True, slots=True)
class Turn:
    """One forward.

    Attributes:
        tasks: who takes part, at least one.
        expert: which all of them need.
        upcoming: who takes the turn after this one, unless something more urgent arrives.
        next_expert: which that turn needs; the first one where nobody is left, because a new request begins with it.
    """

    tasks: tuple[Task, ...]
    expert: int
    upcoming: tuple[Task, ...]
    next_expert: int


#: Next step of each task, in the order of arrival.
_Steps: TypeAlias = "Mapping[Task, int]"


@dataclass(frozen=True, slots=True)
class _History:
    """What a choice needs to know of the turns before it.

    Attributes:
        num_turns: turns taken so far.
        expert: the one that is loaded.
        held: turns it has taken on end while another was waited for.
        promised: the one that is brought in behind the last turn, if that is another; it takes the next turn.
    """

    num_turns: int = 0
    expert: int = 0
    held: int = 0
    promised: int | None = None


class StepScheduler:
    """Gives turns to tasks; see the module for the order.

    Args:
        max_batch_size: most tasks of one turn.
        max_batch_tokens: most tokens of one turn together; a longer task takes a turn alone.
        switch_is_free: whether going from one expert to another costs nothing.
    """

    def __init__(self, *, max_batch_size: int, max_batch_tokens: int, switch_is_free: bool) -> None:
        self._max_batch_size = max_batch_size
        self._max_batch_tokens = max_batch_tokens
        self._switch_is_free = switch_is_free
        self._steps: dict[Task, int] = {}
        self._isolated: set[Task] = set()
        self._history = _History()

    def __len__(self) -> int:
        """How many tasks take turns."""
        return len(self._steps)

    def add(self, task: Task, step: int) -> None:
        """Lets `task` take turns from `step` on, which must be one of its steps."""
        self._steps[task] = step

    def remove(self, task: Task) -> None:
        """Lets it take no more turns; nothing happens if it takes none."""
        self._steps.pop(task, None)
        self._isolated.discard(task)

    def isolate(self, task: Task) -> None:
        """Lets it take its turns alone from now on: what fails together may do alone."""
        self._isolated.add(task)

    def next_turn(self) -> Turn | None:
        """Who takes the next turn, or None where nobody waits. Their steps count as done by `advance`."""
        if not self._steps:
            return None
        tasks, self._history = self._choose(self._steps, self._history)
        after = _advanced(self._steps, tasks)
        upcoming = self._choose(after, self._history)[0] if after else []
        next_expert = self._expert(upcoming[0], after) if upcoming else 0
        if next_expert != self._history.expert:
            self._history = replace(self._history, promised=next_expert)
        return Turn(
            tasks=tuple(tasks),
            expert=self._expert(tasks[0], self._steps),
            upcoming=tuple(upcoming),
            next_expert=next_expert,
        )

    def advance(self, tasks: Sequence[Task]) -> None:
        """Counts a step of each as done; one that had its last takes no more turns. Those removed are passed over."""
        self._steps = _advanced(self._steps, [task for task in tasks if task in self._steps])
        self._isolated &= self._steps.keys()

    def predict(
        self, task: Task, step: int, running: Sequence[Task], seconds: Callable[[Sequence[Task]], float | None]
    ) -> float | None:
        """How long it would take from the end of the running turn until `task` is done, if nothing else arrives.

        Args:
            task: a task that takes no turns yet, at `step`.
            running: who takes part in a turn that `next_turn` gave and that is not counted yet.
            seconds: how long a turn of these tasks takes; None where it is not known.

        Returns:
            Seconds, or None where those of a turn before its end are not known.
        """
        steps: _Steps = _advanced(self._steps, [other for other in running if other in self._steps]) | {task: step}
        history, total = self._history, 0.0
        while task in steps:
            tasks, history = self._choose(steps, history)
            taken = seconds(tasks)
            if taken is None:
                return None
            total += taken
            steps = _advanced(steps, tasks)
        return total

    def _choose(self, steps: _Steps, history: _History) -> tuple[list[Task], _History]:
        arrival = {task: number for number, task in enumerate(steps)}

        def rank(task: Task) -> tuple[int, int, int]:
            work_left = (len(task.experts) - steps[task]) * task.num_tokens
            return task.priority_level, work_left, arrival[task]

        candidates, held = self._choose_expert(steps, history)
        num_turns = history.num_turns + 1
        first = candidates[0] if num_turns % _OLDEST_EVERY == 0 else min(candidates, key=rank)
        expert = self._expert(first, steps)
        together = [first]
        if first not in self._isolated:
            at_once = min(self._max_batch_size, self._max_batch_tokens // first.num_tokens)
            beside = [
                task
                for task in candidates
                if task is not first
                and task not in self._isolated
                and task.group == first.group
                and self._expert(task, steps) == expert
                and task.priority_level <= first.priority_level
            ]
            together += sorted(beside, key=rank)[: max(0, at_once - 1)]
        return together, _History(num_turns=num_turns, expert=expert, held=held)

    def _choose_expert(self, steps: _Steps, history: _History) -> tuple[list[Task], int]:
        """Who may take the turn, in the order of arrival, and how often the loaded expert will then have been held."""
        tasks = list(steps)
        if self._switch_is_free:
            return tasks, 0
        current = history.expert
        if any(self._expert(task, steps) == history.promised for task in tasks):
            assert history.promised is not None
            current = history.promised
        here = [task for task in tasks if self._expert(task, steps) == current]
        elsewhere = [task for task in tasks if self._expert(task, steps) != current]
        if not here or not elsewhere:
            return tasks, 0
        if current == history.promised:
            return here, 1
        most_urgent = min(task.priority_level for task in tasks)
        if all(task.priority_level > most_urgent for task in here) or history.held == _MAX_TURNS_HELD:
            return elsewhere, 1
        return here, history.held + 1

    def _expert(self, task: Task, steps: _Steps) -> int:
        return task.experts[steps[task]]


def _advanced(steps: _Steps, tasks: Sequence[Task]) -> dict[Task, int]:
    """`steps` after one more of each of `tasks`, without those that are done."""
    after = dict(steps)
    for task in tasks:
        after[task] += 1
        if after[task] == len(task.experts):
            del after[task]
    return after
