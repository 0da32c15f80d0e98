"""FLOPs, parameters and traffic of a plan against counted ones."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench.memory import DENSE, MOE, random_batch, run_of
from llada_mega.config.compose import compose
from llada_mega.config.data import Corpus
from llada_mega.config.run import ParallelConfig
from llada_mega.config.schema import Config
from llada_mega.config.validate import validate
from llada_mega.data.batch import Batch
from llada_mega.models import build_model, run_batch
from llada_mega.planning.memory import Copies
from llada_mega.planning.share import share_of_stage
from llada_mega.training.flops import STEP, batch_flops, forward_flops
from tests.models.test_big_models import build_ranks
from tests.parallel.harness import run_ranks

aten = torch.ops.aten
PRODUCTS = (aten.mm, aten.addmm, aten.bmm, aten.addmm_)


def _products_of(left: list[int], right: list[int]) -> int:
    return 2 * left[0] * left[1] * right[1]


def counted_flops(config: Config, batch: Batch) -> int:
    """Matrix products of a forward and backward pass as PyTorch counts them, and attention by visible pairs."""
    model = build_model(config.model)
    model.train()
    in_place = {aten.addmm_: lambda self, left, right, *_, **__: _products_of(left, right)}
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        run_batch(model, batch).loss_sum.backward()
    linear = sum(counter.get_flop_counts()["Global"].get(product, 0) for product in PRODUCTS)
    heads = config.model.num_attention_heads * config.model.head_dim
    pairs_S = batch.mask.visible_counts()
    last = int(pairs_S[batch.logit_rows_R[: batch.num_rows]].sum())
    pairs = int(pairs_S.sum()) * (config.model.num_layers - 1) + last
    return linear + STEP * 2 * 2 * pairs * heads


@pytest.mark.parametrize(
    "overrides",
    [
        run_of(512, 1, 32, *MOE),
        run_of(512, 2, 512, *DENSE),
        run_of(1024, 2, 1024, *DENSE, "model.tie_embeddings=true"),  # more rows than a chunk of logits
    ],
)
def test_flops_are_those_of_a_counted_run(overrides: tuple[str, ...]) -> None:
    config = compose(Config, overrides)
    batch = random_batch(config, 0)
    pairs_S = batch.mask.visible_counts()
    logit_pairs = int(pairs_S[batch.logit_rows_R[: batch.num_rows]].sum())
    rows, positions = len(batch.logit_rows_R), len(batch.input_ids_S)  # fillers are computed too
    padded = dataclasses.replace(config.model, vocab_size=-(-config.model.vocab_size // 128) * 128)
    planned = STEP * forward_flops(padded, positions, int(pairs_S.sum()), rows, logit_pairs).total
    assert planned == pytest.approx(counted_flops(config, batch), rel=0.01)
    # Model FLOPs leave out fillers and padding.
    assert 0.8 * planned < batch_flops(config.model, batch) <= planned


SPLITS = {
    "tied over stages": (["model=smollm2_135m"], ParallelConfig(pp=3, vp=2), 3),
    "uneven stages": (["model=tiny_ling"], ParallelConfig(pp=2, num_layers_in_first_pipeline_stage=2), 2),
    "biases": (["model=tiny", "model.architecture=qwen2", "model.qkv_bias=true"], ParallelConfig(tp=2, sp=True), 2),
    "expert tensor": (
        ["model=tiny_ling"],
        ParallelConfig(tp=2, sp=True, ep=2, etp=2, dispatcher="allgather"),
        4,
    ),
}


@pytest.mark.parametrize("name", SPLITS)
def test_parameters_are_those_of_built_modules(name: str) -> None:
    overrides, parallel, gpus = SPLITS[name]
    model = compose(Config, overrides).model
    numbers = [stage * gpus // parallel.pp for stage in range(parallel.pp)]
    (ranks,) = run_ranks(build_ranks, 1, model=model, parallel=parallel, gpus=gpus, numbers=numbers)
    for rank in ranks:
        assert rank.parameters == share_of_stage(model, parallel, rank.stage).total_parameters


@pytest.mark.parametrize(("experiment", "gpus"), [("cpt_16b", 64), ("cpt_100b", 256)])
def test_published_models_hold_what_the_plan_says(experiment: str, gpus: int) -> None:
    config = compose(Config, [f"experiment={experiment}", "model.implementation=local"])
    model, parallel = config.model, config.parallel
    numbers = [stage * gpus // parallel.pp for stage in range(parallel.pp)]
    (ranks,) = run_ranks(build_ranks, 1, model=model, parallel=parallel, gpus=gpus, numbers=numbers)
    for rank in ranks:
        share = share_of_stage(model, parallel, rank.stage)
        experts = sum(size for (part, _), size in rank.parts.items() if ".local_experts." in part)
        assert (share.total_parameters, share.expert_parameters) == (rank.parameters, experts)


def test_copies_tile_the_devices() -> None:
    parallel = ParallelConfig(tp=4, sp=True, pp=4, cp=2, ep=8)
    copies = Copies.of(parallel, 256)
    assert copies == Copies(dense=16, experts=8)
    config = compose(Config, ["model=tiny_ling", "trainer.global_batch_size=8"])
    config.data.train, config.parallel = [Corpus("x")], ParallelConfig()
    validate(config, 8)
    assert Copies.of(config.parallel, 8) == Copies(8, 8)
