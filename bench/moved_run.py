"""One training run that changes its parallel layout three times, the same run left alone, and a control.

All are `llada-mega train` as a user would type it: a leg ends at ``trainer.max_steps``, the next one is the same
command with another layout, which resumes from the newest checkpoint. The control is the run on one process with two
samples a micro-batch: the same numbers added in another order, so its distance is what rounding alone does.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.corpus import prepare_corpus

GLOBAL_BATCH, LENGTH = 4, 128


@dataclass(frozen=True)
class Leg:
    """Steps up to ``last_step`` under one layout."""

    label: str
    nproc: int
    settings: tuple[str, ...]
    last_step: int

    def overrides(self) -> list[str]:
        """What is added to the command line of the run."""
        return [f"launch.nproc={self.nproc}", *self.settings, f"trainer.max_steps={self.last_step}"]


LEGS = (
    Leg("1 process", 1, (), 20),
    Leg("TP2 x PP2", 4, ("parallel.tp=2", "parallel.sp=true", "parallel.pp=2"), 40),
    Leg("CP2 x EP2", 2, ("parallel.cp=2", "parallel.ep=2"), 60),
    Leg("1 process", 1, (), 80),
)
STEPS = LEGS[-1].last_step
RUNS = {
    "moved": LEGS,
    "alone": (Leg("1 process", 1, (), STEPS),),
    "control": (Leg("1 process", 1, ("trainer.micro_batch_size=2",), STEPS),),
}
# name, block size, steps, more: warm-up over the block size, stable without blocks, decay to the smallest.
STAGES = (
    ("warmup_4", 4, 12, ", lr: {start: 0.0, warmup_tokens: 6144}, embedding_noise: {decay_tokens: 6144}"),
    ("warmup_32", 32, 14, ""),
    ("stable", LENGTH, 24, ""),
    ("decay_16", 16, 14, ""),
    ("decay_8", 8, 16, ", lr: {shape: linear, end: 0.1}"),
)


def command(directory: Path, name: str, corpus: tuple[str, ...], leg: Leg) -> list[str]:
    """The command line of one leg of the run ``name``."""
    tokens = GLOBAL_BATCH * LENGTH
    stages = ", ".join(f"{{name: {n}, block_size: {b}, tokens: {s * tokens}{more}}}" for n, b, s, more in STAGES)
    return [
        *(sys.executable, "-m", "llada_mega", "train"),
        "model=tiny_ling",
        *corpus,
        f"data.sequence_length={LENGTH}",
        f"curriculum.stages=[{stages}]",
        f"trainer.global_batch_size={GLOBAL_BATCH}",
        "optimizer.lr=1e-3",
        "checkpoint.keep_last=1",
        "logging.progress=false",
        f"run.name={name}",
        f"run.dir={directory / name}",
        *leg.overrides(),
    ]


def train_all(directory: Path, say: Callable[[str], None] = print) -> dict[str, list[dict[str, Any]]]:
    """The rows of ``metrics.jsonl`` of each of ``RUNS``; trains what was not trained yet."""
    corpus = prepare_corpus(directory / "corpus")
    for name, legs in RUNS.items():
        for leg in legs:
            say(f"{name}, up to step {leg.last_step} on {leg.label}: {' '.join(leg.overrides())}")
            subprocess.run(command(directory, name, corpus, leg), check=True)
    return {name: read_rows(directory / name) for name in RUNS}


def read_rows(run_dir: Path) -> list[dict[str, Any]]:
    """Rows of training steps, in order."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "loss" in row]
