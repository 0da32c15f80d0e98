"""The counter sees every collective, and a step communicates what the formula says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bench import layout_table
from bench.corpus import prepare_corpus
from bench.layout_table import LAYOUTS, Layout, average
from bench.traffic import SENT
from llada_mega.config.compose import compose
from llada_mega.config.model import ModelConfig
from llada_mega.config.run import ParallelConfig
from llada_mega.config.schema import Config
from llada_mega.config.validate import validate
from llada_mega.planning.communication import MicroBatch, Rank, bytes_of_step
from tests.parallel.harness import run_ranks

KIB = 1024.0
RUN = (
    "model=tiny_ling",
    "model.num_layers=2",
    "data.sequence_length=256",
    "trainer.global_batch_size=2",
    "curriculum.stages=[{block_size: 32, tokens: 100000}]",
)


def test_planted_collectives_are_counted() -> None:
    expected = {
        ("tp", "allreduce"): KIB,
        ("tp", "allgather_base"): KIB / 2,
        ("tp", "reduce_scatter_base"): KIB / 2,
        ("tp", "allgather"): KIB / 2,
        ("tp", "alltoall_base"): KIB / 2 + KIB / 4,
        ("tp", "allreduce_coalesced"): 2 * KIB,
        ("tp", "broadcast"): KIB / 2,
        ("pp", "send"): KIB,  # only pipelines send point to point
    }
    for counted in run_ranks("tests.bench.worker:planted", 2):
        assert counted == expected


def test_every_operation_that_is_counted_exists() -> None:
    names = torch._C._dispatch_get_all_op_names()
    operations = {name.removeprefix("c10d::").split(".")[0].strip("_") for name in names if name.startswith("c10d::")}
    assert {name.strip("_") for name in SENT} <= operations


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    return prepare_corpus(tmp_path_factory.mktemp("corpus"))


CASES = {
    "tp": (Layout("TP2 with recomputation", 2, ("tp=2", "sp=true", "recompute=full")), {"tp", "dp"}),
    "cp and ep": (Layout("CP2 x EP2", 2, ("cp=2", "ep=2")), {"cp", "ep", "dp"}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_step_communicates_what_the_formula_says(corpus: tuple[str, ...], tmp_path: Path, name: str) -> None:
    layout, axes = CASES[name]
    overrides = [*RUN, *corpus, f"run.dir={tmp_path}", *layout.overrides()]
    ranks = run_ranks("tests.bench.worker:measure_layout", layout.nproc, overrides=overrides)[0]
    counted, expected = average(ranks, "sent"), average(ranks, "expected")
    assert set(expected) == axes
    assert set(counted) - {"other"} == axes
    for axis in axes:
        assert counted[axis] == pytest.approx(expected[axis], rel=0.005), axis  # sums of a few numbers come on top
    assert counted.get("other", 0) < 2 * KIB


def test_the_formula_by_hand() -> None:
    """Two dense layers of width 8 on 2 x 2 stages, a micro-batch of 16 positions and 4 rows."""
    model = ModelConfig(num_layers=2, hidden_size=8, num_attention_heads=2, num_query_groups=1, head_dim=4)
    first = Rank(1, 0, True, False, 100, 0, 2, 1, 0)
    sent = bytes_of_step(model, ParallelConfig(tp=2, sp=True, pp=2), first, [MicroBatch(16, 4)])
    activation = 16 * 8 * 4
    assert sent["tp"] == (10 + 2) * activation / 2 + 2 / 2 * 2 * 8 * 4  # 2 norms of a layer
    assert sent["pp"] == activation / 2
    assert sent["dp"] == 100 * 4


def test_every_layout_of_the_table_can_run(corpus: tuple[str, ...]) -> None:
    for layout in LAYOUTS:
        validate(compose(Config, [*layout_table.RUN, *corpus, *layout.overrides()]), world_size=layout.nproc)
