"""The average of a run's best checkpoints, made when it ends."""

from __future__ import annotations

import logging
from pathlib import Path

from llada_mega.checkpoint.checkpoint import is_complete, marker_of, read_state
from llada_mega.checkpoint.merge import merge_checkpoints, rank_checkpoints
from llada_mega.config.training import CheckpointConfig
from llada_mega.errors import CheckpointError
from llada_mega.parallel.workers import Workers
from llada_mega.training.callback import Callback
from llada_mega.training.trainer import Trainer

MERGED = "merged"
logger = logging.getLogger("llada_mega")


class MergeCallback(Callback):
    """Writes ``RUN/merged``: the uniform average of the best ``checkpoint.merge_at_end`` checkpoints of the last stage.

    Every rank averages a share of the files. Fewer checkpoints are averaged when the last stage has no more.
    """

    phase = "checkpoint"

    def __init__(self, run_dir: Path, config: CheckpointConfig) -> None:
        self.run_dir, self.config = run_dir, config

    def on_train_end(self, trainer: Trainer) -> None:
        try:
            ranked = rank_checkpoints(self.run_dir, self.config.best_metric)
        except CheckpointError as error:  # alike on all ranks; the run itself is done
            logger.warning(f"nothing is merged: {error}")
            return
        best = sorted(ranked[: self.config.merge_at_end], key=lambda candidate: candidate.step)
        output, paths = self.run_dir / MERGED, [candidate.path for candidate in best]
        steps, markers = [candidate.step for candidate in best], [marker_of(path) for path in paths]
        if is_complete(output) and read_state(output).get("merged", {}).get("markers") == markers:
            return
        groups = trainer.step.groups
        origin = {"metric": self.config.best_metric, "steps": steps, "scores": [candidate.score for candidate in best]}
        workers = Workers(groups.rank, groups.world_size)
        merge_checkpoints(paths, output, origin=origin, overwrite=True, workers=workers)
        if trainer.writes_files:
            logger.info(f"{output} is the average of steps {', '.join(map(str, steps))}")
