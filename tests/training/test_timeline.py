"""Time by phase: exclusive, complete, and never waited for."""

from __future__ import annotations

from typing import Any

import pytest

from llada_mega.training.timeline import PHASES, Timeline


class FakeMark:
    """A mark on a line whose clock and device the test moves by hand."""

    now = 0.0
    device = float("inf")  # how far the device has come
    made = 0

    def __init__(self) -> None:
        self.time = FakeMark.now
        FakeMark.made += 1

    def is_past(self) -> bool:
        return self.time <= FakeMark.device

    def seconds_since(self, earlier: Any) -> float:
        assert self.is_past() and earlier.is_past()
        return self.time - earlier.time


@pytest.fixture
def timeline() -> Timeline:
    FakeMark.now, FakeMark.device, FakeMark.made = 0.0, float("inf"), 0
    return Timeline(FakeMark)


def spend(seconds: float) -> None:
    FakeMark.now += seconds


def nonzero(seconds: dict[str, float]) -> dict[str, float]:
    assert tuple(seconds) == PHASES
    return {phase: value for phase, value in seconds.items() if value}


def test_an_inner_phase_is_not_its_outer_ones(timeline: Timeline) -> None:
    spend(1)
    with timeline.phase("optimizer"):
        spend(2)
        with timeline.phase("communication"):
            spend(4)
        spend(8)
    spend(16)
    assert nonzero(timeline.take()) == {"other": 17, "optimizer": 10, "communication": 4}
    assert nonzero(timeline.take()) == {}


def test_a_phase_that_is_on_goes_on_in_the_next_account(timeline: Timeline) -> None:
    with timeline.phase("validation"):
        spend(3)
        assert nonzero(timeline.take()) == {"validation": 3}
        spend(5)
    assert nonzero(timeline.take()) == {"validation": 5}


def test_an_error_leaves_the_phase(timeline: Timeline) -> None:
    with pytest.raises(ValueError), timeline.phase("data"):
        spend(1)
        raise ValueError
    spend(2)
    assert nonzero(timeline.take()) == {"data": 1, "other": 2}


def test_megatrons_timers_are_phases(timeline: Timeline) -> None:
    """In the order in which its schedules start and stop them; what has no phase belongs to the phase around it."""
    timeline("forward-backward", log_level=1).start(barrier=True)
    for name, seconds in [
        ("forward-recv", 1),
        ("forward-compute", 2),
        ("backward-compute", 4),
        ("backward-send-forward-recv", 8),
        ("all-grads-sync", 16),
        ("embedding-grads-all-reduce", 32),
    ]:
        timeline(name, log_level=2).start()
        spend(seconds)
        timeline(name).stop()
    timeline("forward-backward").stop()
    with timeline.phase("optimizer"):
        timeline("optimizer-inner-step", log_level=1).start(barrier=True)
        spend(64)
        timeline("optimizer-inner-step").stop()
        timeline("params-all-gather", log_level=1).start(barrier=True)
        spend(128)
        timeline("params-all-gather").stop()
    expected = {"forward": 2, "backward": 4, "communication": 1 + 8 + 16 + 32 + 128, "optimizer": 64}
    assert nonzero(timeline.take()) == expected


def test_what_the_device_has_not_done_is_not_waited_for(timeline: Timeline) -> None:
    FakeMark.device = 0.0
    with timeline.phase("forward"):
        spend(2)
    with timeline.phase("backward"):
        spend(3)
    assert nonzero(timeline.take()) == {}  # seconds_since would have failed
    FakeMark.device = 2.0
    assert nonzero(timeline.take()) == {"forward": 2}
    FakeMark.device = float("inf")
    spend(1)
    assert nonzero(timeline.take()) == {"backward": 3, "other": 1}


def test_no_change_no_mark(timeline: Timeline) -> None:
    for _ in range(100):
        with timeline.phase("other"):
            pass
    assert FakeMark.made == 1
