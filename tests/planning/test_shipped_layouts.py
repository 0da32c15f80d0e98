"""Every layout and experiment that comes with the project composes, is valid, and asks for no recomputation in vain."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from llada_mega.config.compose import compose
from llada_mega.config.run import ParallelConfig
from llada_mega.planning.options import PlanOptions
from llada_mega.planning.plan import Planner, prepare

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
LAYOUTS = sorted(path.stem for path in (CONFIGS / "parallel").glob("*.yaml"))
EXPERIMENTS = sorted(path.stem for path in (CONFIGS / "experiment").glob("*.yaml"))
GPUS = 64  # goes with all of them


def prepared(*overrides: str) -> PlanOptions:
    options = compose(PlanOptions, overrides)
    prepare(options)
    return options


def peak_gib(options: PlanOptions, parallel: ParallelConfig) -> float:
    ranks = Planner(options).memory(parallel, options.trainer.micro_batch_size, GPUS)
    return max(rank.total_gib for rank in ranks)


@pytest.mark.parametrize(
    "overrides",
    [*(["model=ling_flash", f"parallel={layout}"] for layout in LAYOUTS), *([f"experiment={e}"] for e in EXPERIMENTS)],
    ids=lambda overrides: overrides[-1],
)
def test_recomputation_of_what_is_shipped_frees_memory(overrides: list[str]) -> None:
    options = prepared(*overrides, "model.implementation=local")
    if options.parallel.recompute != "none":
        without = replace(options.parallel, recompute="none", recompute_modules=[])
        assert peak_gib(options, options.parallel) < 0.98 * peak_gib(options, without)


def test_the_core_of_attention_alone_frees_nothing() -> None:
    """What the layouts say about it, and what the test above has to notice."""
    options = prepared("experiment=cpt_16b", "parallel.recompute=selective", "parallel.recompute_modules=[core_attn]")
    without = replace(options.parallel, recompute="none", recompute_modules=[])
    assert peak_gib(options, options.parallel) == pytest.approx(peak_gib(options, without), rel=0.005)


@pytest.mark.parametrize(("experiment", "gpus"), [("cpt_16b", 8), ("cpt_100b", 64)])
def test_the_large_experiments_fit_where_their_layouts_say(experiment: str, gpus: int) -> None:
    options = prepared(f"experiment={experiment}", "assume.expert_load=3", f"gpus={gpus}")
    ranks = Planner(options).memory(options.parallel, options.trainer.micro_batch_size, gpus)
    assert all(rank.fits for rank in ranks)
