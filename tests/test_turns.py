"""Turns: in the order of asking, and no longer than a request's patience."""

import threading
import time

import pytest

from errors import DeadlineExceededError
from services.patience import Patience
from services.turns import Turns

PLACES = threading.Semaphore(100)


def patience(seconds: float = 20) -> Patience:
    return Patience(seconds, PLACES)


def wait_in_line(turns: Turns, came: list[int], count: int) -> list[threading.Thread]:
    """Threads that ask one after the other."""

    def ask(number: int) -> None:
        with patience() as mine, turns.of("name", mine):
            came.append(number)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(count)]
    for thread in threads:
        standing = len(turns.lines["name"])
        thread.start()
        while len(turns.lines["name"]) == standing:
            time.sleep(0.001)
    return threads


def test_turns_come_in_the_order_of_asking() -> None:
    turns, came = Turns(), list[int]()
    with turns.of("name", patience()):
        threads = wait_in_line(turns, came, 20)
        assert came == []
    for thread in threads:
        thread.join()
    assert came == list(range(20))
    assert turns.lines == {}


def test_who_gives_up_holds_up_nobody() -> None:
    turns, came = Turns(), list[int]()
    with turns.of("name", patience()):
        short = patience(0.01)
        with pytest.raises(DeadlineExceededError), short, turns.of("name", short):
            raise AssertionError("it was not its turn")
        threads = wait_in_line(turns, came, 1)
    threads[0].join()
    assert came == [0]
    assert turns.lines == {}
