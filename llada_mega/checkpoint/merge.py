"""The average of several checkpoints of a run (LLaDA2.0, arXiv 2512.15745: the best k by a validation metric).

Averaging checkpoints of a constant learning rate also stands in for a decay of it (WSM, Tian et al. 2025): the average
is the first checkpoint plus the later updates, each scaled by the weight of all checkpoints that contain it. So weights
that fall from 1 to 0 over the updates, as a decaying learning rate would, are differences of such a curve.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llada_mega import __version__
from llada_mega.checkpoint.checkpoint import (
    MODEL_FILE,
    list_checkpoints,
    marker_of,
    read_model_config,
    read_state,
    resolve_checkpoint,
    tokenizer_files,
)
from llada_mega.checkpoint.directory import check_output, recover
from llada_mega.checkpoint.hf_config import model_keys
from llada_mega.checkpoint.save import write_checkpoint
from llada_mega.checkpoint.streaming import Progress, no_progress
from llada_mega.checkpoint.weights import WeightReader, piece_bounds
from llada_mega.config.model import ModelConfig
from llada_mega.diffusion.curriculum import Curriculum
from llada_mega.errors import CheckpointError
from llada_mega.models.hf_mapping import ModelTensor
from llada_mega.parallel.workers import ALONE, Workers

# How the scale of an update falls with its place x in (0, 1) between the first and the last checkpoint.
DECAYS: dict[str, Callable[[float], float]] = {
    "linear": lambda x: 1.0 - x,
    "1-sqrt": lambda x: 1.0 - math.sqrt(x),
    "cosine": lambda x: 0.5 * (1.0 + math.cos(math.pi * x)),
}
LAST_STAGE, ALL_STAGES, NEWEST_STAGE = "last", "all", "newest"


@dataclass(frozen=True)
class Candidate:
    """A checkpoint of a run, with its value of the metric by which candidates are ranked."""

    path: Path
    step: int
    score: float


def find_candidates(root: Path, metric: str, stage: str = LAST_STAGE) -> list[Candidate]:
    """The complete checkpoints in a directory that were validated in a stage, best first; perhaps none.

    Args:
        root: a run's directory of checkpoints.
        metric: name of a validation metric; of an accuracy the largest value is the best, of all others the smallest.
        stage: name of a stage of the curriculum, ``last``, ``all``, or ``newest``: that of the newest checkpoint.
    """
    found: list[Candidate] = []
    states = [(path, state) for path in list_checkpoints(root) if "train" in (state := read_state(path))]
    if not states:
        return found
    newest = states[-1][1]  # one run, so one curriculum
    last = Curriculum.from_json(newest["curriculum"]).stages[-1].name
    wanted = {LAST_STAGE: last, NEWEST_STAGE: _stage_of(newest)}.get(stage, stage)
    for path, state in states:
        score = state.get("metrics", {}).get(metric, math.nan)
        if math.isfinite(score) and (stage == ALL_STAGES or _stage_of(state) == wanted):
            found.append(Candidate(path, state["train"]["step"], score))
    sign = -1.0 if metric.endswith("/accuracy") else 1.0
    return sorted(found, key=lambda candidate: (sign * candidate.score, -candidate.step))


def rank_checkpoints(run: Path, metric: str, stage: str = LAST_STAGE) -> list[Candidate]:
    """:func:`find_candidates` of a run, or of its directory of checkpoints.

    Raises:
        CheckpointError: nothing there, an unknown stage, or no checkpoint that has the metric.
    """
    root = run / "checkpoints" if (run / "checkpoints").is_dir() else run
    paths = list_checkpoints(root)
    if not paths:
        raise CheckpointError(f"{run} holds no complete checkpoint; give a run, or checkpoints=[PATH, PATH]")
    states = [read_state(path) for path in paths]
    if "train" not in states[-1]:
        raise CheckpointError(f"{run} is no run: its checkpoints hold no training state")
    names = [entry.name for entry in Curriculum.from_json(states[-1]["curriculum"]).stages]
    if stage not in (LAST_STAGE, ALL_STAGES, *names):
        raise CheckpointError(f"stage={stage} is no stage of {run}; use {LAST_STAGE}, {ALL_STAGES}, {', '.join(names)}")
    found = find_candidates(root, metric, stage)
    if not found:
        known = sorted({name for state in states for name in state.get("metrics", {}) if name.startswith("valid/")})
        hint = f"the checkpoints have {', '.join(known)}" if known else "no checkpoint was made at a validation"
        raise CheckpointError(f"{run}: no checkpoint of stage={stage} has metric={metric}; {hint}")
    return found


def _stage_of(state: dict[str, Any]) -> str:
    """Name of the stage that the last sample before a checkpoint belonged to."""
    consumed = state["train"]["consumed_samples"]
    return Curriculum.from_json(state["curriculum"]).stage_at(max(0, consumed - 1)).name


def best_checkpoints(run: Path, k: int, metric: str, stage: str = LAST_STAGE) -> list[Candidate]:
    """The best ``k`` of :func:`rank_checkpoints`, in the order of training. Raises CheckpointError: there are fewer."""
    ranked = rank_checkpoints(run, metric, stage)
    if not 0 < k <= len(ranked):
        have = ", ".join(f"step {candidate.step}" for candidate in ranked)
        raise CheckpointError(
            f"k={k} checkpoints cannot be merged: stage={stage} has {len(ranked)} with metric={metric} ({have}); lower "
            f"k, or keep more with checkpoint.keep_last and checkpoint.keep_best"
        )
    return sorted(ranked[:k], key=lambda candidate: candidate.step)


def merge_weights(kind: str | Sequence[float], count: int) -> list[float]:
    """Weights of ``count`` checkpoints in the order of training; they add up to 1.

    Args:
        kind: ``uniform``, a name in DECAYS, or the weights themselves.
    Raises:
        CheckpointError: an unknown name, or not one positive sum of as many weights.
    """
    if not isinstance(kind, str):
        total = math.fsum(kind) if all(map(math.isfinite, kind)) else math.nan
        if len(kind) != count or not math.isfinite(total) or total <= 0:
            raise CheckpointError(f"weights={list(kind)} must be {count} numbers with a positive sum")
        return [weight / total for weight in kind]
    if kind == "uniform" or count == 1:
        return [1.0 / count] * count
    if kind not in DECAYS:
        raise CheckpointError(f"weights={kind} is unknown; use uniform, {', '.join(DECAYS)} or a list of numbers")
    # scales of the updates before the first checkpoint (1), between checkpoints, and after the last (0)
    scales = [1.0, *(DECAYS[kind]((index + 0.5) / (count - 1)) for index in range(count - 1)), 0.0]
    return [before - after for before, after in pairwise(scales)]


def merge_checkpoints(
    paths: Sequence[Path],
    output: Path,
    *,
    weights: str | Sequence[float] = "uniform",
    origin: Mapping[str, object] | None = None,
    overwrite: bool = False,
    workers: Workers = ALONE,
    progress: Progress = no_progress,
) -> None:
    """Write the weighted average of checkpoints as a new checkpoint, without optimizer state.

    Sums are made in float64, piece by piece, from the optimizer's float32 weights where all checkpoints have them. The
    biases of experts are averaged like weights. Checkpoints may have been written under different layouts.

    Args:
        paths: checkpoints or runs (their newest one), in the order of training.
        output: must not exist, or be empty, or with ``overwrite`` be a checkpoint.
        weights: see :func:`merge_weights`.
        origin: more about them, for the new checkpoint's ``state.json``.
        overwrite: replace ``output``, once the new checkpoint is whole.
        workers: the processes that share the work; each calls this.
        progress: shows bytes.
    Raises:
        CheckpointError: a checkpoint is not complete, they hold different models, or the output is in use or cannot be
            written.
    """
    recover(output)
    check_output(output, is_ours=overwrite and (output / MODEL_FILE).is_file())
    checkpoints = [resolve_checkpoint(path) for path in paths]
    shares = merge_weights(weights, len(checkpoints))
    config = _common_config(checkpoints)
    masters = all(WeightReader(path, config).has_masters for path in checkpoints)
    readers = [WeightReader(path, config, masters=masters) for path in checkpoints]
    if len({reader.dtype for reader in readers}) > 1:
        raise CheckpointError(f"the checkpoints have weights of several dtypes: {[str(r.dtype) for r in readers]}")
    merged = {"checkpoints": [str(path) for path in checkpoints], "weights": shares, "float32": masters}
    merged |= {"markers": [marker_of(path) for path in checkpoints]}
    write_checkpoint(
        output,
        {"merge": merged, "llada_mega": __version__},
        config,
        readers[0].dtype,
        partial(_average, readers, shares),
        state={"merged": merged | dict(origin or {})},
        tokenizer_files=tokenizer_files(checkpoints[-1]),
        workers=workers,
        progress=progress,
    )


def _average(readers: Sequence[WeightReader], shares: Sequence[float], tensor: ModelTensor) -> Iterator[Tensor]:
    for start, stop in piece_bounds(tensor, 0, tensor.shape[0]):
        total = torch.zeros(stop - start, *tensor.shape[1:], dtype=torch.float64)
        for reader, share in zip(readers, shares, strict=True):
            total.add_(reader.rows(tensor, start, stop), alpha=share)
        yield total


def _common_config(checkpoints: Sequence[Path]) -> ModelConfig:
    """The model of all checkpoints. Raises CheckpointError when they differ."""
    first, *others = (model_keys(read_model_config(path)) for path in checkpoints)
    for path, other in zip(checkpoints[1:], others, strict=True):
        for key in sorted(first):
            if first[key] != other[key]:
                raise CheckpointError(
                    f"{checkpoints[0]} and {path} hold different models: {key} is {first[key]} and {other[key]}; "
                    f"only checkpoints of one model can be averaged"
                )
    return read_model_config(checkpoints[-1])
