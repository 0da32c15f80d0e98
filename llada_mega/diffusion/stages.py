"""One stage of a curriculum: what the configuration says, in tokens, and what it resolves to, in samples.

The configuration's dataclasses (``llada_mega.config.training``) live on a higher floor: they are read by their
attributes, which the protocols below list.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from llada_mega.diffusion.noise_levels import check_band
from llada_mega.diffusion.objectives import DiffusionObjective, check_weighting
from llada_mega.diffusion.schedule import get_schedule
from llada_mega.errors import ConfigError

LR_SHAPES = ("constant", "linear", "cosine", "1-sqrt")

Blend = tuple[tuple[str, float], ...]  # (path, weight) of each corpus; empty: the run's own data.train


@dataclass(frozen=True)
class LearningRateCurve:
    """Factors of ``optimizer.lr``: linear from ``start`` to ``peak``, then ``shape`` from ``peak`` to ``end``."""

    shape: str
    start: float
    peak: float
    end: float
    warmup_samples: int

    def factor(self, done: int, num_samples: int) -> float:
        """The factor after ``done`` of the stage's ``num_samples`` samples; from there on the last one."""
        if done < self.warmup_samples:
            return self.start + (self.peak - self.start) * done / self.warmup_samples
        progress = min(1.0, (done - self.warmup_samples) / max(1, num_samples - self.warmup_samples))
        descent = _fraction_of_descent(self.shape, progress)
        return self.peak * (1 - descent) + self.end * descent


def _fraction_of_descent(shape: str, progress: float) -> float:
    """How much of the way from ``peak`` to ``end`` is behind, from 0 at progress 0 to 1 at progress 1."""
    if shape == "linear":
        return progress
    if shape == "cosine":
        return (1 - math.cos(math.pi * progress)) / 2
    if shape == "1-sqrt":  # fast first, slow last: arXiv 2405.18392
        return math.sqrt(progress)
    return 0.0


@dataclass(frozen=True)
class StageObjective:
    """Corruption and weighting of a stage; the fields of the ``objective`` configuration group."""

    weighting: str
    schedule: str
    t_min: float
    t_max: float
    level: str

    def build(self) -> DiffusionObjective:
        """The strategy object."""
        return DiffusionObjective(self.weighting, get_schedule(self.schedule))


@dataclass(frozen=True)
class EmbeddingNoiseDecay:
    """Gaussian noise on MASK embeddings; ``std`` None stands for a default that the model knows."""

    std: float | None
    decay_samples: int


@dataclass(frozen=True)
class ResolvedStage:
    """One stage; it uses the samples [start_sample, end_sample). ``corpora`` is an index into Curriculum.corpora."""

    index: int
    name: str
    block_size: int
    layout: str
    sequence_length: int
    start_sample: int
    end_sample: int
    lr: LearningRateCurve
    objective: StageObjective
    embedding_noise: EmbeddingNoiseDecay
    corpora: int

    @property
    def num_samples(self) -> int:
        """Samples of the stage, a multiple of the global batch."""
        return self.end_sample - self.start_sample


class ObjectiveLike(Protocol):
    """``objective``: see :class:`StageObjective`."""

    @property
    def weighting(self) -> str: ...
    @property
    def schedule(self) -> str: ...
    @property
    def t_min(self) -> float: ...
    @property
    def t_max(self) -> float: ...
    @property
    def level(self) -> str: ...


class StageObjectiveLike(Protocol):
    """``objective`` of a stage: what it changes of the run's."""

    def over(self, run: Any) -> ObjectiveLike: ...


class LearningRateLike(Protocol):
    """``lr`` of a stage: factors of ``optimizer.lr``."""

    @property
    def shape(self) -> str: ...
    @property
    def start(self) -> float: ...
    @property
    def peak(self) -> float: ...
    @property
    def end(self) -> float: ...
    @property
    def warmup_tokens(self) -> int: ...


class EmbeddingNoiseLike(Protocol):
    """``embedding_noise`` of a stage; no noise when ``decay_tokens`` is 0."""

    @property
    def std(self) -> float | None: ...
    @property
    def decay_tokens(self) -> int: ...


class CorpusLike(Protocol):
    """One corpus of a blend."""

    @property
    def path(self) -> str: ...
    @property
    def weight(self) -> float: ...


class StageLike(Protocol):
    """One stage of the configuration. None: the run's sequence length, objective or data."""

    @property
    def name(self) -> str: ...
    @property
    def block_size(self) -> int: ...
    @property
    def tokens(self) -> int: ...
    @property
    def sequence_length(self) -> int | None: ...
    @property
    def lr(self) -> LearningRateLike: ...
    @property
    def objective(self) -> StageObjectiveLike | None: ...
    @property
    def data(self) -> Sequence[CorpusLike] | None: ...
    @property
    def embedding_noise(self) -> EmbeddingNoiseLike: ...


def resolve_learning_rate(lr: LearningRateLike, tokens: int, sequence_length: int, key: str) -> LearningRateCurve:
    """The learning rate of a stage of ``tokens`` tokens.

    Raises:
        ConfigError: the message names the key below ``key``; so do the functions that follow.
    """
    if lr.shape not in LR_SHAPES:
        raise ConfigError(f"{key}.shape={lr.shape} is unknown; use {', '.join(LR_SHAPES)}")
    for name in ("start", "peak", "end"):
        value = getattr(lr, name)
        require(0 <= value < math.inf, f"{key}.{name}", value, "use a factor of optimizer.lr, 0 or more")
    if lr.shape == "constant" and lr.end not in (1.0, lr.peak):
        raise ConfigError(f"{key}.end={lr.end} has no effect with shape=constant; use {', '.join(LR_SHAPES[1:])}")
    fits = 0 <= lr.warmup_tokens <= tokens
    require(fits, f"{key}.warmup_tokens", lr.warmup_tokens, f"use 0 to the stage's tokens={tokens}")
    warmup_samples = samples(lr.warmup_tokens, sequence_length)
    return LearningRateCurve(lr.shape, float(lr.start), float(lr.peak), float(lr.end), warmup_samples)


def resolve_objective(objective: ObjectiveLike, key: str) -> StageObjective:
    """The objective, checked."""
    check_weighting(objective.weighting, f"{key}.weighting")
    get_schedule(objective.schedule, f"{key}.schedule")
    check_band(objective.level, objective.t_min, objective.t_max, key)
    t_min, t_max = float(objective.t_min), float(objective.t_max)
    return StageObjective(objective.weighting, objective.schedule, t_min, t_max, objective.level)


def resolve_embedding_noise(noise: EmbeddingNoiseLike, sequence_length: int, key: str) -> EmbeddingNoiseDecay:
    """The decay of the MASK embedding noise, in samples."""
    require(noise.decay_tokens >= 0, f"{key}.decay_tokens", noise.decay_tokens, "use 0 (no noise) or more")
    std = None if noise.std is None else float(noise.std)
    require(std is None or 0 <= std < math.inf, f"{key}.std", std, "use 0 or more, or null for the default")
    return EmbeddingNoiseDecay(std, samples(noise.decay_tokens, sequence_length))


def resolve_blend(data: Sequence[CorpusLike] | None, key: str) -> Blend:
    """The stage's own corpora; empty for the run's."""
    if data is None:
        return ()
    if not data:
        raise ConfigError(f"{key} is empty; give corpora, or leave it out for data.train")
    for index, corpus in enumerate(data):
        require(0 < corpus.weight < math.inf, f"{key}[{index}].weight", corpus.weight, "use a positive number")
    return tuple((corpus.path, float(corpus.weight)) for corpus in data)


def samples(tokens: int, sequence_length: int) -> int:
    """Samples that hold ``tokens`` tokens, rounded up."""
    return -(-tokens // sequence_length)


def require(condition: bool, key: str, value: object, fix: str) -> None:
    """Raise ConfigError unless the condition holds."""
    if not condition:
        raise ConfigError(f"{key}={value} makes no sense; {fix}")
