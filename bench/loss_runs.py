"""The two training runs whose loss curves are kept in ``tests/golden``: a dense model and a mixture of experts.

Fifty steps each over a curriculum of four block sizes, on the bytes of this repository's ``LICENSE``: a text that every
checkout has and that nobody edits. They are `llada-mega train` commands in every respect but that they run in the
process that asks for them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console

from llada_mega.config.compose import compose
from llada_mega.config.schema import Config
from llada_mega.config.validate import validate
from llada_mega.data.index_file import IndexWriter, idx_path
from llada_mega.training.run import run_training

TEXT = Path(__file__).resolve().parents[1] / "LICENSE"
STEPS, LENGTH, GLOBAL_BATCH = 50, 128, 4
METRICS = ("loss", "ce_masked", "grad_norm")
MASK_TOKEN = 256  # after the bytes
# name, block size, steps, more
STAGES = (
    ("warmup_1", 1, 8, ", lr: {start: 0.1, warmup_tokens: 4096}, embedding_noise: {decay_tokens: 4096}"),
    ("warmup_16", 16, 12, ""),
    ("stable", LENGTH, 15, ""),
    ("decay_8", 8, 15, ", lr: {shape: linear, end: 0.1}"),
)
Curves = dict[str, list[float]]


@dataclass(frozen=True)
class LossRun:
    """One run: a name and the model's overrides."""

    name: str
    model: tuple[str, ...]

    def overrides(self) -> list[str]:
        """What is added to `llada-mega train`, besides the place of corpus and run."""
        tokens = GLOBAL_BATCH * LENGTH
        stages = ", ".join(f"{{name: {n}, block_size: {b}, tokens: {s * tokens}{more}}}" for n, b, s, more in STAGES)
        return [
            *self.model,
            f"curriculum.stages=[{stages}]",
            f"data.sequence_length={LENGTH}",
            "data.document_alignment=8",
            f"trainer.global_batch_size={GLOBAL_BATCH}",
            "trainer.micro_batch_size=2",
            "optimizer.lr=2e-3",
        ]


RUNS = (
    LossRun("dense", ("model=tiny",)),
    LossRun(
        "moe",
        (
            "model=tiny_ling",
            "model.num_layers=3",
            "model.hidden_size=96",
            "model.num_attention_heads=3",
            "model.num_query_groups=1",
            f"model.vocab_size={MASK_TOKEN + 1}",
            f"model.mask_token_id={MASK_TOKEN}",
        ),
    ),
)


def train(run: LossRun, directory: Path, changes: tuple[str, ...] = ()) -> Curves:
    """The curves of a run below ``directory``, which must not hold it yet; ``changes`` are more overrides."""
    corpus, run_dir = directory / "license", directory / run.name
    if not idx_path(corpus).exists():
        write_corpus(corpus)
    where = [f"data.train=[{{path: {corpus}}}]", f"run.dir={run_dir}", "logging.progress=false"]
    config = compose(Config, [*run.overrides(), *where, *changes])
    validate(config)
    run_training(config, Console(quiet=True))
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text("utf-8").splitlines()]
    steps = [row for row in rows if "loss" in row]
    return {metric: [float(row[metric]) for row in steps] for metric in METRICS}


def write_corpus(prefix: Path) -> None:
    """A document a paragraph, a token a byte."""
    paragraphs = [part.strip() for part in TEXT.read_bytes().split(b"\n\n") if part.strip()]
    with IndexWriter(prefix, np.dtype(np.uint16)) as writer:
        writer.add(np.frombuffer(b"".join(paragraphs), np.uint8), [len(part) for part in paragraphs])
        writer.finish()
