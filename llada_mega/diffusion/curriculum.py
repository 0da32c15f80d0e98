"""The curriculum as data: stages of block size, learning rate, noise range and data, resolved to sample numbers.

The report's Warmup-Stable-Decay over block size (arXiv 2512.15745) is one list of stages; other conversions are other
lists. Everything here is a pure function of ``consumed_samples``, the samples of the run that were used before the
step at hand, so a resumed run continues exactly.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import PurePath
from typing import Any

from llada_mega.diffusion.stages import (
    Blend,
    EmbeddingNoiseDecay,
    LearningRateCurve,
    ObjectiveLike,
    ResolvedStage,
    StageLike,
    StageObjective,
    require,
    resolve_blend,
    resolve_embedding_noise,
    resolve_learning_rate,
    resolve_objective,
    samples,
)
from llada_mega.errors import CheckpointError, ConfigError

_RUN_KEYS = {
    "trainer.global_batch_size": "global_batch_size",
    "optimizer.lr": "base_lr",
    "optimizer.min_lr": "min_lr",
}


@dataclass(frozen=True)
class Curriculum:
    """Stages that follow each other without a gap from sample 0.

    Attributes:
        stages: at least one, in order.
        global_batch_size: samples; every boundary is a multiple of it, so no batch spans two stages.
        base_lr, min_lr: the run's learning rate, and the floor under every stage's.
        corpora: the different blends as (path, weight); entry 0 is empty and stands for the run's own ``data.train``.
    """

    stages: tuple[ResolvedStage, ...]
    global_batch_size: int
    base_lr: float
    min_lr: float
    corpora: tuple[Blend, ...] = ((),)

    @property
    def total_samples(self) -> int:
        """Samples of the whole curriculum."""
        return self.stages[-1].end_sample

    def stage_at(self, consumed_samples: int) -> ResolvedStage:
        """The stage that uses sample number ``consumed_samples``; the last one after the end."""
        ends = [stage.end_sample for stage in self.stages]
        return self.stages[min(bisect_right(ends, consumed_samples), len(ends) - 1)]

    def learning_rate(self, consumed_samples: int) -> float:
        """Learning rate of the step that starts after ``consumed_samples`` samples; ``min_lr`` at least."""
        stage = self.stage_at(consumed_samples)
        factor = stage.lr.factor(consumed_samples - stage.start_sample, stage.num_samples)
        return max(self.min_lr, self.base_lr * factor)

    def embedding_noise_std(self, consumed_samples: int, default_std: float) -> float:
        """Std of the MASK embedding noise: linear to zero over ``decay_samples`` from the start of its stage.

        A decay longer than its stage goes on in the next stages, unless one of them starts a noise of its own.
        """
        current = self.stage_at(consumed_samples).index
        for stage in reversed(self.stages[: current + 1]):
            noise = stage.embedding_noise
            if noise.decay_samples > 0:
                left = 1 - (consumed_samples - stage.start_sample) / noise.decay_samples
                return max(0.0, left) * (default_std if noise.std is None else noise.std)
        return 0.0

    def to_json(self) -> dict[str, Any]:
        """A value that ``json.dumps`` takes and :meth:`from_json` turns back into an equal curriculum."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Curriculum:
        """The inverse of :meth:`to_json`.

        Raises:
            CheckpointError: a field is missing or unknown.
        """
        try:
            corpora = tuple(tuple((path, weight) for path, weight in blend) for blend in data["corpora"])
            return cls(**{**data, "stages": tuple(map(_stage_from_json, data["stages"])), "corpora": corpora})
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"the curriculum saved in state.json is damaged or from another version ({error}); "
                "use a checkpoint that `llada-mega checkpoint verify` accepts"
            ) from error

    def difference(self, other: Curriculum) -> str | None:
        """One line that names the first stage and field in which ``other`` (now) differs from this one (saved).

        None when both train the same. Corpora are compared by file name and weight: a directory may have moved.
        """
        for key, field in _RUN_KEYS.items():
            if getattr(self, field) != getattr(other, field):
                return f"{key} was {getattr(self, field)} and is {getattr(other, field)} now"
        for stage, other_stage in zip(self.stages, other.stages, strict=False):
            saved, now = self._describe(stage), other._describe(other_stage)
            changed = [key for key in saved if saved[key] != now[key]]
            if not changed:
                continue
            if changed == ["tokens"] and stage is self.stages[-1] and now["tokens"] > saved["tokens"]:
                return f"{_name(stage)}, the last, was lengthened from {saved['tokens']} to {now['tokens']} samples"
            key = changed[0]
            unit = " samples" if key.endswith("tokens") else ""
            return f"{_name(stage)}.{key} was {saved[key]}{unit} and is {now[key]}{unit} now"
        if len(other.stages) > len(self.stages):
            return f"{_name(other.stages[len(self.stages)])} was appended"
        if len(other.stages) < len(self.stages):
            return f"{_name(self.stages[len(other.stages)])} was removed"
        return None

    def _describe(self, stage: ResolvedStage) -> dict[str, Any]:
        """What the user chose for a stage, by the names that users type (counts in samples), in order of report."""
        chosen: dict[str, Any] = {}
        for field in fields(stage):
            value = getattr(stage, field.name)
            if field.name in ("lr", "objective", "embedding_noise"):
                chosen |= {f"{field.name}.{key}".replace("_samples", "_tokens"): x for key, x in asdict(value).items()}
            elif field.name == "corpora":
                chosen["data"] = [(PurePath(path).name, weight) for path, weight in self.corpora[value]]
            elif field.name == "end_sample":
                chosen["tokens"] = stage.num_samples
            elif field.name not in ("index", "start_sample", "layout"):  # these follow from the others
                chosen[field.name] = value
        return chosen


def build_curriculum(
    stages: Sequence[StageLike],
    *,
    sequence_length: int,
    global_batch_size: int,
    base_lr: float,
    min_lr: float,
    default_objective: ObjectiveLike,
) -> Curriculum:
    """Resolve tokens to samples: ceil(tokens / sequence length), stages rounded up to whole global batches.

    The layout follows from the block size: a block as long as the sample needs no clean half, eq. (4), ``mdlm``;
    shorter blocks train as eq. (3), ``bdlm``.

    Raises:
        ConfigError: no stage, or a value that makes no sense; the message names its key.
    """
    if not stages:
        raise ConfigError("curriculum.stages is empty; give at least one, e.g. [{block_size: 32, tokens: 1000000}]")
    require(global_batch_size >= 1, "trainer.global_batch_size", global_batch_size, "use 1 or more")
    require(sequence_length >= 1, "data.sequence_length", sequence_length, "use 1 or more")
    require(0 < base_lr < math.inf, "optimizer.lr", base_lr, "use a positive number")
    require(0 <= min_lr <= base_lr, "optimizer.min_lr", min_lr, f"use 0 to optimizer.lr={base_lr}")
    run_objective = resolve_objective(default_objective, "objective")
    corpora: list[Blend] = [()]
    resolved: list[ResolvedStage] = []
    for index, stage in enumerate(stages):
        key = f"curriculum.stages[{index}]"
        length = sequence_length if stage.sequence_length is None else stage.sequence_length
        require(length >= 1, f"{key}.sequence_length", length, "use 1 or more")
        require(stage.block_size >= 1, f"{key}.block_size", stage.block_size, "use 1 or more")
        require(stage.tokens >= 1, f"{key}.tokens", stage.tokens, "use 1 or more")
        own = stage.objective
        objective = run_objective if own is None else resolve_objective(own.over(default_objective), f"{key}.objective")
        blend = resolve_blend(stage.data, f"{key}.data")
        if blend not in corpora:
            corpora.append(blend)
        start_sample = resolved[-1].end_sample if resolved else 0
        num_batches = -(-samples(stage.tokens, length) // global_batch_size)
        resolved.append(
            ResolvedStage(
                index=index,
                name=stage.name,
                block_size=stage.block_size,
                layout="mdlm" if stage.block_size >= length else "bdlm",
                sequence_length=length,
                start_sample=start_sample,
                end_sample=start_sample + num_batches * global_batch_size,
                lr=resolve_learning_rate(stage.lr, stage.tokens, length, f"{key}.lr"),
                objective=objective,
                embedding_noise=resolve_embedding_noise(stage.embedding_noise, length, f"{key}.embedding_noise"),
                corpora=corpora.index(blend),
            )
        )
    return Curriculum(tuple(resolved), global_batch_size, float(base_lr), float(min_lr), tuple(corpora))


def _stage_from_json(stage: dict[str, Any]) -> ResolvedStage:
    nested = {
        "lr": LearningRateCurve(**stage["lr"]),
        "objective": StageObjective(**stage["objective"]),
        "embedding_noise": EmbeddingNoiseDecay(**stage["embedding_noise"]),
    }
    return ResolvedStage(**{**stage, **nested})


def _name(stage: ResolvedStage) -> str:
    return f"curriculum.stages[{stage.index}] ({stage.name})"
