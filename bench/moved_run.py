"""One training run that changes its parallel layout three times, and the same run left alone.

Both are `llada-mega train` as a user would type it: a leg ends at ``trainer.max_steps``, the next one is the same
command with another layout, which resumes from the newest checkpoint.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bench.corpus import prepare_corpus

GLOBAL_BATCH, LENGTH = 4, 128


@dataclass(frozen=True)
class Leg:
    """Steps up to ``last_step`` under one layout."""

    label: str
    nproc: int
    parallel: tuple[str, ...]
    last_step: int

    def overrides(self) -> list[str]:
        """What is added to the command line of the run."""
        layout = [f"parallel.{setting}" for setting in self.parallel]
        return [f"launch.nproc={self.nproc}", *layout, f"trainer.max_steps={self.last_step}"]


LEGS = (
    Leg("1 process", 1, (), 20),
    Leg("TP2 × PP2", 4, ("tp=2", "sp=true", "pp=2"), 40),
    Leg("CP2 × EP2", 2, ("cp=2", "ep=2"), 60),
    Leg("1 process", 1, (), 80),
)
ALONE = Leg("1 process", 1, (), LEGS[-1].last_step)
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


def train_both(directory: Path, say: Callable[[str], None] = print) -> tuple[list[dict], list[dict]]:
    """Train what is not trained yet. Returns the rows of ``metrics.jsonl`` of the moved and of the unmoved run."""
    corpus = prepare_corpus(directory / "corpus")
    for name, legs in (("moved", LEGS), ("alone", (ALONE,))):
        for leg in legs:
            say(f"{name}: up to step {leg.last_step} as {leg.label}: {' '.join(leg.overrides())}")
            subprocess.run(command(directory, name, corpus, leg), check=True)
    return read_rows(directory / "moved"), read_rows(directory / "alone")


def read_rows(run_dir: Path) -> list[dict]:
    """Rows of training steps, in order."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "loss" in row]
