"""Signals as one KeyboardInterrupt."""

from __future__ import annotations

import os
import signal
import time

import pytest

from shards.errors import InputError
from shards.stopping import KINDS, stoppable


@pytest.fixture
def pause(monkeypatch: pytest.MonkeyPatch) -> float:
    monkeypatch.setattr("shards.stopping.ECHO_S", 0.05)
    return 0.06


def tell(number: int) -> None:
    os.kill(os.getpid(), number)
    time.sleep(0)  # Python calls the handler between two steps of its own


@pytest.mark.parametrize("number", KINDS)
def test_a_signal_ends_the_block(number: signal.Signals) -> None:
    before = [signal.getsignal(kind) for kind in KINDS]
    with pytest.raises(KeyboardInterrupt), stoppable():
        tell(number)
        time.sleep(5)
    assert [signal.getsignal(kind) for kind in KINDS] == before


@pytest.mark.parametrize("number", KINDS)
def test_a_library_that_fails_for_the_interrupt(number: signal.Signals) -> None:
    """As rasterio.Env does, when it strikes while an environment is left: CI saw a traceback for a stop."""
    with pytest.raises(KeyboardInterrupt), stoppable():
        try:
            tell(number)
            time.sleep(5)
        finally:
            raise RuntimeError("No GDAL environment exists")


def test_errors_without_a_signal_stay_themselves() -> None:
    with pytest.raises(InputError, match="key: wrong"), stoppable():
        raise InputError("key: wrong")


def test_an_echo_does_not_disturb_what_is_tidied_up() -> None:
    tidied = False
    with pytest.raises(KeyboardInterrupt), stoppable():
        try:
            tell(signal.SIGINT)
            time.sleep(5)
        finally:
            tell(signal.SIGINT)
            tell(signal.SIGTERM)
            tidied = True
    assert tidied


def test_a_signal_that_a_library_lost_can_be_repeated(pause: float) -> None:
    lost = 0
    with pytest.raises(KeyboardInterrupt), stoppable():
        for _ in range(2):
            try:
                tell(signal.SIGTERM)
                time.sleep(5)
            except KeyboardInterrupt:
                lost += 1
                if lost == 2:
                    raise
            time.sleep(pause)
    assert lost == 2


def test_an_ignored_interrupt_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with stoppable():
            tell(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt), stoppable():
            tell(signal.SIGTERM)
            time.sleep(5)
    finally:
        signal.signal(signal.SIGINT, before)
