"""The collapse alarm by hand, and over runs that take a step again."""

import pytest

from aster.algo.alarm import AlarmWatch, CollapseAlarm


def observe(alarm: CollapseAlarm, calls: float, ratio: float = 0.0) -> tuple[CollapseAlarm, dict[str, str]]:
    return alarm.observe({"collapse/calls_mean": calls, "collapse/ratio": ratio})


def test_the_alarm_follows_the_moving_average_not_one_bad_step() -> None:
    alarm, reasons = observe(CollapseAlarm(), 4.0)
    assert reasons == {}
    alarm, reasons = observe(alarm, 0.0)
    assert alarm.ema_calls == pytest.approx(3.6)
    assert reasons == {}
    for _ in range(5):  # 3.6 * 0.9^5 = 2.126
        alarm, reasons = observe(alarm, 0.0)
        assert reasons == {}
    alarm, reasons = observe(alarm, 0.0)  # 1.913 < 2
    assert list(reasons) == ["calls_dropped"]
    assert "1.91" in reasons["calls_dropped"]
    assert "50% of 4.00" in reasons["calls_dropped"]


def test_the_alarm_sounds_above_thirty_percent_of_nearly_toolless_trajectories() -> None:
    assert observe(CollapseAlarm(), 3.0, 0.30)[1] == {}
    assert list(observe(CollapseAlarm(), 3.0, 0.31)[1]) == ["few_calls"]


def test_a_step_without_trajectories_leaves_the_alarm_as_it_is() -> None:
    alarm, _ = observe(CollapseAlarm(), 2.0)
    assert alarm.observe({}) == (alarm, {})


def seen(watch: AlarmWatch, step: int, calls: float, ratio: float = 0.0) -> AlarmWatch:
    watch.observe(step, {"collapse/calls_mean": calls, "collapse/ratio": ratio})
    return watch


def test_the_spell_remembers_the_step_at_which_it_began() -> None:
    watch = AlarmWatch()
    assert seen(watch, 1, 4.0).since is None
    assert seen(watch, 2, 4.0, 0.4).since == 2
    assert seen(watch, 3, 4.0, 0.5).since == 2
    assert seen(watch, 4, 4.0, 0.1).since is None
    assert seen(watch, 5, 4.0, 0.9).since == 5


def test_a_step_that_is_taken_again_counts_once_and_what_came_after_it_is_forgotten() -> None:
    watch = AlarmWatch()
    for step, calls in ((1, 4.0), (2, 4.0), (3, 0.0), (4, 0.0)):
        seen(watch, step, calls, 0.9 if calls == 0 else 0.0)
    assert watch.since == 3
    again = watch.observe(3, {"collapse/calls_mean": 3.0, "collapse/ratio": 0.0})
    assert again is not None
    assert again.since is None
    assert again.alarm.ema_calls == pytest.approx(0.9 * 4.0 + 0.1 * 3.0)
    assert again.alarm.first_calls == 4.0


def test_a_line_without_calls_is_no_step() -> None:
    watch = seen(AlarmWatch(), 1, 4.0, 0.9)
    assert watch.observe(1, {"timing_s/testing": 3.0}) is None
    assert watch.since == 1
