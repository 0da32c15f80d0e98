"""A whole run under a parallel layout is the run of one process: losses, gradients, held-out losses, checkpoints.

Stages go from block 4 to 8 to no blocks, with embedding noise in the first; samples hold several documents. What a step
computes under every layout is the subject of ``tests/parallel/test_matrix.py``; here it is what a run adds to that.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from rich.console import Console

from llada_mega.config.schema import Config
from llada_mega.training.run import run_training
from tests.parallel.harness import run_ranks
from tests.training.rows import TIMINGS

pytestmark = [pytest.mark.slow]

Configure = Callable[..., Config]
Rows = dict[tuple[int, str], dict[str, Any]]
COMMON = (
    "curriculum.stages=[{name: four, block_size: 4, tokens: 512, embedding_noise: {decay_tokens: 512}},"
    "{name: eight, block_size: 8, tokens: 512}, {name: whole, block_size: 64, tokens: 512}]",
    "trainer.micro_batch_size=1",
    "trainer.validation.every=2",
    "trainer.validation.windows=4",
    "trainer.validation.block_sizes=[1,4]",
    "trainer.consistency_every=2",
)
SMALL = ("model.num_layers=4", "model.mask_token_id=256", "model.vocab_size=257")
MODELS = {"dense": SMALL, "tied": (*SMALL, "model.tie_embeddings=true"), "moe": ("model=tiny_ling", *SMALL)}
SEQUENCE = ("parallel.tp=2", "parallel.sp=true")
ATTENTION_AGAIN = ("parallel.recompute=selective", "parallel.recompute_modules=[core_attn]")
DISTRIBUTED = ("parallel.distributed_optimizer=true", "parallel.overlap=true")
LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "one": (1, ()),
    "dp2-distributed": (2, DISTRIBUTED),
    "tp2": (2, ("parallel.tp=2",)),
    "tp2-sp": (2, SEQUENCE),
    "tp2-etp2-allgather": (2, (*SEQUENCE, "parallel.etp=2", "parallel.dispatcher=allgather")),
    "pp2": (2, ("parallel.pp=2", "parallel.recompute=full")),
    "pp2-vp2": (2, ("parallel.pp=2", "parallel.vp=2", *ATTENTION_AGAIN)),
    "cp2": (2, ("parallel.cp=2",)),
    "ep2-distributed": (2, ("parallel.ep=2", *DISTRIBUTED)),
    "ep2-allgather": (2, ("parallel.ep=2", "parallel.dispatcher=allgather")),
    "pp2-cp2": (4, ("parallel.pp=2", "parallel.cp=2")),
}
EXACT = ("consumed_tokens", "mask_ratio", "lr", "block_size", "applied", "dead_experts", "expert_load_max_over_mean")
CLOSE = ("loss", "ce_masked", "grad_norm", "mask_embedding_rms", "embedding_noise_std")
# AdamW divides by the root of the second moment: where that is near zero it makes a step of a rounding error, and the
# routers of a MoE pass it on. The differences grow from 1e-7 at the first step.
TOLERANCE = {"dense": 1e-6, "tied": 1e-5, "moe": 2e-5}


def train_on_this_rank(config: Config) -> None:
    run_training(config, Console(quiet=True))


def read_rows(run_dir: Path) -> Rows:
    """Rows of metrics.jsonl by step and kind."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {(row["step"], "train" if "loss" in row else "valid"): row for row in rows}


@pytest.fixture
def train(configure: Configure, tmp_path: Path) -> Callable[..., Rows]:
    """Run (or resume) ``name`` under a layout; returns all its rows."""

    def run(name: str, model: str, layout: str, *overrides: str) -> Rows:
        world_size, parallel = LAYOUTS[layout]
        run_ranks(
            train_on_this_rank, world_size, config=configure(name, *MODELS[model], *COMMON, *parallel, *overrides)
        )
        return read_rows(tmp_path / name)

    return run


_references: dict[str, Rows] = {}


@pytest.fixture
def reference(train: Callable[..., Rows]) -> Callable[[str], Rows]:
    """The rows of one process that is never interrupted; made once a model."""

    def rows(model: str) -> Rows:
        if model not in _references:
            _references[model] = train("reference", model, "one")
        return _references[model]

    return rows


def assert_same(rows: Rows, expected: Rows, tolerance: float) -> None:
    assert sorted(rows) == sorted(expected)
    worst: dict[str, tuple[float, int]] = {}
    for (step, kind), row in rows.items():
        for key, value in row.items():
            other = expected[step, kind].get(key)
            if key in EXACT:
                assert value == other, (step, key)
            elif key in CLOSE or (kind == "valid" and isinstance(value, float)):
                worst[key] = max(worst.get(key, (0.0, 0)), (abs(value - other) / max(abs(other), 1e-30), step))
    assert {"loss", "grad_norm", "valid/ar_nll", "valid/block_4/nll_bound", "valid/block_1/accuracy"} <= worst.keys()
    assert all(difference <= tolerance for difference, _ in worst.values()), worst


@pytest.mark.parametrize(
    "model,layout",
    [
        ("dense", "dp2-distributed"),
        ("dense", "pp2-vp2"),
        ("tied", "tp2"),
        ("tied", "pp2"),
        ("moe", "tp2-etp2-allgather"),
        ("moe", "pp2-cp2"),
        ("moe", "ep2-distributed"),
    ],
)
def test_a_layout_changes_nothing(
    train: Callable[..., Rows], reference: Callable[[str], Rows], model: str, layout: str
) -> None:
    rows = train("run", model, layout)
    assert_same(rows, reference(model), TOLERANCE[model])
    if layout.endswith("cp2"):
        row = rows[1, "train"]
        assert len(row["cp_positions"]) == len(row["cp_attention_pairs"]) == 2
        assert row["consumed_tokens"] <= sum(row["cp_positions"]) <= 2 * row["consumed_tokens"]  # noisy and clean
        assert 1.0 <= row["cp_attention_imbalance"] < 1.5


@pytest.mark.parametrize(
    "model,path",
    [
        ("dense", ("dp2-distributed", "tp2-sp", "cp2")),
        ("moe", ("one", "ep2-distributed", "pp2")),
        ("moe", ("pp2-vp2", "tp2-etp2-allgather", "one")),
    ],
)
def test_a_run_moves_between_layouts(
    train: Callable[..., Rows], reference: Callable[[str], Rows], model: str, path: tuple[str, ...]
) -> None:
    """Two steps under each layout; every change goes through a checkpoint, optimizer state included."""
    rows: Rows = {}
    for leg, layout in enumerate(path, start=1):
        rows = train("run", model, layout, f"trainer.max_steps={2 * leg}")
    assert_same(rows, reference(model), TOLERANCE[model])


def test_the_same_layout_resumes_bit_for_bit_with_bfloat16_weights(train: Callable[..., Rows]) -> None:
    """Held-out losses and float32 master weights included; float32 runs: ``test_resume_layouts.py``."""
    bfloat16 = ("dense", "dp2-distributed", "trainer.dtype=bfloat16")
    whole = train("whole", *bfloat16)
    train("parts", *bfloat16, "trainer.max_steps=2")
    parts = train("parts", *bfloat16)
    assert sorted(parts) == sorted(whole)
    for place, row in parts.items():
        untimed = {key: value for key, value in row.items() if key not in TIMINGS}
        assert untimed == {key: whole[place][key] for key in untimed}, place


@pytest.fixture(scope="module")
def uneven_windows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prefix of a held-out corpus whose first document fills a window and whose others are shorter than a block."""
    prefix = tmp_path_factory.mktemp("uneven") / "tokens"
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.int32)
    for length in (64, 7, 6, 5, 4, 3):
        builder.add_document(torch.arange(length), [length])
    builder.finalize(f"{prefix}.idx")
    return prefix


@pytest.mark.parametrize("layout,clean_tokens", [("ep2-allgather", "all"), ("ep2-distributed", "needed")])
def test_validation_on_windows_of_uneven_documents(
    train: Callable[..., Rows], uneven_windows: Path, layout: str, clean_tokens: str
) -> None:
    """Of two data-parallel ranks one has a window with clean tokens that it needs; three windows are two batches."""
    settings = (
        f"data.valid=[{{path: {uneven_windows}}}]",
        f"data.clean_tokens={clean_tokens}",  # also of the one process: expert loads count them
        "trainer.validation.windows=6",
        "trainer.validation.batch_size=2",
        "trainer.validation.block_sizes=[1,4,8]",
        "trainer.max_steps=2",
    )
    assert_same(train(layout, "moe", layout, *settings), train("one", "moe", "one", *settings), TOLERANCE["moe"])
