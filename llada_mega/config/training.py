"""How a model is optimised: curriculum, objective, optimizer, trainer, checkpoints, logging, validation."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Optional

from llada_mega.config.data import Corpus


@dataclass
class ObjectiveConfig:
    """Corruption and loss weighting (LLaDA2.0 report, eq. 1). ``t`` is the mask level in (0, 1]."""

    weighting: str = "elbo"  # elbo | uniform
    schedule: str = "linear"  # linear | cosine
    t_min: float = 0.0
    t_max: float = 1.0
    level: str = "sequence"  # one noise level a sequence | document | block


@dataclass
class LearningRateConfig:
    """Learning rate inside a stage, as factors of ``optimizer.lr``; ``end`` reaches ``optimizer.min_lr`` at least."""

    shape: str = "constant"  # constant | linear | cosine | 1-sqrt: from peak to end after the warm-up
    start: float = 0.0  # factor at the first step of the warm-up
    peak: float = 1.0
    end: float = 1.0
    warmup_tokens: int = 0


@dataclass
class EmbeddingNoiseConfig:
    """Gaussian noise on MASK embeddings, decaying linearly to zero over ``decay_tokens`` from the stage's start."""

    std: Optional[float] = None  # None: the RMS of the embedding table at the start of training
    decay_tokens: int = 0  # 0: no noise


@dataclass
class StageObjectiveConfig:
    """What a stage changes of the run's objective; null keeps the run's value."""

    weighting: Optional[str] = None
    schedule: Optional[str] = None
    t_min: Optional[float] = None
    t_max: Optional[float] = None
    level: Optional[str] = None

    def over(self, run: ObjectiveConfig) -> ObjectiveConfig:
        """The stage's whole objective."""
        own = {key: value for key, value in asdict(self).items() if value is not None}
        return replace(run, **own)


@dataclass
class StageConfig:
    """One stage of the curriculum. ``tokens`` are data tokens; the layout follows from ``block_size``."""

    name: str = "stage"
    block_size: int = 32
    tokens: int = 0
    sequence_length: Optional[int] = None  # None: data.sequence_length
    lr: LearningRateConfig = field(default_factory=LearningRateConfig)
    objective: Optional[StageObjectiveConfig] = None  # None: the run's objective
    data: Optional[list[Corpus]] = None  # None: data.train
    embedding_noise: EmbeddingNoiseConfig = field(default_factory=EmbeddingNoiseConfig)


@dataclass
class CurriculumConfig:
    """The stages in order."""

    stages: list[StageConfig] = field(default_factory=list)


@dataclass
class OptimizerConfig:
    """AdamW. ``min_lr`` is a floor under every stage's learning rate."""

    lr: float = 1.0e-4
    min_lr: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1.0e-8
    weight_decay: float = 0.1
    clip_grad: float = 1.0


@dataclass
class StabilityConfig:
    """What to do when a step is not finite, or its loss jumps above ``spike_factor`` x the running median."""

    nonfinite: str = "stop"  # stop | skip | rollback (to the newest checkpoint, past the data since then) | warn
    spike: str = "warn"  # stop | skip | rollback | warn
    spike_factor: float = 3.0
    spike_window: int = 50  # steps in the running median; no spike is called before it is half full
    max_skipped: int = 10  # consecutive skipped steps before the run stops
    max_rollbacks: int = 3  # rollbacks without spike_window good steps between before the run stops


@dataclass
class ValidationConfig:
    """Held-out losses during training; evaluation is always on t in (0, 1], where the NLL bound of eq. (1) holds."""

    every: int = 0  # steps; 0: never
    windows: int = 64
    block_sizes: list[int] = field(default_factory=lambda: [32])
    noise_levels: int = 8  # strata of t
    batch_size: int = 8


@dataclass
class TrainerConfig:
    """The loop. ``max_steps`` caps the curriculum (None: run it whole)."""

    init: Optional[str] = None  # checkpoint whose weights (not optimizer or data position) start the run
    max_steps: Optional[int] = None
    exit_after: Optional[float] = None  # minutes until the run saves and stops (status 85); counted from its start
    global_batch_size: int = 8  # samples
    micro_batch_size: int = 1  # samples
    dtype: str = "float32"  # float32 | bfloat16
    fp8: Optional[str] = None  # matrix products of the layers: delayed | tensorwise | blockwise | mxfp8; null: dtype
    log_every: int = 1
    consistency_every: int = 100  # steps between checks that ranks which share samples hold the same; 0: never
    deterministic: bool = False
    gc_every: int = 0  # steps between garbage collections, on all ranks in the same step; 0: as Python likes
    hang_minutes: float = 15.0  # without progress until all ranks leave their stacks and the run ends; 0: never
    dry_run: Optional[bool] = None  # the largest batch once through the model before training; null: on GPUs
    stability: StabilityConfig = field(default_factory=StabilityConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)


@dataclass
class CheckpointConfig:
    """Training checkpoints. The key users type for ``async_save`` is ``checkpoint.async``."""

    every: int = 0  # steps; 0: only at the end
    keep_last: int = 2
    keep_best: int = 0
    best_metric: str = "valid/block_32/nll_bound"
    merge_at_end: int = 0  # average so many of the best checkpoints of the last stage into RUN/merged
    async_save: bool = False
    resume: str = "auto"  # auto | never | path of a checkpoint


@dataclass
class ProfileConfig:
    """A window of steps under PyTorch's profiler; traces go to RUN/profile."""

    start: int = 0  # first step of the window; 0: no profile
    steps: int = 3
    ranks: list[int] = field(default_factory=lambda: [0])
    memory: bool = False  # allocations too, and on a GPU a memory snapshot


@dataclass
class LoggingConfig:
    """Sinks beside metrics.jsonl, which is always written."""

    tensorboard: bool = False
    wandb: bool = False
    wandb_project: str = "llada-mega"
    wandb_group: Optional[str] = None  # runs that wandb shows together
    wandb_mode: str = "offline"  # offline | online
    progress: bool = True
    peak_tflops: Optional[float] = None  # of a device in trainer.dtype, for MFU; null: by its name, none on a CPU
    profile: ProfileConfig = field(default_factory=ProfileConfig)
