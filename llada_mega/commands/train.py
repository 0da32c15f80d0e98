"""``llada-mega train``: the main job."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from llada_mega.commands.base import Command
from llada_mega.config.model import ModelConfig
from llada_mega.config.preflight import check_paths
from llada_mega.config.schema import Config
from llada_mega.config.validate import validate
from llada_mega.errors import ConfigError
from llada_mega.ranks import STOPPED_STATUS, StopSignals, rank_log


def world_size(config: Config) -> int:
    """Processes of the run: what torchrun started, or what ``launch.nproc`` will start."""
    return int(os.environ.get("WORLD_SIZE", config.launch.nproc))


def model_from_init(config: Config) -> ModelConfig:
    """The model of ``trainer.init``, with this run's choice of attention backend and implementation."""
    from llada_mega.checkpoint.checkpoint import read_model_config, resolve_checkpoint

    if config.trainer.init is None:
        raise ConfigError("model=from_init takes the model from trainer.init, which is null; name a checkpoint")
    model = read_model_config(resolve_checkpoint(Path(config.trainer.init)))
    choices = {name: getattr(config.model, name) for name in ("attention_backend", "implementation")}
    return dataclasses.replace(model, **choices)


def check(config: Config) -> None:
    """Refuses a configuration that cannot run, before torch is imported."""
    if config.model.architecture == "from_init":
        config.model = model_from_init(config)
    validate(config)
    validate(config, world_size=world_size(config))
    check_paths(config)


def run(config: Config) -> int:
    """Trains, or raises what ended the run. 0: finished; ``STOPPED_STATUS``: saved on request, to go on later."""
    with rank_log(config.run.dir), StopSignals() as signals:
        from llada_mega.training.run import run_training  # takes seconds, in which a signal may come

        outcome = run_training(config, signals=signals)
    return STOPPED_STATUS if outcome.stop_reason else 0


COMMAND = Command(
    name="train",
    summary="run or resume a training job",
    example="llada-mega train model=from_init trainer.init=checkpoints/smollm2 data.train=data/corpus run.name=first\n"
    "torchrun --nproc-per-node=2 -m llada_mega train experiment=cpt_16b data.train=data/corpus",
    options=Config,
    run=run,
    distributed=True,
    check=check,
)
