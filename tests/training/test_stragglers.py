"""A rank that the others wait for is named."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from llada_mega.config.schema import Config
from llada_mega.training import run as run_module
from llada_mega.training.callback import Callback
from llada_mega.training.callbacks.stragglers import slow_ranks
from llada_mega.training.run import run_training
from llada_mega.training.timeline import PHASES
from llada_mega.training.trainer import Trainer
from tests.parallel.harness import run_ranks
from tests.training.rows import read_rows


def shares(**given: float) -> dict[str, float]:
    return {phase: given.get(phase, 0.0) for phase in PHASES}


def test_who_works_while_the_others_wait_is_slow() -> None:
    usual = shares(forward=0.2, backward=0.3, communication=0.5)
    slow = shares(data=0.5, forward=0.2, backward=0.3)
    assert slow_ranks([usual, usual, slow, usual]) == {2: "data"}
    assert slow_ranks([usual] * 4) == {}
    assert slow_ranks([slow, usual]) == {0: "data"}


class Sleep(Callback):
    def on_step_begin(self, trainer: Trainer) -> None:
        if os.environ["RANK"] == "1":
            time.sleep(2.0)


def train_with_a_slow_rank(config: Config) -> None:
    with pytest.MonkeyPatch.context() as patch:
        build = run_module.build_callbacks
        patch.setattr(run_module, "build_callbacks", lambda *a: [Sleep(), *build(*a)])
        run_training(config, Console(quiet=True))


@pytest.mark.slow
def test_a_slow_rank_is_named_once(configure: Callable[..., Config], tmp_path: Path) -> None:
    config = configure("run", "trainer.micro_batch_size=1", "trainer.max_steps=8")
    run_ranks(train_with_a_slow_rank, 2, config=config)
    warnings = [row["warning"] for row in read_rows(tmp_path / "run", "warning").values()]
    assert warnings == ["slow: rank 1 (in other); the others wait for it"]
