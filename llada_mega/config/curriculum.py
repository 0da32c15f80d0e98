"""The curriculum that a configuration names."""

from __future__ import annotations

from llada_mega.config.schema import Config
from llada_mega.diffusion.curriculum import Curriculum, build_curriculum


def curriculum_of(config: Config) -> Curriculum:
    """The run's curriculum, resolved to samples."""
    return build_curriculum(
        config.curriculum.stages,
        sequence_length=config.data.sequence_length,
        global_batch_size=config.trainer.global_batch_size,
        base_lr=config.optimizer.lr,
        min_lr=config.optimizer.min_lr,
        default_objective=config.objective,
    )
