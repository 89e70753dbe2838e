"""What goes on beside the device: order, waiting, and what a failure ends."""

from __future__ import annotations

import threading
from contextlib import suppress

import pytest

from dualdiff_engine.pipeline.beside import Beside


def test_calls_are_made_in_order_and_all_before_leaving() -> None:
    made: list[int] = []
    with Beside(2) as beside:
        for number in range(20):
            beside.submit(made.append, number)
    assert made == list(range(20))


def test_no_more_wait_than_there_is_room() -> None:
    go, waiting = threading.Event(), threading.Event()
    with Beside(2) as beside:
        beside.submit(go.wait)
        beside.submit(lambda: None)

        def third() -> None:
            beside.submit(lambda: None)
            waiting.set()

        thread = threading.Thread(target=third)
        thread.start()
        assert not waiting.wait(0.05)
        go.set()
        assert waiting.wait(10)
        thread.join()


def test_a_failure_ends_it_and_is_raised_once() -> None:
    made: list[str] = []
    failed = threading.Event()

    def fail() -> None:
        raise OSError("disk full")

    with suppress(OSError), Beside(4, failed.set) as beside:
        beside.submit(fail)
        assert failed.wait(10)
        with pytest.raises(OSError, match="disk full"):
            beside.submit(made.append, "later")
    assert not made


def test_leaving_raises_the_failure_of_the_last_call() -> None:
    def fail() -> None:
        raise ValueError("bad pair")

    with pytest.raises(ValueError, match="bad pair"), Beside(1) as beside:
        beside.submit(fail)


def test_an_interruption_waits_for_the_call_that_is_made_alone() -> None:
    begun, go, made = threading.Event(), threading.Event(), []

    def interrupted() -> None:
        with Beside(4) as beside:
            beside.submit(lambda: (begun.set(), go.wait(10), made.append("first")))
            beside.submit(made.append, "second")
            assert begun.wait(10)
            threading.Timer(0.05, go.set).start()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert made == ["first"]
