"""Loss and gradient do not depend on how a global batch is split."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from llada_mega.config.schema import Config
from tests.training.conftest import TINY_MOE, TWO_STAGES, Train
from tests.training.rows import read_rows


@pytest.mark.parametrize("model", [(), TINY_MOE], ids=["dense", "moe"])
@pytest.mark.parametrize("weighting", ["elbo", "uniform"])
def test_micro_batch_split_changes_nothing(
    train: Train, tmp_path: Path, model: tuple[str, ...], weighting: str
) -> None:
    for size in (1, 4):
        train(
            f"micro{size}",
            *model,
            f"trainer.micro_batch_size={size}",
            "trainer.max_steps=7",
            f"objective.weighting={weighting}",
        )
    one, four = (read_rows(tmp_path / f"micro{size}") for size in (1, 4))
    for step, row in one.items():
        for key in ("loss", "ce_masked", "grad_norm"):
            # Adam turns the last bit of a gradient near zero into a step; a router can then choose another expert.
            assert math.isclose(row[key], four[step][key], rel_tol=2e-4 if model else 2e-5), (step, key)
        assert row["mask_ratio"] == four[step]["mask_ratio"]


def test_clean_tokens_left_out_change_nothing(train: Train, tmp_path: Path) -> None:
    for choice in ("needed", "all"):
        train(choice, f"data.clean_tokens={choice}", "trainer.max_steps=5")
    needed, everything = (read_rows(tmp_path / choice) for choice in ("needed", "all"))
    for step, row in needed.items():
        for key in ("loss", "grad_norm"):
            assert math.isclose(row[key], everything[step][key], rel_tol=2e-6), (step, key)


@pytest.mark.parametrize("model", [(), TINY_MOE], ids=["dense", "moe"])
def test_two_data_parallel_ranks_equal_one(
    train: Train, configure: Callable[..., Config], corpus: Path, tmp_path: Path, model: tuple[str, ...]
) -> None:
    validation = ("trainer.validation.every=3", "trainer.validation.windows=8", "trainer.validation.block_sizes=[4]")
    common = (*model, "trainer.max_steps=6", "trainer.micro_batch_size=1", *validation)
    train("one", *common)
    config = configure("two")
    overrides = [
        f"run.dir={config.run.dir}",
        f"data.train=[{{path: {corpus}}}]",
        "data.valid_fraction=0.2",
        "data.sequence_length=64",
        "trainer.global_batch_size=4",
        "optimizer.lr=1e-3",
        TWO_STAGES,
        *common,
        "launch.nproc=2",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "llada_mega", "train", *overrides], capture_output=True, text=True, env=dict(os.environ)
    )
    assert done.returncode == 0, done.stderr
    one, two = (read_rows(tmp_path / name) for name in ("one", "two"))
    assert sorted(one) == sorted(two) == list(range(1, 7))
    for step, row in one.items():
        for key in ("loss", "ce_masked", "grad_norm"):
            assert math.isclose(row[key], two[step][key], rel_tol=2e-4 if model else 2e-5), (step, key)
        assert row["mask_ratio"] == two[step]["mask_ratio"]
    for step, row in read_rows(tmp_path / "one", "valid/ar_nll").items():
        other = read_rows(tmp_path / "two", "valid/ar_nll")[step]
        assert math.isclose(row["valid/block_4/nll_bound"], other["valid/block_4/nll_bound"], rel_tol=2e-4)


def test_a_stage_changes_only_what_it_names_of_the_objective(train: Train, tmp_path: Path) -> None:
    stages = "curriculum.stages=[{name: s, block_size: 4, tokens: 512, objective: {t_max: 0.2}}]"
    train("run", "objective.weighting=uniform", "trainer.max_steps=1", stages)
    row = read_rows(tmp_path / "run")[1]
    assert math.isclose(row["loss"], row["ce_masked"], rel_tol=1e-6)  # uniform weighting, from the run
    assert row["mask_ratio"] < 0.3  # the stage's own band
