"""What a plan says: of every stage of the curriculum, every pipeline stage, and the whole run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class StagePlan:
    """One stage of the curriculum.

    Attributes:
        steps: optimizer steps.
        positions, logit_rows: of a micro-batch on a rank, rounding included; rows as expected.
        tflop: model TFLOP of a step, all devices together.
        sent_gib: bytes that the rank with the longest step sends in it, by axis, in GiB.
        seconds: of a step, by what it is spent on, on that rank.
        mfu: model FLOPs of the step over what the devices could do at their peak.
    """

    name: str
    block_size: int
    layout: str
    tokens: int
    steps: int
    positions: int
    logit_rows: int
    tflop: float
    sent_gib: dict[str, float]
    seconds: dict[str, float]
    step_seconds: float
    mfu: float
    tokens_per_day: float
    days: float
    gpu_hours: float


@dataclass(frozen=True)
class RankPlan:
    """The ranks of one pipeline stage: what they hold, and their peak over the whole curriculum, in GiB.

    Attributes:
        memory_gib, total_gib: device memory.
        host_gib: host memory of the first of them, which copies most for a checkpoint.
        shared_host_gib: of those of them that are on its host, all together.
    """

    pipeline_stage: int
    layers: int
    parameters: int
    moment: str
    curriculum_stage: str
    memory_gib: dict[str, float]
    total_gib: float
    fits: bool
    host_gib: dict[str, float]
    shared_host_gib: float


@dataclass(frozen=True)
class Plan:
    """Everything that is printed and written as JSON."""

    run: str
    model: dict[str, int]
    hardware: dict[str, Any]
    implementation: str
    gpus: int
    data_parallel: int
    micro_batches: int
    parallel: dict[str, Any]
    micro_batch_size: int
    dtype: str
    async_save: bool
    ranks: tuple[RankPlan, ...]
    stages: tuple[StagePlan, ...]
    assume: dict[str, Any]
    fits: bool
    peak_gib: float
    usable_gib: float
    days: float
    gpu_hours: float
    mean_mfu: float
