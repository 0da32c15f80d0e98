"""A whole run under a parallel layout is the run of one process: losses, gradients, held-out losses, checkpoints.

Stages go from block 4 to 8 to no blocks, with embedding noise in the first; samples hold several documents.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from llada_mega.config.schema import Config
from llada_mega.training.run import run_training
from tests.parallel.harness import run_ranks

pytestmark = [pytest.mark.slow]

Configure = Callable[..., Config]
STEPS = 6
STAGES = (
    "curriculum.stages=[{name: four, block_size: 4, tokens: 512, embedding_noise: {decay_tokens: 512}},"
    "{name: eight, block_size: 8, tokens: 512}, {name: whole, block_size: 64, tokens: 512}]"
)
COMMON = (
    STAGES,
    "trainer.micro_batch_size=1",
    "checkpoint.every=3",
    "trainer.validation.every=3",
    "trainer.validation.windows=8",
    "trainer.validation.block_sizes=[1,4]",
)
MODELS = {
    "dense": ("model.num_layers=4", "model.mask_token_id=256", "model.vocab_size=257"),
    "moe": ("model=tiny_ling", "model.num_layers=4", "model.mask_token_id=256", "model.vocab_size=257"),
}
SEQUENCE_PARALLEL = ("parallel.tp=2", "parallel.sp=true")
LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "one": (1, ()),
    "dp2": (2, ()),
    "dp2-distributed-overlap": (2, ("parallel.distributed_optimizer=true", "parallel.overlap=true")),
    "tp2-sp": (2, SEQUENCE_PARALLEL),
    "pp2": (2, ("parallel.pp=2",)),
    "pp2-vp2": (2, ("parallel.pp=2", "parallel.vp=2")),
    "cp2": (2, ("parallel.cp=2",)),
    "ep2": (2, ("parallel.ep=2",)),
    "ep2-distributed": (2, ("parallel.ep=2", "parallel.distributed_optimizer=true")),
}
EXACT = ("consumed_tokens", "mask_ratio", "lr", "block_size", "applied", "dead_experts")
CLOSE = ("loss", "ce_masked", "grad_norm", "mask_embedding_rms", "embedding_noise_std")


def train_on_this_rank(config: Config) -> None:
    run_training(config, Console(quiet=True))


def read_rows(run_dir: Path) -> dict[tuple[int, str], dict[str, Any]]:
    """Rows of metrics.jsonl by step and kind."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {(row["step"], "train" if "loss" in row else "valid"): row for row in rows}


@pytest.fixture
def run(configure: Configure, tmp_path: Path) -> Callable[..., dict[tuple[int, str], dict[str, Any]]]:
    """Train ``name`` under a layout; returns its rows of metrics."""

    def train(name: str, model: str, layout: str, *overrides: str) -> dict[tuple[int, str], dict[str, Any]]:
        world_size, parallel = LAYOUTS[layout]
        config = configure(name, *MODELS[model], *COMMON, *parallel, *overrides)
        run_ranks(train_on_this_rank, world_size, config=config)
        return read_rows(tmp_path / name)

    return train


def assert_same(rows: dict[tuple[int, str], dict[str, Any]], expected: dict[tuple[int, str], dict[str, Any]]) -> None:
    worst: dict[str, float] = {}
    assert rows.keys() == expected.keys()
    for place, row in rows.items():
        for key, value in row.items():
            other = expected[place][key]
            if key in EXACT or other is None:
                assert value == other, (place, key)
            elif key in CLOSE or (key.startswith("valid/") and isinstance(value, float)):
                worst[key] = max(worst.get(key, 0.0), abs(value - other) / max(abs(other), 1e-30))
    assert all(difference <= 1e-5 for difference in worst.values()), worst
