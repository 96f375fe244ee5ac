"""Which answer to a request is the last one, with and without words that keep it open, and how errors end it."""

from __future__ import annotations

import queue

import pytest

from turbo_backend.cancellation import Cancellations
from turbo_backend.errors import Cancelled, TurboError
from turbo_backend.stages.caller import Caller
from turbo_backend.stages.denoiser_request import DenoisedStep
from turbo_backend.stages.held_open import HeldOpen, LettingGo

MINE = "mine"
STEP = DenoisedStep(step=1, step_count=2, cancel_token=MINE)
LAST = DenoisedStep(step=2, step_count=2, cancel_token=MINE, report={"seed": 1})
ERROR = Cancelled("enough")


class Answers:
    """What a caller was given, in order: (update, whether it was the last), and errors."""

    def __init__(self, held_open: HeldOpen, *, is_job: bool = False) -> None:
        self.sent: queue.SimpleQueue[tuple[DenoisedStep, bool]] = queue.SimpleQueue()
        self.failed: list[TurboError] = []
        self.caller = Caller(
            lambda update, is_last: self.sent.put((update, is_last)),
            self.failed.append,
            held_open=held_open,
            is_job=is_job,
        )

    def take(self) -> tuple[DenoisedStep, bool]:
        return self.sent.get(timeout=60)


def is_word(update: DenoisedStep) -> bool:
    return update.step_count == 0 and update.report is not None and "is_last_word" in update.report


def test_the_report_is_the_last_answer_to_who_is_not_held(held_open: HeldOpen) -> None:
    answers = Answers(held_open)
    answers.caller(STEP)
    answers.caller(LAST)
    answers.caller.hold(MINE)  # too late
    held_open.close()
    assert [answers.take(), answers.take()] == [(STEP, False), (LAST, True)]
    assert answers.sent.empty()


def test_who_is_held_hears_words_until_the_decoder_lets_go(held_open: HeldOpen, marks: Cancellations) -> None:
    answers = Answers(held_open)
    answers.caller.hold(MINE)
    word, is_last = answers.take()
    assert (is_word(word), word.cancel_token, is_last) == (True, MINE, False)
    answers.caller(LAST)
    while (taken := answers.take())[0] is not LAST:
        assert is_word(taken[0])
    assert not taken[1], "the video is still to be made"
    LettingGo(marks).let_go(MINE)
    said = [answers.take()]
    while not said[-1][1]:
        said.append(answers.take())
    assert all(is_word(update) for update, _ in said)
    assert said[-1][0].report == {"is_last_word": True}
    held_open.close()
    assert answers.sent.empty()


def test_an_error_before_the_first_step_is_one(held_open: HeldOpen) -> None:
    answers = Answers(held_open)
    answers.caller(ERROR)
    assert answers.failed == [ERROR]
    assert answers.sent.empty()


@pytest.mark.parametrize("why", ["a step was answered", "it is held", "it is a job"])
def test_later_the_next_model_fails(held_open: HeldOpen, why: str) -> None:
    """The error is a report then, and the last answer: no word comes after it."""
    answers = Answers(held_open, is_job=why == "it is a job")
    if why == "a step was answered":
        answers.caller(STEP)
    if why == "it is held":
        answers.caller.hold(MINE)
    answers.caller(ERROR)
    while not (taken := answers.take())[1]:
        assert taken[0] is STEP or is_word(taken[0])
    assert taken[0].report is not None
    assert taken[0].report["error"] == {"code": ERROR.code, "message": "enough"}
    held_open.close()
    assert answers.sent.empty()
    assert not answers.failed


def test_a_job_is_not_held(held_open: HeldOpen) -> None:
    answers = Answers(held_open, is_job=True)
    answers.caller.hold(MINE)
    answers.caller(LAST)
    held_open.close()
    assert answers.take() == (LAST, True)
    assert answers.sent.empty()
