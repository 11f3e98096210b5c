"""Signals as one KeyboardInterrupt."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

import pytest

from shards.errors import InputError
from shards.stopping import KINDS, stoppable


def tell(*numbers: int) -> None:
    """Send this process signals, and give Python a moment to call their handlers."""
    for number in numbers:
        os.kill(os.getpid(), number)
    time.sleep(0.01)


def within(work: Callable[[], None]) -> None:
    """Do work that can be stopped."""
    with stoppable():
        work()


@pytest.mark.parametrize("number", KINDS)
def test_a_signal_ends_the_block(number: signal.Signals) -> None:
    before = [signal.getsignal(kind) for kind in KINDS]
    with pytest.raises(KeyboardInterrupt):
        within(lambda: tell(number))
    assert [signal.getsignal(kind) for kind in KINDS] == before


@pytest.mark.parametrize("number", KINDS)
def test_a_library_that_fails_for_the_interrupt(number: signal.Signals) -> None:
    """As rasterio.Env does when it strikes while an environment is left: a stop became a traceback."""

    def work() -> None:
        try:
            tell(number)
        except KeyboardInterrupt:
            raise RuntimeError("No GDAL environment exists") from None

    with pytest.raises(KeyboardInterrupt):
        within(work)


def test_errors_without_a_signal_stay_themselves() -> None:
    def work() -> None:
        raise InputError("key: wrong")

    with pytest.raises(InputError, match="key: wrong"):
        within(work)


def test_an_echo_does_not_disturb_what_is_tidied_up() -> None:
    tidied = []

    def work() -> None:
        try:
            tell(signal.SIGINT)
        finally:
            tell(signal.SIGINT, signal.SIGTERM)
            tidied.append(True)

    with pytest.raises(KeyboardInterrupt):
        within(work)
    assert tidied


def test_a_signal_that_a_library_lost_can_be_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shards.stopping.ECHO_S", 0.05)
    lost = []

    def work() -> None:
        try:
            tell(signal.SIGTERM)
        except KeyboardInterrupt:
            lost.append(True)
        time.sleep(0.06)
        tell(signal.SIGTERM)
        lost.append(False)

    with pytest.raises(KeyboardInterrupt):
        within(work)
    assert lost == [True]


def test_an_ignored_interrupt_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        within(lambda: tell(signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            within(lambda: tell(signal.SIGTERM))
    finally:
        signal.signal(signal.SIGINT, before)
