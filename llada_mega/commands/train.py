"""``llada-mega train``: the main job."""

from __future__ import annotations

import os

from llada_mega.commands.base import Command
from llada_mega.config.preflight import check_paths, check_supported
from llada_mega.config.schema import Config
from llada_mega.config.validate import validate


def world_size(config: Config) -> int:
    """Processes of the run: what torchrun started, or what ``launch.nproc`` will start."""
    return int(os.environ.get("WORLD_SIZE", config.launch.nproc))


def check(config: Config) -> None:
    """Refuses a configuration that cannot run, before torch is imported."""
    validate(config)
    check_supported(config)
    validate(config, world_size=world_size(config))
    check_paths(config)


def run(config: Config) -> int:
    """Trains; the exit status is that of the run."""
    from llada_mega.training.run import run_training

    return run_training(config)


COMMAND = Command(
    name="train",
    summary="run or resume a training job",
    example="llada-mega train experiment=cpt_16b run.name=first data.train=data/corpus optimizer.lr=5e-5\n"
    "torchrun --nproc-per-node=2 -m llada_mega train experiment=quickstart run.name=two_ranks",
    options=Config,
    run=run,
    check=check,
)
