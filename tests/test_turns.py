"""Turns: in the order of asking, and no more who wait than there are places."""

import threading
import time

import pytest

from errors import DeadlineExceededError, OverloadedError
from services.turns import Places, Turns


def wait_in_line(turns: Turns, came: list[int], count: int) -> list[threading.Thread]:
    """Threads that ask one after the other."""

    def ask(number: int) -> None:
        with turns.of("name", 20):
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
    with turns.of("name", 0):
        threads = wait_in_line(turns, came, 20)
        assert came == []
    for thread in threads:
        thread.join()
    assert came == list(range(20))
    assert turns.lines == {}


def test_who_gives_up_holds_up_nobody() -> None:
    turns, came = Turns(), list[int]()
    with turns.of("name", 0):
        with pytest.raises(DeadlineExceededError), turns.of("name", 0.01):
            raise AssertionError("it was not its turn")
        threads = wait_in_line(turns, came, 1)
    threads[0].join()
    assert came == [0]
    assert turns.lines == {}


def test_only_who_waits_takes_a_place_and_keeps_it() -> None:
    places = Places(1)
    with places.one(), places.one() as take:
        take()
        take()
        with places.one() as refused, pytest.raises(OverloadedError):
            refused()
    with places.one() as take:
        take()
