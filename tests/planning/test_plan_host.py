"""Host memory of a plan against what ranks copy for a checkpoint."""

from __future__ import annotations

import pytest
import torch

from bench.memory import MOE, run_of
from llada_mega.checkpoint.storage import snapshot
from llada_mega.config.compose import compose
from llada_mega.config.data import Corpus
from llada_mega.config.run import ParallelConfig
from llada_mega.config.schema import Config
from llada_mega.parallel import destroy, initialize
from llada_mega.parallel.capabilities import choose_software
from llada_mega.planning.activations import layer
from llada_mega.planning.host import OFFLOADED, checkpoint_copy, host_memory
from llada_mega.planning.memory import Copies, sizes_of
from llada_mega.planning.options import PlanOptions
from llada_mega.planning.plan import make_plan, prepare
from llada_mega.planning.share import share_of_stage
from llada_mega.training.resume import sharded_training_state
from llada_mega.training.run import build_step
from tests.parallel.harness import run_ranks

LAYOUTS = {
    "one process": (1,),
    "copies": (2, "trainer.dtype=bfloat16"),
    "distributed optimizer": (2, "parallel.distributed_optimizer=true", "trainer.dtype=bfloat16"),
    "experts": (2, "parallel.ep=2", "parallel.distributed_optimizer=true"),
    "pipeline": (2, "parallel.pp=2"),
}


def copied(overrides: tuple[str, ...]) -> tuple[int, int]:
    """Pipeline stage, and bytes that this rank copies for a checkpoint."""
    config = compose(Config, overrides)
    config.data.train = [Corpus("not read")]
    groups = initialize(config.parallel, seed=0)
    try:
        software = choose_software(config.model, config.parallel, getattr(torch, config.trainer.dtype))
        step = build_step(config, groups, None, software, random_weights=True)
        tensors, _ = snapshot(sharded_training_state(step))
        return groups.pp.rank(), sum(tensor.nbytes for tensor in tensors.values())
    finally:
        destroy()


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_the_copy_for_a_checkpoint_is_what_ranks_copy(name: str) -> None:
    nproc, *layout = LAYOUTS[name]
    overrides = run_of(128, 1, 32, *MOE, "trainer.global_batch_size=4", *layout)
    config = compose(Config, overrides)
    share = [share_of_stage(config.model, config.parallel, stage) for stage in range(config.parallel.pp)]
    copies, element = Copies.of(config.parallel, nproc), 2 if config.trainer.dtype == "bfloat16" else 4
    ranks = run_ranks(copied, nproc, overrides=overrides)
    for stage, of_stage in enumerate(share):
        sizes = [size for at, size in ranks if at == stage]
        together = checkpoint_copy(config.parallel, of_stage, copies, element, ranks=len(sizes))
        assert sizes[0] == pytest.approx(checkpoint_copy(config.parallel, of_stage, copies, element), rel=0.01)
        assert sum(sizes) == pytest.approx(together, rel=0.01)


def test_offloaded_layers_wait_in_host_memory() -> None:
    config = compose(Config, ["model=tiny_ling"])
    parallel = ParallelConfig(offload_layers=2)
    sizes = sizes_of(config.model, parallel, 256, 128, torch.bfloat16, te=True)
    found = host_memory(
        config.model, parallel, share_of_stage(config.model, parallel, 0), Copies(1, 1), sizes, processes=0, ranks=2
    )
    kept = sum(sum(layer(config.model, parallel, index, sizes).values()) for index in range(2))
    assert found[OFFLOADED] == 2 * kept > 0


def test_memory_is_shared_by_the_devices_of_a_host_not_by_all_that_fast_links_join() -> None:
    run = ("experiment=cpt_16b", "gpus=64", "hardware.device=gb200")
    processes = compose(PlanOptions, ["assume.process_gib=4"]).assume.process_gib
    totals = {}
    for process_gib in (processes, processes + 1):
        options = compose(PlanOptions, [*run, f"assume.process_gib={process_gib}"])
        prepare(options)
        totals[process_gib] = make_plan(options).ranks[0].shared_host_gib
    assert totals[processes + 1] - totals[processes] == pytest.approx(4)  # ranks


def test_a_node_of_the_largest_run_holds_what_its_ranks_do() -> None:
    options = compose(PlanOptions, ["experiment=cpt_100b", "gpus=256", "data.num_workers=2"])
    prepare(options)
    plan = make_plan(options)
    assert plan.async_save
    for rank in plan.ranks:
        assert rank.host_gib["processes"] == options.assume.process_gib + 2 * options.assume.worker_gib
        # All 8 ranks keep their experts' weights, the first 4 (tp) the dense ones, and each has its optimizer state.
        share = share_of_stage(options.model, options.parallel, rank.pipeline_stage)
        weights = 2 * (4 * share.dense_parameters + 8 * share.expert_parameters) / 2**30
        expected = weights + 8 * (rank.memory_gib["optimizer"] + rank.host_gib["processes"])
        assert rank.shared_host_gib == pytest.approx(expected, rel=1e-6)
