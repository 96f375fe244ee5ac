"""Requests that stay open while their videos are decoded: words, last words, and what fails after them."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from turbo_backend.cancellation import Cancellations
from turbo_backend.stages.held_open import HeldOpen, LettingGo


def put_into(words: queue.SimpleQueue[bool]) -> Callable[[bool], bool]:
    def say(is_last: bool) -> bool:
        words.put(is_last)
        return not is_last

    return say


def when_last(event: threading.Event) -> Callable[[bool], bool]:
    def say(is_last: bool) -> bool:
        if is_last:
            event.set()
        return not is_last

    return say


def test_words_are_said_until_the_decoder_lets_go(held_open: HeldOpen, marks: Cancellations) -> None:
    words: queue.SimpleQueue[bool] = queue.SimpleQueue()
    letting_go = LettingGo(marks)
    assert held_open.hold("mine", put_into(words))
    letting_go.begin("mine")
    assert [words.get(timeout=60) for _ in range(3)] == [False] * 3
    letting_go.let_go("mine")
    said = []
    while not said or not said[-1]:
        said.append(words.get(timeout=60))
    held_open.close()
    assert words.empty(), "nothing comes after the last word"


def test_each_request_is_let_go_of_by_itself(held_open: HeldOpen, marks: Cancellations) -> None:
    one, other = threading.Event(), threading.Event()
    held_open.hold("one", when_last(one))
    held_open.hold("other", when_last(other))
    LettingGo(marks).let_go("one")
    assert one.wait(60)
    assert not other.is_set()


def test_what_fails_waits_for_the_last_word(held_open: HeldOpen, marks: Cancellations) -> None:
    letting_go = LettingGo(marks)
    happened: queue.SimpleQueue[str] = queue.SimpleQueue()

    def say(is_last: bool) -> bool:
        if is_last:
            happened.put("last word")
            letting_go.end("mine")
        return not is_last

    assert held_open.hold("mine", say)
    letting_go.begin("mine")
    letting_go.after("mine", lambda: happened.put("failed"))
    assert [happened.get(timeout=60), happened.get(timeout=60)] == ["last word", "failed"]


def test_what_was_let_go_of_or_never_held_fails_at_once(held_open: HeldOpen, marks: Cancellations) -> None:
    letting_go, failed = LettingGo(marks), []
    letting_go.begin("never held")
    letting_go.after("never held", lambda: failed.append("never held"))
    over = threading.Event()
    held_open.hold("mine", when_last(over))
    letting_go.begin("mine")
    letting_go.let_go("mine")
    assert over.wait(60)
    letting_go.end("mine")
    letting_go.after("mine", lambda: failed.append("mine"))
    assert failed == ["never held", "mine"]


def hold_beside_another(held_open: HeldOpen, say: Callable[[bool], bool]) -> None:
    """Returns when three words were said to the other."""
    words: queue.SimpleQueue[bool] = queue.SimpleQueue()
    held_open.hold("mine", say)
    held_open.hold("another's", put_into(words))
    for _ in range(3):
        words.get(timeout=60)


def test_a_request_to_which_nothing_can_be_said_is_given_up(
    held_open: HeldOpen, caplog: pytest.LogCaptureFixture
) -> None:
    def say(is_last: bool) -> bool:
        tries.append(is_last)
        raise RuntimeError("the caller's stream is gone")

    tries: list[bool] = []
    hold_beside_another(held_open, say)
    assert len(tries) == 1
    assert "the caller's stream is gone" in caplog.text


def test_one_that_has_ended_is_held_no_longer_and_leaves_no_mark(held_open: HeldOpen, tmp_path: Path) -> None:
    def say(is_last: bool) -> bool:
        tries.append(is_last)
        return False

    tries: list[bool] = []
    hold_beside_another(held_open, say)
    assert len(tries) == 1
    assert len(list((tmp_path / "marks").iterdir())) == 1, "that of the other"


def test_a_request_may_wait_longer_than_marks_are_kept(
    held_open: HeldOpen, marks: Cancellations, tmp_path: Path
) -> None:
    words: queue.SimpleQueue[bool] = queue.SimpleQueue()
    held_open.hold("mine", put_into(words))
    (mark,) = (tmp_path / "marks").iterdir()
    words.get(timeout=60)
    os.utime(mark, (0, 0))
    for _ in range(2):
        words.get(timeout=60)
    marks.request("another's")
    assert mark.exists()
    assert [words.get(timeout=60) for _ in range(3)] == [False] * 3


def test_what_cannot_be_marked_is_not_held(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    marks = Cancellations(tmp_path / "marks")
    (tmp_path / "marks").rmdir()
    (tmp_path / "marks").touch()
    held_open = HeldOpen(marks)
    words: queue.SimpleQueue[bool] = queue.SimpleQueue()
    assert not held_open.hold("mine", put_into(words))
    held_open.close()
    assert words.empty()
    assert "will not be noticed" in caplog.text


def test_no_mark_is_left_by_what_is_still_held_at_the_end(marks: Cancellations, tmp_path: Path) -> None:
    held_open = HeldOpen(marks)
    assert held_open.hold("mine", lambda is_last: True)
    held_open.close()
    assert list((tmp_path / "marks").iterdir()) == []
