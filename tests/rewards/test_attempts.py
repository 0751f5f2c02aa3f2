import pytest

from prl_lightning.rewards.attempts import Attempts, Patience
from prl_lightning.rewards.tasks import DIED, Failure, Reply, Task

GOOD = Reply([1.0])
LATE = Reply(failure=Failure("time", "late"))
DEAD = Reply(failure=DIED)
TASK = Task(0, "__call__", {}, 5.0)


def test_patience_is_measured_by_calls_of_the_same_function_that_came_to_an_end() -> None:
    patience = Patience()
    assert patience.with_call(TASK) == float("inf")
    patience.note(Task(1, "__call__", {}, 5.0), 1.0)
    patience.note(Task(0, "answers", {}, 5.0), 1.0)
    assert patience.with_call(TASK) == float("inf")
    patience.note(TASK, 0.001)
    assert patience.with_call(TASK) == 0.05
    patience.note(TASK, 0.4)
    assert patience.with_call(TASK) == pytest.approx(0.6)
    for _ in range(1024):  # what was long ago does not count
        patience.note(TASK, 0.001)
    assert patience.with_call(TASK) == 0.05


def test_what_had_to_let_others_go_first_is_tried_again_after_them() -> None:
    attempts = Attempts(3, workers=2)
    assert [attempts.next(), attempts.next()] == [0, 1]
    assert not attempts.is_over(0, LATE, starved=True)
    assert attempts.is_over(1, LATE, starved=False)
    assert [attempts.next(), attempts.next(), attempts.next()] == [2, 0, None]
    assert attempts.is_over(0, LATE, starved=True)
    assert attempts.given_up() == {}


def test_second_attempts_end_after_some_in_vain_in_a_row() -> None:
    attempts = Attempts(8, workers=1)
    for index in range(8):
        assert attempts.next() == index
        assert not attempts.is_over(index, LATE, starved=True)
    assert attempts.next() == 0
    assert attempts.is_over(0, LATE, starved=False)
    assert attempts.next() == 1
    assert attempts.is_over(1, GOOD, starved=False)  # so the others may have had much to do too
    for index in (2, 3):
        assert attempts.next() == index
        assert attempts.is_over(index, LATE, starved=False)
    assert attempts.next() is None
    assert attempts.given_up() == dict.fromkeys([4, 5, 6, 7], LATE)


def test_what_has_died_is_given_to_a_new_process_once() -> None:
    attempts = Attempts(1, workers=2)
    assert attempts.next() == 0
    assert not attempts.wants_new(0)
    assert not attempts.is_over(0, DEAD, starved=False)
    assert attempts.next() == 0
    assert attempts.wants_new(0)
    assert attempts.is_over(0, DEAD, starved=False)
