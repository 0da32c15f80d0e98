"""``llada-mega merge``: the average of several checkpoints of a run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from llada_mega.commands.base import Command
from llada_mega.errors import ConfigError


@dataclass
class MergeOptions:
    """Keys of ``merge``."""

    checkpoints: Any = MISSING  # a run, of which the best k are taken; or a list of them, in the order of training
    output: str = MISSING  # directory of the new checkpoint
    k: int = 3  # how many of a run
    metric: str = "valid/block_32/nll_bound"  # by which they are ranked: any metric of the validation
    stage: str = "last"  # last | all | name of a stage: where a run's candidates come from
    weights: Any = "uniform"  # uniform | linear | 1-sqrt | cosine (stand in for a decay of the learning rate) | numbers
    overwrite: bool = False  # replace output


def check(options: MergeOptions) -> None:
    """Raises ConfigError when keys have the wrong type."""
    listed = options.checkpoints if isinstance(options.checkpoints, list) else [options.checkpoints]
    if not listed or not all(map(_is_text, listed)):
        raise ConfigError(f"checkpoints={listed} must be a run or a list of checkpoints")
    numbers = isinstance(options.weights, list) and all(isinstance(w, int | float) for w in options.weights)
    if not numbers and not _is_text(options.weights):
        raise ConfigError(f"weights={options.weights} must be a name or a list of numbers, one a checkpoint")


def run(options: MergeOptions) -> int:
    """Writes the merged checkpoint."""
    from llada_mega.checkpoint.merge import best_checkpoints, merge_checkpoints, merge_weights
    from llada_mega.commands.progress import bytes_progress
    from llada_mega.parallel.workers import Workers

    origin: dict[str, Any] = {}
    if isinstance(options.checkpoints, list):
        paths = [Path(path) for path in options.checkpoints]
        labels = [str(path) for path in paths]
    else:
        best = best_checkpoints(Path(options.checkpoints), options.k, options.metric, options.stage)
        paths = [candidate.path for candidate in best]
        labels = [f"{candidate.path.name}  {options.metric} {candidate.score:.4f}" for candidate in best]
        origin = {"metric": options.metric, "scores": [candidate.score for candidate in best]}
    workers = Workers.from_launcher()
    if workers.is_first:
        for label, weight in zip(labels, merge_weights(options.weights, len(paths)), strict=True):
            print(f"{weight:7.4f}  {label}")
    with bytes_progress("merging", enabled=workers.is_first) as progress:
        merge_checkpoints(
            paths,
            Path(options.output),
            weights=options.weights,
            origin=origin,
            overwrite=options.overwrite,
            workers=workers,
            progress=progress,
        )
    if workers.is_first:
        print(f"checkpoint: {options.output}")
    return 0


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


COMMAND = Command(
    name="merge",
    summary="average the best checkpoints of a run, or any checkpoints of one model; torchrun shares the work",
    example="llada-mega merge runs/quickstart k=3 metric=valid/block_8/nll_bound output=checkpoints/merged",
    options=MergeOptions,
    run=run,
    check=check,
    positional="checkpoints",
)
