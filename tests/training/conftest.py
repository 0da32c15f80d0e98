"""A small corpus and a small run, built from the real configuration."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from rich.console import Console

from llada_mega.config.compose import compose
from llada_mega.config.schema import Config
from llada_mega.config.validate import validate
from llada_mega.training.run import run_training
from llada_mega.training.state import TrainState

TWO_STAGES = (
    "curriculum.stages=[{name: small, block_size: 4, tokens: 1280, embedding_noise: {decay_tokens: 640}},"
    "{name: whole, block_size: 64, tokens: 1280, lr: {shape: linear, end: 0.5}}]"
)
TINY_MOE = ("model=tiny_ling", "model.vocab_size=257", "model.mask_token_id=256", "model.num_layers=3")

Train = Callable[..., TrainState]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prefix of 200 documents of 5 to 200 tokens with learnable structure, ids below 200."""
    prefix = tmp_path_factory.mktemp("corpus") / "tokens"
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.int32)
    rng = np.random.default_rng(0)
    for _ in range(200):
        steps = rng.integers(0, 3, int(rng.integers(5, 200)))
        builder.add_document(torch.tensor(np.cumsum(steps) % 200), [len(steps)])
    builder.finalize(f"{prefix}.idx")
    return prefix


@pytest.fixture
def configure(corpus: Path, tmp_path: Path) -> Callable[..., Config]:
    """A validated configuration of a run of 10 steps of 4 samples in two stages; arguments are overrides."""

    def make(name: str, *overrides: str) -> Config:
        config = compose(
            Config,
            [
                f"run.dir={tmp_path / name}",
                f"data.train=[{{path: {corpus}}}]",
                "data.valid_fraction=0.2",
                "data.sequence_length=64",
                "trainer.global_batch_size=4",
                "trainer.micro_batch_size=2",
                "optimizer.lr=1e-3",
                TWO_STAGES,
                *overrides,
            ],
        )
        validate(config)
        return config

    return make


@pytest.fixture
def train(configure: Callable[..., Config]) -> Train:
    """Run (or resume) ``name`` with overrides on a quiet console."""

    def run(name: str, *overrides: str) -> TrainState:
        return run_training(configure(name, *overrides), Console(quiet=True)).state

    return run
