"""The whole configuration of ``train``, one field a Hydra group."""

from __future__ import annotations

from dataclasses import dataclass, field

from llada_mega.config.data import DataConfig
from llada_mega.config.model import ModelConfig
from llada_mega.config.run import LaunchConfig, ParallelConfig, RunSection
from llada_mega.config.training import (
    CheckpointConfig,
    CurriculumConfig,
    LoggingConfig,
    ObjectiveConfig,
    OptimizerConfig,
    TrainerConfig,
)


@dataclass
class Config:
    """Composed by Hydra, validated once by :func:`llada_mega.config.validate.validate`, then left alone."""

    run: RunSection = field(default_factory=RunSection)
    seed: int = 1234
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    curriculum: CurriculumConfig = field(default_factory=CurriculumConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
