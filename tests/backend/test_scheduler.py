"""Whose turn it is: urgency, ageing, batches, experts; counted in turns, with neither clock nor tensors."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from turbo_backend.stages.scheduler import StepScheduler, Task, Turn
from turbo_backend.stages.step_times import StepTimes

DRAFT_TOKENS, FINAL_TOKENS = 100, 1000


def make_scheduler(**limits: object) -> StepScheduler:
    return StepScheduler(**{"max_batch_size": 1, "max_batch_tokens": 10_000, "switch_is_free": True, **limits})  # type: ignore[arg-type]


def task(
    num_steps: int = 4, *, num_tokens: int = FINAL_TOKENS, level: int = 5, experts: str = "", group: str = ""
) -> Task:
    return Task(
        group=group or num_tokens,
        num_tokens=num_tokens,
        experts=tuple(map(int, experts)) or (0,) * num_steps,
        priority_level=level,
    )


def add(scheduler: StepScheduler, *tasks: Task) -> None:
    for each in tasks:
        scheduler.add(each, 0)


def take(scheduler: StepScheduler) -> Turn:
    turn = scheduler.next_turn()
    assert turn is not None
    scheduler.advance(turn.tasks)
    return turn


def run_out(scheduler: StepScheduler) -> list[Turn]:
    turns = []
    while len(scheduler):
        turns.append(take(scheduler))
    assert scheduler.next_turn() is None
    return turns


@pytest.mark.parametrize("before", range(9))
@pytest.mark.parametrize("num_steps", [1, 2, 3])
def test_among_any_number_of_finals_a_draft_waits_for_two_of_their_steps(before: int, num_steps: int) -> None:
    """It arrives in the middle of a turn, which is the first that it waits for; finals never cease to come."""
    scheduler = make_scheduler()
    add(scheduler, *(task() for _ in range(5)))
    for _ in range(before):
        take(scheduler)
        add(scheduler, task())
    running = scheduler.next_turn()
    draft = task(num_steps, num_tokens=DRAFT_TOKENS)
    add(scheduler, draft)
    assert running is not None
    scheduler.advance(running.tasks)
    waited, done = 1, 0
    while done < num_steps:
        add(scheduler, task())
        is_draft = take(scheduler).tasks == (draft,)
        done += is_draft
        waited += not is_draft
    assert waited <= 2


@pytest.mark.parametrize("level", [5, 9])
def test_a_final_is_done_however_many_urgent_drafts_come(level: int) -> None:
    scheduler = make_scheduler()
    final = task(level=level)
    add(scheduler, final)
    turns = steps = 0
    while steps < 4:
        add(scheduler, *(task(2, num_tokens=DRAFT_TOKENS, level=0) for _ in range(3)))
        steps += final in take(scheduler).tasks
        turns += 1
    assert turns <= 4 * 4, "every fourth turn is that of the oldest"


def test_urgent_then_short_then_first() -> None:
    scheduler = make_scheduler()
    first, second = task(1), task(1)
    urgent, short = task(1, level=4), task(1, num_tokens=DRAFT_TOKENS)
    nearly_done = task(4)
    add(scheduler, first, second, urgent, short)
    scheduler.add(nearly_done, 3)
    order = [turn.tasks[0] for turn in run_out(scheduler)]
    # The fourth turn would be the oldest's anyway.
    assert order == [urgent, short, first, second, nearly_done]


def test_requests_share_a_turn_wherever_they_are() -> None:
    scheduler = make_scheduler(max_batch_size=8)
    late, alone = task(4), task(4, group="another")
    add(scheduler, late, alone, task(1), task(3))
    scheduler.add(task(4), 3)
    sizes = [len(turn.tasks) for turn in run_out(scheduler)]
    assert sum(sizes) == 4 + 4 + 1 + 3 + 1
    assert sizes[0] == 4
    assert max(sizes) == 4


@pytest.mark.parametrize(
    ("limits", "sizes"),
    [
        ({"max_batch_size": 2}, [2, 2, 1]),
        ({"max_batch_size": 8, "max_batch_tokens": 3 * FINAL_TOKENS}, [3, 2]),
        ({"max_batch_size": 8, "max_batch_tokens": FINAL_TOKENS - 1}, [1] * 5),
        ({"max_batch_size": 8}, [5]),
    ],
)
def test_turns_stay_within_their_limits(limits: dict[str, int], sizes: list[int]) -> None:
    scheduler = make_scheduler(**limits)
    add(scheduler, *(task(1) for _ in range(5)))
    assert [len(turn.tasks) for turn in run_out(scheduler)] == sizes


def test_the_less_urgent_do_not_slow_the_urgent_down() -> None:
    scheduler = make_scheduler(max_batch_size=8)
    urgent, patient = task(1, level=1), task(1, level=8)
    add(scheduler, patient, urgent)
    assert [turn.tasks for turn in run_out(scheduler)] == [(urgent,), (patient,)]


def test_who_was_isolated_runs_alone() -> None:
    scheduler = make_scheduler(max_batch_size=8)
    tasks = [task(2) for _ in range(3)]
    add(scheduler, *tasks)
    assert len(take(scheduler).tasks) == 3
    scheduler.isolate(tasks[0])
    assert sorted(len(turn.tasks) for turn in run_out(scheduler)) == [1, 2]


def test_who_has_left_takes_no_turns() -> None:
    scheduler = make_scheduler()
    gone, other = task(4), task(4)
    add(scheduler, gone, other)
    take(scheduler)
    running = scheduler.next_turn()
    assert running is not None
    scheduler.remove(gone)
    scheduler.remove(gone)
    scheduler.advance(running.tasks)
    assert {turn.tasks for turn in run_out(scheduler)} == {(other,)}


class TestExperts:
    """Where going from one expert to another costs something."""

    def test_a_crowd_changes_them_once_each_way(self) -> None:
        scheduler = make_scheduler(switch_is_free=False)
        add(scheduler, *(task(experts="01") for _ in range(6)))
        turns = run_out(scheduler)
        assert [turn.expert for turn in turns] == [0] * 6 + [1] * 6
        assert [turn.next_expert for turn in turns] == [0] * 5 + [1] * 6 + [0], "and ready for who comes next"

    @pytest.mark.parametrize("switch_is_free", [True, False])
    def test_each_turn_knows_the_expert_of_the_next(self, switch_is_free: bool) -> None:
        scheduler = make_scheduler(switch_is_free=switch_is_free, max_batch_size=2)
        add(scheduler, *(task(experts=experts) for experts in ("0011", "0", "01", "11", "0001")))
        turns = run_out(scheduler)
        for turn, after in itertools.pairwise(turns):
            assert turn.next_expert == after.expert
            assert turn.upcoming == after.tasks

    def test_neither_waits_for_more_than_eight_turns(self) -> None:
        scheduler = make_scheduler(switch_is_free=False)
        add(scheduler, *(task(experts="0000") for _ in range(9)), *(task(experts="1111") for _ in range(9)))
        runs = [len(list(turns)) for _, turns in itertools.groupby(turn.expert for turn in run_out(scheduler))]
        assert runs == [8] * 8 + [4, 4]

    @pytest.mark.parametrize("level", [0, 5, 9])
    def test_nobody_waits_for_ever_for_the_other(self, level: int) -> None:
        scheduler = make_scheduler(switch_is_free=False)
        add(scheduler, task(experts="0000", level=0))
        take(scheduler)
        waiting = task(experts="1", level=level)
        add(scheduler, waiting)
        for _ in range(9):
            if waiting in take(scheduler).tasks:
                return
            add(scheduler, task(experts="0000", level=0))
        pytest.fail("more than eight turns of the other expert")

    def test_the_urgent_wait_for_no_expert(self) -> None:
        scheduler = make_scheduler(switch_is_free=False)
        add(scheduler, *(task(experts="0000") for _ in range(3)))
        take(scheduler)
        urgent = task(experts="11", level=0)
        add(scheduler, urgent)
        assert [take(scheduler).tasks for _ in range(2)] == [(urgent,), (urgent,)]


crowds = st.lists(
    st.builds(
        lambda num_steps, short, level, expert: task(
            num_tokens=DRAFT_TOKENS if short else FINAL_TOKENS,
            level=level,
            experts="".join(str(int(step >= expert)) for step in range(num_steps)),
        ),
        st.integers(1, 4),
        st.booleans(),
        st.integers(3, 6),
        st.integers(0, 4),
    ),
    min_size=1,
    max_size=12,
)
limits = st.fixed_dictionaries(
    {"max_batch_size": st.integers(1, 4), "max_batch_tokens": st.just(2500), "switch_is_free": st.booleans()}
)


@given(crowds, limits, st.randoms(use_true_random=False))
def test_whoever_comes_whenever_each_step_is_taken_once_and_in_order(crowd, limits, random) -> None:
    scheduler = make_scheduler(**limits)
    outside, steps = list(crowd), dict.fromkeys(crowd, 0)
    while outside or len(scheduler):
        while outside and (not len(scheduler) or random.random() < 0.4):
            add(scheduler, outside.pop())
        turn = take(scheduler)
        assert len(set(turn.tasks)) == len(turn.tasks) <= limits["max_batch_size"]
        assert len(turn.tasks) == 1 or sum(each.num_tokens for each in turn.tasks) <= limits["max_batch_tokens"]
        assert len({each.group for each in turn.tasks}) == 1
        for each in turn.tasks:
            assert each.experts[steps[each]] == turn.expert
            steps[each] += 1
    assert all(steps[each] == len(each.experts) for each in crowd)


@given(crowds, crowds, limits, st.integers(0, 6))
def test_the_prediction_is_what_happens_if_nobody_else_comes(crowd, later, limits, num_turns) -> None:
    """A turn costs as many seconds as it has tokens; the last task arrives while one is running."""
    scheduler = make_scheduler(**limits)

    def seconds(tasks) -> float:
        return float(sum(each.num_tokens for each in tasks))

    add(scheduler, *crowd)
    for _ in range(num_turns):
        if len(scheduler):
            take(scheduler)
    running = scheduler.next_turn()
    last = later[0]
    tasks = () if running is None else running.tasks
    predicted = scheduler.predict(last, 0, tasks, seconds)
    add(scheduler, last)
    scheduler.advance(tasks)
    elapsed, left = 0.0, len(last.experts)
    while left:
        turn = take(scheduler)
        elapsed += seconds(turn.tasks)
        left -= last in turn.tasks
    assert predicted == elapsed
    assert scheduler.predict(task(), 0, (), lambda tasks: None) is None


class TestStepTimes:
    def test_nothing_is_known_before_a_kind_ran_twice(self) -> None:
        times = StepTimes()
        assert times.estimate([task()]) is None
        times.record([task()], 60.0)  # compiles
        assert times.estimate([task()]) is None
        for seconds in (3.0, 1.0, 2.0):
            times.record([task()], seconds)
        assert times.estimate([task()]) == 2.0

    def test_what_never_ran_is_scaled_from_the_nearest(self) -> None:
        times = StepTimes()
        for num_tokens, seconds in ((100, 1.0), (1000, 20.0)):
            for _ in range(2):
                times.record([task(num_tokens=num_tokens)], seconds)
        assert times.estimate([task(num_tokens=50)]) == 0.5
        assert times.estimate([task(num_tokens=2000)]) == 40.0
        assert times.estimate([task(num_tokens=100)] * 9) == 9.0, "of the same shape, though another has more its size"

    def test_old_times_and_kinds_are_forgotten(self) -> None:
        times = StepTimes()
        for seconds in (1000.0, *[5.0] * 5, *[1.0] * 9):
            times.record([task()], seconds)
        assert times.estimate([task()]) == 1.0
        for number in range(300):
            times.record([task(group=f"{number}")], 1.0)
        assert times.estimate([task()]) is None
