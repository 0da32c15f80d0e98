"""When a run will be done, on a clock that the test moves."""

from __future__ import annotations

import pytest

from llada_mega.config.training import ObjectiveConfig, StageConfig
from llada_mega.diffusion.curriculum import Curriculum, build_curriculum
from llada_mega.training.callbacks.eta import RECENT, Eta
from llada_mega.training.callbacks.progress import hours


def curriculum(*stages: tuple[int, int]) -> Curriculum:
    """Stages of (block size, steps), a sample of 64 tokens a step."""
    configs = [StageConfig(block_size=block_size, tokens=64 * steps) for block_size, steps in stages]
    return build_curriculum(
        configs, sequence_length=64, global_batch_size=1, base_lr=1.0, min_lr=0.0, default_objective=ObjectiveConfig()
    )


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def run(eta: Eta, clock: Clock, steps: range, seconds: float) -> None:
    for step in steps:
        clock.now += seconds
        eta.update(step)


def test_stage_and_run() -> None:
    clock = Clock()
    eta = Eta(curriculum((4, 10), (8, 30)), 1, 40, clock)
    eta.begin(0)
    assert eta.run_seconds(0) is None
    run(eta, clock, range(1, 5), 2.0)
    assert eta.stage_seconds(4) == pytest.approx(6 * 2.0)
    assert eta.run_seconds(4) == pytest.approx(36 * 2.0)
    run(eta, clock, range(5, 11), 2.0)
    assert eta.stage_seconds(10) == pytest.approx(30 * 2.0)  # the next stage's
    run(eta, clock, range(11, 41), 2.0)
    assert (eta.stage_seconds(40), eta.run_seconds(40)) == (0.0, 0.0)


def test_the_run_may_end_before_the_curriculum() -> None:
    clock = Clock()
    eta = Eta(curriculum((4, 10), (8, 30)), 1, 15, clock)
    eta.begin(0)
    run(eta, clock, range(1, 13), 1.0)
    assert eta.stage_seconds(12) == eta.run_seconds(12) == pytest.approx(3.0)


def test_stages_without_clean_tokens_are_taken_for_half_as_long_until_they_are_seen() -> None:
    clock = Clock()
    eta = Eta(curriculum((4, 10), (64, 30), (4, 10)), 1, 50, clock)
    eta.begin(0)
    run(eta, clock, range(1, 6), 4.0)
    assert eta.run_seconds(5) == pytest.approx(5 * 4.0 + 30 * 2.0 + 10 * 4.0)
    run(eta, clock, range(6, 11), 4.0)
    run(eta, clock, range(11, 21), 3.0)  # as it turns out
    assert eta.stage_seconds(20) == pytest.approx(20 * 3.0)
    assert eta.run_seconds(20) == pytest.approx(20 * 3.0 + 10 * 4.0)


def test_the_pace_is_that_of_the_last_rows() -> None:
    clock = Clock()
    eta = Eta(curriculum((4, 100)), 1, 100, clock)
    eta.begin(0)
    run(eta, clock, range(1, 2), 60.0)  # compiles, warms up
    run(eta, clock, range(2, 2 + RECENT), 1.0)
    assert eta.run_seconds(1 + RECENT) == pytest.approx(99 - RECENT)


def test_rolled_back() -> None:
    clock = Clock()
    eta = Eta(curriculum((4, 100)), 1, 100, clock)
    eta.begin(0)
    run(eta, clock, range(1, 11), 1.0)
    clock.now += 1000.0  # loading
    run(eta, clock, range(6, 12), 3.0)
    assert eta.run_seconds(11) == pytest.approx(89 * 3.0)


def test_resumed() -> None:
    clock = Clock()
    eta = Eta(curriculum((4, 100)), 1, 100, clock)
    eta.begin(90)
    run(eta, clock, range(92, 95, 2), 4.0)  # log_every=2
    assert eta.run_seconds(94) == pytest.approx(6 * 2.0)


def test_hours() -> None:
    assert [hours(x) for x in (None, 0.4, 3723.0, 90061.0)] == ["-:--:--", "0:00:00", "1:02:03", "1 d 1:01:01"]
