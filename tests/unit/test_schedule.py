"""Length of a run and its learning rate, against the formulas."""

from __future__ import annotations

import math
from fractions import Fraction

from hypothesis import given
from hypothesis import strategies as st

from dctc.engine.schedule import Schedule, rounds_per_epoch


def factors(schedule: Schedule) -> list[float]:
    return [schedule.factor(step) for step in range(schedule.rounds)]


@given(tiles=st.integers(1, 10**6), batch=st.integers(1, 512))
def test_an_epoch_is_all_training_tiles_over_the_batch_rounded_up(tiles: int, batch: int) -> None:
    rounds = rounds_per_epoch(tiles, batch)
    assert (rounds - 1) * batch < tiles <= rounds * batch


def test_the_paper_preset() -> None:
    schedule = Schedule.plan(training_tiles=4001, batch=4, epochs=100, warmup_epochs=5, rounds=None)
    assert schedule == Schedule(rounds=100_100, warmup=5_005, epoch=1_001)


def test_rounds_win_over_epochs_and_the_warm_up_keeps_its_share() -> None:
    schedule = Schedule.plan(training_tiles=4000, batch=4, epochs=100, warmup_epochs=5, rounds=600)
    assert schedule == Schedule(rounds=600, warmup=30, epoch=1000)
    assert Schedule.plan(4000, 4, 100, 5, 6).warmup == 0
    assert Schedule.plan(4000, 4, 100, 0, None) == Schedule(rounds=100_000, warmup=0, epoch=1000)


@given(rounds=st.integers(1, 400), epochs=st.integers(2, 50), data=st.data())
def test_warm_up_then_half_a_cosine(rounds: int, epochs: int, data: st.DataObject) -> None:
    warmup_epochs = data.draw(st.integers(0, epochs - 1))
    schedule = Schedule.plan(64, 4, epochs, warmup_epochs, rounds)
    warmup = schedule.warmup
    assert abs(warmup - Fraction(rounds * warmup_epochs, epochs)) <= Fraction(1, 2)
    for step, factor in enumerate(factors(schedule)):
        if step < warmup:
            expected = (step + 1) / warmup
        else:
            expected = (1 + math.cos(math.pi * (step - warmup) / (rounds - warmup))) / 2
        assert math.isclose(factor, expected, rel_tol=1e-12, abs_tol=1e-12)


@given(rounds=st.integers(1, 400), epochs=st.integers(2, 50), data=st.data())
def test_it_rises_then_falls_and_never_leaves_its_bounds(rounds: int, epochs: int, data: st.DataObject) -> None:
    schedule = Schedule.plan(64, 4, epochs, data.draw(st.integers(0, epochs - 1)), rounds)
    rates = factors(schedule)
    assert all(0 < rate <= 1 for rate in rates)
    assert max(rates) == 1
    up, down = rates[: schedule.warmup], rates[schedule.warmup :]
    assert up == sorted(up)
    assert down == sorted(down, reverse=True)
    assert not up or math.isclose(up[0], 1 / len(up))  # the first round learns, too


def test_the_whole_cosine_is_used() -> None:
    schedule = Schedule.plan(400, 4, 100, 5, None)
    rates = factors(schedule)
    assert rates[499] == rates[500] == 1
    assert math.isclose(schedule.factor(500 + 9500 // 2), 0.5)
    assert rates[-1] < 1e-6


def test_poly_is_a_power_of_what_is_left() -> None:
    schedule = Schedule.plan(400, 4, 100, 5, None, "poly")
    assert (schedule.rounds, schedule.warmup) == (10_000, 500)
    assert schedule.factor(499) == 1.0
    for step in (500, 3000, 9999):
        left = (10_000 - step) / 9_500
        assert math.isclose(schedule.factor(step), left**0.9)
